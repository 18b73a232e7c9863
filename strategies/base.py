"""A strategy: a pure function from (model, sum, state) to the next (model, state).

The step is replicated: every site computes it and all must get the same bits. So only elementwise float64
+ − × ÷ √ in numpy are allowed (reductions, transcendentals and torch differ between processors), scalars come from
the manifest, and weights are rounded once, to float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["State", "StepInput", "Strategy"]

#: A strategy's memory: float64 vectors, in a fixed order.
State = tuple[NDArray[np.float64], ...]


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a step may use.

    Attributes:
        model: Current weights, float32 [d].
        total: Σ over the cohort of weight × (trained − current), float64 [d].
        weight: Σ of the cohort's public weights.
        state: The strategy's memory.
    """

    model: NDArray[np.float32]
    total: NDArray[np.float64]
    weight: float
    state: State


class Strategy(ABC):
    """One way to turn a sum into the next model."""

    @abstractmethod
    def initial_state(self, size: int) -> State:
        """The memory before the first step, for `size` parameters."""

    @abstractmethod
    def step(self, given: StepInput) -> tuple[NDArray[np.float32], State]:
        """The next model and memory."""
