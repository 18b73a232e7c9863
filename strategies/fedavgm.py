"""FedAvgM (Hsu et al. 2019): federated averaging with momentum at the server.

v ← β v + Δ, w ← w + η v, with Δ the weighted mean of the updates and v = 0 at first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from confide.strategies.base import State, StepInput, Strategy, Weights, moved

__all__ = ["FedAvgM"]


@dataclass(frozen=True, slots=True)
class FedAvgM(Strategy):
    """State: v."""

    server_learning_rate: float = 1.0
    momentum: float = 0.9

    def initial_state(self, size: int) -> State:
        """At rest."""
        return (np.zeros(size),)

    def step(self, given: StepInput) -> tuple[Weights, State]:
        """See the module."""
        speed = given.state[0] * self.momentum + given.average
        return moved(given.model, speed * self.server_learning_rate), (speed,)
