"""Several small integers share one word: mixed-radix packing with head-room, so that sums never carry.

With K sites and b bits a coordinate a field of a sum is at most K·(2^b − 1); the radix is one more than that. F fields
share a word while radix^F ≤ modulus, so a packed sum stays below the modulus and unpacks exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Packing", "fields_below"]

Words = NDArray[np.uint64]


def fields_below(limit: int, sites: int, bits: int) -> int:
    """How many fields fit a word whose values stay below `limit`."""
    radix, fields = sites * (2**bits - 1) + 1, 0
    while radix ** (fields + 1) <= limit:
        fields += 1
    return fields


@dataclass(frozen=True, slots=True)
class Packing:
    """How integers lie in words.

    Attributes:
        sites: Most sites a sum may have (K).
        bits: Bits a coordinate (b).
        fields: Fields a word (F).
        modulus: Words live in [0, modulus).
        words: Words a chunk; a last chunk may have fewer.
    """

    sites: int
    bits: int
    fields: int
    modulus: int
    words: int

    def __post_init__(self) -> None:
        if self.fields < 1 or self.radix**self.fields > self.modulus:
            raise ValueError("the fields of a sum do not fit a word")

    @property
    def radix(self) -> int:
        """One more than the largest field of a sum."""
        return self.sites * ((1 << self.bits) - 1) + 1

    @property
    def coordinates(self) -> int:
        """Coordinates a chunk."""
        return self.fields * self.words

    def chunks(self, size: int) -> int:
        """Chunks that `size` coordinates need; the last is padded with zeros."""
        return max(1, -(-size // self.coordinates))

    def pack(self, values: Words, words: int) -> Words:
        """One chunk's coordinates, at most `fields` · `words` of them; shape [words], padded with zeros."""
        padded = np.zeros(self.fields * words, dtype=np.uint64)
        padded[: len(values)] = values
        fields = padded.reshape(self.fields, words)
        packed = fields[-1]
        for field in fields[-2::-1]:
            packed = packed * np.uint64(self.radix) + field
        return np.asarray(packed, dtype=np.uint64)

    def unpack(self, words: Words) -> tuple[Words, bool]:
        """Inverse of `pack`, also for sums: (coordinates with padding, did every word hold only fields?)."""
        fields = np.empty((self.fields, len(words)), dtype=np.uint64)
        rest = words
        for i in range(self.fields):
            rest, fields[i] = np.divmod(rest, np.uint64(self.radix))
        return fields.reshape(-1), not bool(rest.any())
