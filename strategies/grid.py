"""Single updates as integers, so that sorting them and summing their distances gives every site the same bits.

Floating-point sums depend on the order, and so on the processor; sums of integers do not. An update lies in the public
range [−bound, bound] and becomes a whole multiple of bound / 2²³: as fine as float32 is at the end of its range.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["squared_distance", "to_grid"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_HALF = 2**23
#: Squares are at most 2⁴⁸: so many fit an int64.
_PART = 2**14


def to_grid(updates: Floats, bound: float) -> tuple[Integers, float]:
    """(whole multiples, what one is worth), of the shape of `updates`; what lies outside ±`bound` is clipped."""
    return np.rint(np.clip(updates, -bound, bound) * (_HALF / bound)).astype(np.int64), bound / _HALF


def squared_distance(a: Integers, b: Integers) -> int:
    """‖a − b‖², exactly, in units of the grid's unit squared."""
    difference = a - b
    square = difference * difference
    return sum(int(part) for part in np.add.reduceat(square, range(0, len(square), _PART))) if len(square) else 0
