"""One log entry that proves itself: with its salt, its path to a signed checkpoint, and the signer's public key.

Whoever has the file needs nothing else but the key's fingerprint from somebody trusted: steps, numbered in the code,
1. the checkpoint is signed by the key; 2. the entry is canonical; 3. its leaf lies under the checkpoint's root at its
number (RFC 9162 §2.1.3.2).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confide.errors import AuditError
from confide.privacy.audit.checkpoint import Checkpoint, fingerprint, parse_note
from confide.privacy.audit.evidence import Evidence
from confide.privacy.audit.log import parse_line
from confide.privacy.audit.merkle import verify_inclusion
from confide.privacy.audit.records import Charged, Record

__all__ = [
    "EntryProof",
    "Hash",
    "Proved",
    "check_entry",
    "find_charge",
    "fingerprint",
    "kind_of",
    "make_entry_proof",
    "make_proof",
    "read_file",
    "read_proof",
]

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_LARGEST = 2**20


class EntryProof(BaseModel):
    """The file. `entry` is the canonical JSON as it stands in the log; `path` the audit path, from the leaf up."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["confide/entry-proof"] = "confide/entry-proof"
    version: Literal[1] = 1
    party: str
    origin: str
    public_key: Hash
    checkpoint: str
    number: Annotated[int, Field(ge=0)]
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    entry: str
    path: Annotated[list[Hash], Field(max_length=64)]


@dataclass(frozen=True, slots=True)
class Proved:
    """What a proof shows: this record, written at this time (microseconds UTC), is that entry of that log."""

    record: Record
    at: int
    number: int
    checkpoint: Checkpoint
    party: str
    fingerprint: str


def make_proof(evidence: Evidence, party: str, number: int) -> bytes:
    """The file that proves one entry of a party's exported log; raises as `make_entry_proof`."""
    return make_entry_proof(evidence, party, number).model_dump_json(indent=1).encode() + b"\n"


def make_entry_proof(evidence: Evidence, party: str, number: int) -> EntryProof:
    """The proof of one entry of a party's exported log.

    Raises:
        AuditError: There is no such log or entry, or the log does not hold together.
    """
    log = evidence.sites.get(party, evidence.coordinator if party == evidence.coordinator.party else None)
    if log is None:
        raise AuditError(f"there is no log of {party[:64]!r} here", where=f"run {evidence.run}",
                         hint=f"parties: {', '.join([evidence.coordinator.party, *evidence.sites])}")  # fmt: skip
    wrong = next((f for f in evidence.findings if f.party == party), None)
    if wrong is not None or log.checkpoint is None:
        raise AuditError(f"nothing can be proved from a log that does not hold together ({wrong})", where=party,
                         hint="see confide audit verify")  # fmt: skip
    if not 0 <= number < log.checkpoint.size:
        raise AuditError(f"there is no entry {number}", where=f"log of {party}", hint=f"it has {log.checkpoint.size}")
    line = log.path.read_bytes().split(b"\n")[number] if log.path is not None else b""
    salt, _, entry = line.partition(b" ")
    return EntryProof(
        party=party, origin=log.checkpoint.origin, public_key=log.public_key.hex(), checkpoint=log.note, number=number,
        salt=salt.decode(), entry=entry.decode(),
        path=[part.hex() for part in log.tree.inclusion_proof(number, log.checkpoint.size)],
    )  # fmt: skip


def find_charge(evidence: Evidence, party: str, charge: str) -> int:
    """The entry of a party's log that reserved a charge.

    Raises:
        AuditError: There is none.
    """
    log = evidence.sites.get(party)
    for number, entry in log.of(Charged) if log is not None else ():
        if entry.charge == charge:
            return number
    raise AuditError(f"there is no charge {charge[:200]!r}", where=f"log of {party[:64]}",
                     hint="charges are called RUN/ROUND/train or RUN/ROUND/held_out")  # fmt: skip


def read_proof(path: Path) -> Proved:
    """Check a proof file completely; it needs nothing beside it.

    Raises:
        AuditError: It is no proof, or does not hold.
    """
    try:
        proof = EntryProof.model_validate_json(read_file(path))
    except (ValueError, ValidationError) as error:
        raise AuditError(f"is not a proof that this version can read ({type(error).__name__})", where=str(path),
                         hint="give a file of confide audit prove, or a run's folder") from None  # fmt: skip
    return check_entry(proof, str(path))


def read_file(path: Path) -> bytes:
    """A proof file's bytes.

    Raises:
        ValueError: It cannot be read, or is far too large for a proof.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST + 1)
    except OSError as error:
        raise ValueError(str(error)) from None
    if len(data) > _LARGEST:
        raise ValueError("too large")
    return data


def kind_of(path: Path) -> str:
    """What kind of proof a file says that it is; empty where it says nothing."""
    try:
        found = json.loads(read_file(path))
    except (ValueError, RecursionError):
        return ""
    return str(found.get("kind", "")) if isinstance(found, dict) else ""


def check_entry(proof: EntryProof, where: str) -> Proved:
    """The steps above.

    Raises:
        AuditError: It does not hold.
    """
    key = bytes.fromhex(proof.public_key)
    checkpoint = parse_note(proof.checkpoint, proof.origin, proof.party, key)  # 1
    leaf, record, at = parse_line(f"{proof.salt} {proof.entry}".encode())  # 2
    nodes = [bytes.fromhex(part) for part in proof.path]
    if not verify_inclusion(leaf, proof.number, checkpoint.size, nodes, checkpoint.root):  # 3
        raise AuditError("the entry does not lie where the proof says", where=where,
                         hint="the file was changed, or was made from another log")  # fmt: skip
    return Proved(record, at, proof.number, checkpoint, proof.party, fingerprint(key))
