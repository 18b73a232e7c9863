"""Metrics that can be summed and noised: one person moves them by at most 1, and they read as what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, roc_auc_score

from confide.privacy.dp.metrics import BINS, SENSITIVITY, Task, contributions, read, width

TASKS: tuple[Task, ...] = ("binary", "multiclass", "regression")
#: Whatever a model may say; a diverged one, or one whose weights were chosen to, says nan.
PREDICTIONS: dict[str, st.SearchStrategy[float]] = {
    "binary": st.floats(0, 1) | st.just(float("nan")),
    "multiclass": st.sampled_from([0.0, 1.0, 2.0]),
    "regression": st.floats(0, 1) | st.floats(allow_infinity=True) | st.just(float("nan")),
}
LABELS: dict[str, st.SearchStrategy[float]] = {
    "binary": st.sampled_from([0.0, 1.0]),
    "multiclass": st.sampled_from([0.0, 1.0, 2.0]),
    "regression": st.floats(0, 1),
}


@st.composite
def a_person(draw: st.DrawFn, task: Task, predictions: st.SearchStrategy[float]) -> Any:
    """A person's (prediction, label, weight) a record."""
    n = draw(st.integers(1, 6))
    prediction = np.array(draw(st.lists(predictions, min_size=n, max_size=n)))
    label = np.array(draw(st.lists(LABELS[task], min_size=n, max_size=n)))
    return prediction, label, np.full(n, 1.0 / n)


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_adding_one_person_moves_the_vector_by_an_l2_norm_of_at_most_one(task: Task, data: st.DataObject) -> None:
    others = data.draw(st.lists(a_person(task, st.floats(0, 1)), max_size=4))
    one = data.draw(a_person(task, PREDICTIONS[task]))
    empty = (np.zeros(0), np.zeros(0), np.zeros(0))

    def total(people: list[Any]) -> np.ndarray[Any, Any]:
        return contributions(task, *(np.concatenate(column) for column in zip(empty, *people, strict=True)))

    before, after = total(others), total([*others, one])
    assert before.shape == after.shape == (width(task),)
    assert np.linalg.norm(after - before) <= SENSITIVITY + 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_one_person_may_move_the_vector_by_exactly_the_sensitivity(task: Task) -> None:
    """So the bound is not slack: less noise would be too little."""
    one = contributions(task, np.array([1.0, 1.0]), np.array([1.0, 1.0]), np.array([0.5, 0.5]))
    assert np.linalg.norm(one) == pytest.approx(SENSITIVITY)


def weights(rng: np.random.Generator, n: int) -> np.ndarray[Any, Any]:
    return 1.0 / rng.integers(1, 4, n)


def test_exact_sums_read_as_the_weighted_accuracy() -> None:
    rng = np.random.default_rng(0)
    p, y, w = rng.random(500), rng.integers(0, 2, 500).astype(float), weights(rng, 500)
    assert read("binary", contributions("binary", p, y, w))["accuracy"] == pytest.approx(
        accuracy_score(y, p >= 0.5, sample_weight=w)
    )
    guess, of_three = rng.integers(0, 3, 500).astype(float), rng.integers(0, 3, 500).astype(float)
    assert read("multiclass", contributions("multiclass", guess, of_three, w))["accuracy"] == pytest.approx(
        accuracy_score(of_three, guess, sample_weight=w)
    )


def test_exact_sums_read_as_the_mean_absolute_error() -> None:
    rng = np.random.default_rng(0)
    p, y, w = rng.random(500), rng.random(500), weights(rng, 500)
    assert read("regression", contributions("regression", p, y, w))["mean_absolute_error_scaled"] == pytest.approx(
        np.average(np.abs(p - y), weights=w)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 3.0))
def test_the_auc_is_that_of_the_binned_predictions_and_close_to_the_exact_one(seed: int, strength: float) -> None:
    rng = np.random.default_rng(seed)
    y = (rng.random(3000) < 0.4).astype(float)
    p = 1 / (1 + np.exp(-(strength * (y - 0.5) + rng.normal(size=len(y)))))
    w = weights(rng, len(y))
    found = read("binary", contributions("binary", p, y, w))["auc"]
    binned = np.minimum((p * BINS).astype(int), BINS - 1)
    assert found == pytest.approx(roc_auc_score(y, binned, sample_weight=w), abs=1e-9)
    assert found == pytest.approx(roc_auc_score(y, p, sample_weight=w), abs=0.02)


def test_a_perfect_a_useless_and_a_reversed_model_read_as_such() -> None:
    y, one = np.array([0.0] * 10 + [1.0] * 10), np.ones(20)
    for prediction, expected in ((y, 1.0), (np.full(20, 0.3), 0.5), (1 - y, 0.0)):
        assert read("binary", contributions("binary", prediction, y, one))["auc"] == pytest.approx(expected)


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
def test_whatever_the_noise_does_a_metric_is_a_share_or_absent(task: Task, data: st.DataObject) -> None:
    coordinate = st.floats(-1e6, 1e6)
    total = np.array(data.draw(st.lists(coordinate, min_size=width(task), max_size=width(task))))
    for value in read(task, total).values():
        assert value is None or 0 <= value <= 1 + 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_where_the_noise_leaves_nothing_there_is_no_metric(task: Task) -> None:
    assert set(read(task, np.full(width(task), -3.0)).values()) == {None}
    assert set(read(task, np.zeros(width(task))).values()) == {None}
