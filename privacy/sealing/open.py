"""Profile `open`: updates travel readable. For baselines on public data; a site refuses it elsewhere.

Where a strategy reads single updates they are *gathered*, not added: the coordinator passes all payloads on, and every
site reads them. A value outside the public range is then clipped, not refused: one site must not be able to end a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing.encoding import SATURATION
from confide.privacy.sealing.exposure import Exposure, exposure_table
from confide.privacy.sealing.profile import (
    Accumulator,
    Agreement,
    Opened,
    Payload,
    Profile,
    Sealing,
    Segment,
    Session,
    Size,
)

__all__ = ["OpenProfile"]

_CHUNK = 2**20
_SLACK = 1e-6  # float32 rounds
Floats = NDArray[np.float64]


class OpenProfile(Profile):
    """float32 updates in the clear, clipped to the public range, summed in float64 in the order they arrive."""

    name = "open"
    keyed = False

    def __init__(self, sites: int = 0, *, gather: bool = False) -> None:
        self._sites, self._gather = sites, gather

    @property
    def parameters(self) -> Mapping[str, int | float]:
        """Bits a coordinate on the way up and down."""
        return {"bits": 32, "sum_bits": 32 if self._gather else 64}

    @property
    def summary(self) -> str:
        """See the base class."""
        to = ", and every site gets every other's" if self._gather else ""
        return "updates travel readable, as float32" + to

    def size(self, coordinates: int) -> Size:
        """See the base class."""
        held = coordinates + SATURATION
        return Size(4 * held, 4 * held * self._sites if self._gather else 8 * held)

    def accumulator(self, size: int) -> Accumulator:
        """An empty sum, or collection."""
        return (_OpenCollection if self._gather else _OpenAccumulator)(size + SATURATION)

    def make_secret(self) -> bytes:
        """There is none."""
        return b""

    def session(self, site: str, secret: bytes, private_key: bytes, peers: Mapping[str, bytes]) -> Session:
        """Needs nothing."""
        return _OpenSession(self._gather)

    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
        return exposure_table("open, gathered" if self._gather else self.name, 0, 0)


class _OpenAccumulator(Accumulator):
    def __init__(self, size: int) -> None:
        self._total = np.zeros(size, dtype=np.float64)

    def add(self, payload: Payload) -> None:
        self._total += _parse(payload.chunks, len(self._total), "<f4")

    def total(self) -> Payload:
        return Payload(tuple(_split(self._total.astype("<f8").tobytes())))


class _OpenCollection(Accumulator):
    """Payloads in the order they arrive: here memory does grow with the number of sites."""

    def __init__(self, size: int) -> None:
        self._size, self._held = size, list[bytes]()

    def add(self, payload: Payload) -> None:
        _parse(payload.chunks, self._size, "<f4")
        self._held += payload.chunks

    def total(self) -> Payload:
        return Payload(tuple(self._held))


class _OpenSession(Session):
    secret_digest = "0" * 64

    def __init__(self, gather: bool) -> None:
        self._gather = gather

    def seal(
        self, vector: Floats, segments: Sequence[Segment], agreement: Agreement, rounding: SecureRandom | None = None
    ) -> Sealing:
        low = np.concatenate([np.full(s.size, s.low) for s in segments])
        high = np.concatenate([np.full(s.size, s.high) for s in segments])
        clipped = np.clip(vector, low, high)
        saturated = np.count_nonzero(clipped != vector)
        return Sealing(_split(np.append(clipped, saturated).astype("<f4").tobytes()))

    def open(self, total: Payload, segments: Sequence[Segment], agreement: Agreement) -> Opened:
        size = sum(s.size for s in segments)
        if self._gather:
            return self._open_each(total, segments, size, len(agreement.cohort))
        values, sites = _parse(total.chunks, size + SATURATION, "<f8"), len(agreement.cohort)
        # Nothing is authenticated here, but one member's numbers must not drown everybody else's.
        low = np.concatenate([*(np.full(s.size, s.low) for s in segments), np.zeros(SATURATION)]) * sites
        high = np.concatenate([*(np.full(s.size, s.high) for s in segments), np.full(SATURATION, size)]) * sites
        if np.any(values < low - _SLACK * np.abs(low)) or np.any(values > high + _SLACK * np.abs(high)):
            raise SealingError("holds a coordinate that no honest sum has", where="sum")
        return Opened(values[:size], float(values[size]) / (max(1, size) * sites))

    def _open_each(self, total: Payload, segments: Sequence[Segment], size: int, sites: int) -> Opened:
        rows = _parse(total.chunks, sites * (size + SATURATION), "<f4").reshape(sites, size + SATURATION)
        low = np.concatenate([*(np.full(s.size, s.low) for s in segments), np.zeros(SATURATION)])
        high = np.concatenate([*(np.full(s.size, s.high) for s in segments), np.full(SATURATION, size)])
        rows, values = np.clip(rows, low, high), np.zeros(size + SATURATION)
        for row in rows:  # one after the other: all sites add in the same order
            values += row
        return Opened(values[:size], float(values[size]) / (max(1, size) * sites), rows[:, :size])

    def destroy(self) -> None:
        """There is nothing to forget."""


def _split(data: bytes) -> Iterator[bytes]:
    return (data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK))


def _parse(chunks: Sequence[bytes], size: int, dtype: str) -> Floats:
    expected = size * np.dtype(dtype).itemsize
    if sum(map(len, chunks)) != expected:
        raise SealingError("has another number of coordinates than the run", where="payload")
    values = np.frombuffer(b"".join(chunks), dtype=dtype).astype(np.float64)
    if not np.all(np.isfinite(values)):
        raise SealingError("holds a coordinate that is not a finite number", where="payload")
    return values
