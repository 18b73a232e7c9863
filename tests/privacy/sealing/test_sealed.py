"""Profile `sealed` end to end: exact, refuses whatever is not its own sum, and the coordinator holds no key."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest

from confide.errors import SealingError
from confide.privacy.sealing import OpenProfile, Payload, SealedProfile, Segment
from confide.privacy.sealing.accumulate import LatticeAccumulator
from confide.privacy.sealing.bfv import BfvLock, lattice_for
from confide.privacy.sealing.lattice import FRESH_BYTES, KEY_BYTES, SUMMED_BYTES
from confide.privacy.sealing.masks import remove_own
from confide.privacy.sealing.parameters import DEGREE
from tests.privacy.sealing import exact
from tests.privacy.sealing.cohort import SEGMENTS, SIZE, Cohort, vectors

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


def lock_of(cohort: Cohort) -> BfvLock:
    """The lock that every site of the run holds."""
    assert isinstance(cohort.profile, SealedProfile)
    return BfvLock(cohort.profile.choice, cohort.secret[:KEY_BYTES])


# --- the sum ----------------------------------------------------------------------------------------------------------


@given(case=exact.cases("sealed"))
@settings(max_examples=120, deadline=None)
def test_the_opened_sum_is_the_exact_integer_sum_and_the_same_bits_at_every_site(case: exact.Case) -> None:
    exact.check(case)


@given(sites=st.integers(2, 12), bits=st.integers(8, 20), size=st.integers(1, 20_000), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_on_the_quantisers_own_grid_the_opened_sum_is_the_sum_itself(
    sites: int, bits: int, size: int, seed: int
) -> None:
    cohort = Cohort.make(sites, bits)
    top = 2**bits - 1
    rng = np.random.default_rng(seed)
    integers = rng.integers(0, top + 1, (sites, size))
    integers[:, 0] = top  # the largest possible sum
    segments = [Segment(size, 0.0, float(top))]
    payloads = cohort.seal({n: row.astype(np.float64) for n, row in zip(cohort.names, integers, strict=True)}, segments)
    total = cohort.total(list(payloads.values()), size)
    for site in cohort.names[:2]:
        assert np.array_equal(cohort.open(total, segments, site=site), integers.sum(axis=0))


@pytest.mark.parametrize("self_masked", [False, True])
def test_seventy_sites_on_a_ring_of_neighbours_open_the_exact_sum(self_masked: bool) -> None:
    exact.check(
        exact.Case(
            profile="sealed", sites=70, most=70, bits=16, segments=(Segment(300, -1.0, 1.0),),
            self_masked=self_masked, extreme=False, seed=5,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("sites", "bits"), [(3, 8), (4, 20), (7, 12), (12, 16)])
def test_sealed_and_open_agree_within_a_quantisation_step_a_site(sites: int, bits: int) -> None:
    cohort = Cohort.make(sites, bits)
    mine = vectors(cohort)
    sealed = cohort.open(cohort.total(list(cohort.seal(mine, SEGMENTS).values()), SIZE), SEGMENTS)
    plain = OpenProfile()
    accumulator = plain.accumulator(SIZE)
    session = plain.session("x", b"", b"", {})
    for vector in mine.values():
        accumulator.add(session.seal(vector, SEGMENTS, cohort.agreement()).payload())
    opened = session.open(accumulator.total(), SEGMENTS, cohort.agreement()).values
    step = np.repeat([1.0, 43.0], [6, 2]) / (2**bits - 1)
    assert np.all(np.abs(sealed - opened) <= sites * step + 1e-4)
    assert not np.array_equal(sealed, opened), "one is quantised, the other float32: equality would be suspicious"


def test_rounding_is_unbiased_through_the_whole_path() -> None:
    cohort = Cohort.make(3, 8)
    exact.make_deterministic(cohort, 1)
    size, step = 60_000, 1 / 255
    segments = [Segment(size, 0.0, 1.0)]
    value = (100 + 0.3) * step
    total = cohort.total(list(cohort.seal({n: np.full(size, value) for n in cohort.names}, segments).values()), size)
    mean = cohort.open(total, segments).mean() / step
    assert abs(mean - 3 * 100.3) < 5 * (3 * 0.21 / size) ** 0.5
    assert abs(3 * np.rint(100.3) - 3 * 100.3) > 5 * (3 * 0.21 / size) ** 0.5, "rounding to the nearest would show"


@pytest.mark.parametrize("size", [0, 8191, 8192, 24_575])
def test_what_is_sent_is_as_long_as_was_said(size: int) -> None:
    cohort = Cohort.make(3, 20)
    segments = [Segment(size, -1.0, 1.0)]
    said = cohort.profile.size(size)
    chunks = size // 8192 + 1  # two fields a slot, and the saturation's coordinate
    assert (said.uplink, said.downlink) == (chunks * FRESH_BYTES, chunks * SUMMED_BYTES)
    assert said.padding == pytest.approx(1 - (size + 1) / (chunks * 8192))
    payloads = cohort.seal({name: np.zeros(size) for name in cohort.names}, segments)
    exact.check_sizes(cohort, size, payloads, cohort.total(list(payloads.values()), size))


def test_two_tags_work_like_one() -> None:
    """No choice of today's asks for two: the modulus is large enough everywhere."""
    cohort = Cohort.make(3, 12)
    assert isinstance(cohort.profile, SealedProfile)
    cohort.profile.choice = dataclasses.replace(cohort.profile.choice, tags=2)
    sessions = {
        name: cohort.profile.session(name, cohort.secret, cohort.private[name], cohort.public) for name in cohort.names
    }
    two = dataclasses.replace(cohort, sessions=sessions)
    mine = vectors(two)
    total = two.total(list(two.seal(mine, SEGMENTS).values()), SIZE)
    assert len(total.tags) == 2
    assert np.allclose(two.open(total, SEGMENTS), sum(mine.values()), atol=0.05)
    for changed in ((total.tags[0] + 1, total.tags[1]), (total.tags[0], total.tags[1] + 1), total.tags[:1]):
        with pytest.raises(SealingError, match="authenticated"):
            two.open(Payload(total.chunks, changed), SEGMENTS)


def test_a_vector_is_sealed_chunk_by_chunk_and_the_tags_come_last() -> None:
    cohort = Cohort.make(3, 20)
    segments = [Segment(20_000, -1.0, 1.0)]
    sealing = cohort.sessions["site-0000"].seal(np.zeros(20_000), segments, cohort.agreement())
    with pytest.raises(ValueError, match="chunks come first"):
        _ = sealing.tags
    parts = iter(sealing)
    assert len(next(parts)) == FRESH_BYTES
    with pytest.raises(ValueError, match="chunks come first"):
        _ = sealing.tags
    assert len(list(parts)) == 2
    assert len(sealing.tags) == 1


# --- what a payload shows ---------------------------------------------------------------------------------------------


def test_two_seals_of_one_vector_share_nothing_visible() -> None:
    cohort = Cohort.make()
    mine = vectors(cohort)
    first, second = (cohort.seal(mine, SEGMENTS)[cohort.names[0]] for _ in range(2))
    lattice = lattice_for(cohort.profile.choice)
    words = [set(lattice.residues(p.chunks[0], fresh=True).tolist()) for p in (first, second)]
    assert len(words[0]) == len(words[1]) == DEGREE
    assert not words[0] & words[1]
    assert first.chunks[0][-64:] != second.chunks[0][-64:]


def test_a_key_holder_sees_only_masks_in_one_sites_payload() -> None:
    """The BFV lock protects from the coordinator, not from sites: there the masks must."""
    cohort = Cohort.make()
    t, lock = cohort.profile.parameters["t"], lock_of(cohort)
    payloads = cohort.seal(vectors(cohort), SEGMENTS)
    alone = lock.open(cohort.total([payloads[cohort.names[0]]], SIZE).chunks[0])
    assert kstest(alone / t, "uniform").pvalue > 1e-6
    summed = lock.open(cohort.total(list(payloads.values()), SIZE).chunks[0])
    assert kstest(summed / t, "uniform").pvalue < 1e-9, "the control: a sum is not uniform"


def test_until_own_masks_are_unlocked_a_key_holder_sees_only_masks_in_the_sum_too() -> None:
    cohort = Cohort.make()
    t, agreement = cohort.profile.parameters["t"], cohort.agreement(self_masked=True)
    total = cohort.total(list(cohort.seal(vectors(cohort), SEGMENTS, agreement).values()), SIZE)
    summed, seeds = lock_of(cohort).open(total.chunks[0]), cohort.unlocked(agreement).unlocked
    assert kstest(summed / t, "uniform").pvalue > 1e-6
    assert kstest(remove_own(summed, seeds[1:], 0, t) / t, "uniform").pvalue > 1e-6, "one is enough"
    assert kstest(remove_own(summed, seeds, 0, t) / t, "uniform").pvalue < 1e-9


# --- the coordinator's side -------------------------------------------------------------------------------------------


def test_the_coordinators_side_holds_nothing_that_depends_on_a_secret() -> None:
    cohort = Cohort.make()
    assert set(vars(cohort.profile)) == {"choice"}
    accumulator = cohort.profile.accumulator(SIZE)
    assert isinstance(accumulator, LatticeAccumulator)
    assert set(vars(accumulator)) == {"_lattice", "_count", "_modulus", "_total", "_tags"}
    lattice = vars(accumulator._lattice)
    assert set(lattice) == {
        "context", "modulus", "evaluator", "_file", "_frame_fresh", "_frame_summed", "_frame_key",
    }  # fmt: skip
    framing = [*lattice["_frame_fresh"], lattice["_frame_summed"], lattice["_frame_key"]]
    assert sum(map(len, framing)) < 400, "only framing: nothing of the key that was thrown away"
    assert framing == [*(again := type(accumulator._lattice)(*_as_made(cohort)))._frame_fresh,
                       again._frame_summed, again._frame_key], "and the same whatever key was used"  # fmt: skip


def _as_made(cohort: Cohort) -> tuple[object, int]:
    import tenseal.sealapi as seal

    return seal.SCHEME_TYPE.BFV, int(cohort.profile.parameters["t"])
