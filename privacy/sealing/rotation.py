"""Randomised Hadamard rotation: y = H·D·x / √n with public random signs D (Suresh et al. 2017).

A rotated vector is spread evenly: a coordinate of y is about Gaussian with standard deviation ‖x‖/√n, whatever x is, so
a much narrower range serves and few bits are enough. The inverse is x = D·H·y / √n. Only elementwise float64 additions,
subtractions and multiplications by a scalar are used: all sites get the same bits back.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST_BLOCK", "blocks", "half_range", "rotate", "rotate_back"]

Floats = NDArray[np.float64]
LARGEST_BLOCK = 2**16
_DEVIATIONS = 6


def blocks(size: int) -> list[int]:
    """Powers of two that add up to `size`, largest first, none above `LARGEST_BLOCK`."""
    found = [LARGEST_BLOCK] * (size // LARGEST_BLOCK)
    rest = size % LARGEST_BLOCK
    return found + [1 << i for i in reversed(range(rest.bit_length())) if rest >> i & 1]


def half_range(block: int, norm: float, deviation: float) -> float:
    """Six standard deviations of a rotated coordinate whose block has at most this norm, besides independent noise."""
    return _DEVIATIONS * math.sqrt(norm * norm / block + deviation * deviation)


def rotate(values: Floats, signs: Floats) -> Floats:
    """H·D·x / √n; length a power of two."""
    return _hadamard(values * signs) * (1 / math.sqrt(len(values)))


def rotate_back(values: Floats, signs: Floats) -> Floats:
    """The inverse of `rotate`."""
    return _hadamard(values * (1 / math.sqrt(len(values)))) * signs


def _hadamard(values: Floats) -> Floats:
    """The unnormalised fast Walsh–Hadamard transform, in place."""
    width = 1
    while width < len(values):
        pairs = values.reshape(-1, 2, width)
        upper = pairs[:, 0] + pairs[:, 1]
        pairs[:, 1] = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] = upper
        width *= 2
    return values
