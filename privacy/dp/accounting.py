"""From events to (ε, δ).

- `rdp`: Rényi divergence of order α of the sampled Gaussian (Mironov, Talwar, Zhang 2019), through Opacus.
- `rdp_epsilon`: the conversion of Canonne, Kamath, Steinke 2020, Proposition 12, as in Opacus.
- `run_epsilon`, `person_epsilon`: for *one run whose parameters were fixed beforehand*: the distribution of the privacy
  loss (`loss_distribution`; within 0.2 % of the true value from above), exact for the unsampled Gaussian (Balle, Wang
  2018). They are no privacy filter; a ledger of adaptively chosen runs uses `rdp` only.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from confide.privacy.dp.events import PrivacyEvent, Role
from confide.privacy.dp.loss_distribution import Releases, composed_loss_epsilon

__all__ = [
    "LEDGER_LABEL",
    "ORDERS",
    "RUN_LABEL",
    "composed_epsilon",
    "gaussian_epsilon",
    "person_epsilon",
    "rdp",
    "rdp_epsilon",
    "run_epsilon",
    "run_label",
    "sampled_gaussian_rdp",
]

#: How an ε is labelled wherever it is shown: the two kinds must never be taken for each other.
RUN_LABEL = "PRV: this run alone, its parameters fixed beforehand"
LEDGER_LABEL = "RDP filter: sound although later runs are chosen after seeing earlier ones"


def run_label(sites: int) -> str:
    """`RUN_LABEL`, and over how many sites a person's loss is composed where she may lie at several."""
    return RUN_LABEL if sites == 1 else f"{RUN_LABEL}; composed over up to {sites} sites of a person"


#: Orders at which losses are reported.
ORDERS: tuple[float, ...] = (
    *(1 + x / 20 for x in range(1, 80)), *(5 + x / 4 for x in range(20)), *range(10, 64), 80, 96, 128, 192, 256, 512,
)  # fmt: skip
#: Enough of them to say roughly how large an ε is; whole, because at those the divergence is quickly computed.
_FEW_ORDERS: tuple[float, ...] = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 80, 128, 256, 512)


def _opacus_rdp() -> ModuleType:
    """Opacus's module `opacus.accountants.analysis.rdp`, which needs numpy and scipy only: the package around it would
    import `torch.distributed` and more, which takes most of a second whenever a command starts."""
    package = importlib.util.find_spec("opacus")
    folder = next(iter((package and package.submodule_search_locations) or ()), None)
    if folder is None:
        raise ImportError("Opacus is not installed")
    file = Path(folder, "accountants", "analysis", "rdp.py")
    spec = importlib.util.spec_from_file_location("confide.privacy.dp._opacus_rdp", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_rdp = _opacus_rdp()


@functools.lru_cache(maxsize=4096)
def sampled_gaussian_rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Rényi divergence of order `order` of one sampled Gaussian release; +∞ where it cannot be bounded."""
    value = float(_rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=float(order)))
    return value if math.isfinite(value) and value >= 0 else math.inf


def rdp(events: Sequence[PrivacyEvent], order: float) -> float:
    """Sum of the events' divergences at one order."""
    return sum(e.releases * sampled_gaussian_rdp(e.noise_multiplier, e.sample_rate, order) for e in events if e.steps)


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
        upper = float(ndtr(mu / 2 - epsilon / mu))
        lower: float = math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))
        return upper - lower - delta

    if excess(0.0) <= 0:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1.0  # from the Gaussian's tail bound
    return float(brentq(excess, 0.0, high, xtol=1e-9)) + 1e-9


def run_epsilon(event: PrivacyEvent, delta: float) -> float:
    """ε of one run whose parameters were fixed before it started. Never below the true value. Where the unit may lie at
    several sites, it is the run of all of them."""
    return composed_epsilon([event], delta)


def composed_epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """The same of releases of several kinds, all of them fixed before the first and all of them of one unit."""
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            kind = (event.noise_multiplier, event.sample_rate)
            counts[kind] = counts.get(kind, 0) + event.releases
    if not counts:
        return 0.0
    if all(rate == 1.0 for _, rate in counts):
        if len(counts) == 1:
            (((sigma, _), releases),) = counts.items()
            return gaussian_epsilon(math.sqrt(releases) / sigma, delta)
        return gaussian_epsilon(math.sqrt(sum(n / sigma**2 for (sigma, _), n in counts.items())), delta)
    return _prv_epsilon(tuple((*kind, n) for kind, n in sorted(counts.items())), delta)


def person_epsilon(events: Sequence[PrivacyEvent], delta: float) -> float:
    """What a run costs a person at most, from all that it charges, whichever roles.

    At one site she holds one role for ever. Where she may lie at m sites, each of them gives her a role without asking
    the others: so she is in the releases of one role at j of them and of the other at m − j, with the worst j.
    """
    sites = max((e.sites for e in events), default=1)
    train, held_out = ([e for e in events if e.role is role] for role in (Role.TRAIN, Role.HELD_OUT))
    return max(
        composed_epsilon([*_at(j, train), *_at(sites - j, held_out)], delta) for j in range(sites + 1)
    )  # fmt: skip


def _at(sites: int, events: Iterable[PrivacyEvent]) -> list[PrivacyEvent]:
    return [replace(e, sites=sites) for e in events] if sites else []


@functools.lru_cache(maxsize=1024)
def _prv_epsilon(run: tuple[Releases, ...], delta: float) -> float:
    events = [
        PrivacyEvent(role=Role.TRAIN, unit="subject", noise_multiplier=sigma, sample_rate=rate, steps=n,
                     max_grad_norm=1.0)  # any role: only σ, q and the number count
        for sigma, rate, n in run
    ]  # fmt: skip
    value = _best(events, delta, _FEW_ORDERS)
    try:
        for _ in range(2):  # the grid follows what is already known of the answer
            value = min(value, composed_loss_epsilon(run, delta, about=value))
    except ValueError:
        return min(value, rdp_epsilon(events, delta))  # outside the grid's domain: the looser bound is still a bound
    return value


def rdp_curve(events: Sequence[PrivacyEvent], orders: Sequence[float]) -> NDArray[np.float64]:
    """The summed divergences at several orders; shape [orders]."""
    return np.array([rdp(events, a) for a in orders], dtype=np.float64)
