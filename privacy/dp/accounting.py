"""From events to (ε, δ).

- `rdp`: Rényi divergence of order α of the sampled Gaussian (Mironov, Talwar, Zhang 2019), through Opacus.
- `rdp_epsilon`: the conversion of Canonne, Kamath, Steinke 2020, Proposition 12, as in Opacus.
- `run_epsilon`: for *one run whose parameters were fixed beforehand*: the distribution of the privacy loss
  (`loss_distribution`; within 0.2 % of the true value from above), exact for the unsampled Gaussian (Balle, Wang 2018).
  It is no privacy filter; a ledger of adaptively chosen runs uses `rdp` only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis import rdp as _rdp
from scipy.optimize import brentq
from scipy.stats import norm

from confide.privacy.dp.events import PrivacyEvent
from confide.privacy.dp.loss_distribution import loss_epsilon

__all__ = [
    "LEDGER_LABEL",
    "ORDERS",
    "RUN_LABEL",
    "gaussian_epsilon",
    "rdp",
    "rdp_epsilon",
    "run_epsilon",
    "sampled_gaussian_rdp",
]

#: How an ε is labelled wherever it is shown: the two kinds must never be taken for each other.
RUN_LABEL = "PRV: this run alone, its parameters fixed beforehand"
LEDGER_LABEL = "RDP filter: sound although later runs are chosen after seeing earlier ones"
#: Orders at which losses are reported.
ORDERS: tuple[float, ...] = (
    *(1 + x / 20 for x in range(1, 80)), *(5 + x / 4 for x in range(20)), *range(10, 64), 80, 96, 128, 192, 256, 512,
)  # fmt: skip
#: Enough of them to say roughly how large an ε is; whole, because at those the divergence is quickly computed.
_FEW_ORDERS: tuple[float, ...] = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 80, 128, 256, 512)


@functools.lru_cache(maxsize=4096)
def sampled_gaussian_rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Rényi divergence of order `order` of one sampled Gaussian release; +∞ where it cannot be bounded."""
    value = float(_rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=float(order)))
    return value if math.isfinite(value) and value >= 0 else math.inf


def rdp(events: Sequence[PrivacyEvent], order: float) -> float:
    """Sum of the events' divergences at one order."""
    return sum(e.steps * sampled_gaussian_rdp(e.noise_multiplier, e.sample_rate, order) for e in events if e.steps)


def conversion(order: float, delta: float) -> float:
    """ε − ρ(α) of the RDP-to-DP conversion."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def rdp_epsilon(events: Sequence[PrivacyEvent], delta: float) -> float:
    """The smallest ε over `ORDERS` for which the composed events are (ε, δ)-private; 0 without events."""
    if not any(e.steps for e in events):
        return 0.0
    return _best(events, delta, ORDERS)


def _best(events: Sequence[PrivacyEvent], delta: float, orders: Sequence[float]) -> float:
    return max(0.0, min(rdp(events, a) + conversion(a, delta) for a in orders))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact ε of the Gaussian mechanism with sensitivity/σ = `mu`."""

    def excess(epsilon: float) -> float:
        upper: float = norm.cdf(mu / 2 - epsilon / mu)
        lower: float = math.exp(epsilon + float(norm.logcdf(-mu / 2 - epsilon / mu)))
        return upper - lower - delta

    if excess(0.0) <= 0:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1.0  # from the Gaussian's tail bound
    return float(brentq(excess, 0.0, high, xtol=1e-9)) + 1e-9


def run_epsilon(event: PrivacyEvent, delta: float) -> float:
    """ε of one run whose parameters were fixed before it started. Never below the true value."""
    if event.steps == 0:
        return 0.0
    if event.sample_rate == 1.0:
        return gaussian_epsilon(math.sqrt(event.steps) / event.noise_multiplier, delta)
    return _prv_epsilon(event.noise_multiplier, event.sample_rate, event.steps, delta)


@functools.lru_cache(maxsize=1024)
def _prv_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    run = [PrivacyEvent(role="train", unit="subject", noise_multiplier=noise_multiplier, sample_rate=sample_rate,  # type: ignore[arg-type]  # any role: only σ, q and steps count
                        steps=steps, max_grad_norm=1.0)]  # fmt: skip
    value = _best(run, delta, _FEW_ORDERS)
    try:
        for _ in range(2):  # the grid follows what is already known of the answer
            value = min(value, loss_epsilon(noise_multiplier, sample_rate, steps, delta, about=value))
    except ValueError:
        return min(value, rdp_epsilon(run, delta))  # outside the grid's domain: the looser bound is still a bound
    return value


def rdp_curve(events: Sequence[PrivacyEvent], orders: Sequence[float]) -> NDArray[np.float64]:
    """The summed divergences at several orders; shape [orders]."""
    return np.array([rdp(events, a) for a in orders], dtype=np.float64)
