"""Federated statistics: the bounds of number columns, learned from noised, charged, sealed histograms.

Two releases. The first counts each value in bins whose edges are powers of two (public, whatever the data), as in the
approximate bounds of Wilson et al. 2020 ("Differentially Private SQL with Bounded User Contribution", §5.1.1); the bins
that rise above the noise give a coarse range. The second counts in `FINE` equal bins of that range, and its outermost
bins are left away as long as they hold next to nobody.

Invariant: a unit's records weigh 1/n each and each of F columns gets 1/√F, so that a unit contributes an L2 norm ≤ 1,
whatever its values are. A missing value contributes nothing.

Reading a noised sum is post-processing: it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["FINE", "RELEASES", "STATISTICS_SENSITIVITY", "Range", "coarse_ranges", "contributions", "learned", "width"]

#: Releases that a set of bounds costs.
RELEASES = 2
STATISTICS_SENSITIVITY = 1.0
FINE = 32
#: Magnitudes from 2^-20 to 2^43 are told apart; smaller ones count as zero, larger ones as the largest.
_LOWEST, _OCTAVES = -20, 63
_COARSE = 2 * _OCTAVES + 1
#: A bin counts as seen where noise alone would reach it in one of twenty sets of statistics.
_FALSE_ALARM = 0.05
#: Standard deviations of noise from which a bin beside a full one counts as seen, and how many octaves beside is.
_LIKELY, _GAP = 3.0, 2
#: Share of the weight that may lie outside the learned bounds on each side, where the noise lets us see that little;
#: and the most that may hide in the noise there.
_TAIL, _HIDDEN = 0.01, 0.1
Floats = NDArray[np.float64]
Range = tuple[float, float]


def width(columns: int, release: int) -> int:
    """Coordinates of a release (1 or 2) over so many columns."""
    return columns * (_COARSE if release == 1 else FINE)


def contributions(values: Floats, weight: Floats, ranges: Sequence[Range] | None) -> Floats:
    """The exact sum over records, before noise; shape [width].

    Args:
        values: Raw values, [records, columns]; NaN where missing.
        weight: 1/n of the record's unit, [records].
        ranges: Each column's coarse range for the second release; None for the first.
    """
    columns = values.shape[1]
    parts = []
    for column in range(columns):
        value = values[:, column]
        present = ~np.isnan(value)
        bins = _coarse_bin(value[present]) if ranges is None else _fine_bin(value[present], ranges[column])
        size = _COARSE if ranges is None else FINE
        parts.append(np.bincount(bins, weights=weight[present], minlength=size) / math.sqrt(columns))
    return np.concatenate(parts)


def coarse_ranges(total: Floats, columns: int, noise: float) -> list[Range | None]:
    """Each column's range from the first release's (noised) sum; None where it shows nothing but noise.

    The fullest bin must stand out among all bins. From there the range grows to its neighbours, for which less is
    asked: there are few of them.

    Args:
        total: The sum, [width].
        columns: How many.
        noise: Standard deviation of the noise in each coordinate.
    """
    surely = noise * math.sqrt(2 * math.log(total.size / _FALSE_ALARM))
    found: list[Range | None] = []
    for counts in total.reshape(columns, _COARSE):
        fullest = int(np.argmax(counts))
        if counts[fullest] <= surely:
            found.append(None)
            continue
        near = {number for number in range(_COARSE) if counts[number] > max(_LIKELY * noise, _TAIL * counts[fullest])}
        seen = _grown(fullest, near)
        found.append((min(_edges(n)[0] for n in seen), max(_edges(n)[1] for n in seen)))
    return found


def learned(total: Floats, ranges: Sequence[Range], noise: float) -> list[Range]:
    """Each column's bounds from the second release's (noised) sum over `FINE` bins of its coarse range.

    Args:
        total: The sum, [width].
        ranges: Coarse ranges.
        noise: Standard deviation of the noise in each coordinate.
    """
    found = []
    for counts, (low, high) in zip(total.reshape(len(ranges), FINE), ranges, strict=True):
        mass = max(float(counts.sum()), 0.0)
        step = (high - low) / FINE
        left, right = _empty(counts, mass, noise), _empty(counts[::-1], mass, noise)
        if left + right >= FINE:  # there is nothing but noise to be seen
            left = right = 0
        found.append((low + left * step, high - right * step))
    return found


def _empty(counts: Floats, mass: float, noise: float) -> int:
    """How many bins from one end hold next to nobody, as far as the noise lets us see.

    The longest stretch counts: what shorter ones add up to goes up and down with the noise.
    """
    number = np.arange(1, len(counts) + 1)
    spread = noise * np.sqrt(number)
    fits = (np.cumsum(counts) <= _TAIL * mass + spread / 2) & (spread <= _HIDDEN * mass)
    return int(np.max(number, where=fits, initial=0))


def _grown(start: int, near: set[int]) -> set[int]:
    """The bins of `near` that are at most `_GAP` octaves from one that belongs, on either side of zero."""
    seen, edge = {start}, [start]
    while edge:
        octave = abs(edge.pop() - _OCTAVES)
        for other in near - seen:
            if abs(abs(other - _OCTAVES) - octave) <= _GAP or other == _OCTAVES:
                seen.add(other)
                edge += [other] if other != _OCTAVES else []
    return seen


def _coarse_bin(values: Floats) -> NDArray[np.int64]:
    """Bins by sign and power of two: [−2^(k+1), −2^k) … [0 and near it] … [2^k, 2^(k+1))."""
    values = np.nan_to_num(values, posinf=np.finfo(np.float64).max, neginf=np.finfo(np.float64).min)
    _, exponent = np.frexp(np.abs(values))  # |v| = m · 2^exponent, m in [1/2, 1): exact, unlike a logarithm
    octave = np.clip(exponent.astype(np.int64) - 1 - _LOWEST, -1, _OCTAVES - 1)
    return np.where((octave < 0) | (values == 0), _OCTAVES, _OCTAVES + np.sign(values).astype(np.int64) * (octave + 1))


def _edges(number: int) -> Range:
    """Lower and upper end of a coarse bin."""
    octave = abs(number - _OCTAVES) - 1
    if octave < 0:
        return -(2.0**_LOWEST), 2.0**_LOWEST
    near, far = 2.0 ** (octave + _LOWEST), 2.0 ** (octave + 1 + _LOWEST)
    return (near, far) if number > _OCTAVES else (-far, -near)


def _fine_bin(values: Floats, range_: Range) -> NDArray[np.int64]:
    low, high = range_
    inside = np.clip((np.clip(values, low, high) - low) / (high - low), 0.0, 1.0)
    return (inside * FINE).astype(np.int64).clip(0, FINE - 1)
