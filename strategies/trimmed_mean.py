"""Coordinate-wise trimmed mean (Yin et al. 2018): of K updates the ⌊trim · K⌋ largest and as many smallest values of
each coordinate are left out, the others are averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from confide.strategies.base import Floats, Refused, StepInput
from confide.strategies.robust import RobustStrategy, mean_of

__all__ = ["TrimmedMean"]


@dataclass(frozen=True, slots=True)
class TrimmedMean(RobustStrategy):
    """`trim` lies in (0, 0.5)."""

    trim: float = 0.2

    def too_few(self, sites: int) -> Refused | None:
        """With nothing cut off it is a plain mean, which anybody can move anywhere."""
        if int(self.trim * sites):
            return None
        needed = math.ceil(1 / self.trim)
        return (
            f"trimmed_mean with trim = {self.trim:g} cuts nothing off {sites} updates",
            f"set strategy.trim to at least {math.ceil(100 / sites) / 100:g}, or sites.min_sites = {needed}",
        )

    def centre(self, given: StepInput) -> Floats:
        """The mean of what is left."""
        ordered = np.sort(given.single(), axis=0)
        cut = int(self.trim * len(ordered))
        return mean_of(ordered[cut : len(ordered) - cut], given.unit)
