"""Quantising: unbiased, within a step, clipped to the public range and counted; what is no number is refused."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import DataError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing.quantise import dequantise_sum, quantise

FIXED = SecureRandom(unsafe_key=b"\x07" * 32)


@pytest.mark.parametrize("bits", [8, 12, 20])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_rounding_is_unbiased_between_two_steps(bits: int, fraction: float) -> None:
    draws, high = 200_000, 15.0
    step = high / (2**bits - 1)
    got, clipped = quantise(np.full(draws, (7 + fraction) * step), 0.0, high, bits, SecureRandom(unsafe_key=bytes(32)))
    assert set(got.tolist()) == {7, 8}
    assert clipped == 0
    error = 8 * (fraction * (1 - fraction) / draws) ** 0.5  # eight standard deviations
    assert abs(got.mean() - 7 - fraction) < error
    nearest, downwards = np.rint(7 + fraction), np.floor(7 + fraction)
    assert fraction in (0.02, 0.5) or abs(nearest - 7 - fraction) > error, "rounding to the nearest is the control"
    assert abs(downwards - 7 - fraction) > error


def test_the_draws_of_two_coordinates_are_independent() -> None:
    got, _ = quantise(np.full(200_000, 0.5), 0.0, 255.0, 8, SecureRandom(unsafe_key=bytes(32)))
    steps = got.astype(np.float64) - 0.5
    assert abs(float((steps[1:] * steps[:-1]).mean())) < 8 * 0.25 / 200_000**0.5
    again, _ = quantise(np.full(200_000, 0.5), 0.0, 255.0, 8, SecureRandom(unsafe_key=b"\x01" * 32))
    assert 99_000 < np.count_nonzero(got != again) < 101_000


def test_values_on_a_step_are_exact() -> None:
    got, clipped = quantise(np.arange(256, dtype=np.float64), 0.0, 255.0, 8, FIXED)
    assert got.tolist() == list(range(256))
    assert clipped == 0


@given(low=st.floats(-1e3, 1e3), width=st.floats(1e-6, 1e3), bits=st.integers(8, 20), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_error_of_one_value_is_below_one_step(low: float, width: float, bits: int, seed: int) -> None:
    high = low + width
    values = np.clip(np.random.default_rng(seed).uniform(low, high, 50), low, high)
    got, clipped = quantise(values, low, high, bits, FIXED)
    back, step = dequantise_sum(got, low, high, bits, 1), (high - low) / (2**bits - 1)
    slack = 1e-11 * (abs(low) + width)  # float64's own rounding of numbers of this size
    assert np.all(np.abs(back - values) < step + slack)
    assert clipped == 0
    assert int(got.max()) <= 2**bits - 1


@given(sites=st.integers(3, 12), bits=st.integers(8, 20), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_dequantised_sum_is_within_a_step_a_site(sites: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for low, high in ((-0.3, 0.7), (-50.0, 900.0)):
        vectors = rng.uniform(low, high, (sites, 8))
        integers = [quantise(v, low, high, bits, FIXED)[0] for v in vectors]
        total = np.sum(integers, axis=0, dtype=np.uint64)
        error = np.abs(dequantise_sum(total, low, high, bits, sites) - vectors.sum(axis=0))
        assert np.all(error <= sites * (high - low) / (2**bits - 1) * (1 + 1e-9))


@pytest.mark.parametrize("bits", [8, 12, 20])
def test_integers_stay_in_range_and_infinities_are_clipped_whatever_the_value(bits: int) -> None:
    got, clipped = quantise(np.array([-1e300, -0.5, 0.25, np.inf, -np.inf, 1e9, -0.0]), -0.5, 0.25, bits, FIXED)
    top = 2**bits - 1
    assert got.dtype == np.uint64
    assert got.tolist()[:6] == [0, 0, top, top, 0, top]
    assert 0 < int(got[6]) < top
    assert clipped == 4


@given(
    inside=st.lists(st.floats(-1, 1), max_size=20),
    outside=st.lists(st.floats(1, exclude_min=True) | st.floats(max_value=-1, exclude_max=True), max_size=20),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_clipped_values_are_counted_exactly_and_values_at_the_ends_are_not(
    inside: list[float], outside: list[float], order: Random
) -> None:
    values = [*inside, -1.0, 1.0, *outside]
    order.shuffle(values)
    assert quantise(np.array(values), -1.0, 1.0, 8, FIXED)[1] == len(outside)


@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize("value", [np.nan, -np.nan])
def test_a_coordinate_that_is_no_number_is_refused_as_the_sites_own_secret(position: int, value: float) -> None:
    values = np.zeros(4)
    assert quantise(values, -1.0, 1.0, 12, FIXED)[0].shape == (4,)
    values[position] = value
    with pytest.raises(DataError, match="no number") as caught:
        quantise(values, -1.0, 1.0, 12, FIXED)
    assert not caught.value.shareable


def test_nothing_becomes_nothing() -> None:
    got, clipped = quantise(np.empty(0), -1.0, 1.0, 8, FIXED)
    assert (got.shape, clipped) == ((0,), 0)
    assert dequantise_sum(got, -1.0, 1.0, 8, 3).shape == (0,)


def test_the_values_themselves_are_left_alone() -> None:
    values = np.array([5.0, 0.25, -5.0])
    quantise(values, -1.0, 1.0, 8, FIXED)
    assert values.tolist() == [5.0, 0.25, -5.0]


def test_quantising_uses_randomness_that_no_seed_reaches() -> None:
    draws = []
    for _ in range(2):
        np.random.seed(1)  # the point of the test
        draws.append(quantise(np.full(500, 0.01234), -0.5, 0.5, 8, SecureRandom())[0])
    assert not np.array_equal(*draws)
