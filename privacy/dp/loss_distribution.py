"""ε of one run from the distribution of its privacy loss: an upper end that is within 0.1 % of the true value.

Let P and Q be one release with and without a unit, and L = log P(x)/Q(x), x ~ P, its privacy loss (the "privacy random
variable", PRV). The loss of a run is the sum of its releases' losses, and δ(ε) = E[1 − exp(ε − L)]⁺ over that sum.

Invariant: *what is computed is never below the true value.* Each step replaces the loss by one that dominates it:
1. The loss is put on a grid of width h so that each cell's mass moves to the cell's two ends with its mass under P
   *and* under Q unchanged ("connect the dots": Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022). That adds about
   h²/8 to a release's mean loss and h²/4 to its variance at most: second order, so coarse grids are exact enough.
2. Losses above the grid count as infinite, losses below it as its lowest point.
3. Releases are added by a discrete Fourier transform of a window outside which the sum lies with a probability that
   Chernoff's bound makes small; what it may lose at the top counts as infinite.
4. What is cut in 2 and 3, and an allowance for rounding, are taken out of δ: a thousandth of it altogether.

Both neighbours are computed, the unit added and the unit removed, and the worse one counts: what is worst for one
release need not be worst for many (Lebeda, Regehr, Kamath, Steinke 2024).

Source of the approach: Gopi, Lee, Wutschitz 2021; the grid is the one above because its error is proved from above and
falls with h², where theirs is two-sided and falls with h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.special import logsumexp, ndtr, ndtri

__all__ = ["SMALLEST_DELTA", "Releases", "composed_loss_epsilon", "loss_epsilon"]

Floats = NDArray[np.float64]
#: Equal Gaussian releases over Poisson-sampled units: σ > 0, q in (0, 1], and how many, ≥ 1.
Releases = tuple[float, float, int]
#: One release's loss on the grid (index of the first point, each point's mass under P), and how many of them.
_Part = tuple[int, Floats, int]
#: Below it, rounding (about 10⁻¹³ of mass) is no longer small against the allowance.
SMALLEST_DELTA = 1e-10
_ERROR = 2e-4  # wanted, relative to ε
_ALLOWANCE = 1e-3  # of δ
_WIDEST_CELL = 0.05
_MOST_POINTS = 1 << 22  # 32 MiB a vector
_LARGEST_LOSS = 700.0  # its exponential is still a float64


def loss_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, about: float) -> float:
    """ε of `steps` Gaussian releases over Poisson-sampled units; never below the true value.

    Args:
        noise_multiplier: σ > 0.
        sample_rate: q in (0, 1).
        steps: Number of releases, ≥ 1.
        delta: δ ≥ `SMALLEST_DELTA`.
        about: Roughly the answer; the grid's width follows it. It decides how close the answer is, not whether it
            holds.

    Raises:
        ValueError: The grid would be too large, or δ is too small for it.
    """
    return composed_loss_epsilon([(noise_multiplier, sample_rate, steps)], delta, about)


def composed_loss_epsilon(run: Sequence[Releases], delta: float, about: float) -> float:
    """ε of releases of several kinds that one unit is in; otherwise as `loss_epsilon`, and q may be 1.

    Raises:
        ValueError: The grid would be too large, or δ is too small for it.
    """
    if delta < SMALLEST_DELTA or not 0 < about <= _LARGEST_LOSS:
        raise ValueError("outside what the grid resolves")
    # With a near-Gaussian loss of variance s² = 2μ, ε = μ + z s; the grid then adds k h²/12 (1 + z/s) to it.
    z = -float(ndtri(delta))
    spread = math.sqrt(z * z + 2 * about) - z
    steps = sum(count for _, _, count in run)
    width = min(_WIDEST_CELL, math.sqrt(12 * _ERROR * about / (steps * (1 + z / spread))))
    cut = _ALLOWANCE / 4 * delta
    return max(
        _epsilon([(*_one_release(sigma, rate, width, cut / steps, removed), n) for sigma, rate, n in run], width, delta,
                 cut)
        for removed in (True, False)
    )  # fmt: skip


def _one_release(sigma: float, rate: float, width: float, cut: float, removed: bool) -> tuple[int, Floats]:
    """The loss of one release on the grid: index of the first point, and each point's mass under P; shape [points].

    P is the mixture (1−q) N(0, σ²) + q N(1, σ²) and Q is N(0, σ²) where the unit is removed; the other way round where
    it is added. At most `cut` of P lies above the grid.
    """
    z = -float(ndtri(cut))
    ends = [_loss_at(x, sigma, rate) for x in (-z * sigma, 1 + z * sigma)]
    low, high = (ends[0], ends[1]) if removed else (-ends[1], -ends[0])
    first, last = math.floor(low / width), math.ceil(high / width) + 1
    if last - first > _MOST_POINTS:
        raise ValueError("one release's loss has too many points")
    edges: Floats = np.arange(first, last + 1, dtype=np.float64) * width
    if removed:
        under_q, under_p = _masses(edges, sigma, rate)
    else:
        under_p, under_q = (mass[::-1] for mass in _masses(-edges[::-1], sigma, rate))
    # p + p' = P(cell) and p e^(−a) + p' e^(−a−h) = Q(cell), for the masses p, p' at its ends a and a + h.
    right = np.clip((under_p - under_q * np.exp(edges[:-1])) / -math.expm1(-width), 0.0, under_p)
    mass = np.zeros(len(edges))
    mass[:-1] += under_p - right
    mass[1:] += right
    mass[0] += max(0.0, 1.0 - float(mass.sum()))
    return first, mass


def _loss_at(x: float, sigma: float, rate: float) -> float:
    """log of (mixture density / N(0, σ²) density) at x."""
    absent = math.log1p(-rate) if rate < 1 else -math.inf
    return float(np.logaddexp(absent, math.log(rate) + (2 * x - 1) / (2 * sigma * sigma)))


def _masses(edges: Floats, sigma: float, rate: float) -> tuple[Floats, Floats]:
    """Mass of N(0, σ²) and of the mixture where `_loss_at` lies between consecutive edges; shape [edges − 1] each."""
    if rate == 1:
        x: Floats = sigma * sigma * edges + 0.5
    else:
        ratio = np.expm1(edges) / rate
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.where(ratio > -1, sigma * sigma * np.log1p(ratio) + 0.5, -np.inf)
    without, present = _between(x / sigma), _between((x - 1) / sigma)
    return without, (1 - rate) * without + rate * present


def _between(x: Floats) -> Floats:
    """Standard normal mass between consecutive points, each from the side where nothing cancels."""
    left, right = x[:-1], x[1:]
    found: Floats = np.where(left > 0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left))
    return found


def _epsilon(parts: Sequence[_Part], width: float, delta: float, cut: float) -> float:
    """Compose them and read ε off."""
    bottom, top = _window(parts, width, cut)
    size = fft.next_fast_len(top - bottom + 1, real=True)
    if size > _MOST_POINTS or (bottom + size) * width > _LARGEST_LOSS:
        raise ValueError("the run's loss has too many points or is too large")
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for first, mass, count in parts:
        circle = np.bincount((first + np.arange(len(mass))) % size, weights=mass, minlength=size)
        spectrum *= fft.rfft(circle) ** count
    composed = fft.irfft(spectrum, size)
    start = max(bottom, 0)  # ε < 0 is of no use
    index = np.arange(start, bottom + size)
    tail, loss = np.maximum(composed[index % size], 0.0)[::-1], (index * width)[::-1]
    # Infinite: above one release's grid, above the window. The last two parts are for rounding.
    wanted = delta - 4 * cut
    above = np.cumsum(tail)
    weighted = np.cumsum(tail * np.exp(-loss))
    reached = above - np.exp(loss) * weighted  # δ(ε) at ε = loss; grows as the loss falls
    at = int(np.searchsorted(reached, wanted, side="right")) - 1
    if at < 0:
        raise ValueError("the window does not resolve δ")
    if above[at] <= wanted:
        return 0.0
    return max(0.0, math.log((float(above[at]) - wanted) / float(weighted[at])))


def _window(parts: Sequence[_Part], width: float, cut: float) -> tuple[int, int]:
    """Grid indices between which the sum lies but for at most `cut` on either side, by Chernoff's bound."""
    top = bottom = variance = 0.0
    found = list[tuple[Floats, Floats, int]]()
    for first, mass, count in parts:
        index = first + np.arange(len(mass))
        occupied = mass > 0
        loss = np.asarray(index[occupied] * width, dtype=np.float64)
        mean = float(np.dot(mass[occupied], loss))
        variance += count * max(float(np.dot(mass[occupied], (loss - mean) ** 2)), width * width)
        found.append((np.log(mass[occupied]), loss, count))
        top, bottom = top + float(count * index[-1]), bottom + float(count * index[0])
    spread, need = math.sqrt(variance), math.log(1 / cut)
    # Around the best t of a Gaussian sum, and where a single rare release decides.
    for t in (*(math.sqrt(2 * need) / spread * np.geomspace(0.1, 4.0, 10)), 0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        above = sum(count * float(logsumexp(logs + t * loss)) for logs, loss, count in found)
        below = sum(count * float(logsumexp(logs - t * loss)) for logs, loss, count in found)
        top, bottom = min(top, (above + need) / t / width), max(bottom, -(below + need) / t / width)
    return math.floor(bottom), math.ceil(top)
