"""Models: the built-in ones, a user's own, their flat parameter vector, and what cannot be trained privately."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from confide.config import ModelConfig
from confide.errors import ConfigError
from confide.protocol.manifest import Layout

__all__ = ["build_model", "flatten", "initial_model", "layout_of", "load_flat"]

Vector = NDArray[np.float32]


def build_model(config: ModelConfig, inputs: int, outputs: int) -> nn.Module:
    """A model on the CPU with fresh weights (the run's own weights are loaded afterwards).

    Raises:
        ConfigError: A model of the user's own cannot be imported or made.
    """
    if config.kind == "logistic":
        return nn.Linear(inputs, outputs)
    if config.kind == "mlp":
        widths = (inputs, *config.hidden)
        layers: list[nn.Module] = []
        for low, high in pairwise(widths):
            layers += [nn.Linear(low, high), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
    function = _import(config.kind)
    try:
        model = function(inputs, outputs, **config.options)
    except Exception as error:  # whatever a user's function raises, it is a fault of the configuration
        raise ConfigError(f"raised {type(error).__name__}: {error}", where=f"model.kind = {config.kind!r}",
                          hint="the function is called with (inputs, outputs, **model.options)") from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise ConfigError(f"returned a {type(model).__name__}, not an nn.Module", where=f"model.kind = {config.kind!r}")
    return model


def initial_model(config: ModelConfig, inputs: int, outputs: int, seed: int) -> tuple[Vector, Layout]:
    """The first weights, drawn once and shipped as bytes: the same seed gives other bits on other processors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, inputs, outputs)
    return flatten(model), layout_of(model)


def layout_of(model: nn.Module) -> Layout:
    """Names and shapes of the trained parameters, in order."""
    named = list(model.named_parameters())
    return Layout(names=tuple(n for n, _ in named), shapes=tuple(tuple(p.shape) for _, p in named))


def flatten(model: nn.Module) -> Vector:
    """All parameters as one float32 vector."""
    parts = [p.detach().cpu().reshape(-1).to(torch.float32).numpy() for p in model.parameters()]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def load_flat(model: nn.Module, vector: Vector) -> None:
    """Copy a flat vector into the parameters, in place."""
    if vector.shape != (sum(p.numel() for p in model.parameters()),):
        raise ValueError(f"{vector.shape} weights do not fit this model")
    offset = 0
    with torch.no_grad():
        for parameter in model.parameters():
            size = parameter.numel()
            piece = torch.tensor(vector[offset : offset + size], dtype=parameter.dtype)
            parameter.copy_(piece.reshape(parameter.shape))
            offset += size


def _import(path: str) -> Callable[..., object]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        expected = isinstance(error, ImportError | AttributeError | ValueError)
        reason = f"{error}" if expected else f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot be imported: {reason}", where=f"model.kind = {path!r}",
                          hint="install the package, or add its folder to PYTHONPATH") from None  # fmt: skip
    if not callable(found):
        raise ConfigError("is not a function", where=f"model.kind = {path!r}")
    return found  # type: ignore[no-any-return]  # checked to be callable just above
