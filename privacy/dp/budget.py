"""The ledger's budget: a Rényi filter.

Invariant (Feldman, Zrnic 2021, Theorem 4.2; Lécuyer 2021): let B(α) be fixed before the first charge. If every
charge is admitted only while Σ ρ(α) ≤ B(α) at each retained order, then everything released is (α, B(α))-Rényi
private at those orders, *although each charge may be chosen after seeing all earlier releases*. B is chosen such
that this converts to (ε limit, δ).

One order is retained: the one at which a Gaussian consumer gets most out of the limit. More orders could only
refuse more, for the same guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from confide.privacy.dp.accounting import ORDERS, conversion, rdp
from confide.privacy.dp.events import PrivacyEvent

__all__ = ["RenyiBudget"]


@dataclass(frozen=True, slots=True)
class RenyiBudget:
    """B(α) at the retained orders, and the (ε limit, δ) it stands for."""

    epsilon_limit: float
    delta: float
    orders: tuple[float, ...]
    limits: tuple[float, ...]

    @classmethod
    def for_limit(cls, epsilon_limit: float, delta: float) -> RenyiBudget:
        """The budget that guarantees (ε limit, δ)."""
        order = max(ORDERS, key=lambda a: (epsilon_limit - conversion(a, delta)) / a)
        return cls(epsilon_limit, delta, (float(order),), (epsilon_limit - conversion(order, delta),))

    def used(self, events: Sequence[PrivacyEvent]) -> float:
        """The largest used share over the retained orders; 1.0 is all of it. Shares of runs add up."""
        if not any(e.steps for e in events):
            return 0.0
        return max(rdp(events, a) / b if b > 0 else float("inf") for a, b in zip(self.orders, self.limits, strict=True))

    def admits(self, events: Sequence[PrivacyEvent]) -> bool:
        """May exactly these events (history and the next charge together) be held?"""
        return self.used(events) <= 1.0
