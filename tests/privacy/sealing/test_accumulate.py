"""The coordinator's sum: payloads enter whole or not at all, in any order; malformed ones leave it as it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing import CkksProfile, MaskedProfile, Payload, SealedProfile, Segment
from confide.privacy.sealing.accumulate import WordAccumulator, words_from
from tests.privacy.sealing import exact
from tests.privacy.sealing.cohort import SEGMENTS, SIZE, Cohort, vectors

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_payload_enters_the_sum_whole_or_not_at_all(profile: str) -> None:
    cohort = Cohort.make(3, 20, profile=profile)
    size = 2 * exact.coordinates(profile, 3, 20) + 100  # three chunks
    segments = [Segment(size, -1.0, 1.0)]
    mine = {n: np.random.default_rng(i).uniform(-1, 1, size) for i, n in enumerate(cohort.names)}
    payloads = cohort.seal(mine, segments)
    bad, accumulator = payloads["site-0001"], cohort.profile.accumulator(size)
    last, rest = bad.chunks[-1], bad.chunks[:-1]
    broken = [
        Payload(rest, bad.tags),
        Payload((*bad.chunks, bad.chunks[0]), bad.tags),
        Payload((*rest, last[:-1]), bad.tags),
        Payload((*rest, last[:-8]), bad.tags),
        Payload((*rest, last + bytes(1)), bad.tags),
        Payload((*rest, last + bytes(8)), bad.tags),
        Payload((*rest, last * 2), bad.tags),
        Payload((*rest, b"\xff" * len(last)), bad.tags),
        Payload((*rest, b""), bad.tags),
        Payload((last + bad.chunks[0], *bad.chunks[1:-1], b""), bad.tags),
        Payload((), ()),
        Payload(bad.chunks, ()),
        Payload(bad.chunks, bad.tags * 2),
        Payload(bad.chunks, (-1,)),
        Payload(bad.chunks, (accumulator._modulus,)),
    ]
    for payload in broken:  # also as the very first one
        with pytest.raises(SealingError):
            accumulator.add(payload)
    with pytest.raises(SealingError, match="nothing was added"):
        accumulator.total()
    accumulator.add(payloads["site-0000"])
    before = accumulator.total()
    for payload in broken:
        with pytest.raises(SealingError):
            accumulator.add(payload)
        assert accumulator.total() == before
    for site in ("site-0001", "site-0002"):
        accumulator.add(payloads[site])
    opened = cohort.open(accumulator.total(), segments)
    assert np.max(np.abs(opened - sum(mine.values()))) <= 3 * 2 / (2**20 - 1) * (1 + 1e-9)


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_the_order_of_arrival_does_not_change_a_bit_of_the_sum(profile: str) -> None:
    cohort = Cohort.make(4, profile=profile)
    payloads = cohort.seal(vectors(cohort), SEGMENTS)
    arrivals = [cohort.names, cohort.names[::-1], (*cohort.names[2:], *cohort.names[:2])]
    assert len({cohort.total([payloads[name] for name in order], SIZE) for order in arrivals}) == 1


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_total_may_be_asked_for_twice_and_nothing_of_it_is_shared_with_the_sum(profile: str) -> None:
    cohort = Cohort.make(3, profile=profile)
    payloads = list(cohort.seal(vectors(cohort), SEGMENTS).values())
    accumulator = cohort.profile.accumulator(SIZE)
    accumulator.add(payloads[0])
    first = accumulator.total()
    assert accumulator.total() == first
    accumulator.add(payloads[1])
    assert accumulator.total() != first


@pytest.mark.parametrize("profile", [SealedProfile, MaskedProfile, CkksProfile])
def test_an_empty_accumulator_has_no_sum(profile: type[SealedProfile | MaskedProfile | CkksProfile]) -> None:
    with pytest.raises(SealingError, match="nothing was added"):
        profile(4, 12).accumulator(5).total()


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_sum_takes_the_room_of_one_payload_however_many_are_added(profile: str) -> None:
    cohort = Cohort.make(3, profile=profile)
    payloads = list(cohort.seal(vectors(cohort), SEGMENTS).values())
    accumulator = cohort.profile.accumulator(SIZE)
    sizes = []
    for payload in payloads:
        accumulator.add(payload)
        sizes.append((len(accumulator._total), sum(map(len, accumulator.total().chunks))))
    assert len(set(sizes)) == 1


@given(words=st.lists(st.integers(0, 2**64 - 1), max_size=20), modulus=st.sampled_from([2**61 - 1, 2**47 + 5, 2**63]))
@settings(deadline=None)
def test_words_are_read_exactly_where_each_is_below_the_modulus(words: list[int], modulus: int) -> None:
    data = np.array(words, dtype="<u8").tobytes()
    if all(word < modulus for word in words):
        assert words_from(data, modulus).tolist() == words
    else:
        with pytest.raises(SealingError, match="not below the modulus"):
            words_from(data, modulus)
    with pytest.raises(SealingError, match="whole words"):
        words_from(data + b"\0", modulus)


def test_plain_words_are_added_modulo_the_modulus_without_wrapping() -> None:
    modulus = MaskedProfile(3, 20).parameters["modulus"]
    accumulator = WordAccumulator([2], 1, int(modulus))
    top = np.array([modulus - 1, 5], dtype="<u8").tobytes()
    for _ in range(100):
        accumulator.add(Payload((top,), (int(modulus) - 1,)))
    total = accumulator.total()
    assert np.frombuffer(total.chunks[0], dtype="<u8").tolist() == [modulus - 100, 500]
    assert total.tags == (modulus - 100,)
