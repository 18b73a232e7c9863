"""Networks of the examples, named in their experiment files as `confide.simulations.examples.networks:…`."""

from __future__ import annotations

from torch import nn

__all__ = ["fashion_cnn"]

_SIDE = 28


def fashion_cnn(inputs: int, outputs: int) -> nn.Module:
    """Two convolutions with bounded activations, which noise and clipping hurt least (Papernot et al. 2021).

    Args:
        inputs: Pixels of a picture, 784.
        outputs: Classes.

    Raises:
        ValueError: The pictures have another size.
    """
    if inputs != _SIDE * _SIDE:
        raise ValueError(f"pictures of {_SIDE} × {_SIDE} pixels, not {inputs} numbers")
    return nn.Sequential(
        nn.Unflatten(1, (1, _SIDE, _SIDE)),
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.Tanh(), nn.Linear(32, outputs),
    )  # fmt: skip
