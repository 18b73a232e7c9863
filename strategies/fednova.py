"""FedNova (Wang et al. 2020): sites may take different numbers of steps τᵢ without pulling the model their own way.

Each update is divided by its number of steps, the mean is multiplied by the mean number:
w ← w + η · τ_eff · Σ nᵢ (Δᵢ / τᵢ) / Σ nᵢ, with τ_eff = Σ nᵢ τᵢ / Σ nᵢ over the cohort (plain SGD at the sites).

τᵢ are public constants of the manifest, never counted in data. A site divides before it seals (it sends Δᵢ · τ / τᵢ,
with τ = `training.local_steps`, so that ranges fit), hence a sum is enough. τᵢ ≤ τ, and every site is charged for τ
steps: a site that takes fewer is charged too much, never too little. Without `steps` all τᵢ are τ: this is FedAvg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from confide.protocol.manifest import Manifest
from confide.strategies.base import Refused, State, StepInput, Strategy, Weights, moved

__all__ = ["FedNova"]


@dataclass(frozen=True, slots=True)
class FedNova(Strategy):
    """`steps`: local steps of those sites that do not take the manifest's number. No memory."""

    server_learning_rate: float = 1.0
    steps: Mapping[str, int] | None = None

    def steps_of(self, site: str, most: int) -> int:
        """τᵢ."""
        return (self.steps or {}).get(site, most)

    def factor(self, site: str, most: int) -> float:
        """τ / τᵢ."""
        return most / self.steps_of(site, most)

    def refusal(self, manifest: Manifest) -> Refused | None:
        """Names and numbers must be the run's; dividing by τᵢ normalises plain SGD only."""
        training, roster = manifest.training, {m.site for m in manifest.members}
        if unknown := sorted(set(self.steps or {}) - roster):
            return f"strategy.steps names {unknown[0]!r}, which is no site of the run", (
                f"the sites are {', '.join(sorted(roster))}"
            )
        if any(n > training.local_steps for n in (self.steps or {}).values()):
            return f"strategy.steps asks for more than training.local_steps = {training.local_steps}", (
                "raise training.local_steps: every site is charged for that many"
            )
        if training.optimizer != "sgd" or training.momentum:
            return "fednova normalises plain SGD at the sites", "set training.optimizer = 'sgd', training.momentum = 0"
        return None

    def initial_state(self, size: int) -> State:
        """No memory."""
        return ()

    def step(self, given: StepInput) -> tuple[Weights, State]:
        """See the module."""
        # fsum is correctly rounded: the same number from every version of Python.
        taken = math.fsum(weight * self.steps_of(site, given.local_steps) for site, weight in given.cohort)
        share = taken / given.weight / given.local_steps
        return moved(given.model, given.average * (self.server_learning_rate * share)), given.state
