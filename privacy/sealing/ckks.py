"""Profile `ckks`: CKKS under a key that all sites hold, without masks; a baseline that many frameworks use.

Three things are not as elsewhere. Integers on the quantiser's grid are encrypted, and what is opened is rounded to that
grid before anything else sees it: the approximation error, from which the key can be computed (Li, Micciancio 2021),
never leaves `open`. Magnitudes are bounded by the parameters, so that nothing wraps. Tags cover the residues of the
ciphertexts and are checked *before* anything is decrypted. There are no multiplications: weights are applied before.

One site's update falls to the coordinator together with any one site: every key holder can open every ciphertext.
"""

from __future__ import annotations

import functools
import hashlib
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from confide.errors import ConfigError, SealingError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing.accumulate import LatticeAccumulator
from confide.privacy.sealing.authentication import SumMac
from confide.privacy.sealing.encoding import SATURATION, Encoder, regroup
from confide.privacy.sealing.exposure import Exposure, exposure_table
from confide.privacy.sealing.lattice import FRESH_BYTES, KEY_BYTES, SUMMED_BYTES, Lattice
from confide.privacy.sealing.parameters import COEFFICIENT_BITS, DEGREE, check_request
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
from confide.privacy.sealing.slots import MAC_KEY_BYTES
from confide.privacy.sealing.workers import run_jobs

__all__ = ["CkksProfile", "lattice"]

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
SLOTS = DEGREE // 2
_SCALE_BITS = 24
_TOLERANCE = 0.25  # of a grid step; an honest sum errs by 2⁻⁷ of one at 1,000 sites


@functools.lru_cache(maxsize=1)
def lattice() -> Lattice:
    """The one context."""
    return Lattice(seal.SCHEME_TYPE.CKKS, scale=2.0**_SCALE_BITS)


class CkksProfile(Profile):
    """The public side.

    Args:
        sites: Most sites a sum may have.
        bits: Bits a coordinate.

    Raises:
        ConfigError: The combination is impossible; names the nearest possible.
    """

    name = "ckks"
    keyed = True

    def __init__(self, sites: int, bits: int) -> None:
        check_request(sites, bits)
        self.sites, self.bits = sites, bits
        magnitude = math.log2(sites * (2**bits - 1)) + _SCALE_BITS
        if magnitude >= COEFFICIENT_BITS - 2:
            raise ConfigError("a sum would wrap", where="sealing.bits", hint="use fewer bits or sites")

    @property
    def parameters(self) -> Mapping[str, int | float]:
        """N, log₂ q, log₂ of the scale, bits, tags."""
        return {"N": DEGREE, "log2_q": COEFFICIENT_BITS, "log2_scale": _SCALE_BITS, "bits": self.bits, "tags": 1}

    @property
    def summary(self) -> str:
        """See the base class."""
        return (
            f"{self.bits} bits a coordinate; CKKS (N = {DEGREE}, one {COEFFICIENT_BITS}-bit prime: above 128-bit "
            "security) without masks, opened values rounded to their grid, linear authentication tags"
        )

    def size(self, coordinates: int) -> Size:
        """See the base class."""
        chunks = _chunks(coordinates + SATURATION)
        return Size(chunks * FRESH_BYTES, chunks * SUMMED_BYTES, 1 - (coordinates + SATURATION) / (chunks * SLOTS))

    def accumulator(self, size: int) -> Accumulator:
        """An empty sum."""
        return LatticeAccumulator(lattice(), _chunks(size + SATURATION), 1, lattice().modulus)

    def make_secret(self) -> bytes:
        """CKKS key ‖ MAC key."""
        return lattice().generate_key() + secrets.token_bytes(MAC_KEY_BYTES)

    def session(self, site: str, secret: bytes, private_key: bytes, peers: Mapping[str, bytes]) -> Session:
        """See the base class; there are no masks, so peers' keys are not used."""
        if len(secret) != KEY_BYTES + MAC_KEY_BYTES:
            raise SealingError("is not a secret of this run", where="run secret")
        return _CkksSession(site, self.sites, self.bits, secret)

    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
        return exposure_table(self.name, self.sites, 0)


class _Lock:
    """Encryption of 2048 integers, approximate; may be pickled to a worker process."""

    def __init__(self, key: bytes) -> None:
        self._key, self._lattice = key, lattice()
        secret = self._lattice.parse_key(key)
        self._encryptor = seal.Encryptor(self._lattice.context, secret)
        self._decryptor = seal.Decryptor(self._lattice.context, secret)
        self._encoder = seal.CKKSEncoder(self._lattice.context)

    def __reduce__(self) -> tuple[type[_Lock], tuple[Any, ...]]:
        return _Lock, (self._key,)

    def close(self, values: Words) -> bytes:
        plain = seal.Plaintext()
        self._encoder.encode(values.astype(np.float64).tolist(), 2.0**_SCALE_BITS, plain)
        return self._lattice.fresh(lambda: self._encryptor.encrypt_symmetric(plain))

    def residues(self, fresh: bytes) -> Words:
        """Both polynomials of a fresh ciphertext, whose second one travels as a seed."""
        return self._lattice.residues(self._lattice.summed(self._lattice.parse(fresh, fresh=True)), fresh=False)

    def open(self, data: bytes) -> Words:
        plain = seal.Plaintext()
        self._decryptor.decrypt(self._lattice.parse(data, fresh=False), plain)
        values = np.array(self._encoder.decode_double(plain), dtype=np.float64)
        rounded = np.rint(values)
        if float(np.abs(values - rounded).max()) > _TOLERANCE or float(rounded.min()) < 0:
            raise SealingError("has more error than an honest sum", where="sum")
        return rounded.astype(np.uint64)


@dataclass(frozen=True, slots=True)
class _SealJob:
    lock: _Lock
    mac: SumMac

    def __call__(self, number: int, values: Words) -> tuple[bytes, tuple[int, ...]]:
        padded = np.zeros(SLOTS, dtype=np.uint64)
        padded[: len(values)] = values
        data = self.lock.close(padded)
        return data, self.mac.products(number, self.lock.residues(data))


@dataclass(frozen=True, slots=True)
class _CheckJob:
    mac: SumMac

    def __call__(self, number: int, data: bytes) -> tuple[int, ...]:
        return self.mac.products(number, lattice().residues(data, fresh=False))


@dataclass(frozen=True, slots=True)
class _OpenJob:
    lock: _Lock

    def __call__(self, number: int, data: bytes) -> Words:
        return self.lock.open(data)


class _CkksSession(Session):
    def __init__(self, site: str, sites: int, bits: int, secret: bytes) -> None:
        self._site, self._sites, self._bits = site, sites, bits
        self._lock: _Lock | None = _Lock(secret[:-MAC_KEY_BYTES])
        self._mac_key, self._rng = secret[-MAC_KEY_BYTES:], SecureRandom()
        self.secret_digest = hashlib.sha256(b"confide/1/run-secret" + secret).hexdigest()

    def seal(
        self, vector: Floats, segments: Sequence[Segment], agreement: Agreement, rounding: SecureRandom | None = None
    ) -> Sealing:
        """Quantise, encrypt, tag the ciphertext."""
        if self._site not in agreement.cohort or len(agreement.cohort) > self._sites:
            raise SealingError("a cohort that this site cannot seal for", where=f"site {self._site}")
        encoder, mac, totals = Encoder(segments, self._bits, agreement.transcript), self._mac(agreement), [0]
        count = _chunks(encoder.size)
        parts = regroup(encoder.encode(vector, rounding or self._rng), [SLOTS] * count)
        job = _SealJob(self._alive(), mac)

        def chunks() -> Iterator[bytes]:
            for chunk, products in run_jobs(job, parts, count):
                totals[0] += products[0]
                yield chunk

        return Sealing(chunks(), lambda: mac.tags(self._site, totals))

    def open(self, total: Payload, segments: Sequence[Segment], agreement: Agreement) -> Opened:
        """Authenticate, then decrypt, round to the grid, and check the range."""
        lock, mac, sites = self._alive(), self._mac(agreement), len(agreement.cohort)
        encoder = Encoder(segments, self._bits, agreement.transcript)
        count = _chunks(encoder.size)
        if len(total.chunks) != count:
            raise SealingError("is not complete", where="sum")
        products = sum(p[0] for p in run_jobs(_CheckJob(mac), total.chunks, count))
        if not mac.accepts(agreement.cohort, total.tags, [products]):
            raise SealingError("is not the authenticated sum of this cohort", where="sum",
                               hint="the coordinator, or the network, changed it; nothing was decrypted")  # fmt: skip
        opened = list(run_jobs(_OpenJob(lock), total.chunks, count))
        if max(int(words.max()) for words in opened) > sites * (2**self._bits - 1):
            raise SealingError("holds a value that no honest sum has", where="sum")
        return encoder.decode(opened, sites)

    def destroy(self) -> None:
        """Drop every reference to a secret."""
        self._lock, self._mac_key = None, b""

    def _mac(self, agreement: Agreement) -> SumMac:
        self._alive()
        return SumMac(self._mac_key, agreement.transcript, lattice().modulus, 1)

    def _alive(self) -> _Lock:
        if self._lock is None:
            raise SealingError("the run's keys were destroyed", where=f"site {self._site}")
        return self._lock


def _chunks(size: int) -> int:
    return max(1, -(-size // SLOTS))
