"""Profile `open`: updates travel readable. For baselines on public data; a site refuses it elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.profile import Accumulator, Exposure, Profile

__all__ = ["OpenProfile"]

_CHUNK = 2**20
Floats = NDArray[np.float64]


class OpenProfile(Profile):
    """float32 updates in the clear, summed in float64 in the order of arrival that the coordinator fixes."""

    name = "open"

    def seal(self, vector: Floats) -> tuple[bytes, ...]:
        """The vector as little-endian float32, in chunks of 1 MiB."""
        return _split(vector.astype("<f4").tobytes())

    def accumulator(self, size: int) -> Accumulator:
        """An empty sum."""
        return _OpenAccumulator(size)

    def open(self, chunks: Sequence[bytes], size: int) -> Floats:
        """The float64 sum."""
        return _parse(chunks, size, "<f8")

    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
        return (
            Exposure("coordinator", "every site's update, every round"),
            Exposure("one other site", "the sum over the cohort"),
            Exposure("outsider on the network", "nothing beyond TLS"),
        )


class _OpenAccumulator(Accumulator):
    def __init__(self, size: int) -> None:
        self._total = np.zeros(size, dtype=np.float64)

    def add(self, chunks: Sequence[bytes]) -> None:
        self._total += _parse(chunks, len(self._total), "<f4")

    def sum_chunks(self) -> tuple[bytes, ...]:
        return _split(self._total.astype("<f8").tobytes())


def _split(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK))


def _parse(chunks: Sequence[bytes], size: int, dtype: str) -> Floats:
    expected = size * np.dtype(dtype).itemsize
    if sum(map(len, chunks)) != expected:
        raise SealingError("has another number of coordinates than the run", where="payload")
    values = np.frombuffer(b"".join(chunks), dtype=dtype).astype(np.float64)
    if not np.all(np.isfinite(values)):
        raise SealingError("holds a coordinate that is not a finite number", where="payload")
    return values
