"""The BFV lock through SEAL: seeded symmetric encryption, addition, decryption. Bytes go through a memory file.

SEAL parses only what has passed a signature, is of the one length that honest bytes have, and loads as a valid
ciphertext of this context; nothing here touches the disk.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.parameters import DEGREE, BfvParameters

__all__ = ["Bfv", "BfvKey"]

Words = NDArray[np.uint64]
#: Lengths of honest bytes for N = 4096 and one prime: a seeded ciphertext, a full one, a secret key.
_SEEDED_BYTES, _FULL_BYTES, _KEY_BYTES = 32_972, 65_659, 32_866


class _MemoryFile:
    """SEAL reads and writes files only; this one lives in memory."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("confide")
        self._path = f"/proc/self/fd/{self._descriptor}"

    def save(self, thing: object) -> bytes:
        os.ftruncate(self._descriptor, 0)
        thing.save(self._path)  # type: ignore[attr-defined]  # any SEAL object
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        os.ftruncate(self._descriptor, 0)  # it may have been a key
        return data

    def load(self, thing: object, context: object, data: bytes) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        try:
            thing.load(context, self._path)  # type: ignore[attr-defined]  # any SEAL object
        except (RuntimeError, ValueError) as error:
            raise SealingError("is not a valid SEAL object of this run", where="ciphertext") from error
        finally:
            os.ftruncate(self._descriptor, 0)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._descriptor)  # bound here: at interpreter exit the module may be gone already


class Bfv:
    """Keyless operations under fixed parameters: what a coordinator can do."""

    def __init__(self, parameters: BfvParameters) -> None:
        self.parameters = parameters
        choice = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
        choice.set_poly_modulus_degree(DEGREE)
        choice.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, [60]))
        choice.set_plain_modulus(seal.PlainModulus.Batching(DEGREE, parameters.plain_modulus.bit_length()))
        self.context = seal.SEALContext(choice, True, seal.SEC_LEVEL_TYPE.TC128)
        # SEAL's constructor accepts impossible parameters silently.
        if not self.context.parameters_set() or choice.plain_modulus().value() != parameters.plain_modulus:
            raise SealingError("SEAL does not accept the run's parameters", where="sealing")
        self._evaluator = seal.Evaluator(self.context)
        self.file = _MemoryFile()

    def parse(self, data: bytes, *, seeded: bool) -> object:
        """A ciphertext from bytes.

        Raises:
            SealingError: It is anything else.
        """
        if len(data) != (_SEEDED_BYTES if seeded else _FULL_BYTES):
            raise SealingError("has a length that no honest ciphertext has", where="ciphertext")
        ciphertext = seal.Ciphertext(self.context)
        self.file.load(ciphertext, self.context, data)
        fresh = ciphertext.size() == 2 and not ciphertext.is_ntt_form() and not ciphertext.is_transparent()
        if not fresh or ciphertext.poly_modulus_degree() != DEGREE or ciphertext.coeff_modulus_size() != 1:
            raise SealingError("is not a fresh ciphertext of this run", where="ciphertext")
        return ciphertext

    def add(self, total: list[object] | None, parts: list[object]) -> list[object]:
        """Add ciphertexts in place, position by position; the first parts become the total."""
        if total is None:
            return parts
        for into, part in zip(total, parts, strict=True):
            self._evaluator.add_inplace(into, part)
        return total

    def serialise(self, ciphertexts: Iterable[object]) -> tuple[bytes, ...]:
        """Full (unseeded) bytes of summed ciphertexts."""
        return tuple(self.file.save(c) for c in ciphertexts)

    def generate_key(self) -> bytes:
        """A new secret key; SEAL seeds its generator from the operating system."""
        return self.file.save(seal.KeyGenerator(self.context).secret_key())


class BfvKey:
    """Operations with the run's secret key: at sites only."""

    def __init__(self, bfv: Bfv, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise SealingError("is not a key of this run", where="run secret")
        self._bfv = bfv
        secret = seal.SecretKey()
        bfv.file.load(secret, bfv.context, key)
        self._encryptor = seal.Encryptor(bfv.context, secret)
        self._decryptor = seal.Decryptor(bfv.context, secret)
        self._encoder = seal.BatchEncoder(bfv.context)

    def encrypt(self, slots: Words) -> bytes:
        """Seeded bytes of 4096 slots."""
        plain = seal.Plaintext()
        self._encoder.encode(slots.tolist(), plain)
        return self._bfv.file.save(self._encryptor.encrypt_symmetric(plain))

    def decrypt(self, data: bytes) -> tuple[Words, int]:
        """4096 slots of a summed ciphertext, and the noise budget that is left in bits."""
        ciphertext = self._bfv.parse(data, seeded=False)
        plain = seal.Plaintext()
        self._decryptor.decrypt(ciphertext, plain)
        return np.array(self._encoder.decode_uint64(plain), dtype=np.uint64), int(
            self._decryptor.invariant_noise_budget(ciphertext)
        )


@functools.lru_cache(maxsize=8)
def shared_bfv(parameters: BfvParameters) -> Bfv:
    """Contexts hold precomputed tables and no secret: one per parameters and process is enough."""
    return Bfv(parameters)
