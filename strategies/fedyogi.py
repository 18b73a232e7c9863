"""FedYogi (Reddi et al. 2021, Algorithm 2): like FedAdam, but its second moment moves by a bounded amount.

m ← β₁ m + (1 − β₁) Δ, v ← v − (1 − β₂) Δ² sign(v − Δ²), w ← w + η m / (√v + τ), with Δ the weighted mean of the
updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from confide.strategies.base import State, StepInput, Strategy, Weights, moved

__all__ = ["FedYogi"]


@dataclass(frozen=True, slots=True)
class FedYogi(Strategy):
    """State: m, v."""

    server_learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def initial_state(self, size: int) -> State:
        """Nothing seen yet."""
        return np.zeros(size), np.zeros(size)

    def step(self, given: StepInput) -> tuple[Weights, State]:
        """See the module."""
        delta = given.average
        square = delta * delta
        first = given.state[0] * self.beta1 + delta * (1 - self.beta1)
        second = given.state[1] - square * (1 - self.beta2) * np.sign(given.state[1] - square)
        return moved(given.model, first * self.server_learning_rate / (np.sqrt(second) + self.tau)), (first, second)
