"""Ed25519 identities of the coordinator and the sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from confide.privacy.audit.log import Log

__all__ = ["Hex32", "Identity", "verify_signature"]

#: A digest or a public key in a message.
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """A name with its signing key. The private key never leaves the process that made it."""

    name: str
    key: Ed25519PrivateKey

    @classmethod
    def generate(cls, name: str) -> Identity:
        """A new identity from the operating system's randomness."""
        return cls(name, Ed25519PrivateKey.generate())

    @property
    def public_key(self) -> bytes:
        """The 32-byte public key."""
        return self.key.public_key().public_bytes_raw()

    def open_log(self, path: Path, kind: str, federation: str, former: Sequence[bytes] = ()) -> Log:
        """This identity's log of a kind (`federated`, `local`, `coordinator`); `former`: public keys that it had."""
        origin = f"confide/{federation}/{self.name}/{kind}"
        return Log(path, origin=origin, name=self.name, public_key=self.public_key, sign=self.sign, former=former)

    def sign(self, message: bytes) -> bytes:
        """A 64-byte signature."""
        return self.key.sign(message)


def verify_signature(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Is this the key's signature over the message?"""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
