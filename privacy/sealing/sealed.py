"""Profile `sealed`: two locks and a seal. Masks hide a site from key holders, BFV hides the sum from the coordinator,
tags let only the agreed sum open.

Invariants:
1. The coordinator's side (`SealedProfile`, its accumulator) holds no key.
2. A sum opens only if its tags match the cohort and transcript, every field is in range and the noise budget is what an
   honest sum has left. Anything else raises, and the caller must destroy the session: a second look at a forgery would
   be an oracle.
3. A payload enters the accumulator whole or not at all.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing.authentication import SumMac
from confide.privacy.sealing.bfv import Bfv, BfvKey, shared_bfv
from confide.privacy.sealing.masks import PairKeys
from confide.privacy.sealing.parameters import DEGREE, choose_parameters
from confide.privacy.sealing.profile import Accumulator, Agreement, Exposure, Payload, Profile, Segment, Session
from confide.privacy.sealing.quantise import dequantise_sum, pack, quantise, unpack

__all__ = ["SealedProfile"]

_MAC_KEY_BYTES = 32
Floats = NDArray[np.float64]


class SealedProfile(Profile):
    """The public side.

    Args:
        sites: Most sites a sum may have.
        bits: Bits a coordinate.
    """

    name = "sealed"
    keyed = True

    def __init__(self, sites: int, bits: int) -> None:
        self.parameters = choose_parameters(sites, bits)
        self._bfv = shared_bfv(self.parameters)

    def accumulator(self, size: int) -> Accumulator:
        """An empty sum."""
        return _SealedAccumulator(self._bfv, self.parameters.ciphertexts(size))

    def make_secret(self) -> bytes:
        """BFV key ‖ MAC key."""
        return self._bfv.generate_key() + secrets.token_bytes(_MAC_KEY_BYTES)

    def session(self, site: str, secret: bytes, private_key: bytes, peers: Mapping[str, bytes]) -> Session:
        """See the base class."""
        return SealedSession(self._bfv, site, secret, PairKeys(site, private_key, peers))

    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
        return (
            Exposure("coordinator", "nothing until a release: sizes and timing, no update and no sum"),
            Exposure("one other site", "the sum over the cohort"),
            Exposure("coordinator and one site", "the sum over the cohort; they can forge sums, not open an update"),
            Exposure("all other sites of the cohort together", "the remaining site's noised update, by subtraction"),
            Exposure("outsider with backups", "nothing: keys of a run are never written to a disk"),
        )


class _SealedAccumulator(Accumulator):
    def __init__(self, bfv: Bfv, ciphertexts: int) -> None:
        self._bfv, self._count = bfv, ciphertexts
        self._total: list[object] | None = None
        self._tags = [0] * bfv.parameters.tags

    def add(self, payload: Payload) -> None:
        parameters = self._bfv.parameters
        if len(payload.chunks) != self._count or len(payload.tags) != parameters.tags:
            raise SealingError("is not complete", where="payload")
        if not all(0 <= tag < parameters.plain_modulus for tag in payload.tags):
            raise SealingError("holds a tag out of range", where="payload")
        parts = [self._bfv.parse(chunk, seeded=True) for chunk in payload.chunks]
        self._total = self._bfv.add(self._total, parts)
        self._tags = [(a + b) % parameters.plain_modulus for a, b in zip(self._tags, payload.tags, strict=True)]

    def total(self) -> Payload:
        if self._total is None:
            raise SealingError("nothing was added", where="sum")
        return Payload(self._bfv.serialise(self._total), tuple(self._tags))


class SealedSession(Session):
    """A site's side.

    Args:
        bfv: The run's context.
        site: Its own name.
        secret: BFV key ‖ MAC key.
        pairs: Secrets shared with each peer.
    """

    def __init__(self, bfv: Bfv, site: str, secret: bytes, pairs: PairKeys) -> None:
        self._bfv, self._site = bfv, site
        self._key: BfvKey | None = BfvKey(bfv, secret[:-_MAC_KEY_BYTES])
        self._mac_key, self._pairs = secret[-_MAC_KEY_BYTES:], pairs
        self._rng = SecureRandom()
        self.secret_digest = hashlib.sha256(b"confide/1/run-secret" + secret).hexdigest()

    def seal(self, vector: Floats, segments: Sequence[Segment], agreement: Agreement) -> Payload:
        """Quantise, pack, mask, tag, encrypt: chunk by chunk."""
        key, parameters = self._alive(), self._bfv.parameters
        if self._site not in agreement.cohort or len(agreement.cohort) > parameters.sites:
            raise SealingError("a cohort that this site cannot seal for", where=f"site {self._site}")
        slots = pack(quantise(vector, segments, parameters.bits, self._rng), parameters)
        masks = self._pairs.for_cohort(agreement.cohort, agreement.transcript)
        mac = self._mac(agreement)
        products, chunks = [0] * parameters.tags, []
        for number in range(len(slots) // DEGREE):
            masked = masks.apply(slots[number * DEGREE : (number + 1) * DEGREE], number, parameters.plain_modulus)
            products = [a + b for a, b in zip(products, mac.products(number, masked), strict=True)]
            chunks.append(key.encrypt(masked))
        return Payload(tuple(chunks), mac.tags(self._site, products))

    def open(self, total: Payload, segments: Sequence[Segment], agreement: Agreement) -> Floats:
        """Decrypt, authenticate, then (and only then) read."""
        key, parameters = self._alive(), self._bfv.parameters
        size = sum(s.size for s in segments)
        if len(total.chunks) != parameters.ciphertexts(size):
            raise SealingError("is not complete", where="sum")
        mac, opened, products = self._mac(agreement), [], [0] * parameters.tags
        for number, chunk in enumerate(total.chunks):
            slots, budget = key.decrypt(chunk)
            if budget < max(1, parameters.noise_budget):
                raise SealingError("has more noise than an honest sum", where="sum")
            products = [a + b for a, b in zip(products, mac.products(number, slots), strict=True)]
            opened.append(slots)
        if not mac.accepts(agreement.cohort, total.tags, products):
            raise SealingError("is not the authenticated sum of this cohort", where="sum",
                               hint="the coordinator, or the network, changed it; nothing was applied")  # fmt: skip
        slots = np.concatenate(opened)
        sites = len(agreement.cohort)
        fields = unpack(slots, len(slots) * parameters.fields, parameters)
        in_range = fields[:size].max(initial=0) <= sites * (2**parameters.bits - 1) and not fields[size:].any()
        if not in_range or bool((slots >> np.uint64(parameters.fields * parameters.field_bits)).any()):
            raise SealingError("holds a field that no honest sum has", where="sum")
        return dequantise_sum(fields[:size], segments, parameters.bits, sites)

    def destroy(self) -> None:
        """Drop every reference to a secret; Python cannot promise to overwrite the memory."""
        self._key, self._mac_key = None, b""
        self._pairs.destroy()

    def _mac(self, agreement: Agreement) -> SumMac:
        parameters = self._bfv.parameters
        return SumMac(self._mac_key, agreement.transcript, parameters.plain_modulus, parameters.tags)

    def _alive(self) -> BfvKey:
        if self._key is None:
            raise SealingError("the run's keys were destroyed", where=f"site {self._site}")
        return self._key
