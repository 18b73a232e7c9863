"""Held-out metrics as vectors that can be summed over sites and noised: each person contributes an L2 norm ≤ 1.

What a record adds to its site's vector, at weight 1/n for each of a person's n records:

- binary: 1 in one of two histograms (positive, negative) over `BINS` equal bins of the predicted probability;
- multiclass: where the model is right, 1 in a histogram of its confidence (the largest probability, there also that of
  the true class); where it is wrong, 1/√2 in a second such histogram and 1/√2 in one of the true class's probability,
  which is then at most 1/2, over `BINS` bins of [0, 1/2];
- regression, with e the absolute error on the label scaled to [0, 1], clipped to 1: (e, 1 − e, √8·e·(1 − e)). The third
  coordinate is free: with u = e·(1 − e) ≤ 1/4 the squared norm is 1 − 2u + 8u² ≤ 1.

So each record has norm ≤ 1, and a person's contribution is a mean of her records'. Reading a noised sum is
post-processing: it costs nothing. What is read:

- `accuracy` (binary: at 0.5); `auc` of the binned probabilities;
- `ece`, the expected calibration error Σ_b (n_b/n)·|share of positive (right) in bin b − midpoint of b| (Naeini et al.
  2015; Guo et al. 2017). With midpoints in place of the bins' mean probabilities it is off by at most half a bin, 0.05,
  whatever the number of persons;
- `clipped_loss`: log loss (nats) with probabilities clipped to `PROBABILITY_LIMITS`, at the bins' midpoints: off by at
  most log 2 for a record at the lowest bin's upper end and log 1.5 elsewhere; on average by 0.2 in the lowest bin and
  0.02 elsewhere where probabilities are spread evenly within bins. Regression: the mean of e²;
- `mean_absolute_error_scaled`: the mean of e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

__all__ = [
    "BINS",
    "NAMES",
    "PROBABILITY_LIMITS",
    "SENSITIVITY",
    "Task",
    "contributions",
    "interval",
    "noise_deviation",
    "read",
    "value_range",
    "width",
]

BINS = 10
SENSITIVITY = 1.0
#: Public limits that probabilities are clipped to in a log loss: the outer bins' midpoints.
PROBABILITY_LIMITS = (0.5 / BINS, 1 - 0.5 / BINS)
#: As people read them.
NAMES = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "ece": "calibration error (ECE)",
    "clipped_loss": "clipped loss",
    "mean_absolute_error_scaled": "mean absolute error (label scaled to 0–1)",
    "r2": "R²",
}
Task = Literal["binary", "multiclass", "regression"]
Floats = NDArray[np.float64]

_MIDPOINTS = (np.arange(BINS) + 0.5) / BINS
_WIDTH: dict[Task, int] = {"binary": 2 * BINS, "multiclass": 3 * BINS, "regression": 3}
_HALF, _FREE = 0.5**0.5, 8**0.5
#: Standard deviations of a site's noise that its range has room for.
_ROOM = 8
#: Of a normal distribution: 95 % lie within.
_Z = 1.96
#: Standard deviations of its noise that a total must reach before anything is told of a ratio's error.
_CLEAR = 3
#: What `_unfold` leaves of a standard deviation where the true gap is 0: 2√(2/π) − √(4/π).
_LEFT = 2 * (2 / math.pi) ** 0.5 - (4 / math.pi) ** 0.5
#: Fewer persons than can be told from none, and more than there are.
_NOBODY, _ABSURD = 1e-6, 1e12
_LARGEST_LOSS, _SMALLEST_LOSS = (-math.log(p) for p in PROBABILITY_LIMITS)


# --- what leaves a site, once it is noised -------------------------------------------------------------------------


def width(task: Task) -> int:
    """Coordinates of the vector."""
    return _WIDTH[task]


def contributions(task: Task, prediction: Floats, label: Floats, weight: Floats) -> Floats:
    """The exact sum over records, before noise; shape [width].

    Args:
        task: Kind of label.
        prediction: binary: probability of the positive class, [records]; multiclass: probabilities, [records, classes];
            regression: prediction, [records].
        label: 0/1, class index, or scaled label; shape [records].
        weight: 1/n of the record's unit; shape [records].
    """
    # What a model gives may be no number at all; each person still counts once, somewhere.
    prediction = np.nan_to_num(prediction, nan=0.0, posinf=1.0, neginf=0.0)
    if task == "binary":
        positive = label > 0.5
        return np.concatenate([_histogram(prediction, weight * positive), _histogram(prediction, weight * ~positive)])
    if task == "multiclass":
        truth = label.astype(np.int64)
        confidence, of_truth = prediction.max(axis=1), np.take_along_axis(prediction, truth[:, None], axis=1)[:, 0]
        right = prediction.argmax(axis=1) == truth
        wrong = weight * ~right * _HALF
        parts = [_histogram(confidence, weight * right), _histogram(confidence, wrong), _histogram(2 * of_truth, wrong)]
        return np.concatenate(parts)
    error = np.clip(np.abs(prediction - label), 0, 1)
    return np.array([np.sum(weight * part) for part in (error, 1 - error, _FREE * error * (1 - error))])


def value_range(noise_multiplier: float, population: int) -> tuple[float, float]:
    """Public range of a coordinate of one site's noised vector.

    Args:
        noise_multiplier: σ of a site's release.
        population: Largest declared population of a site.
    """
    spread = _ROOM * SENSITIVITY * noise_multiplier
    return -spread - 1, population + spread + 1


def noise_deviation(noise_multiplier: float, *, sites: int, population: int, bits: int) -> float:
    """Standard deviation of the noise in each coordinate of an opened sum; each site adds its own.

    Besides the privacy noise it counts what stochastic rounding to the range adds, at most: a quarter of a squared
    step (at 20 bits next to nothing, at 8 as much as some privacy noise).

    Args:
        noise_multiplier: σ of a site's release; 0 for ε = ∞.
        sites: Size of the cohort.
        population: Largest declared population of a site.
        bits: Bits a coordinate is rounded to.
    """
    low, high = value_range(noise_multiplier, population)
    step = (high - low) / (2.0**bits - 1)
    return math.sqrt(sites * ((noise_multiplier * SENSITIVITY) ** 2 + step**2 / 4))


# --- what is read from the sum: post-processing ----------------------------------------------------------------------


def read(task: Task, total: Floats, noise: float) -> dict[str, float | None]:
    """Metrics from a (noised) sum; None where the noise leaves nothing to divide by.

    Noise spreads these metrics and hardly moves their expected value: single counts may be negative, and stay so in the
    sums. The ECE is the exception, see `_ece`.

    Args:
        task: Kind of label.
        total: Noised sum; shape [width].
        noise: Standard deviation of the noise in each coordinate of the sum, see `noise_deviation`.

    Raises:
        ValueError: No such sum can be.
    """
    return {name: None if e is None else e.value for name, e in _estimates(task, total, noise).items()}


def interval(task: Task, total: Floats, noise: float) -> dict[str, tuple[float, float] | None]:
    """95 % intervals for the metrics that `read` gives, as they are in the population that the persons come from.

    They cover the sampling of persons and the noise (arguments as for `read`); None where the noise drowns what it
    would be divided by. A person with several records varies no more than one who draws one of them (Jensen), so
    counting persons bounds the sampling error. Binning error, see the module, is not in them.
    """
    found = _estimates(task, total, noise)
    return {name: (e.low, e.high) if e is not None and e.clear else None for name, e in found.items()}


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A metric, its interval, and whether what it was divided by stands clear of the noise."""

    value: float
    low: float
    high: float
    clear: bool


def _estimates(task: Task, total: Floats, noise: float) -> dict[str, _Estimate | None]:
    if total.shape != (width(task),) or not np.all(np.abs(total) < _ABSURD):
        raise ValueError(f"a sum for {task} metrics has {width(task)} coordinates, each a number of persons")
    if task == "regression":
        squares = total[0] - total[2] / _FREE
        # 5/4 of the noise's variance: the third coordinate's, and that it enters both counts.
        both = np.array([squares, total[0] + total[1] - squares])
        one = np.array([1.0, 0.0])
        return {
            "mean_absolute_error_scaled": _mean(one, total[:2], noise),
            "clipped_loss": _mean(one, both, noise * 1.25**0.5),
        }
    if task == "multiclass":
        right, wrong, missed = total[:BINS], total[BINS : 2 * BINS] / _HALF, total[2 * BINS :] / _HALF
        noises = np.repeat([noise, noise / _HALF], BINS)
        # Who was misjudged is counted twice: the mean is less noisy than either.
        counts = np.array([right.sum(), (wrong.sum() + missed.sum()) / 2])
        losses = np.concatenate([_log_loss(_MIDPOINTS), _log_loss(_MIDPOINTS / 2)])
        return {
            "accuracy": _mean(np.array([1.0, 0.0]), counts, noise * BINS**0.5),
            "ece": _ece(right, wrong, noise, noise / _HALF),
            "clipped_loss": _mean(losses, np.concatenate([right, missed]), noises, _SMALLEST_LOSS, _LARGEST_LOSS),
        }
    positive, negative = total[:BINS], total[BINS:]
    correct = np.concatenate([_MIDPOINTS > 0.5, _MIDPOINTS < 0.5]).astype(np.float64)
    losses = np.concatenate([_log_loss(_MIDPOINTS), _log_loss(1 - _MIDPOINTS)])
    return {
        "auc": _auc(positive, negative, noise),
        "accuracy": _mean(correct, total, noise),
        "ece": _ece(positive, negative, noise, noise),
        "clipped_loss": _mean(losses, total, noise, _SMALLEST_LOSS, _LARGEST_LOSS),
    }


def _histogram(probability: Floats, weight: Floats) -> Floats:
    bins = (np.clip(probability, 0.0, 1.0) * BINS).astype(np.int64).clip(0, BINS - 1)
    return np.asarray(np.bincount(bins, weights=weight, minlength=BINS), dtype=np.float64)


def _log_loss(probability: Floats) -> Floats:
    return np.asarray(-np.log(np.clip(probability, *PROBABILITY_LIMITS)))


def _mean(score: Floats, counts: Floats, noise: float | Floats, low: float = 0, high: float = 1) -> _Estimate | None:
    """Mean score, between `low` and `high`, of persons of whom noised counts tell how many have which score."""
    found = _ratio(score, counts, noise, low, high)
    return None if found is None else _around(*found, low, high)


def _auc(positive: Floats, negative: Floats, noise: float) -> _Estimate | None:
    """Mean over the positive of the share of the negative below them (a tie is half), and the other way round.

    The two means are the same number; their variances add up (DeLong et al. 1988).
    """
    p, n = float(positive.sum()), float(negative.sum())
    if min(p, n) <= _NOBODY:
        return None
    one = _ratio((np.cumsum(negative) - negative / 2) / n, positive, noise)
    other = _ratio(1 - (np.cumsum(positive) - positive / 2) / p, negative, noise)
    if one is None or other is None:
        return None
    return _around(one[0], one[1] + other[1], one[2] and other[2])


def _ratio(
    score: Floats, counts: Floats, noise: float | Floats, low: float = 0, high: float = 1
) -> tuple[float, float, bool] | None:
    """Mean score, its variance (delta method over Poisson counts), and whether the total stands clear of the noise.

    The variance holds z²/2 more persons at either end of the scale (as Agresti, Coull 1998, for shares): that nobody
    in a sample was misjudged does not prove that nobody is.
    """
    noise, mass = np.broadcast_to(noise, counts.shape), float(counts.sum())
    if mass <= _NOBODY:
        return None
    value = float(np.clip(score @ counts / mass, low, high))
    variance = (score - value) ** 2 @ (np.maximum(counts, 0.0) + noise**2)
    variance += _Z**2 / 2 * ((value - low) ** 2 + (high - value) ** 2)
    return value, float(variance) / mass**2, mass > _CLEAR * float(np.linalg.norm(noise))


def _around(value: float, variance: float, clear: bool, low: float = 0, high: float = 1) -> _Estimate:
    half = _Z * math.sqrt(variance)
    return _Estimate(value, max(low, value - half), min(high, value + half), clear)


def _ece(positive: Floats, negative: Floats, noise: float, other_noise: float) -> _Estimate | None:
    """ECE from histograms of the positive (or right) and the others, and the noise in each.

    Noise makes a sum of absolute values larger. Two corrections bring it back:

    1. A bin whose noised count is within 2 standard deviations of nobody is left out: it could say little that is true.
       What its few persons would add is lost.
    2. In the others |gap| gives way to 2·|gap| − E|gap + fresh noise| (one step of the parametric bootstrap). Of a
       standard deviation, that leaves 0.47 where a bin's true gap is 0 (0.80 before), takes up to 0.09 too much where
       the gap is between 1 and 2, and is right where it is large.

    Sampling has the same effect on any sample's ECE, also on one computed without noise; it stays in the value, so that
    this is the sample's ECE, and is taken out of the interval, which is about the population.
    """
    mass, deviation = float((positive + negative).sum()), math.hypot(noise, other_noise)
    held = positive + negative > max(2 * deviation, _NOBODY)
    if mass <= _NOBODY or not held.any():
        return None
    up, down, middle = positive[held], negative[held], _MIDPOINTS[held]
    gap = (1 - middle) * up - middle * down
    noises = np.hypot((1 - middle) * noise, middle * other_noise)
    spread = np.sqrt(noises**2 + (1 - middle) ** 2 * np.maximum(up, 0) + middle**2 * np.maximum(down, 0))
    value = min(1.0, max(0.0, float(_unfold(gap, noises).sum()) / mass))
    centre, half = float(_unfold(gap, spread).sum()) / mass, _Z * float(np.linalg.norm(spread)) / mass
    # What the correction may have left, as far as each bin's gap allows.
    left = _LEFT * float(np.sum(spread * np.exp(-((gap / spread) ** 2) / 4))) / mass
    low, high = max(0.0, min(value, centre - half - left)), min(1.0, max(value, centre + half))
    return _Estimate(value, low, high, mass > _CLEAR * BINS**0.5 * deviation)


def _unfold(gap: Floats, deviation: Floats) -> Floats:
    """2·|g| − E|g + N(0, s²)|, the mean of a folded normal distribution; shape as given."""
    spread = np.maximum(deviation, 1e-12)
    z = gap / spread
    folded = gap * erf(z / 2**0.5) + spread * (2 / np.pi) ** 0.5 * np.exp(-(z**2) / 2)
    return np.asarray(2 * np.abs(gap) - folded)
