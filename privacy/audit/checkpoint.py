"""Signed checkpoints of a log, in the C2SP signed-note, tlog-checkpoint and tlog-cosignature formats.

A note's text is: origin, tree size, base64 root, each on its line; after an empty line the signature line
`— <name> <base64(key id ‖ Ed25519 signature)>` with key id = SHA-256(name ‖ 0x0A ‖ 0x01 ‖ public key)[:4].

A *cosigned* note has one more line, by a witness who saw that the log only grew: the signature is over
`cosignature/v1`, `time <seconds since 1970>` and the note's text, each on its line; its key id has type 0x04, and the
time (8 bytes, big endian) stands before the signature.
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

__all__ = ["Checkpoint", "cosign_note", "fingerprint", "parse_cosigned", "parse_note", "sign_note"]

_ED25519, _COSIGNATURE = b"\x01", b"\x04"


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


def cosign_note(note: str, at: int, name: str, public_key: bytes, sign: Callable[[bytes], bytes]) -> str:
    """A note that `parse_note` has accepted, with a witness's line.

    Args:
        note: The signed note.
        at: Seconds since 1970.
        name: The witness.
        public_key: Its Ed25519 public key.
        sign: Its signing function.
    """
    blob = _key_id(name, public_key, _COSIGNATURE) + at.to_bytes(8, "big") + sign(_cosigned(note, at))
    return f"{note}\N{EM DASH} {name} {base64.b64encode(blob).decode()}\n"


def parse_cosigned(
    note: str, origin: str, name: str, public_key: bytes, witness: str, witness_key: bytes
) -> tuple[Checkpoint, int]:
    """(checkpoint, seconds since 1970) of a note with exactly one witness's line, verified completely.

    Raises:
        AuditError: It is malformed, about another log, or a signature is not by these keys.
    """
    inner, dash, last = note[:-1].rpartition(f"\N{EM DASH} {witness} ")
    checkpoint = parse_note(inner, origin, name, public_key)
    where = f"cosignature of {witness} over {origin}"
    try:
        blob = base64.b64decode(last, validate=True)
    except (ValueError, binascii.Error):
        raise AuditError("is not a cosignature", where=where) from None
    key_id, at, signature = blob[:4], int.from_bytes(blob[4:12], "big"), blob[12:]
    honest = f"{inner}{dash}{base64.b64encode(blob).decode()}\n"
    if note != honest or not dash or key_id != _key_id(witness, witness_key, _COSIGNATURE):
        raise AuditError("is not in its canonical form, or by another key", where=where)
    try:
        Ed25519PublicKey.from_public_bytes(witness_key).verify(signature, _cosigned(inner, at))
    except (InvalidSignature, ValueError):
        raise AuditError("the cosignature does not hold", where=where) from None
    return checkpoint, at


def _cosigned(note: str, at: int) -> bytes:
    return f"cosignature/v1\ntime {at}\n{note.partition(chr(10) * 2)[0]}\n".encode()


def _key_id(name: str, public_key: bytes, type_: bytes = _ED25519) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + type_ + public_key).digest()[:4]


def fingerprint(public_key: bytes) -> str:
    """What people compare out of band: SHA-256 of the key, in groups of four hexadecimal digits."""
    text = hashlib.sha256(public_key).hexdigest()
    return " ".join(text[i : i + 4] for i in range(0, 32, 4))
