"""Bounds from noised histograms: what a person can change, and what is learned."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from confide.privacy.dp import statistics

VALUES = st.one_of(
    st.just(math.nan),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-100, 100),
    st.sampled_from([0.0, -0.0, 1.0, 2.0, -2.0, 2.0**44, 1e308, 5e-324]),
)
RANGES = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6)).map(lambda x: (x[0], x[0] + x[1]))


def persons(values: np.ndarray) -> np.ndarray:
    """One record a person."""
    return np.ones(len(values))


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=VALUES),
    st.data(),
)
def test_a_person_changes_no_release_by_more_than_one_whatever_her_records_are(
    records: np.ndarray, data: st.DataObject
) -> None:
    """Each of her n records weighs 1/n."""
    weight = np.full(len(records), 1 / len(records))
    ranges = data.draw(st.lists(RANGES, min_size=records.shape[1], max_size=records.shape[1]))
    for release, given_ranges in ((1, None), (2, ranges)):
        vector = statistics.contributions(records, weight, given_ranges)
        assert vector.shape == (statistics.width(records.shape[1], release),)
        assert np.linalg.norm(vector) <= statistics.STATISTICS_SENSITIVITY + 1e-9
        assert np.all(vector >= 0)


def test_a_person_can_change_a_release_by_one() -> None:
    """The control: the bound is reached, so it is not met by counting nobody."""
    vector = statistics.contributions(np.full((1, 4), 3.0), np.ones(1), None)
    assert np.linalg.norm(vector) == pytest.approx(1.0)


def test_missing_values_count_nowhere() -> None:
    assert not statistics.contributions(np.full((5, 2), np.nan), np.ones(5), None).any()


@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e9, 1e9)))
def test_without_noise_a_coarse_range_holds_the_fullest_bin_and_its_neighbours(values: np.ndarray) -> None:
    total = statistics.contributions(values[:, None], persons(values), None)
    (range_,) = statistics.coarse_ranges(total, 1, 0.0)
    assert range_ is not None
    low, high = range_
    assert low < high
    inside = np.mean((values >= low) & (values <= high))
    assert inside > 0


def learn(table: np.ndarray, noise: float, seed: int = 0) -> list[tuple[float, float] | None]:
    """Both releases, with noise."""
    rng, columns = np.random.default_rng(seed), table.shape[1]
    first = statistics.contributions(table, persons(table), None)
    seen = statistics.coarse_ranges(first + rng.normal(0, noise, first.shape), columns, noise)
    ranges = [r or (-1.0, 1.0) for r in seen]
    second = statistics.contributions(table, persons(table), ranges)
    found = statistics.learned(second + rng.normal(0, noise, second.shape), ranges, noise)
    return [f if s is not None else None for f, s in zip(found, seen, strict=True)]


def columns(people: int = 1500) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "age": rng.uniform(0, 62, people),
        "income": rng.lognormal(9, 0.7, people),
        "score": rng.normal(0, 1, people),
        "latitude": rng.normal(-40, 3, people),
        "share": rng.beta(2, 2, people),
    }


@pytest.mark.parametrize("noise", [0.0, 5.0, 12.0])
def test_learned_bounds_keep_most_values_and_waste_little(noise: float) -> None:
    held = columns()
    table = np.stack(list(held.values()), axis=1)
    for seed in range(5):
        for name, bounds in zip(held, learn(table, noise, seed), strict=True):
            assert bounds is not None, name
            low, high = bounds
            inside = np.mean((held[name] >= low) & (held[name] <= high))
            assert inside >= (0.85 if noise < 10 else 0.7), (name, bounds)
            used = (min(high, held[name].max()) - max(low, held[name].min())) / (high - low)
            assert used >= 0.4, (name, bounds)


def test_what_the_noise_hides_is_not_guessed() -> None:
    """The control of the one above: the same data under noise as loud as everybody together."""
    assert learn(np.stack(list(columns(100).values()), axis=1), 400.0) == [None] * 5


def test_noise_alone_is_rarely_taken_for_a_column() -> None:
    nobody = np.full((1, 6), np.nan)
    seen = sum(bounds is not None for seed in range(60) for bounds in learn(nobody, 10.0, seed))
    assert seen <= 12, "one column in twenty sets, with room for chance"


def test_powers_of_two_fall_on_their_own_side_of_an_edge() -> None:
    """A logarithm in floating point would put some on the wrong side."""
    for exponent in range(-19, 42):
        for value in (2.0**exponent, -(2.0**exponent)):
            total = statistics.contributions(np.array([[value]]), np.ones(1), None)
            (range_,) = statistics.coarse_ranges(total, 1, 0.0)
            assert range_ is not None
            near, far = sorted(range_, key=abs)
            assert (near, far) == (value, 2 * value)
