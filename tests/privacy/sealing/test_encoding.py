"""Encoding: sums come back within a step a site, rotated or not; clipped coordinates are counted; portions regroup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from confide.errors import DataError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing import Opened, Segment
from confide.privacy.sealing.encoding import SATURATION, Encoder, regroup
from confide.privacy.sealing.rotation import LARGEST_BLOCK, half_range

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
X, Y = "3c" * 32, "4d" * 32


def rng(site: int = 0) -> SecureRandom:
    """A stream that is the same in every run."""
    return SecureRandom(unsafe_key=bytes([site]) * 32)


def encoded(encoder: Encoder, vector: Floats, site: int = 0) -> Words:
    """All integers of a vector."""
    return np.concatenate(list(encoder.encode(vector, rng(site))))


def opened(encoder: Encoder, vectors: Sequence[Floats]) -> Opened:
    """What the sum over sites with these vectors opens to."""
    total = np.sum([encoded(encoder, v, site) for site, v in enumerate(vectors)], axis=0, dtype=np.uint64)
    return encoder.decode([total], len(vectors))


@st.composite
def ranges(draw: st.DrawFn) -> Segment:
    """A segment of either kind; rotated ones are long enough for the narrower range to be used, or too short."""
    size = draw(st.integers(0, 3000))
    if draw(st.booleans()):
        low = draw(st.floats(-100, 100))
        return Segment(size, low, low + draw(st.floats(0.01, 100)))
    high = draw(st.floats(0.5, 10))
    return Segment(size, -high, high, rotation=(draw(st.floats(0.1, 1)) * high, draw(st.floats(0.001, 0.3))))


def within(segments: Sequence[Segment], sites: int, seed: int) -> list[Floats]:
    """Vectors that are clipped nowhere: inside plain ranges, and inside the norm of rotated segments."""
    source, found = np.random.default_rng(seed), []
    for _ in range(sites):
        parts = []
        for s in segments:
            part = source.uniform(s.low, s.high, s.size)
            if s.rotation is not None and s.size:
                direction = source.normal(size=s.size)
                part = direction * (s.rotation[0] / np.linalg.norm(direction))
            parts.append(part)
        found.append(np.concatenate([np.empty(0), *parts]))
    return found


@given(
    segments=st.lists(ranges(), max_size=4), bits=st.integers(8, 20), sites=st.integers(1, 5), seed=st.integers(0, 999)
)
@settings(max_examples=50, deadline=None)
def test_sums_of_mixed_segments_come_back_within_the_steps_of_their_quantisers(
    segments: list[Segment], bits: int, sites: int, seed: int
) -> None:
    encoder, vectors = Encoder(segments, bits, X), within(segments, sites, seed)
    assert encoder.vector_size == sum(s.size for s in segments)
    assert encoder.size == encoder.vector_size + SATURATION
    assert all(len(encoded(encoder, v)) == encoder.size for v in vectors)
    found, exact, offset = opened(encoder, vectors), np.sum(vectors, axis=0), 0
    assert found.values.shape == (encoder.vector_size,)
    for s in segments:
        error = (found.values - exact)[offset : offset + s.size]
        offset += s.size
        step = (s.high - s.low) / (2**bits - 1)
        if s.rotation is None:
            assert np.all(np.abs(error) <= sites * step * (1 + 1e-9) + 1e-9)
        elif s.size:
            # In the rotated domain no coordinate errs by more than a step a site; the rotation keeps the norm.
            assert np.linalg.norm(error) <= sites * step * s.size**0.5 * (1 + 1e-9) + 1e-9
    assert found.saturated == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("size", [1, 100, 2**10, 5000, LARGEST_BLOCK, LARGEST_BLOCK + 1, 2 * LARGEST_BLOCK + 777])
@pytest.mark.parametrize("rotation", [None, (1.0, 0.001)])
def test_a_segment_of_any_length_comes_back(size: int, rotation: tuple[float, float] | None) -> None:
    encoder, sites = Encoder([Segment(size, -1.0, 1.0, rotation)], 20, X), 3
    vectors = within([Segment(size, -1.0, 1.0, rotation)], sites, size)
    error = opened(encoder, vectors).values - np.sum(vectors, axis=0)
    assert np.linalg.norm(error) <= sites * 2 / (2**20 - 1) * size**0.5 * (1 + 1e-9)


def test_rotating_makes_the_error_of_few_bits_many_times_smaller() -> None:
    size, sites, bits = 2**14, 4, 8
    spiky = [np.zeros(size) for _ in range(sites)]
    for site, vector in enumerate(spiky):
        vector[site * 11] = 1.0
    errors = {}
    for rotation in (None, (1.0, 0.0)):
        encoder = Encoder([Segment(size, -1.0, 1.0, rotation)], bits, X)
        found = opened(encoder, spiky)
        errors[rotation] = np.linalg.norm(found.values - np.sum(spiky, axis=0))
        assert found.saturated == pytest.approx(0.0, abs=1e-9)
    assert errors[1.0, 0.0] < errors[None] / 10
    assert half_range(size, 1.0, 0.0) < 1 / 20


def test_a_short_block_keeps_the_plain_range_and_is_not_rotated() -> None:
    segment = Segment(4, -1.0, 1.0, rotation=(1.0, 0.0))  # six deviations of it are 3
    plain = Segment(4, -1.0, 1.0)
    vector = np.array([1.0, -1.0, 0.5, 0.0])
    assert np.array_equal(encoded(Encoder([segment], 8, X), vector), encoded(Encoder([plain], 8, X), vector))
    turned = Segment(4096, -1.0, 1.0, rotation=(1.0, 0.0))
    spike = np.zeros(4096)
    spike[0] = 1.0
    plain = Segment(4096, -1.0, 1.0)
    assert np.ptp(encoded(Encoder([plain], 8, X), spike)[1:-1].astype(np.int64)) == 1
    assert encoded(Encoder([turned], 8, X), spike)[0] < 255, "a long one is rotated: the spike is everywhere"


def test_the_signs_of_a_rotation_come_from_the_transcript_and_differ_between_blocks() -> None:
    size = 2**13
    segment = Segment(size, -1.0, 1.0, rotation=(1.0, 0.0))
    spike = np.full(size, size**-0.5)
    here, there = (Encoder([segment], 20, x) for x in (X, Y))
    assert np.array_equal(encoded(here, spike), encoded(Encoder([segment], 20, X), spike))
    assert np.mean(encoded(here, spike) == encoded(there, spike)) < 0.05
    assert np.allclose(opened(there, [spike]).values, spike, atol=1e-3)
    wrong = here.decode([encoded(there, spike)], 1)
    assert not np.allclose(wrong.values, spike, atol=1e-3), "the control: it is another rotation"
    twice = encoded(Encoder([segment, segment], 20, X), np.concatenate([spike, spike]))
    assert np.mean(twice[:size] == twice[size : 2 * size]) < 0.05


# --- saturation -------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    sites=st.integers(1, 5),
    bits=st.integers(8, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_the_share_of_clipped_coordinates_is_exact_within_a_step_of_its_quantiser(
    sizes: list[int], sites: int, bits: int, seed: int
) -> None:
    source, size = np.random.default_rng(seed), sum(sizes)
    vectors = [source.uniform(-2, 2, size) for _ in range(sites)]
    clipped = sum(int(np.count_nonzero(np.abs(v) > 1)) for v in vectors)
    found = opened(Encoder([Segment(s, -1.0, 1.0) for s in sizes], bits, X), vectors)
    assert abs(found.saturated - clipped / max(1, sites * size)) <= (1 + 1e-9) / (2**bits - 1)


@pytest.mark.parametrize("size", [1, 255, 5000])
@pytest.mark.parametrize("rotation", [None, (1e-3, 0.0)])
def test_nothing_clipped_is_said_to_be_nothing_and_everything_to_be_everything(
    size: int, rotation: tuple[float, float] | None
) -> None:
    encoder = Encoder([Segment(size, -1.0, 1.0, rotation)], 8, X)
    assert opened(encoder, [np.zeros(size)] * 3).saturated == 0.0
    if rotation is None:
        assert opened(encoder, [np.full(size, 2.0)] * 3).saturated == pytest.approx(1.0, abs=1e-12)


def test_what_falls_outside_the_narrow_range_after_rotation_is_counted() -> None:
    size = 2**12
    encoder = Encoder([Segment(size, -1.0, 1.0, rotation=(0.1, 0.0))], 12, X)
    honest = np.random.default_rng(2).normal(size=size)
    honest *= 0.1 / np.linalg.norm(honest)
    louder = 100 * honest
    assert opened(encoder, [honest]).saturated == 0.0
    # A hundred times its declared norm: a normal coordinate is beyond 6 of its 100 deviations with probability .952.
    assert opened(encoder, [louder]).saturated == pytest.approx(0.952, abs=0.02)


def test_infinities_are_clipped_and_counted_and_what_is_no_number_is_refused() -> None:
    encoder = Encoder([Segment(4, -1.0, 1.0)], 20, X)
    found = opened(encoder, [np.array([np.inf, -np.inf, 0.5, 1.0])])
    assert np.allclose(found.values, [1, -1, 0.5, 1], atol=1e-5)
    assert found.saturated == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(DataError):
        encoded(encoder, np.array([0.0, np.nan, 0.0, 0.0]))


@pytest.mark.parametrize("place", [0, 3000])
def test_one_coordinate_that_is_no_number_is_refused_where_its_segment_is_rotated(place: int) -> None:
    encoder = Encoder([Segment(4096, -1.0, 1.0, rotation=(1.0, 0.0))], 12, X)
    vector = np.zeros(4096)
    assert len(encoded(encoder, vector)) == 4097
    vector[place] = np.nan
    with pytest.raises(DataError):
        encoded(encoder, vector)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_segments_that_do_not_cover_the_vector_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="do not cover"):
        encoded(Encoder([Segment(3, -1.0, 1.0), Segment(1, 0.0, 1.0)], 8, X), np.zeros(size))


def test_encoding_leaves_the_vector_alone() -> None:
    vector = np.random.default_rng(0).normal(size=5000)
    kept = vector.copy()
    encoded(Encoder([Segment(5000, -1.0, 1.0, rotation=(1.0, 0.0))], 12, X), vector)
    assert np.array_equal(vector, kept)


# --- portions ---------------------------------------------------------------------------------------------------------


@given(
    parts=st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=12),
    sizes=st.lists(st.integers(0, 15), max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_regrouping_gives_the_same_words_in_other_portions(parts: list[list[int]], sizes: list[int]) -> None:
    words = [w for part in parts for w in part]
    expected = []
    for size in sizes:
        if not words and size:
            break  # nothing is left: empty portions end it
        expected.append(words[:size])
        words = words[size:]
    found = regroup((np.array(part, dtype=np.uint64) for part in parts), sizes)
    assert [portion.tolist() for portion in found] == expected


def test_regrouping_reads_no_further_than_it_must() -> None:
    taken = []

    def source() -> Iterator[Words]:
        for i in range(10):
            taken.append(i)
            yield np.full(10, i, dtype=np.uint64)

    portions = regroup(source(), [15, 15, 70])
    assert next(portions).tolist() == [0] * 10 + [1] * 5
    assert taken == [0, 1]
    assert next(portions).tolist() == [1] * 5 + [2] * 10
    assert taken == [0, 1, 2]


@given(cuts=st.lists(st.integers(0, 700), max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_sum_is_decoded_the_same_in_whatever_parts_it_comes(cuts: list[int]) -> None:
    segments = [Segment(300, -1.0, 1.0), Segment(400, -2.0, 2.0, rotation=(0.5, 0.0))]
    encoder = Encoder(segments, 16, X)
    total = encoded(encoder, within(segments, 1, 5)[0])
    whole = encoder.decode([total], 1)
    parted = encoder.decode(np.split(total, sorted(cuts)), 1)
    assert whole.values.tobytes() == parted.values.tobytes()
    assert whole.saturated == parted.saturated
