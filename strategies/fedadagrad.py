"""FedAdagrad (Reddi et al. 2021, Algorithm 2): v ← v + Δ², w ← w + η Δ / (√v + τ), with Δ the weighted mean of the
updates and no momentum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from confide.strategies.base import State, StepInput, Strategy, Weights, moved

__all__ = ["FedAdagrad"]


@dataclass(frozen=True, slots=True)
class FedAdagrad(Strategy):
    """State: v."""

    server_learning_rate: float = 0.1
    tau: float = 1e-3

    def initial_state(self, size: int) -> State:
        """Nothing seen yet."""
        return (np.zeros(size),)

    def step(self, given: StepInput) -> tuple[Weights, State]:
        """See the module."""
        delta = given.average
        second = given.state[0] + delta * delta
        return moved(given.model, delta * self.server_learning_rate / (np.sqrt(second) + self.tau)), (second,)
