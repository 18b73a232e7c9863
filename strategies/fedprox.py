"""FedProx (Li et al. 2020): sites minimise their loss + μ/2 · ‖w − wₜ‖², and so stay near the round's model wₜ.

The proximal term's gradient μ (w − wₜ) is added to a step after clipping and noise (`confide.clients.training`). It is
a function of w and wₜ: of the round's model and of earlier steps that are private already. No record is read for it, so
it is post-processing: it needs no noise and costs nothing. Inside the clipped gradient it would be cut off with it, and
drown in its noise, for no gain in privacy.
"""

from __future__ import annotations

from dataclasses import dataclass

from confide.protocol.manifest import Manifest
from confide.strategies.base import Refused
from confide.strategies.fedavg import FedAvg

__all__ = ["FedProx"]


@dataclass(frozen=True, slots=True)
class FedProx(FedAvg):
    """The server's step is FedAvg's; what differs is how sites train."""

    mu: float = 0.1

    @property
    def proximal(self) -> float:
        """See the base class."""
        return self.mu

    def refusal(self, manifest: Manifest) -> Refused | None:
        """A proximal step longer than the way back overshoots."""
        training = manifest.training
        if training.optimizer == "sgd" and self.mu * training.learning_rate > 1:
            return (
                f"fedprox with mu = {self.mu:g} and training.learning_rate = {training.learning_rate:g} steps past the "
                "round's model",
                "keep mu × learning_rate at most 1",
            )
        return None
