"""A site's part of the manifest, as far as training is concerned."""

from __future__ import annotations

from dataclasses import dataclass, replace

from confide.config import TrainingConfig
from confide.privacy.dp.metrics import Task

__all__ = ["TrainingPlan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """σ = `noise_multiplier`, q = `sample_rate`, C = `max_grad_norm`, μ = `proximal`."""

    training: TrainingConfig
    task: Task
    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    population: int
    proximal: float = 0.0

    @property
    def kind(self) -> str:
        """The same for all whose steps differ in nothing but the population that sums are divided by."""
        return repr(replace(self, population=1))
