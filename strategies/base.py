"""A strategy: a pure function from (model, sum, state) to the next (model, state).

The step is replicated: every site computes it and all must get the same bits. So only elementwise float64
+ − × ÷ √ in numpy are allowed (reductions, transcendentals and torch differ between processors), and exact integers,
which may be reduced in any order. Scalars come from the manifest; what grows with the rounds (a power of β) is a
running product in the state, multiplied once a step. Weights are rounded once, to float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from confide.protocol.manifest import Manifest

__all__ = ["Refused", "State", "StepInput", "Strategy", "moved"]

Floats = NDArray[np.float64]
Weights = NDArray[np.float32]
#: A strategy's memory: float64 vectors, in a fixed order.
State = tuple[Floats, ...]
#: Why a run cannot have a strategy, and what to do instead.
Refused = tuple[str, str]


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a step may use. K sites are in the cohort, d is the number of parameters.

    Attributes:
        model: Current weights, float32 [d].
        total: Σ over the cohort of weight × (trained − current), float64 [d].
        weight: Σ of the cohort's public weights.
        state: The strategy's memory.
        control: Σ over the cohort of weight × change of the site's control variate, float64 [d]; None without them.
        roster_weight: Σ of the whole roster's public weights.
        cohort: The cohort's sites and public weights, in the order of names.
        local_steps: The manifest's number of local steps.
        updates: For a strategy that reads single updates: each site's, unweighted, in the order of `cohort`, as whole
            multiples of `unit`, int64 [K, d]; None for all others. Every weight is 1 then.
        unit: What one step of `updates` is worth.
    """

    model: Weights
    total: Floats
    weight: float
    state: State
    control: Floats | None = None
    roster_weight: float = 1.0
    cohort: tuple[tuple[str, float], ...] = ()
    local_steps: int = 1
    updates: NDArray[np.int64] | None = None
    unit: float = 1.0

    @property
    def average(self) -> Floats:
        """Σ nᵢ Δᵢ / Σ nᵢ."""
        return self.total / self.weight

    def single(self) -> NDArray[np.int64]:
        """The single updates.

        Raises:
            ValueError: The run has none.
        """
        if self.updates is None:
            raise ValueError("this strategy reads single updates")
        return self.updates


class Strategy(ABC):
    """One way to turn the sites' updates into the next model."""

    #: Must it look at each site's update by itself? Then it runs under profile `open` only.
    single_updates: ClassVar[bool] = False
    #: Do sites correct their steps by control variates (SCAFFOLD)? Then `state[0]` is the sites' common one.
    control_variates: ClassVar[bool] = False

    @property
    def proximal(self) -> float:
        """μ: sites add μ · (weights − the round's weights) to each local step's gradient."""
        return 0.0

    def steps_of(self, site: str, most: int) -> int:
        """A site's local steps, a public constant; at most the manifest's, which every site is charged for."""
        return most

    def factor(self, site: str, most: int) -> float:
        """A public constant that a site multiplies its update by, besides its weight, before it is sealed."""
        return 1.0

    def refusal(self, manifest: Manifest) -> Refused | None:
        """Why a run cannot have this strategy: (what is wrong, what to do); None where it can."""
        return None

    @abstractmethod
    def initial_state(self, size: int) -> State:
        """The memory before the first step, for `size` parameters."""

    @abstractmethod
    def step(self, given: StepInput) -> tuple[Weights, State]:
        """The next model and memory."""


def moved(model: Weights, by: Floats) -> Weights:
    """Weights after a step, rounded once."""
    return (model.astype(np.float64) + by).astype(np.float32)
