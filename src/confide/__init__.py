"""confide: federated learning that people can confide in.

`confide.simulate(...)` runs an experiment, `confide.plan(...)` tells beforehand what it would cost,
`confide.sweep(...)` runs it at every point of a grid, and `confide.plan_sweep(...)` tells what that would cost.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from confide.environment import silence_third_parties

silence_third_parties()

if TYPE_CHECKING:
    from confide.simulations import (
        Plan,
        Progress,
        Quote,
        Result,
        Sweep,
        SweepCost,
        SweepProgress,
        plan,
        plan_sweep,
        simulate,
        sweep,
    )

__all__ = [
    "Plan", "Progress", "Quote", "Result", "Sweep", "SweepCost", "SweepProgress", "plan", "plan_sweep", "simulate",
    "sweep",
]  # fmt: skip
__version__ = version("confide")


def __getattr__(name: str) -> Any:
    """Import the simulator only when it is asked for: it brings torch and Flower with it."""
    if name in __all__:
        from confide import simulations

        return getattr(simulations, name)
    raise AttributeError(f"module 'confide' has no attribute {name!r}")
