"""The model objects of a process: one for all sites that a thread answers for, where none leaves anything in it."""

from __future__ import annotations

from functools import lru_cache
from threading import get_ident

from torch import nn

from confide.clients.training.admission import admit_model
from confide.clients.training.models import build_model, layout_of
from confide.clients.training.stacked import Chain
from confide.config import ModelConfig
from confide.protocol.manifest import Layout

__all__ = ["resident_model"]


def resident_model(config: ModelConfig, inputs: int, outputs: int) -> tuple[nn.Module, Layout]:
    """An admitted model and the layout of its parameters. Of a built-in kind that is a chain there is one object a
    thread, into which whoever uses it loads weights of its own; any other is made anew.

    Raises:
        ConfigError: It cannot be made, or not be trained privately.
    """
    if config.kind in ("logistic", "mlp"):
        found = _shared(get_ident(), config.kind, config.hidden, inputs, outputs)
        if Chain.of(found[0]) is not None:  # what is trained otherwise gets hooks of its own
            return found
    return _made(config, inputs, outputs)


@lru_cache(maxsize=8)
def _shared(_thread: int, kind: str, hidden: tuple[int, ...], inputs: int, outputs: int) -> tuple[nn.Module, Layout]:
    return _made(ModelConfig(kind=kind, hidden=hidden), inputs, outputs)


def _made(config: ModelConfig, inputs: int, outputs: int) -> tuple[nn.Module, Layout]:
    model = build_model(config, inputs, outputs)
    admit_model(model, inputs, outputs)
    return model, layout_of(model)
