"""Metrics that can be summed and noised: one person moves them by at most 1, and they read as what they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from confide.privacy.dp.metrics import (
    BINS,
    PROBABILITY_LIMITS,
    SENSITIVITY,
    Task,
    contributions,
    noise_deviation,
    read,
    value_range,
    width,
)

TASKS: tuple[Task, ...] = ("binary", "multiclass", "regression")
CLASSES = 3
Floats = NDArray[np.float64]
not_a_number = st.just(float("nan"))
SCORES = st.tuples(*[st.floats(-20, 20)] * CLASSES)


def softmax(scores: Any) -> Floats:
    raised = np.exp(np.asarray(scores, dtype=float) - np.max(scores, axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


#: What a sound model says.
SOUND: dict[Task, st.SearchStrategy[Any]] = {
    "binary": st.floats(0, 1), "multiclass": SCORES.map(softmax), "regression": st.floats(0, 1),
}  # fmt: skip
#: Whatever a model may say; a diverged one, or one whose weights were chosen to, says nan.
PREDICTIONS: dict[Task, st.SearchStrategy[Any]] = {
    "binary": st.floats(0, 1) | not_a_number,
    "multiclass": SCORES.map(softmax)
    | st.sampled_from([*np.eye(CLASSES), np.full(CLASSES, 1 / 3), np.array([0.5, 0.5, 0.0]), np.zeros(CLASSES)])
    | st.tuples(*[st.floats(0, 1) | not_a_number] * CLASSES).map(np.array),
    "regression": st.floats(0, 1) | st.floats(allow_infinity=True) | not_a_number,
}
LABELS: dict[Task, st.SearchStrategy[float]] = {
    "binary": st.sampled_from([0.0, 1.0]),
    "multiclass": st.sampled_from([0.0, 1.0, 2.0]),
    "regression": st.floats(0, 1),
}
EMPTY: dict[Task, tuple[Floats, Floats, Floats]] = {
    task: (np.zeros((0, CLASSES) if task == "multiclass" else 0), np.zeros(0), np.zeros(0)) for task in TASKS
}
LOSSES = tuple(-math.log(p) for p in reversed(PROBABILITY_LIMITS))


@st.composite
def a_person(draw: st.DrawFn, task: Task, predictions: st.SearchStrategy[Any]) -> Any:
    """A person's (prediction, label, weight) a record."""
    n = draw(st.integers(1, 6))
    prediction = np.array(draw(st.lists(predictions, min_size=n, max_size=n)))
    label = np.array(draw(st.lists(LABELS[task], min_size=n, max_size=n)))
    return prediction, label, np.full(n, 1.0 / n)


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_adding_one_person_moves_the_vector_by_an_l2_norm_of_at_most_one(task: Task, data: st.DataObject) -> None:
    others = data.draw(st.lists(a_person(task, SOUND[task]), max_size=4))
    one = data.draw(a_person(task, PREDICTIONS[task]))

    def total(people: list[Any]) -> Floats:
        return contributions(task, *(np.concatenate(column) for column in zip(EMPTY[task], *people, strict=True)))

    before, after = total(others), total([*others, one])
    assert before.shape == after.shape == (width(task),)
    assert np.linalg.norm(after - before) <= SENSITIVITY + 1e-9


@pytest.mark.parametrize(
    ("task", "said", "label"),
    [("binary", 1.0, 1.0), ("multiclass", [0.0, 1.0, 0.0], 1.0), ("multiclass", [0.3, 0.6, 0.1], 0.0),
     ("regression", 1.0, 1.0), ("regression", 0.5, 1.0)],
    ids=["binary", "right class", "wrong class", "no error", "half the range"],
)  # fmt: skip
def test_one_person_may_move_the_vector_by_exactly_the_sensitivity(task: Task, said: Any, label: float) -> None:
    """So the bound is not slack: less noise would be too little."""
    one = contributions(task, np.array([said, said]), np.array([label, label]), np.array([0.5, 0.5]))
    assert np.linalg.norm(one) == pytest.approx(SENSITIVITY)


def weights(rng: np.random.Generator, n: int) -> Floats:
    return 1.0 / rng.integers(1, 4, n)


def three_classes(rng: np.random.Generator, n: int, sharpness: float = 1.0) -> tuple[Floats, Floats]:
    """Probabilities, and labels drawn from them; `sharpness` over 1 makes the former overconfident."""
    scores = rng.normal(0, 1.5, (n, CLASSES))
    label = (softmax(scores).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(0, CLASSES - 1)
    return softmax(sharpness * scores), label.astype(float)


def test_exact_sums_read_as_the_weighted_accuracy() -> None:
    rng = np.random.default_rng(0)
    p, y, w = rng.random(500), rng.integers(0, 2, 500).astype(float), weights(rng, 500)
    assert read("binary", contributions("binary", p, y, w), 0.0)["accuracy"] == pytest.approx(
        accuracy_score(y, p >= 0.5, sample_weight=w)
    )
    p, y = three_classes(rng, 500)
    assert read("multiclass", contributions("multiclass", p, y, w), 0.0)["accuracy"] == pytest.approx(
        accuracy_score(y, p.argmax(axis=1), sample_weight=w)
    )


def test_exact_sums_read_as_the_mean_absolute_error_and_the_mean_square() -> None:
    rng = np.random.default_rng(0)
    p, y, w = rng.random(500), rng.random(500), weights(rng, 500)
    found = read("regression", contributions("regression", p, y, w), 0.0)
    assert found["mean_absolute_error_scaled"] == pytest.approx(np.average(np.abs(p - y), weights=w))
    assert found["clipped_loss"] == pytest.approx(np.average((p - y) ** 2, weights=w))
    far = contributions("regression", np.array([7.0]), np.array([0.5]), np.ones(1))
    assert set(read("regression", far, 0.0).values()) == {1.0}  # errors are clipped to the label's range


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 3.0))
def test_the_auc_is_that_of_the_binned_predictions_and_close_to_the_exact_one(seed: int, strength: float) -> None:
    rng = np.random.default_rng(seed)
    y = (rng.random(3000) < 0.4).astype(float)
    p = 1 / (1 + np.exp(-(strength * (y - 0.5) + rng.normal(size=len(y)))))
    w = weights(rng, len(y))
    found = read("binary", contributions("binary", p, y, w), 0.0)["auc"]
    binned = np.minimum((p * BINS).astype(int), BINS - 1)
    assert found == pytest.approx(roc_auc_score(y, binned, sample_weight=w), abs=1e-9)
    assert found == pytest.approx(roc_auc_score(y, p, sample_weight=w), abs=0.02)


def calibration_error(confidence: Floats, came_true: NDArray[np.bool_], w: Floats) -> float:
    """By its definition, bin by bin."""
    total = 0.0
    for i in range(BINS):
        low, high = i / BINS, (i + 1) / BINS if i < BINS - 1 else 2.0
        here = (confidence >= low) & (confidence < high)
        if here.any():
            gap = np.average(came_true[here], weights=w[here]) - np.average(confidence[here], weights=w[here])
            total += w[here].sum() / w.sum() * abs(gap)
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 4.0))
def test_calibration_and_loss_are_within_the_documented_bounds_of_the_unbinned_ones(seed: int, sharp: float) -> None:
    rng = np.random.default_rng(seed)
    score, w = rng.normal(0, 1.5, 2000), weights(rng, 2000)
    y = (rng.random(2000) < 1 / (1 + np.exp(-score))).astype(float)
    p = 1 / (1 + np.exp(-sharp * score))
    found = read("binary", contributions("binary", p, y, w), 0.0)
    assert found["ece"] == pytest.approx(calibration_error(p, y > 0.5, w), abs=0.5 / BINS)
    exact = log_loss(y, np.clip(p, *PROBABILITY_LIMITS), sample_weight=w)
    assert found["clipped_loss"] == pytest.approx(exact, abs=math.log(2))
    p, y = three_classes(rng, 2000, sharp)
    found = read("multiclass", contributions("multiclass", p, y, w), 0.0)
    right = p.argmax(axis=1) == y
    assert found["ece"] == pytest.approx(calibration_error(p.max(axis=1), right, w), abs=0.5 / BINS)
    of_truth = np.clip(p[np.arange(len(y)), y.astype(int)], *PROBABILITY_LIMITS)
    assert found["clipped_loss"] == pytest.approx(-np.average(np.log(of_truth), weights=w), abs=0.1)


def test_at_the_bins_midpoints_calibration_and_loss_are_exact() -> None:
    """So what separates them from the unbinned ones elsewhere is binning, and nothing else."""
    rng = np.random.default_rng(0)
    p, y, w = (rng.integers(0, BINS, 500) + 0.5) / BINS, rng.integers(0, 2, 500).astype(float), weights(rng, 500)
    found = read("binary", contributions("binary", p, y, w), 0.0)
    assert found["ece"] == pytest.approx(calibration_error(p, y > 0.5, w))
    assert found["clipped_loss"] == pytest.approx(log_loss(y, p, sample_weight=w))
    # The largest error that the documentation names: a miss at the upper end of the lowest bin.
    edge = read("binary", contributions("binary", np.array([0.1 - 1e-9]), np.ones(1), np.ones(1)), 0.0)["clipped_loss"]
    assert edge == pytest.approx(-math.log(0.1) + math.log(2), abs=1e-6)


def test_a_perfect_a_useless_and_a_reversed_model_read_as_such() -> None:
    y, one = np.array([0.0] * 10 + [1.0] * 10), np.ones(20)
    for prediction, auc, ece, loss in (
        (y, 1.0, 0.05, LOSSES[0]),
        (np.full(20, 0.35), 0.5, 0.15, -(math.log(0.35) + math.log(0.65)) / 2),
        (1 - y, 0.0, 0.95, LOSSES[1]),
    ):
        found = read("binary", contributions("binary", prediction, y, one), 0.0)
        assert found["auc"] == pytest.approx(auc)
        assert found["ece"] == pytest.approx(ece)
        assert found["clipped_loss"] == pytest.approx(loss)


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
def test_whatever_the_noise_does_a_metric_is_in_its_range_or_absent(task: Task, data: st.DataObject) -> None:
    coordinate = st.floats(-1e6, 1e6)
    total = np.array(data.draw(st.lists(coordinate, min_size=width(task), max_size=width(task))))
    for name, value in read(task, total, data.draw(st.floats(0, 1e3))).items():
        low, high = LOSSES if name == "clipped_loss" and task != "regression" else (0.0, 1.0)
        assert value is None or low - 1e-9 <= value <= high + 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_where_the_noise_leaves_nothing_there_is_no_metric(task: Task) -> None:
    assert set(read(task, np.full(width(task), -3.0), 1.0).values()) == {None}
    assert set(read(task, np.zeros(width(task)), 0.0).values()) == {None}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e300])
def test_what_is_no_sum_of_persons_is_refused(task: Task, wrong: float) -> None:
    total = np.ones(width(task))
    assert None not in read(task, total, 0.0).values()  # control
    total[1] = wrong
    with pytest.raises(ValueError, match="a number of persons"):
        read(task, total, 0.0)
    with pytest.raises(ValueError, match="coordinates"):
        read(task, np.ones(width(task) + 1), 0.0)


# --- the noise -------------------------------------------------------------------------------------------------------


def test_every_site_adds_its_own_noise() -> None:
    rng, sigma = np.random.default_rng(0), 2.5
    for sites in (3, 12):
        found = noise_deviation(sigma, sites=sites, population=800, bits=20)
        seen = rng.normal(0, sigma * SENSITIVITY, (20_000, sites)).sum(axis=1).std()
        assert found == pytest.approx(seen, rel=0.03)
    assert noise_deviation(0.0, sites=6, population=800, bits=20) < 0.002  # ε = ∞


def test_rounding_to_few_bits_is_part_of_the_noise() -> None:
    low, high = value_range(0.0, 800)
    step = (high - low) / 255
    assert noise_deviation(0.0, sites=4, population=800, bits=8) == pytest.approx(step)
    rng, position = np.random.default_rng(0), np.full(20_000, 100.5)  # half-way between steps: as wide as it gets
    rounded = sum(np.floor(position + rng.random(20_000)) for _ in range(4)) * step
    assert np.std(rounded) == pytest.approx(step, rel=0.03)
