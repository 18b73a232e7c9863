"""The sealed sum end to end: exact, agrees with the open profile, refuses whatever is not its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import SealingError
from confide.privacy.sealing import OpenProfile, Payload, SealedProfile, Segment
from confide.privacy.sealing.quantise import quantise
from confide.privacy.sealing.sealed import SealedSession
from tests.privacy.sealing.cohort import Cohort

SEGMENTS = [Segment(6, -0.5, 0.5), Segment(2, -3.0, 40.0)]
SIZE = 8


def vectors(cohort: Cohort, seed: int = 0) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """A vector a site, inside the ranges."""
    rng = np.random.default_rng(seed)
    low, high = np.repeat([-0.5, -3.0], [6, 2]), np.repeat([0.5, 40.0], [6, 2])
    return {name: rng.uniform(low, high) for name in cohort.names}


@given(sites=st.integers(3, 12), bits=st.integers(8, 20), size=st.integers(1, 20_000), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_opened_sum_is_the_integer_sum_exactly(sites: int, bits: int, size: int, seed: int) -> None:
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


@pytest.mark.parametrize(("sites", "bits"), [(3, 8), (4, 20), (7, 12), (12, 16)])
def test_sealed_and_open_agree_within_a_quantisation_step_a_site(sites: int, bits: int) -> None:
    cohort = Cohort.make(sites, bits)
    mine = vectors(cohort)
    sealed = cohort.open(cohort.total(list(cohort.seal(mine, SEGMENTS).values()), SIZE), SEGMENTS)
    plain = OpenProfile()
    accumulator = plain.accumulator(SIZE)
    session = plain.session("x", b"", b"", {})
    for vector in mine.values():
        accumulator.add(session.seal(vector, SEGMENTS, cohort.agreement()))
    opened = session.open(accumulator.total(), SEGMENTS, cohort.agreement())
    step = np.repeat([1.0, 43.0], [6, 2]) / (2**bits - 1)
    assert np.all(np.abs(sealed - opened) <= sites * step + 1e-4)
    assert not np.array_equal(sealed, opened), "one is quantised, the other float32: equality would be suspicious"


def test_rounding_is_unbiased_through_the_whole_path() -> None:
    cohort = Cohort.make(3, 8)
    size, step = 60_000, 1 / 255
    segments = [Segment(size, 0.0, 1.0)]
    value = (100 + 0.3) * step
    total = cohort.total(list(cohort.seal({n: np.full(size, value) for n in cohort.names}, segments).values()), size)
    mean = cohort.open(total, segments).mean() / step
    assert abs(mean - 3 * 100.3) < 5 * (3 * 0.21 / size) ** 0.5
    assert abs(3 * np.rint(100.3) - 3 * 100.3) > 5 * (3 * 0.21 / size) ** 0.5, "rounding to the nearest would show"


def test_two_seals_of_one_vector_share_nothing_visible() -> None:
    cohort = Cohort.make()
    mine = vectors(cohort)
    first, second = (cohort.seal(mine, SEGMENTS)[cohort.names[0]] for _ in range(2))
    assert first.chunks[0][130:] != second.chunks[0][130:]
    words = [set(np.frombuffer(p.chunks[0][123 : 123 + 8 * 4000], dtype="<u8").tolist()) for p in (first, second)]
    assert len(words[0]) == len(words[1]) == 4000
    assert not words[0] & words[1]


def test_a_key_holder_sees_only_masks_in_one_sites_payload() -> None:
    """The BFV lock protects from the coordinator, not from sites: there the masks must."""
    from scipy.stats import kstest

    cohort = Cohort.make()
    t = cohort.profile.parameters.plain_modulus
    payload = cohort.seal(vectors(cohort), SEGMENTS)[cohort.names[0]]
    other = cohort.sessions[cohort.names[1]]
    assert isinstance(other, SealedSession)
    full = cohort.total([payload], SIZE)
    slots, _ = other._alive().decrypt(full.chunks[0])
    assert kstest(slots / t, "uniform").pvalue > 1e-3
    summed, _ = other._alive().decrypt(
        cohort.total(list(cohort.seal(vectors(cohort), SEGMENTS).values()), SIZE).chunks[0]
    )
    assert kstest(summed / t, "uniform").pvalue < 1e-9, "the control: a sum is not uniform"


@pytest.mark.parametrize("position", [0, 1])
def test_another_secret_at_one_site_is_noticed_when_the_sum_is_opened(position: int) -> None:
    cohort = Cohort.make()
    name = cohort.names[position]
    other = cohort.profile.session(name, cohort.profile.make_secret(), cohort.private[name], cohort.public)
    assert other.secret_digest != cohort.sessions[name].secret_digest
    mine = vectors(cohort)
    payloads = cohort.seal(mine, SEGMENTS)
    cohort.open(cohort.total(list(payloads.values()), SIZE), SEGMENTS)  # the control: opens
    payloads[name] = other.seal(mine[name], SEGMENTS, cohort.agreement())
    with pytest.raises(SealingError):
        cohort.open(cohort.total(list(payloads.values()), SIZE), SEGMENTS, site=cohort.names[2])


def test_another_mac_key_alone_is_noticed() -> None:
    cohort = Cohort.make()
    name = cohort.names[0]
    half = cohort.secret[:-32] + bytes(32)
    other = cohort.profile.session(name, half, cohort.private[name], cohort.public)
    mine = vectors(cohort)
    payloads = cohort.seal(mine, SEGMENTS) | {name: other.seal(mine[name], SEGMENTS, cohort.agreement())}
    with pytest.raises(SealingError, match="authenticated"):
        cohort.open(cohort.total(list(payloads.values()), SIZE), SEGMENTS, site=cohort.names[2])


@pytest.mark.parametrize("secret", [b"", bytes(32), bytes(100), bytes(32_866 + 32), b"\xff" * (32_866 + 32)])
def test_a_secret_that_is_none_is_refused(secret: bytes) -> None:
    cohort = Cohort.make()
    with pytest.raises(SealingError):
        cohort.profile.session("site-00", secret, cohort.private["site-00"], cohort.public)


def test_a_destroyed_session_refuses_and_holds_no_key() -> None:
    cohort = Cohort.make()
    mine, session = vectors(cohort), cohort.sessions["site-00"]
    assert isinstance(session, SealedSession)
    total = cohort.total(list(cohort.seal(mine, SEGMENTS).values()), SIZE)
    assert cohort.open(total, SEGMENTS).shape == (SIZE,)
    session.destroy()
    with pytest.raises(SealingError, match="destroyed"):
        session.seal(mine["site-00"], SEGMENTS, cohort.agreement())
    with pytest.raises(SealingError, match="destroyed"):
        session.open(total, SEGMENTS, cohort.agreement())
    assert session._key is None
    assert session._mac_key == b""
    assert not session._pairs._shared


def test_a_site_does_not_seal_for_a_cohort_without_itself_or_larger_than_the_parameters() -> None:
    cohort = Cohort.make(5, most=4)
    mine = vectors(cohort)["site-00"]
    for members in (cohort.names[1:4], cohort.names):
        with pytest.raises(SealingError, match="cannot seal"):
            cohort.sessions["site-00"].seal(mine, SEGMENTS, cohort.agreement(members))
    assert cohort.sessions["site-00"].seal(mine, SEGMENTS, cohort.agreement(cohort.names[:4])).chunks


@pytest.mark.parametrize("change", ["transcript", "cohort", "tags", "segments", "no chunk", "chunk twice", "garbage"])
def test_a_sum_opens_only_for_what_was_agreed(change: str) -> None:
    cohort = Cohort.make()
    total = cohort.total(list(cohort.seal(vectors(cohort), SEGMENTS).values()), SIZE)
    agreement, segments, given_ = cohort.agreement(), SEGMENTS, total
    assert cohort.open(given_, segments, agreement).shape == (SIZE,)
    if change == "transcript":
        agreement = cohort.agreement(transcript="cd" * 32)
    elif change == "cohort":
        agreement = cohort.agreement(cohort.names[:3])
    elif change == "tags":
        given_ = Payload(total.chunks, (total.tags[0] ^ 1,))
    elif change == "segments":
        segments = [Segment(5, -0.5, 0.5)]  # fewer coordinates than were sealed: the rest would be read as padding
    elif change == "no chunk":
        given_ = Payload((), total.tags)
    elif change == "chunk twice":
        given_ = Payload(total.chunks * 2, total.tags)
    else:
        given_ = Payload((total.chunks[0][:-1],), total.tags)
    with pytest.raises(SealingError):
        cohort.open(given_, segments, agreement)


def test_a_payload_enters_the_accumulator_whole_or_not_at_all() -> None:
    cohort = Cohort.make(3, 20)
    size = 20_000  # three ciphertexts
    segments = [Segment(size, -1.0, 1.0)]
    mine = {n: np.random.default_rng(i).uniform(-1, 1, size) for i, n in enumerate(cohort.names)}
    payloads = cohort.seal(mine, segments)
    bad = payloads["site-01"]
    broken = [
        Payload(bad.chunks[:-1], bad.tags),
        Payload((*bad.chunks, bad.chunks[0]), bad.tags),
        Payload((*bad.chunks[:-1], bad.chunks[-1][:-1]), bad.tags),
        Payload((*bad.chunks[:-1], b"\0" * len(bad.chunks[-1])), bad.tags),
        Payload(bad.chunks, ()),
        Payload(bad.chunks, (-1,)),
        Payload(bad.chunks, (cohort.profile.parameters.plain_modulus,)),
    ]
    accumulator = cohort.profile.accumulator(size)
    accumulator.add(payloads["site-00"])
    for payload in broken:
        with pytest.raises(SealingError):
            accumulator.add(payload)
    for site in ("site-01", "site-02"):
        accumulator.add(payloads[site])
    opened = cohort.open(accumulator.total(), segments)
    assert np.max(np.abs(opened - sum(mine.values()))) <= 3 * 2 / (2**20 - 1)


def test_an_empty_accumulator_has_no_sum() -> None:
    with pytest.raises(SealingError, match="nothing was added"):
        SealedProfile(4, 12).accumulator(5).total()


def test_the_coordinators_side_holds_nothing_that_depends_on_a_secret() -> None:
    cohort = Cohort.make()
    fields = {slot for slot in vars(cohort.profile)}
    assert fields == {"parameters", "_bfv"}
    assert set(vars(cohort.profile._bfv)) == {"parameters", "context", "_evaluator", "file"}


def test_quantising_uses_randomness_that_no_seed_reaches() -> None:
    cohort = Cohort.make()
    session = cohort.sessions["site-00"]
    assert isinstance(session, SealedSession)
    draws = []
    for _ in range(2):
        np.random.seed(1)  # the point of the test
        draws.append(quantise(np.full(500, 0.01234), [Segment(500, -0.5, 0.5)], 8, session._rng))
    assert not np.array_equal(*draws)
