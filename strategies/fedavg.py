"""Federated averaging (McMahan et al. 2017), with public weights and a server learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.strategies.base import State, StepInput, Strategy

__all__ = ["FedAvg"]


@dataclass(frozen=True, slots=True)
class FedAvg(Strategy):
    """w ← w + η · Σ nᵢ Δᵢ / Σ nᵢ."""

    server_learning_rate: float = 1.0

    def initial_state(self, size: int) -> State:
        """No memory."""
        return ()

    def step(self, given: StepInput) -> tuple[NDArray[np.float32], State]:
        """See the class."""
        scale = self.server_learning_rate / given.weight
        return (given.model.astype(np.float64) + given.total * scale).astype(np.float32), given.state
