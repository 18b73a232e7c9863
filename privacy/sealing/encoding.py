"""Between a vector of real coordinates and the integers that are summed, a stretch at a time.

A stretch is at most 2¹⁶ coordinates with one range; where a segment asks for it, its stretches are rotated first. One
more coordinate follows the vector: how many values were clipped, so that a range chosen too narrow is seen, in the sum
only. What is counted has its noise already (`placement = "site"`), so the count costs no privacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing.keystream import expand, random_words
from confide.privacy.sealing.profile import Opened, Segment
from confide.privacy.sealing.quantise import dequantise_sum, quantise
from confide.privacy.sealing.rotation import LARGEST_BLOCK, blocks, half_range, rotate, rotate_back

__all__ = ["SATURATION", "Encoder", "regroup"]

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
#: Coordinates that every sum carries besides its vector.
SATURATION = 1


@dataclass(frozen=True, slots=True)
class _Stretch:
    size: int
    low: float
    high: float
    rotated: bool
    #: Largest magnitude of a coordinate before it is rotated.
    bound: float = np.inf


class Encoder:
    """One vector's way to integers and the sum's way back.

    Args:
        segments: The vector's ranges.
        bits: Bits a coordinate.
        transcript: X of the sum (hex); the rotation's public signs come from it.
    """

    def __init__(self, segments: Sequence[Segment], bits: int, transcript: str) -> None:
        self._bits, self._key = bits, bytes.fromhex(transcript)
        self._stretches = [stretch for segment in segments for stretch in _stretches(segment)]
        self.vector_size = sum(s.size for s in self._stretches)

    @property
    def size(self) -> int:
        """Integers that stand for the vector."""
        return self.vector_size + SATURATION

    def encode(self, vector: Floats, rng: SecureRandom) -> Iterator[Words]:
        """The integers, a stretch at a time."""
        if len(vector) != self.vector_size:
            raise ValueError("the segments do not cover the vector")
        offset = saturated = 0
        for number, stretch in enumerate(self._stretches):
            values = vector[offset : offset + stretch.size].astype(np.float64)
            offset += stretch.size
            if stretch.rotated:
                # One wild value would be spread over its whole block.
                bounded = np.clip(values, -stretch.bound, stretch.bound)
                saturated += int(np.count_nonzero(bounded != values))
                values = rotate(bounded, self._signs(number, stretch.size))
            words, clipped = quantise(values, stretch.low, stretch.high, self._bits, rng)
            saturated += clipped
            yield words
        if self.vector_size:
            yield quantise(np.array([float(saturated)]), 0.0, float(self.vector_size), self._bits, rng)[0]
        else:
            yield np.zeros(1, dtype=np.uint64)

    def decode(self, total: Iterable[Words], sites: int) -> Opened:
        """The real sum from integers summed over `sites` sites, in parts of any size."""
        parts = regroup(total, [*(s.size for s in self._stretches), SATURATION])
        values, offset = np.empty(self.vector_size, dtype=np.float64), 0
        for number, stretch in enumerate(self._stretches):
            part = dequantise_sum(next(parts), stretch.low, stretch.high, self._bits, sites)
            if stretch.rotated:
                part = rotate_back(part, self._signs(number, stretch.size))
            values[offset : offset + stretch.size] = part
            offset += stretch.size
        count = dequantise_sum(next(parts), 0.0, float(max(1, self.vector_size)), self._bits, sites)
        return Opened(values, float(count[0]) / (sites * max(1, self.vector_size)))

    def _signs(self, number: int, size: int) -> Floats:
        words = random_words(expand(self._key, b"rotation", number.to_bytes(8, "big")), -(-size // 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:size]
        return bits.astype(np.float64) * 2 - 1


def _stretches(segment: Segment) -> Iterator[_Stretch]:
    if segment.rotation is None:
        for start in range(0, segment.size, LARGEST_BLOCK):
            yield _Stretch(min(LARGEST_BLOCK, segment.size - start), segment.low, segment.high, False)
        return
    for block in blocks(segment.size):
        half = half_range(block, *segment.rotation)
        # A short block is spread too little for its range to become narrower.
        if half < segment.high:
            yield _Stretch(block, -half, half, True, segment.high)
        else:
            yield _Stretch(block, segment.low, segment.high, False)


def regroup(parts: Iterable[Words], sizes: Iterable[int]) -> Iterator[Words]:
    """The same words in other portions; a last portion may stay short, and empty ones end it."""
    source, held, count = iter(parts), [np.empty(0, dtype=np.uint64)], 0
    for size in sizes:
        while count < size and (part := next(source, None)) is not None:
            held.append(part)
            count += len(part)
        joined = np.concatenate(held) if len(held) > 1 else held[0]
        if not len(joined) and size:
            return
        yield joined[:size]
        held, count = [joined[size:]], max(0, count - size)
