"""FedAdam (Reddi et al. 2021, Algorithm 2), with Adam's bias correction as Flower has it.

Δ is the weighted mean of the updates:
m ← β₁ m + (1 − β₁) Δ, v ← β₂ v + (1 − β₂) Δ², w ← w + η · √(1 − β₂ᵗ⁺¹) / (1 − β₁ᵗ⁺¹) · m / (√v + τ), with
t = 1, 2, … the number of the step. The paper has no correction; Flower's counts rounds from 1, so its exponent starts
at 2, and ours is the same. β₁ᵗ⁺¹ and β₂ᵗ⁺¹ are running products in the state, so that no step needs a power.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from confide.strategies.base import State, StepInput, Strategy, Weights, moved

__all__ = ["FedAdam"]


@dataclass(frozen=True, slots=True)
class FedAdam(Strategy):
    """State: m, v, [β₁ᵗ⁺¹, β₂ᵗ⁺¹]."""

    server_learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def initial_state(self, size: int) -> State:
        """Nothing seen yet: t = 0."""
        return np.zeros(size), np.zeros(size), np.array([self.beta1, self.beta2])

    def step(self, given: StepInput) -> tuple[Weights, State]:
        """See the module."""
        delta = given.average
        first = given.state[0] * self.beta1 + delta * (1 - self.beta1)
        second = given.state[1] * self.beta2 + delta * delta * (1 - self.beta2)
        powers = given.state[2] * np.array([self.beta1, self.beta2])
        rate = self.server_learning_rate * np.sqrt(1 - powers[1]) / (1 - powers[0])
        return moved(given.model, first * rate / (np.sqrt(second) + self.tau)), (first, second, powers)
