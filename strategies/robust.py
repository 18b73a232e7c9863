"""What strategies that read single updates have in common: sites that send anything at all are outvoted.

They are for profile `open`: under every other profile nobody sees an update by itself, which is the point of sealing.
All sites get all updates and compute the result themselves, from the same integers (`confide.strategies.grid`). Each
site counts once, whatever its population: a declared population must not be a vote.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from confide.protocol.manifest import Manifest
from confide.strategies.base import Floats, Refused, State, StepInput, Strategy, Weights, moved

__all__ = ["RobustStrategy", "mean_of"]


@dataclass(frozen=True, slots=True)
class RobustStrategy(Strategy):
    """w ← w + η · (a robust centre of the updates). No memory."""

    single_updates: ClassVar[bool] = True
    server_learning_rate: float = 1.0

    @abstractmethod
    def centre(self, given: StepInput) -> Floats:
        """The centre of the single updates, float64 [d]."""

    @abstractmethod
    def too_few(self, sites: int) -> Refused | None:
        """Why so many sites are too few to outvote anybody; None where they are enough."""

    def refusal(self, manifest: Manifest) -> Refused | None:
        """The smallest cohort that the run allows must be enough."""
        return self.too_few(manifest.min_sites)

    def initial_state(self, size: int) -> State:
        """No memory."""
        return ()

    def step(self, given: StepInput) -> tuple[Weights, State]:
        """See the class."""
        return moved(given.model, self.centre(given) * self.server_learning_rate), given.state


def mean_of(rows: np.ndarray[tuple[int, ...], np.dtype[np.int64]], unit: float) -> Floats:
    """The mean of integer rows: their exact sum, then one multiplication and one division."""
    return np.asarray(rows.sum(axis=0).astype(np.float64) * unit / len(rows), dtype=np.float64)
