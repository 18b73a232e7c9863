"""Held-out metrics as vectors that can be summed over sites and noised: each unit contributes an L2 norm ≤ 1.

- binary: two histograms (positive, negative) of predicted probability over `BINS` equal bins; accuracy at 0.5 and
  AUC follow from their sum.
- multiclass: [weight correct, weight wrong].
- regression: [Σ clipped absolute error, Σ (1 − it)], on the label scaled to [0, 1].

A unit's records weigh 1/n each, so its contribution has L1 norm ≤ 1, and therefore L2 norm ≤ 1.
Reading a noised sum is post-processing: it costs nothing.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "SENSITIVITY", "Task", "contributions", "interval", "read", "width"]

BINS = 10
SENSITIVITY = 1.0
Task = Literal["binary", "multiclass", "regression"]
Floats = NDArray[np.float64]


def width(task: Task) -> int:
    """Coordinates of the vector."""
    return 2 * BINS if task == "binary" else 2


def contributions(task: Task, prediction: Floats, label: Floats, weight: Floats) -> Floats:
    """The exact sum over records, before noise; shape [width].

    Args:
        task: Kind of label.
        prediction: binary: probability of the positive class; multiclass: predicted class; regression: prediction.
        label: 0/1, class index, or scaled label; shape [records].
        weight: 1/n of the record's unit; shape [records].
    """
    # What a model gives may be no number at all; each person still counts once, somewhere.
    prediction = np.nan_to_num(prediction, nan=0.0, posinf=1.0, neginf=0.0)
    if task == "binary":
        bins = (np.clip(prediction, 0.0, 1.0) * BINS).astype(np.int64).clip(0, BINS - 1)
        positive = np.bincount(bins, weights=weight * (label > 0.5), minlength=BINS)
        negative = np.bincount(bins, weights=weight * (label <= 0.5), minlength=BINS)
        return np.concatenate([positive, negative])
    good = (
        (prediction == label).astype(np.float64)
        if task == "multiclass"
        else 1.0 - np.clip(np.abs(prediction - label), 0, 1)
    )
    if task == "multiclass":
        return np.array([np.sum(weight * good), np.sum(weight * (1 - good))])
    return np.array([np.sum(weight * (1 - good)), np.sum(weight * good)])


def read(task: Task, total: Floats) -> dict[str, float | None]:
    """Metrics from a (noised) sum; None where the noise leaves nothing to divide by."""
    total = np.maximum(total, 0.0)
    if task == "regression":
        mass = float(total.sum())
        return {"mean_absolute_error_scaled": float(total[0]) / mass if mass > 0 else None}
    if task == "multiclass":
        mass = float(total.sum())
        return {"accuracy": float(total[0]) / mass if mass > 0 else None}
    positive, negative = total[:BINS], total[BINS:]
    mass, pairs = float(total.sum()), float(positive.sum() * negative.sum())
    below = np.cumsum(negative) - negative / 2
    correct = float(positive[BINS // 2 :].sum() + negative[: BINS // 2].sum())
    return {
        "auc": float(np.sum(positive * below)) / pairs if pairs > 0 else None,
        "accuracy": correct / mass if mass > 0 else None,
    }


def interval(task: Task, total: Floats, noise: float, draws: int = 400) -> dict[str, tuple[float, float] | None]:
    """95 % intervals around `read(task, total)`: mean ± 1.96 standard deviations of a parametric bootstrap.

    Each draw resamples the persons (Poisson counts around the noised ones) and adds fresh noise, so the interval covers
    the sampling error and the privacy noise. Post-processing of what was released: it costs nothing.

    Args:
        task: Kind of label.
        total: Noised sum; shape [width].
        noise: Standard deviation of the noise in each coordinate of the sum.
        draws: Bootstrap draws.
    """
    generator = np.random.default_rng(0)  # for a reproducible page, not for privacy
    centre = read(task, total)
    seen: dict[str, list[float]] = {name: [] for name in centre}
    for _ in range(draws):
        again = generator.poisson(np.maximum(total, 0.0)) + generator.normal(0.0, noise, len(total))
        for name, value in read(task, again).items():
            if value is not None:
                seen[name].append(value)
    found: dict[str, tuple[float, float] | None] = {}
    for name, value in centre.items():
        if value is None or len(seen[name]) < draws // 2:
            found[name] = None
            continue
        half = 1.96 * float(np.std(seen[name]))
        found[name] = (max(0.0, value - half), min(1.0, value + half))
    return found
