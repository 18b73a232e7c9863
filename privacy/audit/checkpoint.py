"""Signed checkpoints of a log, in the C2SP signed-note and tlog-checkpoint formats.

A note's text is: origin, tree size, base64 root, each on its line; after an empty line the signature line
`— <name> <base64(key id ‖ Ed25519 signature)>` with key id = SHA-256(name ‖ 0x0A ‖ 0x01 ‖ public key)[:4].
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from confide.errors import AuditError

__all__ = ["Checkpoint", "parse_note", "sign_note"]

_ED25519 = b"\x01"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a log: whose, how many entries, and their root."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The signed text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @property
    def short(self) -> str:
        """`size:root`, as it travels in every envelope and stands in other parties' logs."""
        return f"{self.size}:{self.root.hex()}"


def sign_note(checkpoint: Checkpoint, name: str, public_key: bytes, sign: Callable[[bytes], bytes]) -> str:
    """The checkpoint as a signed note."""
    signature = base64.b64encode(_key_id(name, public_key) + sign(checkpoint.text.encode())).decode()
    return f"{checkpoint.text}\n\N{EM DASH} {name} {signature}\n"


def parse_note(note: str, origin: str, name: str, public_key: bytes) -> Checkpoint:
    """Verify a note completely.

    Raises:
        AuditError: It is malformed, about another log, or not signed by this key.
    """
    where = f"checkpoint of {origin}"
    text, gap, signatures = note.partition("\n\n")
    lines = text.split("\n")
    prefix = f"\N{EM DASH} {name} "
    if not gap or len(lines) != 3 or not signatures.startswith(prefix) or not signatures.endswith("\n"):
        raise AuditError("is not a signed checkpoint", where=where)
    try:
        size, root = int(lines[1]), base64.b64decode(lines[2], validate=True)
        blob = base64.b64decode(signatures[len(prefix) : -1], validate=True)
    except (ValueError, binascii.Error):
        raise AuditError("is not a signed checkpoint", where=where) from None
    checkpoint = Checkpoint(lines[0], size, root)
    # Re-encoding must give the same bytes: nothing in the file may be changed unnoticed.
    honest = f"{checkpoint.text}\n{prefix}{base64.b64encode(blob).decode()}\n"
    if note != honest or blob[:4] != _key_id(name, public_key) or len(root) != 32 or size < 0:
        raise AuditError("is not in its canonical form, or signed by another key", where=where)
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(blob[4:], checkpoint.text.encode())
    except (InvalidSignature, ValueError):
        raise AuditError("the signature does not hold", where=where) from None
    if checkpoint.origin != origin:
        raise AuditError(f"is about another log ({checkpoint.origin[:80]!r})", where=where)
    return checkpoint


def _key_id(name: str, public_key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:4]
