"""FedNova (Wang et al. 2020): sites may take different numbers of steps τᵢ without pulling the model their own way.

Each update is divided by its number of steps, the mean is multiplied by the mean number:
w ← w + η · τ_eff · Σ nᵢ (Δᵢ / τᵢ) / Σ nᵢ, with τ_eff = Σ nᵢ τᵢ / Σ nᵢ over the cohort (plain SGD at the sites).

A site divides before it seals (it sends Δᵢ · τ / τᵢ, with τ = `training.local_steps`, so that ranges fit), hence a sum
is enough. Where all τᵢ are τ, as without `steps`, this is FedAvg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from confide.strategies.base import State, StepInput, Weights, moved
from confide.strategies.unequal import UnequalSteps

__all__ = ["FedNova"]


@dataclass(frozen=True, slots=True)
class FedNova(UnequalSteps):
    """No memory."""

    def factor(self, site: str, most: int) -> float:
        """τ / τᵢ."""
        return most / self.steps_of(site, most)

    def initial_state(self, size: int) -> State:
        """No memory."""
        return ()

    def step(self, given: StepInput) -> tuple[Weights, State]:
        """See the module."""
        # fsum is correctly rounded: the same number from every version of Python.
        taken = math.fsum(weight * self.steps_of(site, given.local_steps) for site, weight in given.cohort)
        share = taken / given.weight / given.local_steps
        return moved(given.model, given.average * (self.server_learning_rate * share)), given.state
