"""Randomness for privacy: AES-256 in counter mode under a key from the operating system.

Invariant: nothing a program can seed (`torch.manual_seed`, `numpy.random.seed`, `random.seed`) changes what comes
out; two sites can never draw the same noise. A fixed key is for tests and says `unsafe` in its name.

Normals are the inverse cumulative distribution of uniforms with 53 random bits. Floating-point noise has known
attacks (Mironov 2012); what leaves a site under an integer profile is quantised afterwards, and the report says so.
"""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri

__all__ = ["UNSAFE_NOISE", "SecureRandom"]

#: What must stand wherever a run is shown whose noise came from a seed.
UNSAFE_NOISE = (
    "UNSAFE: the noise was drawn from privacy.unsafe_noise_seed, which everybody knows: this run protects nobody, "
    "whatever its noise multiplier"
)


class SecureRandom:
    """A stream of cryptographically strong random numbers. Not shared between threads or processes.

    Args:
        unsafe_key: 32 bytes that make the stream reproducible. Destroys every privacy guarantee.
    """

    def __init__(self, *, unsafe_key: bytes | None = None) -> None:
        self._unsafe = unsafe_key is not None
        self._start(secrets.token_bytes(32) if unsafe_key is None else unsafe_key)

    def _start(self, key: bytes) -> None:
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def unsafe_restart(self, unsafe_key: bytes) -> None:
        """Go on with another reproducible stream.

        Raises:
            ValueError: This stream is the operating system's: it never becomes reproducible.
        """
        if not self._unsafe:
            raise ValueError("a stream from the operating system stays one")
        self._start(unsafe_key)

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform 64-bit words."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` uniforms in the open interval (0, 1): midpoints of 2⁵³ equal cells."""
        cells = (self.words(count) >> np.uint64(11)).astype(np.float64)
        # The largest midpoint rounds to 1.0 in float64; the last representable number below it stands in.
        return np.minimum((cells + 0.5) * 2.0**-53, 1.0 - 2.0**-53)

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` standard normals."""
        return np.asarray(ndtri(self.uniform(count)), dtype=np.float64)

    def poisson_sample(self, population: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
        """Each member independently with probability `rate` (Poisson sampling); may be empty."""
        return population[self.uniform(len(population)) < rate]
