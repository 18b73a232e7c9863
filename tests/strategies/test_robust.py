"""Median, trimmed mean, Krum and Multi-Krum: by hand, against Flower's own, and what always holds of them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from flwr.serverapp import strategy as flower
from hypothesis import given
from hypothesis import strategies as st

from confide.strategies import Krum, Median, MultiKrum, Strategy, TrimmedMean, to_grid
from confide.strategies.grid import squared_distance
from tests.strategies.flower import aggregate
from tests.strategies.steps import BOUND, centre, step

UNIT = BOUND / 2**23
ALL: list[Strategy] = [Median(), TrimmedMean(trim=0.34), Krum(byzantine=0), MultiKrum(byzantine=0)]


def test_the_median_by_hand() -> None:
    assert centre(Median(), [[1, -5], [3, 0], [7, 5]]) == [3, 0]
    assert centre(Median(), [[1, -5], [3, 0], [7, 5], [5, 1]]) == [4, 0.5]
    assert centre(Median(server_learning_rate=0.5), [[1, -5], [3, 0], [7, 5]]) == [1.5, 0]


def test_the_trimmed_mean_by_hand() -> None:
    # of five, one is cut off at each end: (2 + 3 + 4) / 3
    assert centre(TrimmedMean(trim=0.2), [[1.0], [2.0], [3.0], [4.0], [-7.5]]) == [2.0]
    assert centre(TrimmedMean(trim=0.2), [[1.0], [2.0], [3.0], [4.0]]) == [2.5], "a fifth of four is nobody"
    assert centre(TrimmedMean(trim=0.4), [[1.0], [2.0], [3.0], [4.0], [-7.5]]) == [2.0], "two at each end: the median"


def test_krum_by_hand() -> None:
    # K = 5, f = 1: two neighbours count. Squared distances on a line: 0, 1, 2, 4, 8 →
    # 0: 1 + 4 = 5; 1: 1 + 1 = 2; 2: 1 + 4 = 5; 4: 4 + 9 = 13; 8: 16 + 36 = 52
    updates = [[0.0], [1.0], [2.0], [4.0], [8.0]]
    assert centre(Krum(byzantine=1), updates) == [1.0]
    # in this order the scores rank 1, then 0 and 2 (equal: the first by name wins), then 4, 8
    assert centre(MultiKrum(byzantine=1, keep=2), updates) == [0.5]
    assert centre(MultiKrum(byzantine=1, keep=3), updates) == [1.0]
    assert centre(MultiKrum(byzantine=1), updates) == [0.5], "by default as many as a score looks at: K − f − 2"
    assert centre(MultiKrum(byzantine=1, keep=3), updates[::-1]) == [1.0]


Pair = tuple[Strategy, Callable[[], flower.FedAvg]]
PAIRS: dict[str, Pair] = {
    "median": (Median(), lambda: flower.FedMedian()),
    "trimmed mean": (TrimmedMean(trim=0.2), lambda: flower.FedTrimmedAvg(beta=0.2)),
    "trimmed mean, more": (TrimmedMean(trim=0.45), lambda: flower.FedTrimmedAvg(beta=0.45)),
    "krum": (Krum(byzantine=1), lambda: flower.Krum(num_malicious_nodes=1)),
    "krum, more": (Krum(byzantine=2), lambda: flower.Krum(num_malicious_nodes=2)),
    "multi-krum": (
        MultiKrum(byzantine=2, keep=3),
        lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sites", [7, 8])
def test_it_agrees_with_flowers_own_strategy(name: str, sites: int) -> None:
    ours, theirs = PAIRS[name][0], PAIRS[name][1]()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        model = rng.normal(size=200).astype(np.float32)
        trained = [model + rng.normal(scale=0.3, size=200).astype(np.float32) for _ in range(sites)]
        trained[seed % sites] += np.float32(2.0)  # somebody is far away
        expected = aggregate(theirs, model, trained, [100.0] * sites)
        found, _ = step(ours, model, trained, [100.0] * sites)
        assert np.allclose(found, expected, rtol=1e-6, atol=2 * UNIT)
        assert not np.allclose(found, np.mean(trained, axis=0), atol=1e-3), "the control: a mean is something else"


Number = st.floats(-BOUND, BOUND, width=32)
Updates = st.integers(1, 5).flatmap(
    lambda d: st.lists(st.lists(Number, min_size=d, max_size=d), min_size=3, max_size=7)
)


def on_grid(updates: list[list[float]]) -> list[list[float]]:
    """The values that updates have as single updates, rounded like a model's weights."""
    grid, unit = to_grid(np.array(updates), BOUND)
    return [[float(np.float32(x)) for x in row] for row in grid.astype(float) * unit]


@given(st.lists(Number, min_size=1, max_size=5), st.integers(3, 7), st.sampled_from(ALL))
def test_of_equal_updates_the_centre_is_that_update(update: list[float], sites: int, strategy: Strategy) -> None:
    assert centre(strategy, [update] * sites) == on_grid([update])[0]


@given(Updates, st.sampled_from(ALL))
def test_no_coordinate_leaves_the_range_of_the_updates(updates: list[list[float]], strategy: Strategy) -> None:
    rows, found = np.array(on_grid(updates)), np.array(centre(strategy, updates))
    assert np.all(found >= rows.min(axis=0) - 1e-6)
    assert np.all(found <= rows.max(axis=0) + 1e-6)


@given(Updates, st.integers(0, 2))
def test_krum_chooses_one_of_the_updates(updates: list[list[float]], byzantine: int) -> None:
    assert centre(Krum(byzantine=byzantine), updates) in on_grid(updates)


@given(Updates, st.sampled_from([Median(), TrimmedMean(trim=0.34)]), st.randoms())
def test_names_do_not_matter_to_a_coordinate_wise_centre(
    updates: list[list[float]], strategy: Strategy, random: object
) -> None:
    shuffled = list(updates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert centre(strategy, updates) == centre(strategy, shuffled)


@given(Updates)
def test_the_median_does_not_move_with_a_minority(updates: list[list[float]]) -> None:
    """Whatever fewer than half of the sites send, a coordinate stays between the others' smallest and largest."""
    minority = (len(updates) - 1) // 2
    for far in (BOUND, -BOUND, 1e30):
        poisoned = [[far] * len(updates[0])] * minority + updates[minority:]
        honest, found = np.array(on_grid(updates[minority:])), np.array(centre(Median(), poisoned))
        assert np.all(found >= honest.min(axis=0) - 1e-6)
        assert np.all(found <= honest.max(axis=0) + 1e-6)


@given(st.integers(1, 40_000), st.integers(0, 2**32 - 1))
def test_distances_are_exact_however_long_an_update_is(size: int, seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(-(2**23), 2**23, size=(2, size), endpoint=True)
    a[:3], b[:3] = 2**23, -(2**23)  # the largest there can be
    assert squared_distance(a, b) == sum((int(x) - int(y)) ** 2 for x, y in zip(a, b, strict=True))


@given(Number, st.floats(1e-3, 1e3))
def test_the_grid_is_finer_than_float32_at_the_end_of_the_range(value: float, bound: float) -> None:
    (found,), unit = to_grid(np.array([value]), bound)
    clipped = min(max(value, -bound), bound)
    assert abs(Fraction(int(found)) * Fraction(unit) - Fraction(clipped)) <= Fraction(bound) / 2**24 * Fraction(1.001)
