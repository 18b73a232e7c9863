"""Sites that take different numbers of local steps: public constants of the manifest, never counted in data.

A site may take fewer steps than `training.local_steps`, never more: every site is charged for that many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from confide.protocol.manifest import Manifest
from confide.strategies.base import Refused, Strategy

__all__ = ["UnequalSteps"]


@dataclass(frozen=True, slots=True)
class UnequalSteps(Strategy):
    """`steps`: local steps of those sites that do not take the manifest's number."""

    server_learning_rate: float = 1.0
    steps: Mapping[str, int] | None = None

    def steps_of(self, site: str, most: int) -> int:
        """A site's local steps."""
        return (self.steps or {}).get(site, most)

    def refusal(self, manifest: Manifest) -> Refused | None:
        """Names and numbers must be the run's; a step must be one of plain SGD, so that steps can be counted."""
        training, roster = manifest.training, {m.site for m in manifest.members}
        if unknown := sorted(set(self.steps or {}) - roster):
            return (
                f"strategy.steps names {unknown[0]!r}, which is no site of the run",
                f"the sites are {', '.join(sorted(roster))}",
            )
        if any(n > training.local_steps for n in (self.steps or {}).values()):
            return (
                f"strategy.steps asks for more than training.local_steps = {training.local_steps}",
                "raise training.local_steps: every site is charged for that many",
            )
        if training.optimizer != "sgd" or training.momentum:
            return (
                f"{manifest.strategy.kind} is defined for plain SGD at the sites",
                "set training.optimizer = 'sgd' and training.momentum = 0; fedavgm has its momentum at the server",
            )
        return None
