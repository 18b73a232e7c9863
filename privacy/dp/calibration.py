"""The noise a run needs, from public inputs only; never from anyone's remaining budget."""

from __future__ import annotations

from dataclasses import replace

from confide.errors import BudgetError
from confide.privacy.dp.accounting import run_epsilon
from confide.privacy.dp.budget import RenyiBudget
from confide.privacy.dp.events import PrivacyEvent

__all__ = ["calibrate"]

_LARGEST = 1e6
_PRECISION = 1e-3


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

    def fits(sigma: float) -> bool:
        candidate = replace(event, noise_multiplier=sigma)
        return budget.admits([candidate]) and run_epsilon(candidate, budget.delta) <= epsilon

    high = 1.0
    while not fits(high):
        high *= 2
        if high > _LARGEST:
            raise BudgetError(
                f"no noise makes {event.steps} steps at sample rate {event.sample_rate:g} cost ε ≤ {epsilon:g}",
                hint="lower rounds, local_steps or sample_rate, or raise epsilon",
            )
    low = high / 2 if high > 1.0 else 0.05
    while high / low > 1 + _PRECISION:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return float(f"{high * (1 + 1e-5):.6g}")
