"""The run secret on its way from the site that made it to another one, opaque to the coordinator in between.

HPKE (RFC 9180, base mode: X25519, HKDF-SHA256, AES-256-GCM) has no sender authentication: the maker's signed envelope
around the wrapped bytes gives that, and the same context stands in HPKE's `info`, so a wrap cannot be moved.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from confide.errors import SealingError

__all__ = ["new_ephemeral", "unwrap", "usable", "wrap"]

_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_MAX_BYTES = 256 * 1024


def new_ephemeral() -> tuple[bytes, bytes]:
    """A run's X25519 key pair: (private, public), 32 bytes each."""
    key = X25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def usable(public_key: bytes) -> bool:
    """Can a secret be shared with this key at all?"""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        return False
    return True


def wrap(secret: bytes, public_key: bytes, info: bytes) -> bytes:
    """Encrypt to one recipient.

    Raises:
        SealingError: The recipient's key is unusable.
    """
    try:
        return bytes(_SUITE.encrypt(secret, X25519PublicKey.from_public_bytes(public_key), info))
    except ValueError:
        raise SealingError("the recipient's ephemeral key is not usable", where="run secret") from None


def unwrap(wrapped: bytes, private_key: bytes, info: bytes) -> bytes:
    """Decrypt.

    Raises:
        SealingError: It was wrapped for somebody else, for another run, or changed on the way.
    """
    if len(wrapped) > _MAX_BYTES:
        raise SealingError("is larger than any honest secret", where="run secret")
    try:
        return bytes(_SUITE.decrypt(wrapped, X25519PrivateKey.from_private_bytes(private_key), info))
    except (InvalidTag, ValueError):
        raise SealingError("was not wrapped for this site and run", where="run secret") from None
