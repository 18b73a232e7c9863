"""Steps through Opacus: each record's own gradient, and an optimiser that clips and noises what is a person's.

Imported only where a model needs it (see `trainer`): Opacus brings a second's worth of torch with it.
"""

from __future__ import annotations

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from confide.clients.training.plan import TrainingPlan
from confide.privacy.dp import SecureRandom

__all__ = ["PersonOptimizer", "per_record"]


def per_record(model: nn.Module) -> nn.Module:
    """The model, whose parameters keep each record's gradient of a loss that is a sum."""
    wrapped: nn.Module = GradSampleModule(model, batch_first=True, loss_reduction="sum")
    return wrapped


class PersonOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped
    """Opacus's optimiser with noise from our stream: its own generator is torch's global, seedable one."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rng: SecureRandom,
        plan: TrainingPlan,
        correction: list[torch.Tensor] | None,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.sample_rate * plan.population,
            loss_reduction="mean",
        )
        self._rng, self._proximal, self._correction = rng, plan.proximal, correction
        self._start = [p.detach().clone() for p in self.params] if plan.proximal else []

    def scale_grad(self) -> None:
        """Divide by the public batch size; then add what reads no record."""
        super().scale_grad()
        for p, start in zip(self.params, self._start, strict=False):  # empty without a proximal term
            p.grad += self._proximal * (p.detach() - start)
        for p, part in zip(self.params, self._correction or (), strict=False):
            p.grad += part

    def add_noise(self) -> None:
        scale = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            grad = p.summed_grad
            if scale:
                noise = torch.from_numpy(self._rng.normal(p.numel()) * scale).reshape(p.shape)
                # Added in float64 and rounded once, so that small noise is not lost in a large float32.
                grad = (grad.double() + noise.to(grad.device)).to(grad.dtype)
            p.grad = grad.view_as(p)
