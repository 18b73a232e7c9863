"""Which sites of a simulation train in one stack, and which process has which sites.

Sums of floating-point numbers depend on their order, and so a site's update on who is in its stack, in the last bits.
So the stacks follow from the run alone: however many processes there are, each has whole groups, and the model is the
same to the bit where a seed fixes every draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["TOGETHER", "Grouping"]

#: Sites of one stack, about: more of them no longer fit the processor's caches together.
TOGETHER = 8
_MOST_GROUPS = 64


@dataclass(frozen=True, slots=True)
class Grouping:
    """Sites by their number, dealt out in turn.

    Args:
        groups: How many there are.
        stack: Most sites that train at once; a larger group is trained in several stacks.
    """

    groups: int = 1
    stack: int = 1

    @classmethod
    def of_cohort(cls, cohort: int, together: int = TOGETHER) -> Grouping:
        """For rounds of so many sites, `together` of which train at once, about."""
        if together < 2:
            return cls(min(_MOST_GROUPS, cohort), 1)
        return cls(min(_MOST_GROUPS, max(1, round(cohort / together))), 2 * together)

    def of(self, number: int) -> int:
        """The group of the site with this number."""
        return number % self.groups

    def dealt(self, weights: Sequence[float], processes: int) -> Mapping[int, int]:
        """By group, the process that has it: the heaviest first, each to whoever has least.

        Args:
            weights: What each site costs, by its number.
            processes: How many there are.
        """
        heavy = [0.0] * self.groups
        for number, weight in enumerate(weights):
            heavy[self.of(number)] += weight
        loads, found = [0.0] * processes, dict[int, int]()
        for group in sorted(range(self.groups), key=lambda g: (-heavy[g], g)):
            found[group] = loads.index(min(loads))
            loads[found[group]] += heavy[group]
        return found
