"""What lies on a disk under a key that does not: AES-256-GCM, bound to what it is (associated data)."""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from confide.errors import SealingError

__all__ = ["close_box", "new_key", "open_box"]

_NONCE = 12


def new_key() -> bytes:
    """32 bytes from the operating system."""
    return secrets.token_bytes(32)


def close_box(key: bytes, context: bytes, data: bytes) -> bytes:
    """Encrypt; `context` must be the same when it is opened."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, data, context)


def open_box(key: bytes, context: bytes, box: bytes) -> bytes:
    """Decrypt.

    Raises:
        SealingError: Another key, another context, or a changed bit.
    """
    try:
        return AESGCM(key).decrypt(box[:_NONCE], box[_NONCE:], context)
    except (InvalidTag, ValueError):
        raise SealingError("cannot be opened: another key, or it was changed", where="state at rest") from None
