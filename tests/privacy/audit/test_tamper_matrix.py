"""Every way to tamper with a log, by its own party alone and by all parties together: found, named, and by whom.

Alone means: with the party's own signing key, so that its file, tree and checkpoint agree with each other. Together
means: everybody signs anew, and everybody's records of everybody else are made to fit. What the second kind needs a
witness for is in docs/THREAT_MODEL.md, and is tested here both ways.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from confide.errors import AuditError
from confide.privacy.audit import records as r
from confide.privacy.audit.checkpoint import Checkpoint, sign_note
from confide.privacy.audit.evidence import load_evidence
from confide.privacy.audit.verify import verify
from confide.privacy.audit.witness import Witness
from confide.protocol.fingerprint import fingerprint
from confide.protocol.identity import Identity
from confide.protocol.roster import Change, RosterMember, SignedRoster, sign_roster
from confide.protocol.rosterbook import ROSTERS, RosterBook, add_rosters, write_rosters
from tests.privacy.audit.command import confide
from tests.privacy.audit.logbook import COORDINATOR, KeyRing, Logbook, Run
from tests.rosters import Cast
from tests.support import experiment_tree, write_people

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


# --- the roster beside the logs ---------------------------------------------------------------------------------------


def about(run: Run) -> list[str]:
    """Findings of a verification that looks at the roster; without it there must be none."""
    assert verify(run.folder).findings == [], "the control: nothing else of the evidence was touched"
    return [str(f) for f in verify(run.folder, rosters=RosterBook.read(run.folder)).findings]


def chain_of(run: Run) -> tuple[SignedRoster, ...]:
    return RosterBook.read(run.folder).chain


def _missing(run: Run) -> None:
    (run.folder / "logs" / ROSTERS).unlink()


def _edited(run: Run) -> None:
    """A population, in the file."""
    path = run.folder / "logs" / ROSTERS
    path.write_text(path.read_text().replace('"population": 450', '"population": 451', 1))


def _edited_and_signed_by_the_coordinator(run: Run) -> None:
    (signed,) = chain_of(run)
    members = [m.model_copy(update={"population": 451}) if m.site == SITE else m for m in signed.roster.members]
    roster = signed.roster.model_copy(update={"members": tuple(members)})
    write_rosters(run.folder / "logs", [SignedRoster(
        roster=roster, signatures={**signed.signatures, **sign_roster(roster, run.keys[COORDINATOR])}
    )])  # fmt: skip


def _a_signature_is_gone(run: Run) -> None:
    (signed,) = chain_of(run)
    left = {k: s for k, s in signed.signatures.items() if k != run.keys[SITE].public_key.hex()}
    write_rosters(run.folder / "logs", [signed.model_copy(update={"signatures": left})])


def _an_invented_member(run: Run) -> None:
    """The coordinator adds a site of its own, in a version of its own; nobody else has seen it."""
    (signed,) = chain_of(run)
    cast = Cast("zelkova")
    invented: RosterMember = cast.member("zelkova")
    roster = signed.roster.model_copy(update={
        "version": 2, "previous": signed.roster.digest, "members": (*signed.roster.members, invented),
        "change": Change(kind="add", sites=("zelkova",)),
    })  # fmt: skip
    mine = sign_roster(roster, run.keys[COORDINATOR]) | sign_roster(roster, cast.keys["zelkova"].identity)
    write_rosters(run.folder / "logs", [signed, SignedRoster(roster=roster, signatures=mine)])


def _no_json(run: Run) -> None:
    (run.folder / "logs" / ROSTERS).write_bytes(b"[]")


def _another_federations(run: Run) -> None:
    write_rosters(run.folder / "logs", Cast("ash", "birch", "cedar", "doum").founded())


@pytest.mark.parametrize(("spoil", "said"), [
    (_missing, "is missing"), (_edited, "does not hold"), (_edited_and_signed_by_the_coordinator, "does not hold"),
    (_a_signature_is_gone, f"is not signed by {SITE}"), (_an_invented_member, "is not signed by ash, birch"),
    (_no_json, "is not one"), (_another_federations, "holds no version 1 as the run's manifest names it"),
])  # fmt: skip
def test_a_roster_that_is_not_the_members_is_named(run: Run, spoil: Callable[[Run], None], said: str) -> None:
    assert about(run) == [], "the control"
    spoil(run)
    assert any(finding.startswith("roster: ") and said in finding for finding in about(run))
    told = confide("audit", "verify", run.folder, "--json")
    assert (told.code, json.loads(told.out)["verified"]) == (7, False)


def test_a_flipped_bit_of_the_roster_is_found_wherever_it_is(run: Run) -> None:
    path = run.folder / "logs" / ROSTERS
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, len(whole) // 60):
        changed = bytearray(whole)
        changed[place] ^= 1
        if json.loads(whole) == _parsed(bytes(changed)):
            continue  # white space
        path.write_bytes(changed)
        assert about(run), f"at {place}"


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.fixture(scope="module")
def impostors(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in which everybody was played by one person: self-made keys under the same names."""
    base, ring = tmp_path_factory.mktemp("impostors"), KeyRing()
    ring.simulate(experiment_tree(str(write_people(base)), run={"rounds": 1}), base / "out")
    return Run(base / "out", dict(ring.identities), {})


def test_logs_signed_by_keys_that_are_no_members_are_named_one_by_one(run: Run, impostors: Run, tmp_path: Path) -> None:
    played = impostors.copy(tmp_path / "played")
    shutil.copy(run.folder / "logs" / ROSTERS, played.folder / "logs" / ROSTERS)
    found = about(played)
    for party in (COORDINATOR, *played.sites):
        assert f"log of {party}: is signed by a key that stands in no version of the roster" in found


def test_a_member_with_another_key_or_invented_in_the_manifest_is_named(run: Run) -> None:
    book, evidence = RosterBook.read(run.folder), load_evidence(run.folder)
    for change, said in (
        ({"public_key": Identity.generate(SITE).public_key.hex()}, "another key or population"),
        ({"population": 7}, "another key or population"), ({"site": "zelkova"}, "nobody has confirmed"),
    ):  # fmt: skip
        members = [dict(m) for m in evidence.manifest["members"]]
        members[1].update(change)
        lied = [str(f) for f in book._members({**evidence.manifest, "members": members})]
        assert [said in line for line in lied] == [True]
    assert list(book._members(evidence.manifest)) == [], "the control"


def test_a_federation_invented_from_end_to_end_only_its_fingerprint_gives_away(run: Run, impostors: Run) -> None:
    """The documented limit: whoever doubts it calls a site."""
    assert about(impostors) == []
    told = json.loads(confide("audit", "verify", impostors.folder, "--json").out)["roster"]
    real, played = RosterBook.read(run.folder).latest, RosterBook.read(impostors.folder).latest
    assert real is not None
    assert played is not None
    assert told["fingerprint"] == fingerprint(played) != fingerprint(real)


def test_two_parties_export_one_history_or_none(tmp_path: Path) -> None:
    cast = Cast("ash", "birch", "cedar", "doum")
    first = cast.founded("ash", "birch", "cedar")
    longer = cast.confirmed(first, cast.adding(first, "doum"), "ash", "birch", "cedar", "doum")
    fork = cast.next(first, "remove", "ash", members=[m for m in first[-1].roster.members if m.site != "ash"])
    for chain, kept in ((first, first), (longer, longer), (first, longer)):
        add_rosters(tmp_path, chain)
        assert RosterBook.read(tmp_path).chain == kept
    with pytest.raises(AuditError, match="another history"):
        add_rosters(tmp_path, (*first, cast.signed(fork, "birch", "cedar")))
    (tmp_path / ROSTERS).write_text("{}")
    add_rosters(tmp_path, first)
    assert RosterBook.read(tmp_path).chain == first, "what holds takes the place of what does not"
