"""Local training: DP-SGD whose sample is a person (subject-level, McMahan et al. 2018; Abadi et al. 2016).

Invariants, per step:
1. Units are Poisson-sampled at the public rate q among those whose consent stands.
2. A unit's gradient is the *mean* over her records (weight 1/n), clipped to L2 norm C.
3. Gaussian noise of standard deviation σ·C from an operating-system-keyed stream; an empty draw takes a noisy step.
4. The sum is divided by q · (declared population): never by anything counted in the data.
5. What a strategy adds to a step (a pull towards the round's model, a correction by control variates) is added after
   all that: it is a function of weights that are private already, reads no record and costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from confide.clients.data.records import Batch, SiteRecords
from confide.clients.training.models import flatten, load_flat
from confide.clients.training.plan import TrainingPlan
from confide.clients.training.stacked import Chain, Work, train_stacked
from confide.errors import ConfigError
from confide.privacy.dp import SecureRandom
from confide.privacy.dp.metrics import Task, contributions

__all__ = ["TRAIN", "LocalTrainer", "TrainingPlan", "choose_device", "require_device"]

Vector = NDArray[np.float32]
Floats = NDArray[np.float64]
_EVALUATION_UNITS = 4096


def _train_alone(chain: Chain, work: Work, device: torch.device) -> Floats:
    return train_stacked(chain, [work], device)[0]


#: How a chain is trained: by itself, but where a simulation waits for the other clients of its process and trains all
#: of them at once.
TRAIN: ContextVar[Callable[[Chain, Work, torch.device], Floats]] = ContextVar("confide_train", default=_train_alone)


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def require_device(name: str, where: str) -> torch.device:
    """The device of a name that somebody has given.

    Raises:
        ConfigError: It is no device's name, or it is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ConfigError(f"{name[:40]!r} is no device", where=where, hint="auto, cpu or cuda:N")
    chosen = choose_device(name)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{name} is not there", where=where, hint="auto takes what is there")
    return chosen


def through_opacus() -> ModuleType:
    """What other models than chains need. To import Opacus takes a second: nobody else waits for it."""
    from confide.clients.training import opacus_steps

    return opacus_steps


class LocalTrainer:
    """One model, kept for a run; weights are copied in place each round. A chain (see `stacked`) is trained there, any
    other model through Opacus.

    Args:
        model: An admitted model (see `admission`). That of a chain may be shared: nothing stays in it.
        records: The site's data.
        plan: Public parameters.
        device: Where to compute.
        rng: Sampling and noise.
    """

    def __init__(
        self,
        model: nn.Module,
        records: SiteRecords,
        plan: TrainingPlan,
        device: torch.device,
        rng: SecureRandom,
    ) -> None:
        self._plan, self._records, self._device, self._rng = plan, records, device, rng
        self._chain = Chain.of(model)
        self._model: nn.Module = model.to(device)
        if self._chain is None:
            self._model = through_opacus().per_record(self._model)
        self._parameters: list[Any] = [p for p in self._model.parameters() if p.requires_grad]

    def train(self, weights: Vector, eligible: NDArray[np.int64], correction: Floats | None = None) -> Floats:
        """Run the local steps.

        Args:
            weights: The replicated model, float32 [d].
            eligible: Units that may be drawn.
            correction: Added to every step's private gradient, float64 [d]; itself private already, or public.

        Returns:
            Trained minus given weights, float64 [d]; private by itself.
        """
        if self._chain is not None:
            work = Work(self._records, self._plan, self._rng, weights, eligible, correction)
            return TRAIN.get()(self._chain, work, self._device)
        load_flat(self._model, weights)
        self._model.train()
        parts = None if correction is None else self._pieces(correction)
        optimizer = through_opacus().PersonOptimizer(self._make_optimizer(), self._rng, self._plan, parts)
        for _ in range(self._plan.training.local_steps):
            drawn = self._rng.poisson_sample(eligible, self._plan.sample_rate)
            optimizer.zero_grad()
            self._person_gradients(drawn)
            optimizer.step()
        optimizer.zero_grad()
        update = flatten(self._model).astype(np.float64) - weights.astype(np.float64)
        load_flat(self._model, weights)  # given and trained weights together are the update
        return update

    def destroy(self) -> None:
        """Forget the model of a run that is over."""
        for p in self._parameters:
            p.data.zero_()
            if self._chain is None:
                p.grad = p.grad_sample = p.summed_grad = None

    def metric_sum(self, weights: Vector, eligible: NDArray[np.int64]) -> Floats:
        """The exact metric vector of these units, before noise; it must not leave as it is."""
        load_flat(self._model, weights)
        self._model.eval()
        total: Floats | None = None
        for start in range(0, max(len(eligible), 1), _EVALUATION_UNITS):
            batch = self._records.gather(eligible[start : start + _EVALUATION_UNITS])
            weight = (1.0 / batch.records_of[batch.owner]).double().numpy()
            prediction = predict(self._model, batch.x, self._plan.task, self._device)
            part = contributions(self._plan.task, prediction, batch.y.double().numpy(), weight)
            total = part if total is None else total + part
        if total is None:  # pragma: no cover - the loop runs at least once
            raise ValueError("nothing was evaluated")
        return total

    def _pieces(self, vector: Floats) -> list[torch.Tensor]:
        """A flat vector as tensors shaped like the parameters."""
        sizes = [p.numel() for p in self._parameters]
        pieces = torch.split(torch.from_numpy(vector), sizes)
        return [piece.reshape(p.shape).to(p.device, p.dtype) for piece, p in zip(pieces, self._parameters, strict=True)]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        training = self._plan.training
        if training.optimizer == "adam":
            return torch.optim.Adam(self._parameters, lr=training.learning_rate)
        return torch.optim.SGD(self._parameters, lr=training.learning_rate, momentum=training.momentum)

    def _person_gradients(self, units: NDArray[np.int64]) -> None:
        """Leave each parameter's per-unit mean gradients, [units, …], where Opacus's optimiser looks for them."""
        if len(units) == 0:
            for p in self._parameters:
                p.grad_sample = torch.zeros(0, *p.shape, device=self._device)  # Opacus's attribute
            return
        batch = self._records.gather(units)
        owner, counts = batch.owner.to(self._device), batch.records_of.to(self._device)
        self._loss(batch).backward()  # type: ignore[no-untyped-call]  # torch leaves this untyped
        finite = torch.ones(len(units), dtype=torch.bool, device=self._device)
        for p in self._parameters:
            sample = p.grad_sample
            person = torch.zeros(len(units), *sample.shape[1:], device=self._device).index_add_(0, owner, sample)
            p.grad_sample = person / counts.view(-1, *[1] * (sample.dim() - 1))
            finite &= torch.isfinite(p.grad_sample).flatten(1).all(dim=1)
        if not bool(finite.all()):
            # Clipping does not bound what is not a number; such a person contributes nothing, whoever else is there.
            for p in self._parameters:
                p.grad_sample[~finite] = 0.0

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Sum of the records' losses: Opacus then leaves each record's own gradient."""
        # An input that asks for a gradient keeps torch's backward hooks, which Opacus relies on, on their usual path.
        output, y = self._model(batch.x.to(self._device).requires_grad_()), batch.y.to(self._device)
        if self._plan.task == "binary":
            return nn.functional.binary_cross_entropy_with_logits(output[:, 0], y, reduction="sum")
        if self._plan.task == "multiclass":
            return nn.functional.cross_entropy(output, y.long(), reduction="sum")
        return nn.functional.mse_loss(output[:, 0], y, reduction="sum")


def predict(model: nn.Module, x: torch.Tensor, task: Task, device: torch.device) -> Floats:
    """binary: probability [records]; multiclass: probabilities [records, classes]; regression: value [records]."""
    with torch.no_grad():
        output = model(x.to(device)).double().cpu()
    if task == "binary":
        return np.asarray(torch.sigmoid(output[:, 0]).numpy())
    if task == "multiclass":
        return np.asarray(torch.softmax(output, dim=1).numpy())
    return np.asarray(output[:, 0].numpy())
