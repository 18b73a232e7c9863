"""Uniform numbers modulo a prime from a key: HKDF-SHA256 for the subkey, AES-256-CTR, rejection sampling.

Reducing a random word modulo t would not be uniform; words at or above t are thrown away instead.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from numpy.typing import NDArray

__all__ = ["derive", "expand", "random_words", "uniform_mod"]

Words = NDArray[np.uint64]


def derive(secret: bytes, salt: bytes, *info: bytes) -> bytes:
    """32 bytes: HKDF extract-and-expand over length-prefixed info."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=_framed(info)).derive(secret)


def expand(key: bytes, *info: bytes) -> bytes:
    """32 bytes: HKDF expand of an already uniform key."""
    return HKDFExpand(algorithm=SHA256(), length=32, info=_framed(info)).derive(key)


def uniform_mod(key: bytes, count: int, modulus: int) -> Words:
    """`count` independent uniforms in [0, modulus). One key, one use."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    mask = np.uint64((1 << modulus.bit_length()) - 1)
    share = modulus / (1 << modulus.bit_length())
    found, have = list[Words](), 0
    while have < count or not found:
        words = int((count - have) / share * 1.02) + 64
        drawn = np.frombuffer(stream.update(bytes(8 * words)), dtype="<u8") & mask
        fits = drawn < np.uint64(modulus)
        if not fits.all():
            drawn = drawn[fits]
        found.append(drawn)
        have += len(drawn)
    return np.concatenate(found)[:count] if len(found) > 1 else found[0][:count]


def random_words(key: bytes, count: int) -> Words:
    """`count` uniform 64-bit words. One key, one use."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64)


def _framed(info: tuple[bytes, ...]) -> bytes:
    return b"confide/1" + b"".join(len(part).to_bytes(4, "big") + part for part in info)
