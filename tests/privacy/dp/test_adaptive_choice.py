"""A run chosen after seeing what the first one released: why a ledger does not admit by the (tighter) PRV accountant.

The first run is a Gaussian release. Each of several second runs would, together with it, cost exactly (ε, δ) by its
privacy-loss distribution. Whoever chooses among them by the loss that the first run realised spends more than δ: a
privacy-loss accountant is no filter over adaptively chosen runs (Rogers et al. 2016; Feldman, Zrnic 2021). Computed on
a grid of losses, after Koskela et al. 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from confide.privacy.dp import PrivacyEvent, RenyiBudget, Role

Floats = NDArray[np.float64]
EPSILON, DELTA, FIRST_MU = 2.0, 1e-5, 0.35
GRID = np.linspace(-40, 40, 2**16, endpoint=False)
STEP = GRID[1] - GRID[0]
#: Second runs: (q, steps); their σ is what makes the pair cost exactly (ε, δ).
CANDIDATES = ((1.0, 1), (0.001, 1), (0.001, 100), (0.01, 100), (0.1, 200))


def gaussian_losses(mu: float) -> Floats:
    """Mass of each loss of a Gaussian release with sensitivity/σ = mu."""
    return np.asarray(norm.cdf(GRID + STEP / 2, mu * mu / 2, mu) - norm.cdf(GRID - STEP / 2, mu * mu / 2, mu))


def sampled_losses(sigma: float, rate: float, steps: int) -> Floats:
    """The same for `steps` sampled Gaussian releases, losses rounded up."""
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 60_001)
    mass = np.diff((1 - rate) * norm.cdf(x, 0, sigma) + rate * norm.cdf(x, 1, sigma))
    loss = np.log1p(rate * np.expm1((2 * x[1:] - 1) / (2 * sigma * sigma)))
    cells = np.clip(np.ceil((loss - GRID[0]) / STEP).astype(int), 0, len(GRID) - 1)
    single = np.bincount(cells, weights=mass, minlength=len(GRID))
    zero = round(-GRID[0] / STEP)
    composed = np.fft.irfft(np.fft.rfft(np.roll(single, -zero)) ** steps, len(GRID))
    return np.asarray(np.roll(composed, zero))


def deltas_after(first_losses: Floats, second: Floats) -> Floats:
    """δ that the second run adds where the first one realised each of these losses."""
    mass = np.cumsum(second[::-1])[::-1]
    weighted = np.cumsum((second * np.exp(-GRID))[::-1])[::-1]
    left = EPSILON - first_losses
    at = np.minimum(np.searchsorted(GRID, left, side="right"), len(GRID) - 1)
    return np.asarray(np.maximum(mass[at] - np.exp(np.minimum(left, 100)) * weighted[at], 0))


@dataclass(frozen=True)
class Second:
    sigma: float
    rate: float
    steps: int
    deltas: Floats

    @property
    def event(self) -> PrivacyEvent:
        return PrivacyEvent(
            role=Role.TRAIN, unit="subject", noise_multiplier=self.sigma, sample_rate=self.rate, steps=self.steps,
            max_grad_norm=1.0,
        )  # fmt: skip


@pytest.fixture(scope="module")
def first() -> Floats:
    return gaussian_losses(FIRST_MU)


@pytest.fixture(scope="module")
def seconds(first: Floats) -> list[Second]:
    """The candidates, each calibrated so that the pair costs exactly (ε, δ)."""

    def losses(sigma: float, rate: float, steps: int) -> Floats:
        return gaussian_losses(1 / sigma) if rate == 1.0 else sampled_losses(sigma, rate, steps)

    found = []
    for rate, steps in CANDIDATES:

        def excess(sigma: float, rate: float = rate, steps: int = steps) -> float:
            total = float(first @ deltas_after(GRID, losses(sigma, rate, steps)))
            return float(np.log(total + 1e-300) - np.log(DELTA))

        sigma = float(brentq(excess, 0.2, 40, xtol=2e-3))
        found.append(Second(sigma, rate, steps, deltas_after(GRID, losses(sigma, rate, steps))))
    return found


def test_each_pair_alone_costs_what_was_asked(first: Floats, seconds: list[Second]) -> None:
    for second in seconds:
        assert float(first @ second.deltas) == pytest.approx(DELTA, rel=0.25)


def test_choosing_among_them_after_seeing_the_first_costs_more(first: Floats, seconds: list[Second]) -> None:
    adaptive = float(first @ np.max([second.deltas for second in seconds], axis=0))
    assert adaptive > 1.3 * max(float(first @ second.deltas) for second in seconds)


def test_our_filter_admits_none_of_them_and_what_it_admits_stays_within_delta_whoever_chooses(
    first: Floats, seconds: list[Second]
) -> None:
    budget = RenyiBudget.for_limit(EPSILON, DELTA)
    history = PrivacyEvent(
        role=Role.TRAIN, unit="subject", noise_multiplier=1 / FIRST_MU, sample_rate=1.0, steps=1, max_grad_norm=1.0
    )
    assert budget.admits([history]), "the control: the first run alone is admitted"
    assert not any(budget.admits([history, second.event]) for second in seconds)
    admitted = []
    for second in seconds:
        low, high = second.sigma, 50.0
        while high / low > 1.005:
            middle = (low * high) ** 0.5
            event = Second(middle, second.rate, second.steps, second.deltas).event
            low, high = (low, middle) if budget.admits([history, event]) else (middle, high)
        mass = gaussian_losses(1 / high) if second.rate == 1.0 else sampled_losses(high, second.rate, second.steps)
        admitted.append(deltas_after(GRID, mass))
    assert float(first @ np.max(admitted, axis=0)) <= DELTA
