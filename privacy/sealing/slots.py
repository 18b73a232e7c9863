"""A site's side of the masked profiles: quantise, pack, mask, tag, lock; and back.

Invariants:
1. A sum opens only if its tags match the cohort and transcript, and every field is one that an honest sum can have.
   Anything else raises, and the caller must destroy the session: a second look at a forgery would be an oracle.
2. Nothing of a sum is handed out before all of it is authenticated.
3. One chunk is in the making at a time (a few with worker processes), whatever the vector's size.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing.authentication import SumMac
from confide.privacy.sealing.encoding import Encoder, regroup
from confide.privacy.sealing.keystream import derive
from confide.privacy.sealing.masks import CohortMasks, PairKeys, remove_own
from confide.privacy.sealing.packing import Packing
from confide.privacy.sealing.profile import Agreement, Opened, Payload, Sealing, Segment, Session
from confide.privacy.sealing.workers import run_jobs

__all__ = ["MAC_KEY_BYTES", "Lock", "SlotSession", "chunk_words"]

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
MAC_KEY_BYTES = 32
_NOT_AUTHENTIC = "is not the authenticated sum of this cohort"


class Lock(ABC):
    """What a chunk of masked words goes through last, and a sum's chunk first. May be pickled to a worker process."""

    @abstractmethod
    def close(self, words: Words) -> bytes:
        """A chunk's bytes."""

    @abstractmethod
    def summed_bytes(self, words: int) -> int:
        """Length of a summed chunk of so many words."""

    @abstractmethod
    def open(self, data: bytes) -> Words:
        """A summed chunk's words; raises `SealingError` where they are none."""


@dataclass(frozen=True, slots=True)
class _SealJob:
    lock: Lock
    masks: CohortMasks
    mac: SumMac
    modulus: int

    def __call__(self, number: int, words: Words) -> tuple[bytes, tuple[int, ...]]:
        masked = self.masks.apply(words, number, self.modulus)
        return self.lock.close(masked), self.mac.products(number, masked)


@dataclass(frozen=True, slots=True)
class _OpenJob:
    lock: Lock
    unlocked: tuple[bytes, ...]
    mac: SumMac
    modulus: int

    def __call__(self, number: int, data: bytes) -> tuple[Words, tuple[int, ...]]:
        words = self.lock.open(data)
        return remove_own(words, self.unlocked, number, self.modulus), self.mac.products(number, words)


def chunk_words(packing: Packing, size: int, *, whole: bool) -> list[int]:
    """Words in each chunk of `size` coordinates; `whole` chunks are all of one length."""
    count = packing.chunks(size)
    last = -(-(size - (count - 1) * packing.coordinates) // packing.fields)
    return [packing.words] * (count - 1) + [packing.words if whole else last]


class SlotSession(Session):
    """A site's side.

    Args:
        site: Its own name.
        packing: The run's packing.
        tags: Authentication tags a sum.
        secret: The run secret; its last 32 bytes are the MAC key.
        lock: What its first bytes make.
        pairs: Secrets shared with each peer.
        whole: Are all chunks of one length?
    """

    def __init__(
        self, site: str, packing: Packing, tags: int, secret: bytes, lock: Lock, pairs: PairKeys, *, whole: bool
    ) -> None:
        self._site, self._packing, self._tags, self._whole = site, packing, tags, whole
        self._lock: Lock | None = lock
        self._mac_key, self._pairs = secret[-MAC_KEY_BYTES:], pairs
        self._rng, self._own_key = SecureRandom(), SecureRandom().words(4).tobytes()
        self.secret_digest = hashlib.sha256(b"confide/1/run-secret" + secret).hexdigest()

    def seal(
        self, vector: Floats, segments: Sequence[Segment], agreement: Agreement, rounding: SecureRandom | None = None
    ) -> Sealing:
        """Quantise, pack, mask, tag, lock: chunk by chunk."""
        if self._site not in agreement.cohort or len(agreement.cohort) > self._packing.sites:
            raise SealingError("a cohort that this site cannot seal for", where=f"site {self._site}")
        packing, encoder = self._packing, Encoder(segments, self._packing.bits, agreement.transcript)
        own = self.unlock(agreement) if agreement.self_masked else None
        masks = self._pairs.for_cohort(agreement.cohort, agreement.transcript, own)
        mac = self._mac(agreement)
        job, totals = _SealJob(self._alive(), masks, mac, packing.modulus), [0] * self._tags
        lengths = chunk_words(packing, encoder.size, whole=self._whole)
        parts = regroup(encoder.encode(vector, rounding or self._rng), [packing.coordinates] * len(lengths))
        packed = (packing.pack(part, words) for part, words in zip(parts, lengths, strict=True))

        def chunks() -> Iterator[bytes]:
            for chunk, products in run_jobs(job, packed, len(lengths)):
                totals[:] = [a + b for a, b in zip(totals, products, strict=True)]
                yield chunk

        return Sealing(chunks(), lambda: mac.tags(self._site, totals))

    def open(self, total: Payload, segments: Sequence[Segment], agreement: Agreement) -> Opened:
        """Unlock, authenticate, then (and only then) read."""
        packing, encoder = self._packing, Encoder(segments, self._packing.bits, agreement.transcript)
        lengths, sites = chunk_words(packing, encoder.size, whole=self._whole), len(agreement.cohort)
        if len(total.chunks) != len(lengths):
            raise SealingError("is not complete", where="sum")
        lock = self._alive()
        if any(len(chunk) != lock.summed_bytes(words) for chunk, words in zip(total.chunks, lengths, strict=True)):
            raise SealingError("has a chunk of another length than the run's", where="sum")
        if len(agreement.unlocked) != (sites if agreement.self_masked else 0):
            raise SealingError("lacks what its cohort unlocked", where="sum")
        mac = self._mac(agreement)
        job = _OpenJob(lock, agreement.unlocked, mac, packing.modulus)
        opened, products = list[Words](), [0] * self._tags
        for words, parts in run_jobs(job, total.chunks, len(lengths)):
            if len(words) != lengths[len(opened)]:
                raise SealingError("has another number of words than the run", where="sum")
            opened.append(words)
            products = [a + b for a, b in zip(products, parts, strict=True)]
        if not mac.accepts(agreement.cohort, total.tags, products):
            raise SealingError(_NOT_AUTHENTIC, where="sum",
                               hint="the coordinator, or the network, changed it; nothing was applied")  # fmt: skip
        return encoder.decode(self._fields(opened, encoder.size, sites), sites)

    def unlock(self, agreement: Agreement) -> bytes:
        """The seed of this site's own mask: a different one for every transcript."""
        self._alive()
        return derive(self._own_key, bytes.fromhex(agreement.transcript), b"own-mask", self._site.encode())

    def destroy(self) -> None:
        """Drop every reference to a secret; Python cannot promise to overwrite the memory."""
        self._lock, self._mac_key, self._own_key = None, b"", b""
        self._pairs.destroy()

    def _fields(self, opened: Sequence[Words], size: int, sites: int) -> Iterator[Words]:
        """The coordinates of authenticated chunks, each checked to be one that an honest sum can have."""
        left = size
        for words in opened:
            fields, clean = self._packing.unpack(words)
            here = min(left, len(fields))
            left -= here
            if not clean or int(fields.max()) > sites * (2**self._packing.bits - 1) or bool(fields[here:].any()):
                raise SealingError("holds a field that no honest sum has", where="sum")
            yield fields[:here]

    def _mac(self, agreement: Agreement) -> SumMac:
        self._alive()
        return SumMac(self._mac_key, agreement.transcript, self._packing.modulus, self._tags)

    def _alive(self) -> Lock:
        if self._lock is None:
            raise SealingError("the run's keys were destroyed", where=f"site {self._site}")
        return self._lock
