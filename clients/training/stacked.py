"""Local steps of one client, or of many that train the same chain of layers at once: their parameters stand in one
stack, [clients, …], and a step is a few batched products for all of them.

A *chain* is linear layers with rectifiers between them: every built-in model. Its gradients are written down here
(backpropagation of a chain), so that a person with one record is clipped without her gradient ever being made: that of
a layer is the product of two vectors, b aᵀ, and its norm |b| |a| (Goodfellow 2015). With several records a person's
gradient is a sum in which terms may cancel; there it is made, and the norm is that of what is used.

What a step does to one client's persons is `trainer`'s, invariant for invariant, and the draws are the same, in the
same order: each client's from its own stream. Another model is trained by itself, through Opacus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from confide.clients.data.records import Batch, SiteRecords
from confide.clients.training.plan import TrainingPlan
from confide.privacy.dp import SecureRandom
from confide.privacy.dp.metrics import Task

__all__ = ["Chain", "Work", "train_stacked"]

Vector = NDArray[np.float32]
Floats = NDArray[np.float64]
#: Opacus's; keeps a person without a gradient from a division by zero.
_TINY = 1e-6
#: Numbers that the stack of one go holds: more clients at once no longer fit into a processor's cache.
_STACK = 1_000_000
#: Adam's constants (Kingma, Ba 2015), as torch has them.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True, slots=True)
class Chain:
    """Linear layers with a rectifier between each two: (outputs, inputs, has a bias) of each."""

    layers: tuple[tuple[int, int, bool], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Chain | None:
        """The chain that a model is; None where it is something else."""
        parts = list(model) if type(model) is nn.Sequential else [model]
        if any(type(part) is not (nn.ReLU if i % 2 else nn.Linear) for i, part in enumerate(parts)):
            return None
        linear = [part for part in parts if isinstance(part, nn.Linear)]
        whole = len(parts) == 2 * len(linear) - 1 and all(p.dtype == torch.float32 for p in model.parameters())
        return cls(tuple((p.out_features, p.in_features, p.bias is not None) for p in linear)) if whole else None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters, in the model's order."""
        return [s for out, into, bias in self.layers for s in ((out, into), *([(out,)] if bias else []))]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes)


@dataclass(frozen=True, slots=True)
class Work:
    """What one client is to train in a round.

    Attributes:
        records: Its data.
        plan: Its part of the manifest.
        rng: Its own stream, for sampling and noise.
        weights: The model it starts from, float32 [d].
        eligible: Units that may be drawn.
        correction: Added to every step's private gradient, float64 [d].
    """

    records: SiteRecords
    plan: TrainingPlan
    rng: SecureRandom
    weights: Vector
    eligible: NDArray[np.int64]
    correction: Floats | None = None


@torch.inference_mode()
def train_stacked(chain: Chain, works: Sequence[Work], device: torch.device) -> list[Floats]:
    """Run everybody's local steps; those whose steps are of one kind at once.

    Returns:
        Trained minus given weights of each, float64 [d], in the order of `works`.
    """
    alike: dict[str, list[int]] = {}
    for number, work in enumerate(works):
        alike.setdefault(work.plan.kind, []).append(number)
    most, found = max(1, _STACK // chain.size), dict[int, Floats]()
    for numbers in alike.values():
        for start in range(0, len(numbers), most):
            part = numbers[start : start + most]
            found |= zip(part, _Stack(chain, [works[i] for i in part], device).train(), strict=True)
    return [found[number] for number in range(len(works))]


class _Stack:
    """Clients whose plans differ in the population only."""

    def __init__(self, chain: Chain, works: Sequence[Work], device: torch.device) -> None:
        self._chain, self._works, self._device, self._plan = chain, works, device, works[0].plan
        self._flat = torch.from_numpy(np.stack([work.weights for work in works])).to(device)  # [clients, d]
        self._parameters = self._views(self._flat)
        expected = [work.plan.sample_rate * work.plan.population for work in works]
        #: What clipped sums are divided by, [clients, 1].
        self._expected = torch.tensor(expected, dtype=torch.float32, device=device)[:, None]
        training, plan = self._plan.training, self._plan
        #: What a clipped sum is multiplied by where that is the whole step, [clients, 1].
        self._multiple = -training.learning_rate / self._expected
        self._scale = plan.noise_multiplier * plan.max_grad_norm
        self._correction = self._start = None
        if any(work.correction is not None for work in works):
            parts = [np.zeros(chain.size) if w.correction is None else w.correction for w in works]
            self._correction = torch.from_numpy(np.stack(parts)).to(device, torch.float32)
        if plan.proximal:
            self._start = self._flat.clone()
        memories = 2 if training.optimizer == "adam" else int(training.momentum > 0)
        self._memory = [torch.zeros_like(self._flat) for _ in range(memories)]
        #: Is a step nothing but a multiple of the clipped sum? Then no gradient needs to be held.
        self._direct = not (self._scale or memories or plan.proximal or self._correction is not None)
        if not self._direct:
            self._gradient = torch.empty_like(self._flat)
            self._gradients = self._views(self._gradient)

    def train(self) -> list[Floats]:
        for step in range(1, self._plan.training.local_steps + 1):
            drawn = [work.rng.poisson_sample(work.eligible, work.plan.sample_rate) for work in self._works]
            if not self._direct:
                self._gradient.zero_()
            if any(len(units) for units in drawn):
                batches = [work.records.gather(units) for work, units in zip(self._works, drawn, strict=True)]
                self._clipped_sums(batches)
            if self._direct:
                continue
            self._add_noise()
            self._gradient /= self._expected
            if self._start is not None:
                self._gradient += self._plan.proximal * (self._flat - self._start)
            if self._correction is not None:
                self._gradient += self._correction
            self._move(step)
        trained = self._flat.cpu().numpy()
        return [
            np.subtract(after, work.weights, dtype=np.float64) for after, work in zip(trained, self._works, strict=True)
        ]

    # --- gradients ---------------------------------------------------------------------------------------------

    def _clipped_sums(self, batches: Sequence[Batch]) -> None:
        """Every client's sum over its persons of their clipped gradients."""
        single = all(batch.y.shape[0] == len(batch.units) for batch in batches)
        x, y, weight = _rows(batches, single)
        inputs = self._forward(x.to(self._device))
        error = _output_error(inputs.pop(), y.to(self._device), self._plan.task)
        if weight is not None:
            error *= weight.to(self._device)[..., None]
        errors = self._backward(inputs, error)
        if single:
            self._sum_single(inputs, errors)
        else:
            self._sum_several(inputs, errors, batches)

    def _forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Inputs of each layer, [clients, records, …], and the last one's outputs."""
        found, parameters = [x], iter(self._parameters)
        for number, (_, _, bias) in enumerate(self._chain.layers):
            weight = next(parameters).transpose(1, 2)
            made = torch.baddbmm(next(parameters)[:, None], found[-1], weight) if bias else found[-1] @ weight
            found.append(made.relu_() if number + 1 < len(self._chain.layers) else made)
        return found

    def _backward(self, inputs: Sequence[torch.Tensor], error: torch.Tensor) -> list[torch.Tensor]:
        """Derivatives of the records' losses with respect to each layer's outputs, [clients, records, outputs]."""
        found, matrices = [error], [p for p in self._parameters if p.dim() == 3]
        for number in range(len(self._chain.layers) - 1, 0, -1):
            found.append((found[-1] @ matrices[number]).masked_fill_(inputs[number] <= 0, 0.0))
        return found[::-1]

    def _sum_single(self, inputs: Sequence[torch.Tensor], errors: Sequence[torch.Tensor]) -> None:
        """A record a person: her layers' norms are products of norms."""
        layers = zip(self._chain.layers, inputs, errors, strict=True)
        squares = _sum(_squares(b) * (_squares(a) + float(bias)) for (_, _, bias), a, b in layers)
        finite = torch.isfinite(squares)
        # Clipping does not bound what is not a number; such a person contributes nothing, whoever else is there.
        if not bool(finite.all()):
            bad = ~finite[..., None]
            inputs, errors = ([part.masked_fill(bad, 0.0) for part in parts] for parts in (inputs, errors))
        factors = _factors(squares, self._plan.max_grad_norm)[..., None]
        if self._direct:  # the step itself
            factors *= self._multiple[..., None]
        targets = iter(self._parameters if self._direct else self._gradients)
        for (_, _, bias), a, b in zip(self._chain.layers, inputs, errors, strict=True):
            scaled = (b * factors).transpose(1, 2)
            next(targets).baddbmm_(scaled, a)
            if bias:
                next(targets).add_(scaled.sum(dim=2))

    def _sum_several(
        self, inputs: Sequence[torch.Tensor], errors: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> None:
        """Each person's gradient is made, a client at a time, and its own norm clips it."""
        for i, batch in enumerate(batches):
            persons, records = len(batch.units), len(batch.y)
            if not persons:
                continue
            owner, made = batch.owner.to(self._device), list[torch.Tensor]()
            for (_, _, bias), layer, error in zip(self._chain.layers, inputs, errors, strict=True):
                a, b = layer[i, :records], error[i, :records]
                each = b[:, :, None] * a[:, None, :]
                made.append(torch.zeros(persons, *each.shape[1:], device=self._device).index_add_(0, owner, each))
                if bias:
                    made.append(torch.zeros(persons, b.shape[1], device=self._device).index_add_(0, owner, b))
            flat = [part.flatten(1) for part in made]
            squares = _sum(_squares(part) for part in flat)
            bad = ~torch.isfinite(squares)
            factors = _factors(squares, self._plan.max_grad_norm)
            if self._direct:
                factors *= self._multiple[i]
            for part, target in zip(flat, self._parameters if self._direct else self._gradients, strict=True):
                clean = part.masked_fill(bad[:, None], 0.0) if bool(bad.any()) else part
                target[i].add_((factors @ clean).reshape(target[i].shape))

    # --- steps -------------------------------------------------------------------------------------------------

    def _add_noise(self) -> None:
        if not self._scale:
            return
        noise = np.stack([work.rng.normal(self._chain.size) for work in self._works]) * self._scale
        # Added in float64 and rounded once, so that small noise is not lost in a large float32.
        self._gradient.copy_(self._gradient.double() + torch.from_numpy(noise).to(self._device))

    def _move(self, step: int) -> None:
        """The optimiser's step, as torch's SGD and Adam take it."""
        training, gradient = self._plan.training, self._gradient
        if training.optimizer == "adam":
            first, second = self._memory
            first.lerp_(gradient, 1 - _BETA1)
            second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            spread = (second.sqrt() / (1 - _BETA2**step) ** 0.5).add_(_EPSILON)
            self._flat.addcdiv_(first, spread, value=-training.learning_rate / (1 - _BETA1**step))
            return
        if training.momentum:
            (memory,) = self._memory
            gradient = memory.mul_(training.momentum).add_(gradient)
        self._flat.add_(gradient, alpha=-training.learning_rate)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The parameters in a flat stack, [clients, *shape] each."""
        sizes = [int(np.prod(shape)) for shape in self._chain.shapes]
        pieces = zip(torch.split(flat, sizes, dim=1), self._chain.shapes, strict=True)
        return [piece.view(len(piece), *shape) for piece, shape in pieces]


def _rows(batches: Sequence[Batch], single: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The records of several clients, [clients, records, …], their labels, and what each record weighs; None: all
    one."""
    if len(batches) == 1 and single:
        return batches[0].x[None], batches[0].y[None], None
    longest = max(batch.y.shape[0] for batch in batches)
    x = torch.zeros(len(batches), longest, batches[0].x.shape[1])
    # Rows past a client's last record weigh nothing: zeros, all the way back.
    y, weight = torch.zeros(len(batches), longest), torch.zeros(len(batches), longest)
    for i, batch in enumerate(batches):
        here = batch.y.shape[0]
        x[i, :here], y[i, :here] = batch.x, batch.y
        weight[i, :here] = 1.0 if single else (1.0 / batch.records_of)[batch.owner]
    return x, y, weight


def _sum(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.Tensor.add_, parts)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Squared length of each row, float64."""
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norms.square_()


def _factors(squares: torch.Tensor, clip: float) -> torch.Tensor:
    """What each person's gradient is multiplied by, float32; 0 where the norm is no number.

    Args:
        squares: Of the norms, float64; the memory is used up.
        clip: The largest norm that is left as it is.
    """
    factors = squares.sqrt_().add_(_TINY).reciprocal_().mul_(clip).clamp_(max=1.0)
    return torch.nan_to_num(factors, nan=0.0).float()


def _output_error(output: torch.Tensor, y: torch.Tensor, task: Task) -> torch.Tensor:
    """Derivative of each record's own loss with respect to its outputs, [clients, records, outputs]."""
    if task == "multiclass":
        error = torch.softmax(output, dim=-1)
        return error.scatter_add_(-1, y.long()[..., None], torch.full_like(y, -1.0)[..., None])
    if task == "binary":
        return torch.sigmoid(output) - y[..., None]
    return 2.0 * (output - y[..., None])
