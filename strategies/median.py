"""Coordinate-wise median (Yin et al. 2018): fewer than half of the sites cannot move a coordinate out of the others'
range. Of an even number of updates it is the mean of the two in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from confide.strategies.base import Floats, Refused, StepInput
from confide.strategies.robust import RobustStrategy, mean_of

__all__ = ["Median"]


@dataclass(frozen=True, slots=True)
class Median(RobustStrategy):
    """See the module."""

    def too_few(self, sites: int) -> Refused | None:
        """A run has three at least, of which one is outvoted."""
        return None

    def centre(self, given: StepInput) -> Floats:
        """The median of each coordinate."""
        ordered = np.sort(given.single(), axis=0)
        return mean_of(ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]], given.unit)
