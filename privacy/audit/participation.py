"""One person's part in one round, shown to somebody: she was in its snapshot, in which role, or she was not.

The file holds the log entry with the snapshot's commitment (a proof of its own, see `proof`), the round's opening key,
and the person's two paths in the committed tree, one for each role. Steps of checking it, numbered in the code: 1. the
entry is in the signed log; 2. both paths end under the commitment that the entry holds.

What it does not show: that the pseudonym is this person's. Her consent receipt says that, which the site gave her
before. The opening key lets its holder test other pseudonyms that she knows in this one round, and no other round.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confide.errors import AuditError
from confide.privacy.audit.evidence import Evidence
from confide.privacy.audit.proof import EntryProof, Hash, Proved, check_entry, make_entry_proof, read_file
from confide.privacy.audit.records import SnapshotTaken
from confide.privacy.consent import MembershipProof, SnapshotCommitment, member_name, verify_membership
from confide.privacy.dp import Role

__all__ = ["KIND", "Participation", "find_snapshot", "make_participation_proof", "read_participation"]

KIND = "confide/participation-proof"


class _Path(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    present: bool
    other: Hash | None
    siblings: Annotated[list[Hash], Field(max_length=256)]

    @classmethod
    def of(cls, proof: MembershipProof) -> _Path:
        other = None if proof.other is None else proof.other.hex()
        return cls(present=proof.present, other=other, siblings=[part.hex() for part in proof.siblings])

    def parsed(self) -> MembershipProof:
        other = None if self.other is None else bytes.fromhex(self.other)
        return MembershipProof(self.present, other, tuple(bytes.fromhex(part) for part in self.siblings))


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["confide/participation-proof"] = "confide/participation-proof"
    version: Literal[1] = 1
    pseudonym: Hash
    opening: Hash
    train: _Path
    held_out: _Path
    entry: EntryProof


@dataclass(frozen=True, slots=True)
class Participation:
    """What a proof shows: the person with this pseudonym took part in the round in this role; None: in none."""

    pseudonym: str
    run: str
    round: int
    role: Role | None
    entry: Proved


def find_snapshot(evidence: Evidence, party: str, round_: int) -> int:
    """The entry of a site's log that commits to a round's snapshot.

    Raises:
        AuditError: There is none.
    """
    log = evidence.sites.get(party)
    taken = [number for number, entry in log.of(SnapshotTaken) if entry.round == round_] if log is not None else []
    if not taken:
        raise AuditError(f"there is no snapshot of round {round_}", where=f"log of {party[:64]}",
                         hint="name a site, and a round that it took part in")  # fmt: skip
    return taken[-1]


def make_participation_proof(
    evidence: Evidence, party: str, number: int, tree: SnapshotCommitment, opening: bytes, pseudonym: bytes
) -> bytes:
    """The file for one person and one round.

    Args:
        evidence: The run's logs.
        party: The site.
        number: The entry that commits to the round's snapshot.
        tree: What the site keeps of that snapshot.
        opening: The round's opening key, 32 bytes.
        pseudonym: The person's, 32 bytes.

    Raises:
        AuditError: The log does not hold together, or what the site keeps is not what it committed to.
    """
    entry = make_entry_proof(evidence, party, number)
    taken = evidence.sites[party].entries[number]
    if not isinstance(taken, SnapshotTaken) or tree.root.hex() != taken.commitment:
        raise AuditError("what this site keeps of the round's snapshot is not what its log commits to", where=party,
                         hint="the record of snapshots or the site key was replaced: restore the backup")  # fmt: skip
    paths = {role: _Path.of(tree.prove(member_name(role, pseudonym))) for role in Role}
    file = _File(
        pseudonym=pseudonym.hex(), opening=opening.hex(), train=paths[Role.TRAIN], held_out=paths[Role.HELD_OUT],
        entry=entry,
    )  # fmt: skip
    return file.model_dump_json(indent=1).encode() + b"\n"


def read_participation(path: Path) -> Participation:
    """Check a proof file completely; it needs nothing beside it.

    Raises:
        AuditError: It is no such proof, or does not hold.
    """
    try:
        file = _File.model_validate_json(read_file(path))
    except (ValueError, ValidationError) as error:
        raise AuditError(f"is not a proof that this version can read ({type(error).__name__})", where=str(path),
                         hint="give a file of confide audit prove") from None  # fmt: skip
    proved = check_entry(file.entry, str(path))  # 1
    taken = proved.record
    if not isinstance(taken, SnapshotTaken):
        raise AuditError("the entry in it is not about a snapshot", where=str(path), hint="ask the site for another")
    pseudonym, opening = bytes.fromhex(file.pseudonym), bytes.fromhex(file.opening)
    found: list[Role] = []
    for role, shown in ((Role.TRAIN, file.train), (Role.HELD_OUT, file.held_out)):  # 2
        try:
            root = bytes.fromhex(taken.commitment)
        except ValueError:
            root = b""
        if not verify_membership(root, opening, member_name(role, pseudonym), shown.parsed()):
            raise AuditError(f"the path for role {role} does not end under the snapshot's commitment", where=str(path),
                             hint="the file was changed, or is about another person or round")  # fmt: skip
        found += [role] if shown.present else []
    if len(found) > 1:
        raise AuditError("the snapshot holds one person in both roles", where=str(path),
                         hint="a site may not do that: ask it why")  # fmt: skip
    return Participation(file.pseudonym, taken.run, taken.round, found[0] if found else None, proved)
