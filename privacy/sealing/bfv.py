"""The BFV lock: a chunk of slots mod t under the run's key."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.lattice import SUMMED_BYTES, Lattice
from confide.privacy.sealing.parameters import DEGREE, BfvParameters
from confide.privacy.sealing.slots import Lock

__all__ = ["BfvLock", "lattice_for"]

Words = NDArray[np.uint64]


@functools.lru_cache(maxsize=16)
def lattice_for(parameters: BfvParameters) -> Lattice:
    """Contexts hold precomputed tables and no secret: one per parameters and process is enough."""
    return Lattice(seal.SCHEME_TYPE.BFV, plain_modulus=parameters.plain_modulus)


class BfvLock(Lock):
    """Encryption of 4096 slots.

    Args:
        parameters: The run's.
        key: The run's BFV key in wire form; kept so that a worker process can be handed the lock.

    Raises:
        SealingError: The key is none.
    """

    def __init__(self, parameters: BfvParameters, key: bytes) -> None:
        self._parameters, self._key = parameters, key
        self._lattice = lattice_for(parameters)
        secret = self._lattice.parse_key(key)
        self._encryptor = seal.Encryptor(self._lattice.context, secret)
        self._decryptor = seal.Decryptor(self._lattice.context, secret)
        self._encoder = seal.BatchEncoder(self._lattice.context)

    def __reduce__(self) -> tuple[type[BfvLock], tuple[Any, ...]]:
        return BfvLock, (self._parameters, self._key)

    def close(self, words: Words) -> bytes:
        """Fresh bytes of 4096 slots."""
        plain = seal.Plaintext()
        self._encoder.encode(words.tolist(), plain)
        return self._lattice.fresh(lambda: self._encryptor.encrypt_symmetric(plain))

    def summed_bytes(self, words: int) -> int:
        """One length for all."""
        return SUMMED_BYTES

    def open(self, data: bytes) -> Words:
        """The slots of a summed ciphertext.

        Raises:
            SealingError: It is none, or has more noise than an honest sum.
        """
        ciphertext, plain = self._lattice.parse(data, fresh=False), seal.Plaintext()
        if self._decryptor.invariant_noise_budget(ciphertext) < self._parameters.noise_budget:
            raise SealingError("has more noise than an honest sum", where="sum")
        self._decryptor.decrypt(ciphertext, plain)
        return np.fromiter(self._encoder.decode_uint64(plain), dtype=np.uint64, count=DEGREE)
