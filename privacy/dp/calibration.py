"""The noise a run needs, from public inputs only; never from anyone's remaining budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from scipy.optimize import brentq

from confide.errors import BudgetError
from confide.privacy.dp.accounting import person_epsilon, run_epsilon
from confide.privacy.dp.budget import RenyiBudget
from confide.privacy.dp.events import PrivacyEvent

__all__ = ["calibrate", "calibrate_run"]

_LARGEST = 1e6
_SMALLEST = 0.05
_PRECISION = 1e-3
_TINY = 1e-12


def calibrate(event: PrivacyEvent, epsilon: float, budget: RenyiBudget) -> float:
    """The smallest σ (to 0.1 %, rounded up) with which `event`, as a whole run, costs at most ε.

    It also fits an empty ledger of this budget, so that a run asking for the whole limit is admitted.

    Args:
        event: The run; its `noise_multiplier` is ignored.
        epsilon: What the run may cost a person, at the budget's δ.
        budget: The ledger's budget curve.

    Raises:
        BudgetError: No noise below σ = 10⁶ is enough.
    """

    def at(sigma: float) -> PrivacyEvent:
        return replace(event, noise_multiplier=sigma)

    def over_budget(log_sigma: float) -> float:
        return math.log(max(budget.used([at(math.exp(log_sigma))]), _TINY))

    def over_epsilon(log_sigma: float) -> float:
        return math.log(max(run_epsilon(at(math.exp(log_sigma)), budget.delta), _TINY) / epsilon)

    try:
        sigma = max(math.exp(_root(excess)) for excess in (over_budget, over_epsilon))
        while not budget.admits([at(sigma)]) or run_epsilon(at(sigma), budget.delta) > epsilon:
            sigma *= 1 + _PRECISION / 4  # the accountant's own grid is not perfectly smooth
    except _NoRoot:
        raise BudgetError(
            f"no noise makes {event.steps} steps at sample rate {event.sample_rate:g} cost ε ≤ {epsilon:g}",
            hint="lower rounds, local_steps or sample_rate, or raise epsilon",
        ) from None
    return _rounded_up(sigma)


def calibrate_run(
    train: PrivacyEvent, held_out: PrivacyEvent, epsilon: float, budget: RenyiBudget
) -> tuple[float, float]:
    """σ of training and of what the held-out persons pay for, such that the run costs nobody more than ε.

    At one site a person holds one role, so each is calibrated by itself. Where she may lie at several, she may be in
    both, and σ of both grow by the same factor until no division of the sites among the roles costs more.

    Raises:
        BudgetError: No noise below σ = 10⁶ is enough.
    """
    found = calibrate(train, epsilon, budget), calibrate(held_out, epsilon, budget)
    if max(train.sites, held_out.sites) == 1:
        return found
    factor, events = 1.0, (train, held_out)
    while True:
        sigmas = [_rounded_up(sigma * factor) if factor > 1 else sigma for sigma in found]
        held = [replace(e, noise_multiplier=sigma) for e, sigma in zip(events, sigmas, strict=True)]
        if person_epsilon(held, budget.delta) <= epsilon:
            return sigmas[0], sigmas[1]
        factor *= 1 + _PRECISION


def _rounded_up(sigma: float) -> float:
    return float(f"{sigma * (1 + 1e-5):.6g}")


class _NoRoot(Exception):
    """Not even the largest noise is enough."""


def _root(excess: Callable[[float], float]) -> float:
    """Where a falling function of log σ reaches 0, to a third of the precision and never before it; Brent's method on
    an interval found by doubling."""
    low = high = 0.0
    at_low = at_high = excess(0.0)
    while at_high > 0:
        low, at_low, high = high, at_high, high + math.log(2)
        if high > math.log(_LARGEST):
            raise _NoRoot
        at_high = excess(high)
    while at_low <= 0:
        if low < math.log(_SMALLEST):
            return low
        high, low = low, low - math.log(2)
        at_low = excess(low)
    tolerance = _PRECISION / 3
    return float(brentq(excess, low, high, xtol=tolerance, rtol=1e-9)) + tolerance
