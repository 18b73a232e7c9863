"""Profile `open`: updates travel readable. For baselines on public data; a site refuses it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.profile import Accumulator, Agreement, Exposure, Payload, Profile, Segment, Session

__all__ = ["OpenProfile"]

_CHUNK = 2**20
Floats = NDArray[np.float64]


class OpenProfile(Profile):
    """float32 updates in the clear, clipped to the public range, summed in float64 in the cohort's order."""

    name = "open"
    keyed = False

    def accumulator(self, size: int) -> Accumulator:
        """An empty sum."""
        return _OpenAccumulator(size)

    def make_secret(self) -> bytes:
        """There is none."""
        return b""

    def session(self, site: str, secret: bytes, private_key: bytes, peers: Mapping[str, bytes]) -> Session:
        """Needs nothing."""
        return _OpenSession()

    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
        return (
            Exposure("coordinator", "every site's update, every round"),
            Exposure("one other site", "the sum over the cohort"),
            Exposure("outsider on the network", "nothing beyond what TLS lets through"),
        )


class _OpenAccumulator(Accumulator):
    def __init__(self, size: int) -> None:
        self._total = np.zeros(size, dtype=np.float64)

    def add(self, payload: Payload) -> None:
        self._total += _parse(payload.chunks, len(self._total), "<f4")

    def total(self) -> Payload:
        return Payload(_split(self._total.astype("<f8").tobytes()))


class _OpenSession(Session):
    secret_digest = "0" * 64

    def seal(self, vector: Floats, segments: Sequence[Segment], agreement: Agreement) -> Payload:
        low = np.concatenate([np.full(s.size, s.low) for s in segments])
        high = np.concatenate([np.full(s.size, s.high) for s in segments])
        return Payload(_split(np.clip(vector, low, high).astype("<f4").tobytes()))

    def open(self, total: Payload, segments: Sequence[Segment], agreement: Agreement) -> Floats:
        return _parse(total.chunks, sum(s.size for s in segments), "<f8")

    def destroy(self) -> None:
        """There is nothing to forget."""


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
