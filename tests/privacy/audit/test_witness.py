"""An independent witness: what it has signed once, nobody takes back, not even with all keys of all parties.

Every attack here is self-consistent: the parties sign anew, and their files agree. The control is always the same
folder verified without the witness.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.errors import AuditError, ConfigError
from confide.privacy.audit import records as r
from confide.privacy.audit.checkpoint import Checkpoint, cosign_note, parse_cosigned, parse_note, sign_note
from confide.privacy.audit.evidence import load_evidence
from confide.privacy.audit.verify import verify
from confide.privacy.audit.witness import Witness, WitnessNotes
from tests.privacy.audit.command import confide
from tests.privacy.audit.logbook import COORDINATOR, Logbook, Run

SITE = "birch"


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return Witness.create(tmp_path / "witness", "regulator")


def cosign(witness: Witness, run: Run) -> None:
    """Show the witness every log of a run."""
    evidence = load_evidence(run.folder)
    for log in (evidence.coordinator, *evidence.sites.values()):
        assert log.checkpoint is not None
        assert log.path is not None
        witness.cosign(log.path, log.checkpoint.origin, log.party, log.public_key)


def findings(run: Run, witness: Witness | None = None) -> list[str]:
    return [str(f) for f in verify(run.folder, [witness.notes] if witness else []).findings]


def rolled_back(run: Run) -> None:
    """One site's log ends earlier, and everybody has forgotten what came after."""
    book = Logbook(run)
    first = book.index(SITE, r.KeysDestroyed)
    del book.logs[SITE][first:]
    book.conspire()


def rewritten(run: Run) -> None:
    """The whole log again, entry by entry, with other salts."""
    book = Logbook(run)
    for line in book.logs[SITE]:
        line.salt = bytes(b ^ 0xFF for b in line.salt)
    book.conspire()


def edited(run: Run) -> None:
    """Another snapshot than the one that was committed to."""
    book = Logbook(run)
    book.change(SITE, book.index(SITE, r.SnapshotTaken, round=1), commitment="ab" * 32)
    book.conspire()


@pytest.mark.parametrize("attack", [rolled_back, rewritten, edited])
def test_what_all_parties_change_together_only_a_witness_finds(run: Run, witness: Witness, attack: object) -> None:
    cosign(witness, run)
    assert findings(run, witness) == [], "the control: as it was, it holds"
    attack(run)  # type: ignore[operator]
    assert findings(run) == [], "the control: nobody else can tell"
    found = findings(run, witness)
    assert any("is not the log that witness regulator cosigned" in f for f in found)
    assert any(f"log of {SITE}" in f for f in found)


def test_a_witness_signs_a_log_that_only_grew(stopped: Run, run: Run, witness: Witness) -> None:
    """The same log, earlier and later."""
    later = run.log(SITE).read_bytes(), run.log(SITE).with_suffix(".checkpoint").read_text()
    book = Logbook(run)
    del book.logs[SITE][5:]
    book.write(SITE)
    log, key = run.log(SITE), run.keys[SITE].public_key
    origin = f"confide/simulation/{SITE}/federated"
    early = witness.cosign(log, origin, SITE, key)
    log.write_bytes(later[0])
    log.with_suffix(".checkpoint").write_text(later[1])
    late = witness.cosign(log, origin, SITE, key)
    assert (early.checkpoint.size, late.checkpoint.size) == (5, len(later[0].splitlines()))
    assert late.at >= early.at
    assert witness.cosign(log, origin, SITE, key).checkpoint == late.checkpoint, "again is no news"


@pytest.mark.parametrize("attack", [rolled_back, rewritten, edited])
def test_a_witness_refuses_a_log_that_is_not_the_one_it_saw(run: Run, witness: Witness, attack: object) -> None:
    cosign(witness, run)
    before = {p.name: p.read_bytes() for p in (witness.folder / "notes").iterdir()}
    attack(run)  # type: ignore[operator]
    with pytest.raises(AuditError, match="is not the log that this witness cosigned before"):
        cosign(witness, run)
    after = {p.name: p.read_bytes() for p in (witness.folder / "notes").iterdir()}
    assert after[witness.notes.path(f"confide/simulation/{SITE}/federated").name] in before.values()


def test_a_split_view_is_found_by_whoever_holds_the_other_half(run: Run, witness: Witness, tmp_path: Path) -> None:
    """The coordinator shows one log to the witness and another one to the auditor."""
    other = run.copy(tmp_path / "other")
    book = Logbook(other)
    book.insert(COORDINATOR, len(book.logs[COORDINATOR]) - 1, dataclasses.replace(
        book.logs[COORDINATOR][book.index(COORDINATOR, r.RunEnded)].record, status="finished twice"))  # fmt: skip
    book.write(COORDINATOR)
    cosign(witness, run)
    assert any("witness regulator cosigned" in f for f in findings(other, witness))
    assert findings(run, witness) == []


def test_a_log_that_no_witness_has_seen_is_told(run: Run, witness: Witness) -> None:
    evidence = load_evidence(run.folder)
    log = evidence.sites["ash"]
    assert log.checkpoint is not None
    assert log.path is not None
    witness.cosign(log.path, log.checkpoint.origin, "ash", log.public_key)
    found = findings(run, witness)
    assert [f for f in found if "has never seen this log" in f] == found
    assert not any("log of ash" in f for f in found)


# --- what it keeps ----------------------------------------------------------------------------------------------------


def test_notes_without_the_key_are_enough_to_verify_and_not_to_sign(run: Run, witness: Witness, tmp_path: Path) -> None:
    cosign(witness, run)
    public = tmp_path / "public"
    shutil.copytree(witness.folder, public, ignore=shutil.ignore_patterns("key"))
    assert verify(run.folder, [WitnessNotes(public)]).findings == []
    with pytest.raises(ConfigError, match="is not a witness's folder"):
        Witness(public)
    assert (witness.folder / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", ["flipped", "another witness's", "cut"])
def test_a_note_that_was_changed_is_a_finding(run: Run, witness: Witness, tmp_path: Path, change: str) -> None:
    cosign(witness, run)
    path = witness.notes.path(f"confide/simulation/{SITE}/federated")
    honest = path.read_bytes()
    other_letter = b"B" if honest[-20:-19] == b"A" else b"A"
    if change == "another witness's":
        other = Witness.create(tmp_path / "other", "regulator")
        cosign(other, run)
        path.write_bytes(other.notes.path(f"confide/simulation/{SITE}/federated").read_bytes())
    else:
        path.write_bytes(honest[:-20] if change == "cut" else honest[:-20] + other_letter + honest[-19:])
    assert path.read_bytes() != honest
    assert any("the note of witness regulator" in f for f in findings(run, witness))


def test_a_witness_is_not_made_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    for folder, name in ((tmp_path / "there", "w"), (tmp_path / "new", "no name"), (tmp_path / "new", "")):
        with pytest.raises(ConfigError):
            Witness.create(folder, name)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError):
        Witness(tmp_path / "there")


# --- the form of a cosigned note (C2SP tlog-cosignature) --------------------------------------------------------------

OWNER, PEER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
OWNER_PUBLIC, PEER_PUBLIC = OWNER.public_key().public_bytes_raw(), PEER.public_key().public_bytes_raw()
ORIGIN = "confide/simulation/ash/federated"
NOTE = sign_note(Checkpoint(ORIGIN, 7, bytes(range(32))), "ash", OWNER_PUBLIC, OWNER.sign)
COSIGNED = cosign_note(NOTE, 1_700_000_000, "regulator", PEER_PUBLIC, PEER.sign)


def read(note: str) -> tuple[Checkpoint, int]:
    return parse_cosigned(note, ORIGIN, "ash", OWNER_PUBLIC, "regulator", PEER_PUBLIC)


def test_a_cosigned_note_is_what_c2sp_says() -> None:
    assert COSIGNED.startswith(NOTE)
    blob = base64.b64decode(COSIGNED.splitlines()[-1].split(" ")[2])
    assert int.from_bytes(blob[4:12], "big") == 1_700_000_000
    text = NOTE.split("\n\n")[0] + "\n"
    PEER.public_key().verify(blob[12:], f"cosignature/v1\ntime 1700000000\n{text}".encode())
    assert read(COSIGNED) == (parse_note(NOTE, ORIGIN, "ash", OWNER_PUBLIC), 1_700_000_000)


def test_every_bit_of_a_cosigned_note_counts() -> None:
    data, accepted = COSIGNED.encode(), []
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            read(changed.decode("utf-8"))
        except (AuditError, UnicodeDecodeError):
            continue
        accepted.append(bit)
    assert accepted == []


def test_a_cosignature_does_not_stand_for_another_note_key_or_name() -> None:
    other = sign_note(Checkpoint(ORIGIN, 8, bytes(range(32))), "ash", OWNER_PUBLIC, OWNER.sign)
    moved = other + COSIGNED.removeprefix(NOTE)
    twice = COSIGNED + COSIGNED.removeprefix(NOTE)
    for note in (NOTE, moved, twice, COSIGNED.removeprefix(NOTE), "", "\n"):
        with pytest.raises(AuditError):
            read(note)
    with pytest.raises(AuditError):
        parse_cosigned(COSIGNED, ORIGIN, "ash", OWNER_PUBLIC, "regulator", OWNER_PUBLIC)
    with pytest.raises(AuditError):
        parse_cosigned(COSIGNED, ORIGIN, "ash", OWNER_PUBLIC, "somebody", PEER_PUBLIC)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands_of_a_witness(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    made = confide("audit", "witness", "init", folder, "--name", "regulator", "--json")
    assert made.code == 0
    assert json.loads(made.out)["witness"] == "regulator"
    done = confide("audit", "witness", "cosign", folder, run.folder, "--json")
    assert done.code == 0
    assert [log["party"] for log in json.loads(done.out)["logs"]] == [COORDINATOR, *run.sites]
    assert confide("audit", "verify", run.folder, "--witness", folder).code == 0
    rewritten(run)
    assert confide("audit", "verify", run.folder).code == 0, "the control"
    refused = confide("audit", "verify", run.folder, "--witness", folder)
    assert refused.code == 7
    assert "witness regulator" in refused.err
    assert confide("audit", "witness", "cosign", folder, run.folder).code == 7
    assert confide("audit", "verify", run.folder, "--witness", tmp_path / "nowhere").code == 2
