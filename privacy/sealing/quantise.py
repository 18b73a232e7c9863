"""From real coordinates to small integers and back; several integers share a slot.

Rounding is stochastic (unbiased): y = ⌊x⌋ + Bernoulli(x − ⌊x⌋), with x the position of the value in its public range
in units of range / (2^bits − 1). Values outside the range are clipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confide.errors import DataError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing.parameters import BfvParameters
from confide.privacy.sealing.profile import Segment

__all__ = ["dequantise_sum", "pack", "quantise", "unpack"]

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


def quantise(vector: Floats, segments: Sequence[Segment], bits: int, rng: SecureRandom) -> Words:
    """Integers in [0, 2^bits − 1]; shape of `vector`."""
    if np.isnan(vector).any():
        # Not a SealingError, whose text may be sent: whether it happens may depend on the data.
        raise DataError("an update holds a coordinate that is no number", hint="the site abstains this round")
    top, parts, offset = 2**bits - 1, list[Words](), 0
    for segment in segments:
        values = vector[offset : offset + segment.size]
        offset += segment.size
        position = (np.clip(values, segment.low, segment.high) - segment.low) * (top / (segment.high - segment.low))
        parts.append(np.clip(np.floor(position + rng.uniform(segment.size)), 0, top).astype(np.uint64))
    if offset != len(vector):
        raise ValueError("the segments do not cover the vector")
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def dequantise_sum(total: Words, segments: Sequence[Segment], bits: int, sites: int) -> Floats:
    """The real sum that integers summed over `sites` sites stand for."""
    top, parts, offset = 2**bits - 1, list[Floats](), 0
    for segment in segments:
        values = total[offset : offset + segment.size].astype(np.float64)
        offset += segment.size
        parts.append(values * ((segment.high - segment.low) / top) + segment.low * sites)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float64)


def pack(values: Words, parameters: BfvParameters) -> Words:
    """Fields into slots; the last ciphertext is padded with zeros. Shape [ciphertexts · DEGREE]."""
    slots = parameters.slots(len(values))
    padded = np.zeros(slots * parameters.fields, dtype=np.uint64)
    padded[: len(values)] = values
    shifts = (np.arange(parameters.fields) * parameters.field_bits).astype(np.uint64)
    fields = padded.reshape(slots, parameters.fields) << shifts
    return np.asarray(np.bitwise_or.reduce(fields, axis=1), dtype=np.uint64)


def unpack(slots: Words, size: int, parameters: BfvParameters) -> Words:
    """Inverse of `pack`, also for sums; drops the padding."""
    shifts = (np.arange(parameters.fields) * parameters.field_bits).astype(np.uint64)
    mask = np.uint64(2**parameters.field_bits - 1)
    return np.asarray((slots[:, None] >> shifts) & mask, dtype=np.uint64).reshape(-1)[:size]
