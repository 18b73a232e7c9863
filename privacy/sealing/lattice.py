"""SEAL behind our own bytes: ring degree 4096, one 60-bit prime q, symmetric encryption.

On the wire a ciphertext is its residues mod q at 60 bits each: the first polynomial and a 64-byte seed when fresh, both
polynomials once added. SEAL's own format would be 7 % longer, and puts a decompressor behind the network; here SEAL
parses only a frame that we built around residues that we checked. Nothing touches the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.parameters import COEFFICIENT_BITS, DEGREE

__all__ = ["FRESH_BYTES", "KEY_BYTES", "SUMMED_BYTES", "Lattice", "pack_residues", "unpack_residues"]

Words = NDArray[np.uint64]
_SEED = 64
KEY_BYTES = DEGREE * COEFFICIENT_BITS // 8
FRESH_BYTES, SUMMED_BYTES = KEY_BYTES + _SEED, 2 * KEY_BYTES
_HEADER = 16  # SEAL's: magic, header size, version, compression, length
_RAW_FRAME = 10  # zstd: magic, descriptor, two bytes of size, one raw block's header
_LOW = np.uint64(2**60 - 1)


def pack_residues(residues: Words) -> bytes:
    """An even number of values below 2⁶⁰, at 60 bits each, little endian: 15 bytes a pair."""
    first, second = residues[0::2], residues[1::2]
    out = bytearray(15 * len(first))
    # Two overlapping views of each 15 bytes: the second rewrites the byte that both share.
    np.ndarray(len(first), "<u8", out, 0, (15,))[:] = first
    np.ndarray(len(first), "<u8", out, 7, (15,))[:] = (first >> np.uint64(56)) | (second << np.uint64(4))
    return bytes(out)


def unpack_residues(data: bytes) -> Words:
    """Inverse of `pack_residues`."""
    pairs = len(data) // 15
    residues = np.empty(2 * pairs, dtype=np.uint64)
    residues[0::2] = np.ndarray(pairs, "<u8", data, 0, (15,)) & _LOW
    residues[1::2] = np.ndarray(pairs, "<u8", data, 7, (15,)) >> np.uint64(4)
    return residues


class Lattice:
    """A SEAL context and its wire format; holds no secret.

    Args:
        scheme: SEAL's scheme.
        plain_modulus: t; 0 for CKKS, which has none.
        scale: CKKS's scale; 1 for BFV.

    Raises:
        SealingError: SEAL does not accept the parameters.
    """

    def __init__(self, scheme: Any, plain_modulus: int = 0, scale: float = 1.0) -> None:
        choice = seal.EncryptionParameters(scheme)
        choice.set_poly_modulus_degree(DEGREE)
        choice.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, [COEFFICIENT_BITS]))
        if plain_modulus:
            choice.set_plain_modulus(plain_modulus)
        self.context = seal.SEALContext(choice, True, seal.SEC_LEVEL_TYPE.TC128)
        # SEAL's constructor accepts impossible parameters silently.
        if not self.context.parameters_set():
            raise SealingError("SEAL does not accept the run's parameters", where="sealing")
        self.modulus: int = choice.coeff_modulus()[0].value()
        self.evaluator = seal.Evaluator(self.context)
        self._file = _MemoryFile()
        self._frame_fresh, self._frame_summed, self._frame_key = self._learn_frames(plain_modulus, scale)

    # --- bytes from SEAL ------------------------------------------------------------------------------------------

    def fresh(self, encrypt: Callable[[], Any]) -> bytes:
        """The wire form of what `encrypt` returns, which is asked again where SEAL found it compressible."""
        while (content := self._content(encrypt())) is None:
            pass
        offset = len(self._frame_fresh[0])
        residues = np.frombuffer(content, dtype="<u8", count=DEGREE, offset=offset)
        return pack_residues(residues) + content[len(content) - _SEED :]

    def summed(self, ciphertext: Any) -> bytes:
        """The wire form of a ciphertext after additions."""
        content = self._content(ciphertext)
        if content is None:
            array = ciphertext.dyn_array()
            return pack_residues(np.array([array.at(i) for i in range(2 * DEGREE)], dtype=np.uint64))
        residues = np.frombuffer(content, dtype="<u8", count=2 * DEGREE, offset=len(self._frame_summed))
        return pack_residues(residues)

    def generate_key(self) -> bytes:
        """A new secret key; SEAL seeds its generator from the operating system."""
        while True:
            content = self._content(seal.KeyGenerator(self.context).secret_key())
            if content is not None:
                return pack_residues(np.frombuffer(content, dtype="<u8", count=DEGREE, offset=len(self._frame_key)))

    # --- bytes to SEAL --------------------------------------------------------------------------------------------

    def residues(self, data: bytes, *, fresh: bool) -> Words:
        """The residues that the wire form holds; a fresh one's seed is left out.

        Raises:
            SealingError: Not the one length that honest bytes have, or a residue that is not below q.
        """
        if len(data) != (FRESH_BYTES if fresh else SUMMED_BYTES):
            raise SealingError("has a length that no honest ciphertext has", where="ciphertext")
        residues = unpack_residues(data[:-_SEED] if fresh else data)
        if int(residues.max()) >= self.modulus:
            raise SealingError("holds a residue that is not below q", where="ciphertext")
        return residues

    def parse(self, data: bytes, *, fresh: bool) -> Any:
        """A ciphertext from its wire form.

        Raises:
            SealingError: It is anything else.
        """
        residues = self.residues(data, fresh=fresh)
        if fresh:
            before, after = self._frame_fresh
            content = before + residues.tobytes() + after + data[-_SEED:]
        else:
            content = self._frame_summed + residues.tobytes()
        ciphertext = seal.Ciphertext(self.context)
        self._file.load(ciphertext, self.context, _with_header(content))
        if ciphertext.is_transparent():
            raise SealingError("is transparent: it would open without a key", where="ciphertext")
        return ciphertext

    def parse_key(self, data: bytes) -> Any:
        """A secret key from its wire form.

        Raises:
            SealingError: It is anything else.
        """
        if len(data) != KEY_BYTES:
            raise SealingError("is not a key of this run", where="run secret")
        residues = unpack_residues(data)
        if int(residues.max()) >= self.modulus:
            raise SealingError("is not a key of this run", where="run secret")
        key = seal.SecretKey()
        self._file.load(key, self.context, _with_header(self._frame_key + residues.tobytes()))
        return key

    # --- SEAL's own format ----------------------------------------------------------------------------------------

    def _content(self, thing: Any) -> bytes | None:
        """What SEAL saves, without its header; None where its compressor did more than copy."""
        data = self._file.save(thing)
        frame = data[_HEADER:]
        size = int.from_bytes(frame[5:7], "little") + 256
        block = int.from_bytes(frame[7:10], "little")
        if frame[:5] != b"\x28\xb5\x2f\xfd\x60" or block != (size << 3 | 1) or len(frame) != size + _RAW_FRAME:
            return None
        return frame[_RAW_FRAME:]

    def _learn_frames(self, plain_modulus: int, scale: float) -> tuple[tuple[bytes, bytes], bytes, bytes]:
        """What surrounds the residues, from objects under a key that is thrown away at once."""
        key = seal.KeyGenerator(self.context).secret_key()
        encryptor, plain = seal.Encryptor(self.context, key), seal.Plaintext()
        if plain_modulus:
            seal.BatchEncoder(self.context).encode([1], plain)
        else:
            seal.CKKSEncoder(self.context).encode([1.0], scale, plain)
        fresh = key_content = None
        while fresh is None:
            fresh = self._content(encryptor.encrypt_symmetric(plain))
        while key_content is None:
            key_content = self._content(seal.KeyGenerator(self.context).secret_key())
        before = len(fresh) - DEGREE * 8 - _HEADER - 1 - _SEED
        ciphertext = seal.Ciphertext(self.context)
        encryptor.encrypt_symmetric(plain, ciphertext)
        summed = None
        while summed is None:
            encryptor.encrypt_symmetric(plain, ciphertext)
            summed = self._content(ciphertext)
        return (
            (fresh[:before], fresh[before + DEGREE * 8 : -_SEED]),
            summed[: len(summed) - 2 * DEGREE * 8],
            key_content[: len(key_content) - DEGREE * 8],
        )


class _MemoryFile:
    """SEAL reads and writes files only. These live in memory, a new one each time: threads share none, no key stays."""

    def save(self, thing: Any) -> bytes:
        with _new_memory_file() as descriptor:
            thing.save(f"/proc/self/fd/{descriptor}")
            return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    def load(self, thing: Any, context: Any, data: bytes) -> None:
        with _new_memory_file() as descriptor:
            os.pwrite(descriptor, data, 0)
            try:
                thing.load(context, f"/proc/self/fd/{descriptor}")
            except (RuntimeError, ValueError) as error:
                raise SealingError("is not a valid SEAL object of this run", where="ciphertext") from error


@contextmanager
def _new_memory_file() -> Iterator[int]:
    descriptor = os.memfd_create("confide")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _with_header(content: bytes) -> bytes:
    """SEAL's header for uncompressed content."""
    return bytes.fromhex("5ea1100403000000") + (_HEADER + len(content)).to_bytes(8, "little") + content
