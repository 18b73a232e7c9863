"""Multi-Krum (Blanchard et al. 2017): the mean of the m updates with the lowest Krum scores."""

from __future__ import annotations

from dataclasses import dataclass

from confide.strategies.base import Floats, Refused, StepInput
from confide.strategies.krum import Krum, ranked
from confide.strategies.robust import mean_of

__all__ = ["MultiKrum"]


@dataclass(frozen=True, slots=True)
class MultiKrum(Krum):
    """`keep` is m; None: K − f − 2, as many as a score looks at."""

    keep: int | None = None

    def too_few(self, sites: int) -> Refused | None:
        """As for Krum; and what is kept must leave out as many as may be anything."""
        most = sites - self.byzantine
        if self.keep is not None and self.keep > most:
            return (
                f"multi_krum with keep = {self.keep} leaves out fewer than byzantine = {self.byzantine} of {sites}",
                f"set strategy.keep to at most {most}",
            )
        return super(MultiKrum, self).too_few(sites)

    def centre(self, given: StepInput) -> Floats:
        """The mean of the chosen updates."""
        updates = given.single()
        keep = self.keep if self.keep is not None else max(1, len(updates) - self.byzantine - 2)
        return mean_of(updates[ranked(updates, self.byzantine)[:keep]], given.unit)
