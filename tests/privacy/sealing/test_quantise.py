"""Quantising: unbiased, clipped to the public range, and packing that sums without carries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import DataError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing import Segment
from confide.privacy.sealing.parameters import choose_parameters
from confide.privacy.sealing.quantise import dequantise_sum, pack, quantise, unpack

FIXED = SecureRandom(unsafe_key=b"\x07" * 32)


@given(sites=st.integers(3, 12), bits=st.integers(8, 20), size=st.integers(0, 3 * 4096), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_packed_sums_unpack_to_the_sum_of_what_was_packed(sites: int, bits: int, size: int, seed: int) -> None:
    parameters = choose_parameters(sites, bits)
    values = np.random.default_rng(seed).integers(0, 2**bits, (sites, size)).astype(np.uint64)
    values[: sites // 2] = 2**bits - 1  # the extreme is where a carry would show
    packed = np.zeros(parameters.slots(size), dtype=np.uint64)
    for row in values:
        packed += pack(row, parameters)
    assert int(packed.max(initial=0)) < parameters.plain_modulus
    assert np.array_equal(unpack(packed, size, parameters), values.sum(axis=0))


def test_one_site_too_many_would_run_over_into_the_next_field() -> None:
    parameters = choose_parameters(4, 20)  # 22 bits a field: the control of the head-room above
    packed = sum((pack(np.array([2**20 - 1, 0], dtype=np.uint64), parameters) for _ in range(5)), start=np.uint64(0))
    assert unpack(np.asarray(packed), 2, parameters)[1] != 0


@pytest.mark.parametrize("bits", [8, 12, 20])
def test_integers_stay_in_range_whatever_the_value(bits: int) -> None:
    segments = [Segment(5, -0.5, 0.25), Segment(3, 10.0, 1000.0)]
    vector = np.array([-1e300, -0.5, 0.0, 0.25, np.inf, -np.inf, 10.0, 1e9])
    got = quantise(vector, segments, bits, FIXED)
    assert got.dtype == np.uint64
    assert got.tolist()[0] == got.tolist()[1] == got.tolist()[5] == 0
    assert got.tolist()[3] == got.tolist()[4] == got.tolist()[7] == 2**bits - 1


def test_a_coordinate_that_is_not_a_number_never_becomes_an_integer_that_breaks_the_whole_sum() -> None:
    with np.errstate(invalid="ignore"), pytest.raises(DataError):
        quantise(np.array([0.0, np.nan]), [Segment(2, -1.0, 1.0)], 12, FIXED)


def test_rounding_is_unbiased_between_two_steps() -> None:
    segment, bits, draws = Segment(200_000, 0.0, 15.0), 8, 200_000
    step = 15.0 / 255
    for fraction in (0.1, 0.5, 0.9):
        got = quantise(np.full(draws, (7 + fraction) * step), [segment], bits, FIXED)
        assert set(got.tolist()) == {7, 8}
        error = 5 * (fraction * (1 - fraction) / draws) ** 0.5
        assert abs(got.mean() - 7 - fraction) < error
        nearest = np.rint(np.full(draws, 7 + fraction))
        assert fraction == 0.5 or abs(nearest.mean() - 7 - fraction) > error, "rounding to the nearest is the control"


def test_values_on_a_step_are_exact() -> None:
    steps = np.arange(256, dtype=np.float64)
    assert quantise(steps, [Segment(256, 0.0, 255.0)], 8, FIXED).tolist() == list(range(256))


@given(st.integers(3, 12), st.integers(8, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_dequantised_sum_is_within_a_step_a_site(sites: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    segments = [Segment(6, -0.3, 0.7), Segment(2, -50.0, 900.0)]
    low, high = np.repeat([-0.3, -50.0], [6, 2]), np.repeat([0.7, 900.0], [6, 2])
    vectors = rng.uniform(low, high, (sites, 8))
    total = sum((quantise(v, segments, bits, FIXED) for v in vectors), start=np.zeros(8, dtype=np.uint64))
    error = np.abs(dequantise_sum(total, segments, bits, sites) - vectors.sum(axis=0))
    assert np.all(error <= sites * (high - low) / (2**bits - 1) * (1 + 1e-9))


@pytest.mark.parametrize("size", [3, 5])
def test_segments_that_do_not_cover_the_vector_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"segments|broadcast"):
        quantise(np.zeros(size), [Segment(4, -1.0, 1.0)], 8, FIXED)
