"""Which models can be trained with per-person privacy.

A layer whose output for one example depends on the others (BatchNorm and its kin) gives a person influence over
other people's gradients: clipping no longer bounds her part, and every ε printed would be false. Such layers are
found by type where they are known and by *behaviour* in any case: every example is shown in two different companies,
and its outputs must agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from confide.errors import ConfigError

__all__ = ["admit_model"]

_CROSS_EXAMPLE = (nn.modules.batchnorm._BatchNorm,)
_PROBES = 4
_REMEDY = "use LayerNorm or GroupNorm: they look at one example at a time"


def admit_model(model: nn.Module, inputs: int, outputs: int) -> None:
    """Refuse a model that cannot be trained privately.

    Raises:
        ConfigError: Names the layer and what to use instead.
    """
    for name, module in model.named_modules():
        if isinstance(module, _CROSS_EXAMPLE):
            raise _refusal(name, module, "mixes the examples of a batch")
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise _refusal(name, module, "keeps running statistics of the data")
    buffers = [n for n, _ in model.named_buffers()]
    if buffers:
        raise ConfigError(f"keeps the buffer {buffers[0]!r}, which training would change unaccounted",
                          where="model", hint="turn buffers into parameters or constants")  # fmt: skip
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("has no parameter to train", where="model")
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        raise ConfigError(f"the parameter {frozen[0]!r} is frozen", where="model",
                          hint="every parameter is trained; keep constants out of the module")  # fmt: skip
    _check_behaviour(model, inputs, outputs)


def _check_behaviour(model: nn.Module, inputs: int, outputs: int) -> None:
    """Each of four examples keeps its outputs while all the others are replaced."""
    generator = torch.Generator().manual_seed(0)
    first, other = (torch.rand(_PROBES, inputs, generator=generator) * 2 - 1 for _ in range(2))
    was_training = model.training
    model.train()
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    for module in dropouts:
        module.eval()  # its randomness is not a dependence on other examples
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            alone = _outputs(model, first)
            seen = []
            for i in range(_PROBES):
                company = other.clone()
                company[i] = first[i]
                seen.append(_outputs(model, company))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"fails on a batch of shape [4, {inputs}]: {str(error).splitlines()[0]}", where="model",
                          hint="forward takes [records, features], returns [records, outputs]") from None  # fmt: skip
    finally:
        model.train(was_training)
    shape = alone[-1][1].shape[1:]
    if shape != (outputs,):
        raise ConfigError(f"returns {list(shape)} an example; the label needs [{outputs}]", where="model")
    for number, (name, one) in enumerate(alone):
        for i, company_outputs in enumerate(seen):
            again = company_outputs[number][1]
            same = one.shape == again.shape and torch.allclose(one[i], again[i], rtol=1e-4, atol=1e-6, equal_nan=True)
            if not same:
                raise _refusal(name, model.get_submodule(name), "mixes the examples of a batch")


def _outputs(model: nn.Module, batch: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """(name, outputs for the batch) of every module, in the order they finish: children before parents."""
    found: list[tuple[str, torch.Tensor]] = []

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.dim() > 0 and len(output) == len(batch):
                found.append((name, output.clone()))
            elif isinstance(output, torch.Tensor) and not name:
                raise ValueError(f"returned shape {list(output.shape)}")

        return hook

    handles = [m.register_forward_hook(remember(n)) for n, m in model.named_modules()]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _refusal(name: str, module: nn.Module, why: str) -> ConfigError:
    label = f"layer {name!r} ({type(module).__name__})" if name else type(module).__name__
    return ConfigError(f"{label} {why}, so no person's influence can be bounded", where="model", hint=_REMEDY)
