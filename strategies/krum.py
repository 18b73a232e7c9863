"""Krum (Blanchard et al. 2017): the one update that is nearest to its neighbours.

With K updates of which f may be anything, an update's score is the sum of its squared distances to the K − f − 2 others
nearest to it; the lowest score wins, the first by name among equals. Needs K ≥ 2f + 3. Distances are exact integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.strategies.base import Floats, Refused, StepInput
from confide.strategies.grid import squared_distance
from confide.strategies.robust import RobustStrategy, mean_of

__all__ = ["Krum", "ranked"]


@dataclass(frozen=True, slots=True)
class Krum(RobustStrategy):
    """`byzantine` is f."""

    byzantine: int = 1

    def too_few(self, sites: int) -> Refused | None:
        """K ≥ 2f + 3."""
        needed = 2 * self.byzantine + 3
        if sites >= needed:
            return None
        return (
            f"krum with byzantine = {self.byzantine} needs {needed} updates, and a sum may hold {sites}",
            f"set sites.min_sites = {needed}, or take median, which needs three",
        )

    def centre(self, given: StepInput) -> Floats:
        """The chosen update."""
        updates = given.single()
        return mean_of(updates[ranked(updates, self.byzantine)[:1]], given.unit)


def ranked(updates: NDArray[np.int64], byzantine: int) -> list[int]:
    """Rows by score, lowest first."""
    count = len(updates)
    distance = [[0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            distance[i][j] = distance[j][i] = squared_distance(updates[i], updates[j])
    near = max(1, count - byzantine - 2)
    scores = [sum(sorted(row[:i] + row[i + 1 :])[:near]) for i, row in enumerate(distance)]
    return sorted(range(count), key=lambda i: (scores[i], i))
