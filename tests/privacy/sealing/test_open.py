"""Profile `open`: updates in the clear, clipped and counted; only finite numbers, as many as the run has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing import Agreement, Opened, OpenProfile, Payload, Segment

Floats = NDArray[np.float64]
PROFILE = OpenProfile()
SESSION = PROFILE.session("site", b"", b"", {})
AGREEMENT = Agreement(("a", "b", "c"), "00" * 32)


def seal(vector: Floats, segments: Sequence[Segment]) -> Payload:
    """One site's payload."""
    return SESSION.seal(vector, segments, AGREEMENT).payload()


def total_of(payloads: Sequence[Payload], size: int) -> Payload:
    """What the coordinator makes of payloads."""
    accumulator = PROFILE.accumulator(size)
    for payload in payloads:
        accumulator.add(payload)
    return accumulator.total()


@given(
    size=st.integers(1, 3000) | st.sampled_from([2**18 - 1, 2**18, 2**18 + 1, 2**19]),
    sites=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_what_opens_is_the_sum_of_the_clipped_float32_updates_in_float64(size: int, sites: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cut = size // 3
    segments = [Segment(cut, -1.0, 1.0), Segment(size - cut, 0.0, 4.0)]
    vectors = [rng.normal(scale=2, size=size) for _ in range(sites)]
    low, high = np.repeat([-1.0, 0.0], [cut, size - cut]), np.repeat([1.0, 4.0], [cut, size - cut])
    payloads = [seal(vector, segments) for vector in vectors]
    total = total_of(payloads, size)
    opened = SESSION.open(total, segments, Agreement(tuple(map(str, range(sites))), "00" * 32))
    expected = np.zeros(size)
    for vector in vectors:
        expected += np.clip(vector, low, high).astype(np.float32)
    assert opened.values.tobytes() == expected.tobytes()
    outside = sum(np.count_nonzero((v < low) | (v > high)) for v in vectors)
    assert opened.saturated == outside / (sites * size)
    said = PROFILE.size(size)
    assert {sum(map(len, payload.chunks)) for payload in payloads} == {said.uplink}
    assert sum(map(len, total.chunks)) == said.downlink
    assert max(map(len, total.chunks)) <= 2**20


def test_the_order_of_arrival_does_not_matter_where_float64_holds_the_sum_exactly() -> None:
    rng, segments = np.random.default_rng(1), [Segment(500, -1.0, 1.0)]
    payloads = [seal(rng.uniform(-1, 1, 500), segments) for _ in range(6)]
    arrivals = (payloads, payloads[::-1], payloads[3:] + payloads[:3])
    sums = [np.frombuffer(total_of(order, 500).chunks[0]) for order in arrivals]
    assert np.allclose(sums[0], sums[1], rtol=0, atol=1e-14)
    grid = [seal(rng.integers(-64, 65, 500) / 64, segments) for _ in range(6)]
    assert total_of(grid, 500) == total_of(grid[::-1], 500)


def test_infinities_are_clipped_and_counted() -> None:
    segments = [Segment(4, -1.0, 2.0)]
    payload = seal(np.array([np.inf, -np.inf, 0.5, 2.0]), segments)
    opened = SESSION.open(total_of([payload], 4), segments, Agreement(("a",), "00" * 32))
    assert opened.values.tolist() == [2.0, -1.0, 0.5, 2.0]
    assert opened.saturated == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_payload_with_a_coordinate_that_is_no_finite_number_leaves_the_sum_unchanged(bad: float) -> None:
    accumulator = PROFILE.accumulator(4)
    accumulator.add(seal(np.ones(4), [Segment(4, -1.0, 1.0)]))
    before = accumulator.total()
    hostile = np.array([0.5, bad, 0.5, 0.5, 0.0], dtype="<f4").tobytes()
    with pytest.raises(SealingError, match="not a finite number"):
        accumulator.add(Payload((hostile,)))
    assert accumulator.total() == before
    with pytest.raises(SealingError, match="not a finite number"):
        SESSION.open(Payload((np.array([bad] * 5, dtype="<f8").tobytes(),)), [Segment(4, -1.0, 1.0)], AGREEMENT)


@pytest.mark.parametrize("change", ["nothing", "a byte less", "a coordinate less", "a coordinate more", "thrice"])
def test_a_payload_or_a_sum_of_another_length_is_refused_and_leaves_the_sum_unchanged(change: str) -> None:
    segments = [Segment(4, -1.0, 1.0)]
    payload = seal(np.ones(4), segments)
    accumulator = PROFILE.accumulator(4)
    accumulator.add(payload)
    before = accumulator.total()

    def changed(data: bytes, coordinate: int) -> Payload:
        return Payload({
            "nothing": (), "a byte less": (data[:-1],), "a coordinate less": (data[:-coordinate],),
            "a coordinate more": (data, data[:coordinate]), "thrice": (data,) * 3,
        }[change])  # fmt: skip

    with pytest.raises(SealingError, match="another number of coordinates"):
        accumulator.add(changed(payload.chunks[0], 4))
    assert accumulator.total() == before
    with pytest.raises(SealingError, match="another number of coordinates"):
        SESSION.open(changed(before.chunks[0], 8), segments, AGREEMENT)
    (data,) = payload.chunks
    accumulator.add(Payload((data[:7], data[7:])))
    assert accumulator.total() != before, "the control: how it is cut up does not matter"


@given(
    low=st.floats(-1e6, 1e6).map(lambda x: round(x, 6)),
    width=st.floats(1e-3, 1e6),
    sites=st.integers(1, 50),
    upper=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_sum_at_the_end_of_its_range_opens_although_float32_rounds(
    low: float, width: float, sites: int, upper: bool
) -> None:
    segments = [Segment(5, low, low + width)]
    payload = seal(np.full(5, low + width if upper else low), segments)
    opened = SESSION.open(
        total_of([payload] * sites, 5), segments, Agreement(tuple(f"{i}" for i in range(sites)), "00" * 32)
    )
    assert np.allclose(opened.values, sites * (low + width if upper else low), rtol=1e-6)


@pytest.mark.parametrize("value", [3.1, -3.1, 1e30, -1e30])
@pytest.mark.parametrize("place", [0, 3])
def test_a_member_whose_numbers_drown_everybody_elses_is_noticed(place: int, value: float) -> None:
    assert drowned({place: np.clip(value, -3, 3)}).values[place] == np.clip(value, -3, 3)
    with pytest.raises(SealingError, match="no honest sum"):
        drowned({place: value})


@pytest.mark.parametrize("count", [-0.5, 12.5, 1e30])
def test_a_member_that_says_that_more_was_clipped_than_there_is_is_noticed(count: float) -> None:
    assert drowned({4: 12.0}).saturated == 1.0
    with pytest.raises(SealingError, match="no honest sum"):
        drowned({4: count})


def drowned(said: dict[int, float]) -> Opened:
    """The sum of two honest sites' zeros and one payload that holds these numbers."""
    segments, hostile = [Segment(4, -1.0, 1.0)], np.zeros(5)
    hostile[list(said)] = list(said.values())
    honest = seal(np.zeros(4), segments)
    total = total_of([honest, honest, Payload((hostile.astype("<f4").tobytes(),))], 4)
    return SESSION.open(total, segments, AGREEMENT)


def test_a_sum_of_no_coordinates_opens_to_none() -> None:
    segments = [Segment(0, -1.0, 1.0)]
    opened = SESSION.open(total_of([seal(np.empty(0), segments)] * 3, 0), segments, AGREEMENT)
    assert opened.values.shape == (0,)
    assert opened.saturated == 0.0


def test_there_is_no_secret_and_nothing_to_forget() -> None:
    assert PROFILE.make_secret() == b""
    assert SESSION.secret_digest == "0" * 64
    assert not PROFILE.keyed
    other = PROFILE.session("site", b"", b"", {})
    other.destroy()
    assert other.seal(np.ones(2), [Segment(2, -1.0, 1.0)], AGREEMENT).payload().tags == ()
