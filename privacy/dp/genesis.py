"""A ledger's genesis: what is fixed with it for ever, as the text that its chain starts from."""

from __future__ import annotations

import json
import math

from confide.privacy.dp.accounting import conversion
from confide.privacy.dp.budget import RenyiBudget

__all__ = ["genesis_text", "read_genesis"]


def genesis_text(budget: RenyiBudget, unit: str, held_out: float) -> str:
    """Canonical text: sorted keys, numbers as their shortest exact decimals."""
    return json.dumps(
        {
            "version": 1,
            "unit": unit,
            "held_out": repr(held_out),
            "epsilon_limit": repr(budget.epsilon_limit),
            "delta": repr(budget.delta),
            "orders": [repr(a) for a in budget.orders],
            "limits": [repr(b) for b in budget.limits],
        },
        sort_keys=True,
    )


def read_genesis(text: str) -> tuple[RenyiBudget, str, float]:
    """Inverse of `genesis_text`: budget, unit, share of persons held out.

    The curve is the ledger's own, whatever this version would choose; it must keep the promise (ε limit, δ).

    Raises:
        ValueError: It is no genesis, or its curve does not convert to its limit.
    """
    found = json.loads(text)
    try:
        unit, held_out = found["unit"], float(found["held_out"])
        limit, delta = float(found["epsilon_limit"]), float(found["delta"])
        orders, limits = tuple(map(float, found["orders"])), tuple(map(float, found["limits"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no genesis ({type(error).__name__})") from None
    budget = RenyiBudget(limit, delta, orders, limits)
    if genesis_text(budget, unit, held_out) != text or unit not in ("subject", "record"):
        raise ValueError("no genesis of a known version")
    if not (0 < limit < math.inf and 0 < delta < 1 and 0 <= held_out < 1):
        raise ValueError("a genesis with values that cannot be")
    if len(orders) != len(limits) or not all(1 < a < math.inf for a in orders) or not all(map(math.isfinite, limits)):
        raise ValueError("a genesis without a budget curve")
    promised = min((b + conversion(a, delta) for a, b in zip(orders, limits, strict=True)), default=math.inf)
    if promised > limit * (1 + 1e-9):
        raise ValueError("a budget curve above its limit")
    return budget, unit, held_out
