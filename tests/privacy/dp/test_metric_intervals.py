"""Intervals of released metrics hold what they promise: simulated studies against the populations they come from."""

from __future__ import annotations

import math
import time
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from confide.privacy.dp.metrics import BINS, Task, contributions, interval, read, width

Floats = NDArray[np.float64]
STUDIES = 300
#: (expected persons, standard deviation of the noise in the sum), from next to no noise to a great deal.
SETTINGS = [(200, 1e-3), (300, 4.0), (1000, 7.0), (1000, 20.0), (5000, 8.0)]
POPULATIONS: list[tuple[Task, str]] = [
    ("binary", "calibrated"), ("binary", "overconfident"), ("binary", "shifted"), ("binary", "few bins"),
    ("multiclass", "calibrated"), ("multiclass", "overconfident"), ("regression", "good"),
]  # fmt: skip


@cache
def population(task: Task, kind: str) -> tuple[Floats, Floats]:
    """Predictions and labels of very many persons."""
    rng, n = np.random.default_rng(5), 200_000
    if task == "regression":
        label = rng.random(n)
        return np.clip(label + rng.normal(0, 0.15, n), 0, 1), label
    sharpness = 2.0 if kind == "overconfident" else 1.0
    if task == "multiclass":
        scores = rng.normal(0, 1.5, (n, 4))
        truth = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        said = np.exp(sharpness * scores) / np.exp(sharpness * scores).sum(axis=1, keepdims=True)
        return said, (truth.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(0, 3).astype(float)
    score = rng.normal(-0.3, 0.3 if kind == "few bins" else 1.1, n)
    label = (rng.random(n) < 1 / (1 + np.exp(-score))).astype(float)
    return 1 / (1 + np.exp(-sharpness * score - (0.8 if kind == "shifted" else 0.0))), label


def exact(task: Task, kind: str, rng: np.random.Generator, persons: int) -> Floats:
    """A study's sum before noise: Poisson-many persons."""
    said, label = population(task, kind)
    drawn = rng.integers(0, len(label), rng.poisson(persons))
    return contributions(task, said[drawn], label[drawn], np.ones(len(drawn)))


def truth_of(task: Task, kind: str) -> dict[str, float | None]:
    """The metrics of the whole population, binned like those of a study."""
    said, label = population(task, kind)
    return read(task, contributions(task, said, label, np.ones(len(label))), 0.0)


def coverage(task: Task, kind: str, persons: int, noise: float, told: float) -> tuple[dict[str, float], dict[str, int]]:
    """Share of the intervals that hold the truth, and how many were given; `told`: the noise `interval` hears of."""
    rng, truth = np.random.default_rng(11), truth_of(task, kind)
    hits, given = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for _ in range(STUDIES):
        total = exact(task, kind, rng, persons) + rng.normal(0, noise, width(task))
        for name, bounds in interval(task, total, told).items():
            value = truth[name]
            assert value is not None
            if bounds is not None:
                given[name] += 1
                hits[name] += bounds[0] - 1e-9 <= value <= bounds[1] + 1e-9
    return {name: hits[name] / max(given[name], 1) for name in truth}, given


@pytest.mark.parametrize(("task", "kind"), POPULATIONS, ids=[f"{t} {k}" for t, k in POPULATIONS])
@pytest.mark.parametrize(("persons", "noise"), SETTINGS)
def test_a_95_percent_interval_holds_the_populations_value_nine_times_in_ten_at_least(
    task: Task, kind: str, persons: int, noise: float
) -> None:
    shares, given = coverage(task, kind, persons, noise, noise)
    assert min(given.values()) >= 0.6 * STUDIES
    for name, share in shares.items():
        assert share >= 0.9, f"{name}: {share:.3f}"


@pytest.mark.parametrize(("task", "kind"), [p for p in POPULATIONS if p[0] != "regression"])
def test_an_interval_that_knows_nothing_of_the_noise_holds_it_too_rarely(task: Task, kind: str) -> None:
    """The control for the test above."""
    shares, _ = coverage(task, kind, 1000, 20.0, 1e-3)
    assert all(share < 0.7 for share in shares.values()), shares


def test_without_noise_an_interval_is_that_of_the_sample() -> None:
    truth = truth_of("binary", "overconfident")["accuracy"]
    assert truth is not None
    total = exact("binary", "overconfident", np.random.default_rng(2), 200)
    low, high = interval("binary", total, 1e-3)["accuracy"] or (0, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(truth * (1 - truth) / 200), rel=0.15)


def test_intervals_are_not_wider_than_they_need_to_be() -> None:
    """At 1000 persons and a deviation of 7, about what the RAND example has."""
    rng = np.random.default_rng(3)
    total = exact("binary", "overconfident", rng, 1000) + rng.normal(0, 7, width("binary"))
    for name, most in {"auc": 0.13, "accuracy": 0.1, "ece": 0.14, "clipped_loss": 0.18}.items():
        low, high = interval("binary", total, 7.0)[name] or (0, 1)
        assert 0 < high - low < most, name


def test_the_value_lies_in_its_interval() -> None:
    rng = np.random.default_rng(4)
    for task, kind in POPULATIONS:
        for persons, noise in SETTINGS:
            total = exact(task, kind, rng, persons) + rng.normal(0, noise, width(task))
            bounds = interval(task, total, noise)
            for name, value in read(task, total, noise).items():
                if (found := bounds[name]) is not None:
                    assert value is not None
                    assert found[0] <= value <= found[1]


def test_where_noise_drowns_the_persons_there_is_no_interval() -> None:
    rng = np.random.default_rng(0)
    few = exact("binary", "calibrated", rng, 100)
    assert None not in interval("binary", few, 1.0).values()  # control
    assert set(interval("binary", few + rng.normal(0, 50, len(few)), 50.0).values()) == {None}


def test_a_model_without_a_mistake_in_a_small_sample_is_not_called_perfect_for_certain() -> None:
    label = np.array([0.0, 1.0] * 20)
    bounds = interval("binary", contributions("binary", label, label, np.ones(40)), 0.0)
    for name in ("auc", "accuracy"):
        low, high = bounds[name] or (0, 0)
        assert 0.75 < low < 0.97
        assert high == 1


@pytest.mark.parametrize("kind", ["calibrated", "overconfident", "few bins"])
@pytest.mark.parametrize(("persons", "noise"), [(300, 4.0), (1000, 7.0), (5000, 8.0)])
def test_noise_moves_the_mean_of_the_calibration_error_by_little(kind: str, persons: int, noise: float) -> None:
    """Against the same studies without noise."""
    bias, uncorrected = calibration_bias(kind, persons, noise)
    assert abs(bias) < 0.015
    assert abs(bias) < max(0.5 * uncorrected, 0.002)


@pytest.mark.parametrize("kind", ["calibrated", "few bins"])
@pytest.mark.parametrize(("persons", "noise"), [(300, 4.0), (1000, 7.0)])
def test_the_sum_of_absolute_values_as_it_stands_would_be_moved_by_much(kind: str, persons: int, noise: float) -> None:
    """The control for the test above."""
    bias, uncorrected = calibration_bias(kind, persons, noise)
    assert uncorrected > 0.02
    assert abs(bias) < 0.5 * uncorrected


@cache
def calibration_bias(kind: str, persons: int, noise: float) -> tuple[float, float]:
    """What noise adds on average to the ECE that is read, and to one that is not corrected for it."""
    rng, middle = np.random.default_rng(7), (np.arange(BINS) + 0.5) / BINS
    released, without, plain = [], [], []
    for _ in range(STUDIES):
        clean = exact("binary", kind, rng, persons)
        total = clean + rng.normal(0, noise, len(clean))
        released.append(read("binary", total, noise)["ece"])
        without.append(read("binary", clean, 0.0)["ece"])
        gaps = (1 - middle) * total[:BINS] - middle * total[BINS:]
        plain.append(np.abs(gaps).sum() / total.sum())
    return float(np.mean(released) - np.mean(without)), float(np.mean(plain) - np.mean(without))


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_noise_moves_the_mean_of_the_other_metrics_by_little(task: Task) -> None:
    rng, noise = np.random.default_rng(8), 7.0
    kind = "good" if task == "regression" else "overconfident"
    moved: dict[str, list[float]] = {}
    for _ in range(STUDIES):
        clean = exact(task, kind, rng, 1000)
        before, after = read(task, clean, 0.0), read(task, clean + rng.normal(0, noise, len(clean)), noise)
        for name, value in before.items():
            told = after[name]
            assert value is not None
            assert told is not None
            moved.setdefault(name, []).append(told - value)
    for name, differences in moved.items():
        assert abs(np.mean(differences)) < 0.01, name
        assert np.std(differences) > 0.002, name  # control: there was noise


def test_an_interval_takes_less_than_a_few_milliseconds() -> None:
    total = exact("multiclass", "calibrated", np.random.default_rng(0), 1000)
    started = time.perf_counter()
    for _ in range(20):
        interval("multiclass", total, 5.0)
    assert (time.perf_counter() - started) / 20 < 0.02
