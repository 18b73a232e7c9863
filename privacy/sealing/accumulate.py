"""The coordinator's side of a keyed profile: adding what it cannot open.

Invariants:
1. No key is held here.
2. A payload enters a sum whole or not at all: all of it is checked before the first chunk is added.
3. One chunk of a payload is parsed at a time: memory is that of one sum, whatever the number of sites.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.lattice import Lattice
from confide.privacy.sealing.profile import Accumulator, Payload

__all__ = ["LatticeAccumulator", "WordAccumulator", "words_from"]

Words = NDArray[np.uint64]


class LatticeAccumulator(Accumulator):
    """Sums of ciphertexts of one lattice, with tags mod `modulus`."""

    def __init__(self, lattice: Lattice, chunks: int, tags: int, modulus: int) -> None:
        self._lattice, self._count, self._modulus = lattice, chunks, modulus
        self._total: list[Any] | None = None
        self._tags = [0] * tags

    def add(self, payload: Payload) -> None:
        """See the base class."""
        _check(payload, self._count, len(self._tags), self._modulus)
        for chunk in payload.chunks:
            self._lattice.residues(chunk, fresh=True)
        if self._total is None:
            self._total = [self._lattice.parse(chunk, fresh=True) for chunk in payload.chunks]
        else:
            for into, chunk in zip(self._total, payload.chunks, strict=True):
                self._lattice.evaluator.add_inplace(into, self._lattice.parse(chunk, fresh=True))
        self._tags = [(a + b) % self._modulus for a, b in zip(self._tags, payload.tags, strict=True)]

    def total(self) -> Payload:
        """See the base class."""
        if self._total is None:
            raise SealingError("nothing was added", where="sum")
        return Payload(tuple(self._lattice.summed(c) for c in self._total), tuple(self._tags))


class WordAccumulator(Accumulator):
    """Sums of plain words mod `modulus`; `lengths` says how many each chunk holds."""

    def __init__(self, lengths: list[int], tags: int, modulus: int) -> None:
        self._lengths, self._modulus = lengths, modulus
        self._total: list[Words] | None = None
        self._tags = [0] * tags

    def add(self, payload: Payload) -> None:
        """See the base class."""
        _check(payload, len(self._lengths), len(self._tags), self._modulus)
        for chunk, length in zip(payload.chunks, self._lengths, strict=True):
            if len(chunk) != 8 * length:
                raise SealingError("has another number of words than the run", where="payload")
            words_from(chunk, self._modulus)
        if self._total is None:
            self._total = [np.zeros(length, dtype=np.uint64) for length in self._lengths]
        for into, chunk in zip(self._total, payload.chunks, strict=True):
            into += words_from(chunk, self._modulus)
            into %= np.uint64(self._modulus)
        self._tags = [(a + b) % self._modulus for a, b in zip(self._tags, payload.tags, strict=True)]

    def total(self) -> Payload:
        """See the base class."""
        if self._total is None:
            raise SealingError("nothing was added", where="sum")
        return Payload(tuple(words.astype("<u8").tobytes() for words in self._total), tuple(self._tags))


def words_from(data: bytes, modulus: int) -> Words:
    """Little-endian words below `modulus`.

    Raises:
        SealingError: They are not.
    """
    if len(data) % 8:
        raise SealingError("is not made of whole words", where="payload")
    words = np.frombuffer(data, dtype="<u8").astype(np.uint64)
    if int(words.max(initial=0)) >= modulus:
        raise SealingError("holds a word that is not below the modulus", where="payload")
    return words


def _check(payload: Payload, chunks: int, tags: int, modulus: int) -> None:
    """Are all chunks and tags there, and the tags in range?

    Raises:
        SealingError: No.
    """
    if len(payload.chunks) != chunks or len(payload.tags) != tags:
        raise SealingError("is not complete", where="payload")
    if not all(0 <= tag < modulus for tag in payload.tags):
        raise SealingError("holds a tag out of range", where="payload")
