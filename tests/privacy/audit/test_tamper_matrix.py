"""Every way to tamper with a log, by its own party alone and by all parties together: found, named, and by whom.

Alone means: with the party's own signing key, so that its file, tree and checkpoint agree with each other. Together
means: everybody signs anew, and everybody's records of everybody else are made to fit. What the second kind needs a
witness for is in docs/THREAT_MODEL.md, and is tested here both ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from confide.privacy.audit import records as r
from confide.privacy.audit.checkpoint import Checkpoint, sign_note
from confide.privacy.audit.evidence import load_evidence
from confide.privacy.audit.verify import verify
from confide.privacy.audit.witness import Witness
from tests.privacy.audit.command import confide
from tests.privacy.audit.logbook import COORDINATOR, Logbook, Run

SITE = "birch"
Attack = Callable[[Logbook], None]


def edit(book: Logbook) -> None:
    """Another snapshot than the one that was committed to."""
    book.change(SITE, book.index(SITE, r.SnapshotTaken, round=1), commitment="ab" * 32)


def delete(book: Logbook) -> None:
    """A refusal that never happened, taken out again: here, the note that keys were destroyed."""
    del book.logs[SITE][book.index(SITE, r.KeysDestroyed)]


def reorder(book: Logbook) -> None:
    """What was opened, and the charge after it, change places: nothing else says which came first."""
    number = book.index(SITE, r.Opened, round=1)
    lines = book.logs[SITE]
    lines[number], lines[number + 1] = lines[number + 1], lines[number]
    lines[number].at, lines[number + 1].at = lines[number + 1].at, lines[number].at


def truncate(book: Logbook) -> None:
    """The last entry is cut off."""
    del book.logs[SITE][-1]


def roll_back(book: Logbook) -> None:
    """Everything since the model was released has never been."""
    del book.logs[SITE][book.index(SITE, r.ModelReleased) + 1 :]


def swap(book: Logbook) -> None:
    """Another log altogether, that says the same."""
    for line in book.logs[SITE]:
        line.salt = bytes(b ^ 0xFF for b in line.salt)


ATTACKS: dict[str, Attack] = {f.__name__: f for f in (edit, delete, reorder, truncate, roll_back, swap)}
#: What the party alone cannot hide although nobody has seen a state of its log after this: nothing was signed later.
AFTER_THE_LAST_ENVELOPE = {"delete", "truncate", "roll_back"}


@pytest.fixture
def witness(run: Run, tmp_path: Path) -> Witness:
    """One that has seen the honest logs."""
    found, evidence = Witness.create(tmp_path / "witness", "regulator"), load_evidence(run.folder)
    for log in (evidence.coordinator, *evidence.sites.values()):
        assert log.checkpoint is not None
        assert log.path is not None
        found.cosign(log.path, log.checkpoint.origin, log.party, log.public_key)
    assert verify(run.folder, [found.notes]).findings == [], "the control"
    return found


def found(run: Run, witness: Witness | None = None) -> list[str]:
    """Findings about the site."""
    return [str(f) for f in verify(run.folder, [witness.notes] if witness else []).findings if f.party == SITE]


@pytest.mark.parametrize("name", ATTACKS)
def test_bytes_changed_without_the_key_are_found(run: Run, name: str) -> None:
    book = Logbook(run)
    ATTACKS[name](book)
    book.write(SITE, sign=False)
    assert found(run)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_party_changes_alone_its_peers_or_a_witness_find(run: Run, witness: Witness, name: str) -> None:
    book = Logbook(run)
    ATTACKS[name](book)
    book.write(SITE)
    assert bool(found(run)) == (name not in AFTER_THE_LAST_ENVELOPE), "by what peers keep of its log"
    assert any("witness regulator" in f for f in found(run, witness))


@pytest.mark.parametrize("name", ATTACKS)
def test_what_all_parties_change_together_only_a_witness_finds(run: Run, witness: Witness, name: str) -> None:
    book = Logbook(run)
    ATTACKS[name](book)
    book.conspire()
    assert found(run) == [], "the documented limit: their files agree"
    assert any("witness regulator" in f for f in found(run, witness))


def test_a_forged_checkpoint_is_found(run: Run) -> None:
    """Signed by somebody else's key, or over another tree."""
    path = run.log(SITE).with_suffix(".checkpoint")
    size = len(run.log(SITE).read_bytes().splitlines())
    checkpoint = Checkpoint(f"confide/simulation/{SITE}/federated", size, bytes(32))
    for signer in (SITE, "ash"):
        key = run.keys[signer]
        path.write_text(sign_note(checkpoint, SITE, key.public_key, key.sign), encoding="utf-8")
        assert found(run)


def test_a_split_view_to_two_peers_is_found_where_their_logs_meet(run: Run) -> None:
    """The coordinator has shown ash one log and birch another; each of them has written down what it saw."""
    book = Logbook(run)
    number = book.index(SITE, r.UpdateCommitted, round=2)
    seen = book.logs[SITE][number].record.coordinator  # type: ignore[attr-defined]
    size = seen.partition(":")[0]
    book.change(SITE, number, coordinator=f"{size}:{'cd' * 32}")
    book.write(SITE)
    findings = [str(f) for f in verify(run.folder).findings]
    assert any(f"log of {COORDINATOR}" in f and f"differs from what {SITE} saw" in f for f in findings)


def test_a_restored_ledger_charges_again_and_the_log_shows_it(run: Run) -> None:
    """A ledger backup put back, so that a round is charged and computed twice: two charges, two commitments."""
    book = Logbook(run)
    charged = book.index(SITE, r.Charged, round=2)
    again = [book.logs[SITE][n].record for n in (charged, book.index(SITE, r.SnapshotTaken, round=2))]
    place = book.index(SITE, r.Sealed, round=2)
    for record in reversed(again):
        book.insert(SITE, place, record)
    book.write(SITE)
    assert found(run), "by what peers keep of its log"


def test_a_finding_says_how_bad_it_is(run: Run, witness: Witness) -> None:
    """Changed evidence is critical, a broken rule is high, and what has an innocent explanation is low."""
    book = Logbook(run)
    edit(book)
    book.write(SITE)
    assert {f.severity for f in verify(run.folder).findings} == {"critical"}
    book.restore(SITE)
    run.log(SITE).with_suffix(".checkpoint").write_bytes(witness.notes.path(
        f"confide/simulation/{SITE}/federated").read_bytes().rsplit(b"\xe2\x80\x94", 1)[0])  # fmt: skip
    assert verify(run.folder).findings == [], "the control: put back"
    broken = Logbook(run)
    del broken.logs[SITE][broken.index(SITE, r.SnapshotTaken, round=1)]
    broken.conspire()
    assert {f.severity for f in verify(run.folder).findings} == {"high"}
    told = confide("audit", "verify", run.folder, "--json")
    assert told.code == 7
    assert {f["severity"] for f in json.loads(told.out)["findings"]} == {"high"}
    assert "first (high)" in confide("audit", "verify", run.folder).err
