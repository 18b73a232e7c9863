"""Profile `masked`: the exact sum without encryption; the coordinator sees it, and never one site's update."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import kstest

from confide.errors import SealingError
from confide.privacy.sealing import MaskedProfile, Payload, Segment
from confide.privacy.sealing.accumulate import WordAccumulator
from confide.privacy.sealing.masked import MODULUS
from tests.privacy.sealing import exact
from tests.privacy.sealing.cohort import SEGMENTS, SIZE, Cohort, vectors


@given(case=exact.cases("masked"))
@settings(max_examples=120, deadline=None)
def test_the_opened_sum_is_the_exact_integer_sum_and_the_same_bits_at_every_site(case: exact.Case) -> None:
    exact.check(case)


@pytest.mark.parametrize("self_masked", [False, True])
@pytest.mark.parametrize("sites", [65, 66, 70])
def test_cohorts_on_both_sides_of_the_ring_open_the_exact_sum(sites: int, self_masked: bool) -> None:
    exact.check(
        exact.Case(
            profile="masked", sites=sites, most=1000, bits=12, segments=(Segment(200, -1.0, 1.0),),
            self_masked=self_masked, extreme=True, seed=sites,
        )
    )  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 8190, 8191, 8192, 20_000])
def test_what_is_sent_is_as_long_as_was_said_and_the_last_chunk_is_short(size: int) -> None:
    cohort = Cohort.make(3, 20, profile="masked")
    words = -(-(size % 8192 + 1) // 2) + size // 8192 * 4096  # two fields a word, and the saturation's coordinate
    said = cohort.profile.size(size)
    assert (said.uplink, said.downlink) == (8 * words, 8 * words)
    assert said.padding == pytest.approx(1 - (size + 1) / (2 * words))
    segments = [Segment(size, -1.0, 1.0)]
    payloads = cohort.seal({name: np.zeros(size) for name in cohort.names}, segments)
    exact.check_sizes(cohort, size, payloads, cohort.total(list(payloads.values()), size))


def words(payload: Payload) -> np.ndarray:
    """What travels."""
    return np.frombuffer(b"".join(payload.chunks), dtype="<u8").astype(np.uint64)


def test_the_coordinator_reads_the_sum_and_sees_only_masks_in_one_sites_payload() -> None:
    cohort = Cohort.make(3, 20, profile="masked")
    assert isinstance(cohort.profile, MaskedProfile)
    size = 16_383
    segments = [Segment(size, 0.0, float(2**20 - 1))]
    mine = {n: np.random.default_rng(i).integers(0, 2**20, size).astype(float) for i, n in enumerate(cohort.names)}
    payloads = cohort.seal(mine, segments)
    for payload in payloads.values():
        assert kstest(words(payload) / MODULUS, "uniform").pvalue > 1e-6
    summed = words(cohort.total(list(payloads.values()), size))
    fields, clean = zip(*(cohort.profile.packing.unpack(summed[i : i + 4096]) for i in (0, 4096)), strict=True)
    assert all(clean)
    assert np.array_equal(np.concatenate(fields)[:size], sum(mine.values()))
    rest = words(cohort.total(list(payloads.values())[:2], size))
    assert kstest(rest / MODULUS, "uniform").pvalue > 1e-6, "all but one site are as good as none"


def test_with_own_masks_the_coordinator_does_not_read_the_sum_before_they_are_unlocked() -> None:
    cohort = Cohort.make(3, 20, profile="masked")
    agreement, size = cohort.agreement(self_masked=True), 16_383
    segments = [Segment(size, -1.0, 1.0)]
    total = cohort.total(
        list(cohort.seal({n: np.zeros(size) for n in cohort.names}, segments, agreement).values()), size
    )
    assert kstest(words(total) / MODULUS, "uniform").pvalue > 1e-6
    assert np.allclose(cohort.open(total, segments, cohort.unlocked(agreement)), 0, atol=1e-5)


def test_a_word_that_is_not_reduced_is_refused_although_it_is_congruent() -> None:
    """A sum has one form: otherwise two sites could hold different bytes and open the same."""
    cohort = Cohort.make(3, 20, profile="masked")
    agreement = cohort.agreement(self_masked=True)
    total = cohort.total(list(cohort.seal(vectors(cohort), SEGMENTS, agreement).values()), SIZE)
    bound, held = cohort.unlocked(agreement), words(total)
    assert cohort.open(total, SEGMENTS, bound).shape == (SIZE,)
    held[1] += np.uint64(MODULUS)
    with pytest.raises(SealingError, match="not below the modulus"):
        cohort.open(Payload((held.astype("<u8").tobytes(),), total.tags), SEGMENTS, bound)


def test_two_seals_of_one_vector_differ_only_where_rounding_does() -> None:
    """Masks are bound to the transcript: a site must never seal two vectors under one, as the difference would show."""
    cohort = Cohort.make(3, 20, profile="masked")
    vector, site = np.full(8, 0.0), cohort.sessions["site-0000"]
    first, second = (words(site.seal(vector, SEGMENTS, cohort.agreement()).payload()) for _ in range(2))
    difference = (first + np.uint64(MODULUS) - second) % np.uint64(MODULUS)
    other = words(site.seal(vector, SEGMENTS, cohort.agreement(transcript="cd" * 32)).payload())
    small = np.minimum(difference, np.uint64(MODULUS) - difference)
    assert np.all(small < 2**45)
    assert np.all((first + np.uint64(MODULUS) - other) % np.uint64(MODULUS) > 2**45)


def test_the_coordinators_side_holds_nothing_that_depends_on_a_secret() -> None:
    cohort = Cohort.make(profile="masked")
    assert set(vars(cohort.profile)) == {"packing"}
    accumulator = cohort.profile.accumulator(SIZE)
    assert isinstance(accumulator, WordAccumulator)
    assert set(vars(accumulator)) == {"_lengths", "_modulus", "_total", "_tags"}
    assert len(cohort.secret) == 32
    assert cohort.open(cohort.total(list(cohort.seal(vectors(cohort), SEGMENTS).values()), SIZE), SEGMENTS).any()


def test_the_parameters_say_what_is_used() -> None:
    assert MaskedProfile(3, 20).parameters == {"modulus": 2**61 - 1, "bits": 20, "fields": 2, "tags": 1}
    assert MaskedProfile(1000, 8).parameters["fields"] == 3
    assert MaskedProfile.keyed
