"""From real coordinates to small integers and back.

Rounding is stochastic (unbiased): y = ⌊x⌋ + Bernoulli(x − ⌊x⌋), with x the position of the value in its public range
in units of range / (2^bits − 1). Values outside the range are clipped, and counted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from confide.errors import DataError
from confide.privacy.randomness import SecureRandom

__all__ = ["dequantise_sum", "quantise"]

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


def quantise(values: Floats, low: float, high: float, bits: int, rng: SecureRandom) -> tuple[Words, int]:
    """Integers in [0, 2^bits − 1] of the shape of `values`, and how many values lay outside the range.

    Raises:
        DataError: A value is no number. (Not a SealingError, whose text may be sent: it may depend on the data.)
    """
    if np.isnan(values).any():
        raise DataError("an update holds a coordinate that is no number", hint="the site abstains this round")
    top = 2**bits - 1
    clipped = np.clip(values, low, high)
    position = (clipped - low) * (top / (high - low))
    rounded = np.clip(np.floor(position + rng.uniform(len(values))), 0, top)
    return rounded.astype(np.uint64), int(np.count_nonzero(clipped != values))


def dequantise_sum(total: Words, low: float, high: float, bits: int, sites: int) -> Floats:
    """The real sum that integers summed over `sites` sites stand for."""
    return np.asarray(total.astype(np.float64) * ((high - low) / (2**bits - 1)) + low * sites, dtype=np.float64)
