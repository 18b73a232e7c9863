"""Tampering with a finished run: whoever changes anything, with whichever key, is found and named.

Three liars, each stronger than the one before: somebody who can write files; a party that signs again with its own key;
and all parties together, who are caught only by what the entries mean.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from confide.errors import AuditError
from confide.privacy.audit import records as r
from confide.privacy.audit.log import export_log, parse_line
from confide.privacy.audit.verify import Evidence, Finding, verify
from confide.privacy.digest import digest
from confide.privacy.dp.events import PrivacyEvent, Role, event_to_json
from confide.privacy.sealing.transcript import transcript
from confide.protocol.fingerprint import fingerprint
from confide.protocol.identity import Identity
from confide.protocol.rosterbook import RosterBook
from tests.privacy.audit.command import confide
from tests.privacy.audit.logbook import COORDINATOR, Logbook, Run, databases

FLIPS = 40


def findings(run: Run) -> list[Finding]:
    """What does not hold; damage so bad that there is nothing to verify counts as one finding."""
    try:
        return verify(run.folder).findings
    except AuditError as error:
        return [Finding(COORDINATOR, None, str(error))]


def parties(found: list[Finding]) -> set[str]:
    """Who is named."""
    return {f.party for f in found}


# --- what holds ------------------------------------------------------------------------------------------------------


def test_an_untouched_run_has_no_finding(finished: Run) -> None:
    evidence = verify(finished.folder)
    assert evidence.findings == []
    assert sorted(evidence.sites) == finished.sites == ["ash", "birch", "cedar", "doum"]
    assert finished.result is not None
    assert evidence.run == finished.result.run_id
    assert all(log.entries for log in (evidence.coordinator, *evidence.sites.values()))


def test_a_folder_of_exported_logs_is_enough(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "logs", tmp_path / "exported")
    evidence = verify(tmp_path / "exported")
    assert evidence.findings == []
    assert len(evidence.sites) == 4


def test_an_interrupted_run_holds_together(interrupted: Run) -> None:
    evidence = verify(interrupted.folder)
    assert evidence.findings == []
    assert not any(evidence.coordinator.of(r.RunEnded))


@pytest.mark.parametrize("kind", ["finished", "interrupted", "retried"])
def test_what_a_run_leaves_to_be_read_is_the_whole_of_every_partys_log(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """However it ended: what its sites still hold in their databases is not a single entry more."""
    run: Run = request.getfixturevalue(kind)
    assert sorted(databases(run.folder)) == sorted(run.all_logs())
    for number, (path, database) in enumerate(databases(run.folder).items()):
        copy = tmp_path / f"{number}.log"
        export_log(database, copy)
        assert copy.read_bytes() == path.read_bytes() != b""
        assert copy.with_suffix(".checkpoint").read_bytes() == path.with_suffix(".checkpoint").read_bytes()


def test_the_databases_are_no_part_of_the_evidence(finished: Run, run: Run) -> None:
    """Who checks has only what travelled."""
    assert all(database.is_file() for database in databases(finished.folder).values())
    assert not list(run.folder.rglob("*.db"))
    assert verify(run.folder).findings == []


def test_a_run_that_may_retry_and_never_had_to_has_no_finding(start: Callable[..., Run]) -> None:
    run = start("sealed", sealing={"retry": True})
    assert findings(run) == []
    for site in run.sites:
        assert [(e.round, e.attempt) for e in run.records(site) if isinstance(e, r.Unlocked)] == [
            (1, 0),
            (2, 0),
            (3, 0),
        ]


def test_a_run_that_had_to_retry_has_no_finding(retried: Run) -> None:
    assert findings(retried) == []
    cohorts = [e for e in retried.records(COORDINATOR) if isinstance(e, r.Cohort)]
    assert [(e.round, e.attempt, e.cohort) for e in cohorts] == [
        (1, 0, retried.sites), (2, 0, retried.sites), (2, 1, ["ash", "birch", "cedar"]), (3, 0, retried.sites),
        (3, 1, ["ash", "cedar", "doum"]),
    ]  # fmt: skip

    def of(site: str, kind: type[r.Sealed] | type[r.Unlocked]) -> list[tuple[int, int]]:
        return [(e.round, e.attempt) for e in retried.records(site) if isinstance(e, kind)]

    assert {s: of(s, r.Sealed) for s in retried.sites} == {
        "ash": [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)],
        "cedar": [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)],
        "birch": [(1, 0), (2, 0), (2, 1), (3, 0)],
        "doum": [(1, 0), (3, 0), (3, 1)],
    }
    assert {s: of(s, r.Unlocked) for s in retried.sites} == {
        "ash": [(1, 0), (2, 1), (3, 1)],
        "birch": [(1, 0), (2, 1)],
        "cedar": [(1, 0), (2, 1), (3, 1)],
        "doum": [(1, 0), (3, 1)],
    }
    settled = {s: [e.charge.partition("/")[2] for e in retried.records(s) if isinstance(e, r.Settled)]
               for s in retried.sites}  # fmt: skip
    assert settled == {"ash": [], "birch": [], "cedar": [], "doum": ["2/train", "2/held_out"]}, "what never left"


def test_verifying_changes_no_file(run: Run) -> None:
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    verify(run.folder)
    assert {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()} == before


def test_signing_everything_again_is_no_finding_by_itself(run: Run) -> None:
    """The control of every test below that signs again: it is the change that is found, not the signing."""
    book = Logbook(run)
    for party in book.logs:
        book.write(party)
    assert findings(run) == []
    for lines in book.logs.values():
        for line in lines:
            line.salt = bytes(16)
    book.conspire()
    assert findings(run) == []


# --- somebody who can write files ------------------------------------------------------------------------------------


def _files() -> list[str]:
    sites = ["ash", "birch", "cedar", "doum"]
    logs = [f"logs/{party}" for party in (COORDINATOR, *sites)] + [f"sites/{site}/local" for site in sites]
    return [f"{log}.{suffix}" for log in logs for suffix in ("log", "checkpoint")]


@pytest.mark.parametrize("name", _files())
def test_no_bit_of_any_log_or_checkpoint_can_flip_unnoticed(run: Run, name: str) -> None:
    path = run.folder / name
    data, rng = path.read_bytes(), random.Random()  # noqa: S311  # places to damage, no secret
    places = {rng.randrange(8 * len(data)) for _ in range(FLIPS)} | {0, 8 * len(data) - 1, 8 * len(data) - 8}
    unnoticed = []
    for bit in places:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        if not findings(run):
            unnoticed.append(bit)
    path.write_bytes(data)
    assert findings(run) == []  # the control
    assert unnoticed == []


@pytest.mark.parametrize("name", _files())
@pytest.mark.parametrize("damage", ["empty", "gone", "cut", "doubled", "garbage"])
def test_no_log_or_checkpoint_can_be_damaged_unnoticed(run: Run, name: str, damage: str) -> None:
    path = run.folder / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
        if name.endswith("local.log"):
            return  # a local log never travels: its absence is no evidence of anything
    else:
        path.write_bytes(
            {"empty": b"", "cut": data[: len(data) // 2], "doubled": data * 2, "garbage": b"\xff\x00" * 99}[damage]
        )
    found = findings(run)
    assert found
    if "local" not in name and "coordinator" not in name:
        assert {path.stem} <= parties(found)


@pytest.mark.parametrize("party", [COORDINATOR, "cedar"])
def test_an_edited_entry_is_found_in_the_log_of_whoever_kept_it(run: Run, party: str) -> None:
    book = Logbook(run)
    number = 4 if party == "cedar" else 1
    book.change(party, number, round=1 + book.logs[party][number].record.round)  # type: ignore[attr-defined]
    book.write(party, sign=False)
    found = findings(run)
    assert parties(found) <= {party, *run.sites}
    first = next(f for f in found if f.party == party and f.entry is not None)
    assert first.entry is not None
    assert first.entry >= number  # the first state that another party saw after the edit


@pytest.mark.parametrize("party", [COORDINATOR, "ash", "doum"])
def test_deleting_any_one_entry_is_found(run: Run, party: str) -> None:
    count = len(Logbook(run).logs[party])
    for number in range(count):
        book = Logbook(run)
        del book.logs[party][number]
        book.write(party, sign=False)
        assert party in parties(findings(run)), number
        book.restore(party)
    assert findings(run) == []


@pytest.mark.parametrize("party", [COORDINATOR, "birch"])
def test_exchanging_any_two_neighbours_is_found(run: Run, party: str) -> None:
    count = len(Logbook(run).logs[party])
    for number in range(count - 1):
        book = Logbook(run)
        lines = book.logs[party]
        lines[number], lines[number + 1] = lines[number + 1], lines[number]
        book.write(party, sign=False)
        assert party in parties(findings(run)), number
        book.restore(party)


@pytest.mark.parametrize("keep", [0, 1, 5, -1])
def test_a_truncated_log_is_found(run: Run, keep: int) -> None:
    book = Logbook(run)
    del book.logs["ash"][keep:]
    book.write("ash", sign=False)
    found = [f for f in findings(run) if f.party == "ash"]
    assert Finding("ash", len(book.logs["ash"]), "entries are missing that the checkpoint covers") in found


def test_a_missing_log_is_found(run: Run) -> None:
    run.log("birch").unlink()
    assert Finding("birch", None, "the log is missing") in findings(run)


def test_a_log_that_belongs_to_nobody_is_found(run: Run) -> None:
    shutil.copy(run.log("birch"), run.log("elm"))
    assert findings(run) == [Finding("elm", None, "is no site of this run's roster")]


def test_one_sites_log_under_another_sites_name_is_found(run: Run) -> None:
    for suffix in (".log", ".checkpoint"):
        shutil.copy(run.log("birch").with_suffix(suffix), run.log("cedar").with_suffix(suffix))
    assert "cedar" in parties(findings(run))


def test_an_older_state_of_a_log_put_back_with_its_honest_checkpoint_is_found(run: Run, interrupted: Run) -> None:
    """A backup of the log *and* its checkpoint, both signed: only what others saw tells."""
    book = Logbook(run)
    del book.logs["doum"][10:]
    book.write("doum")
    found = [f for f in findings(run) if f.party == "doum"]
    assert any("entries are missing that coordinator saw" in f.what and f.entry == 10 for f in found)


def test_a_site_that_joined_under_another_roster_than_the_runs_is_found(run: Run) -> None:
    assert findings(run) == []
    book = Logbook(run)
    number = book.index("doum", r.Joined)
    book.change("doum", number, roster="ab" * 32)
    book.conspire()
    assert Finding("doum", number, "joined under another roster than the manifest names") in findings(run)


# --- a log of another run, with the right key ------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["ash", "doum"])
def test_a_sites_log_of_another_run_is_found_though_its_own_key_signed_it(run: Run, another: Run, site: str) -> None:
    for suffix in (".log", ".checkpoint"):
        shutil.copy(another.log(site).with_suffix(suffix), run.log(site).with_suffix(suffix))
    found = findings(run)
    assert another.result is not None
    assert Finding(site, 0, f"belongs to another run ({another.result.run_id})") in found
    assert not any("checkpoint" in f.what for f in found if f.party == site)  # its signature does hold


def test_a_local_log_of_another_run_is_found_though_its_own_key_signed_it(run: Run, another: Run) -> None:
    for suffix in (".log", ".checkpoint"):
        shutil.copy(another.log("ash", local=True).with_suffix(suffix), run.log("ash", local=True).with_suffix(suffix))
    assert "ash (local)" in parties(findings(run))


def test_the_coordinators_log_of_another_run_is_found(run: Run, another: Run) -> None:
    for suffix in (".log", ".checkpoint"):
        shutil.copy(another.log(COORDINATOR).with_suffix(suffix), run.log(COORDINATOR).with_suffix(suffix))
    found = findings(run)
    assert set(run.sites) <= parties(found)
    assert all(any("belongs to another run" in f.what for f in found if f.party == site) for site in run.sites)


def test_a_run_by_others_under_the_same_names_is_found(run: Run) -> None:
    """All of a site's log signed by a key that is not in the manifest."""
    stranger = Identity.generate("cedar")
    book = Logbook(run)
    book.run = Run(run.folder, {**run.keys, "cedar": stranger}, run.tree)
    book.write("cedar")
    found = findings(run)
    assert parties(found) == {"cedar"}
    assert "signed by another key" in found[0].what


# --- a party that signs again with its own key -----------------------------------------------------------------------


@pytest.mark.parametrize("site", ["ash", "birch", "cedar", "doum"])
def test_a_site_that_rolls_back_its_log_is_found_by_what_the_coordinator_saw(run: Run, site: str) -> None:
    """However far it goes back and however well it signs. What no other party has seen yet is the last tests' part."""
    seen = max(
        int(entry.checkpoints[entry.cohort.index(site)].partition(":")[0])
        for entry in run.records(COORDINATOR)
        if isinstance(entry, r.Cohort)
    )
    assert seen > 10  # the control: there is a state to go back behind
    for size in range(seen):
        book = Logbook(run)
        del book.logs[site][size:]
        book.write(site)
        found = [f for f in findings(run) if f.party == site]
        assert any(f.entry == size and "entries are missing that coordinator saw" in f.what for f in found), size
        book.restore(site)


def test_a_coordinator_that_rolls_back_its_log_is_found_by_what_the_sites_saw(run: Run) -> None:
    seen = max(int(e.coordinator.partition(":")[0]) for e in run.records("ash") if isinstance(e, r.Sealed))
    assert seen > 3  # the control
    for size in range(1, seen):
        book = Logbook(run)
        del book.logs[COORDINATOR][size:]
        book.write(COORDINATOR)
        found = [f for f in findings(run) if f.party == COORDINATOR]
        assert any(f.entry == size and "entries are missing" in f.what for f in found), size
        book.restore(COORDINATOR)


@pytest.mark.parametrize("party", [COORDINATOR, "birch"])
def test_editing_an_entry_that_others_saw_is_found_and_narrowed_down(run: Run, party: str) -> None:
    """Signed again with its own key: found between two states that others saw, never before the edited entry."""
    seen, checked = _seen(run, party), 0
    for number in range(seen):
        book = Logbook(run)
        if not hasattr(book.logs[party][number].record, "round"):
            continue
        book.change(party, number, round=9)
        book.write(party)
        found = [f for f in findings(run) if f.party == party and "differs from what" in f.what]
        assert found, number
        assert all(f.entry is not None and f.entry >= number for f in found)
        book.restore(party)
        checked += 1
    assert checked > 3


def _seen(run: Run, party: str) -> int:
    """The largest state of a party's log that another party's log holds."""
    claims = []
    for other in (COORDINATOR, *run.sites):
        for e in run.records(other):
            if isinstance(e, r.Cohort) and party in e.cohort:
                claims.append(e.checkpoints[e.cohort.index(party)])
            elif isinstance(e, r.Joined | r.UpdateCommitted | r.Sealed) and party == COORDINATOR:
                claims.append(e.coordinator)
    return max(int(c.partition(":")[0]) for c in claims)


@pytest.mark.parametrize("site", ["ash", "doum"])
def test_a_site_cannot_take_back_that_it_sealed_the_last_sum(run: Run, site: str) -> None:
    book = Logbook(run)
    number = book.index(site, r.Sealed, round=3)
    del book.logs[site][number:]
    book.write(site)
    assert Finding(site, None, "nothing was sealed for round 3, yet it was counted") in findings(run)


def test_a_site_cannot_take_back_that_it_released_the_model(run: Run) -> None:
    """The last entry: no cohort came after it whose checkpoint would hold it."""
    book = Logbook(run)
    del book.logs["birch"][book.index("birch", r.ModelReleased) :]
    book.write("birch")
    assert "birch" in parties(findings(run))


def test_a_site_cannot_take_back_that_it_opened_the_last_sum(run: Run) -> None:
    book = Logbook(run)
    del book.logs["birch"][book.index("birch", r.Opened, round=3) :]
    book.write("birch")
    assert "birch" in parties(findings(run))


def test_a_coordinator_cannot_take_back_that_it_released_the_model(run: Run) -> None:
    """A model file of which no log tells a release: an interrupted run has none."""
    book = Logbook(run)
    del book.logs[COORDINATOR][book.index(COORDINATOR, r.ModelReleased) :]
    book.write(COORDINATOR)
    assert COORDINATOR in parties(findings(run))


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_coordinator_cannot_name_a_second_cohort_for_a_round(run: Run, attempt: int) -> None:
    """Nor call it a second attempt, where the run does not retry."""
    book = Logbook(run)
    number = book.index(COORDINATOR, r.Cohort, round=3)
    first = book.logs[COORDINATOR][number].record
    assert isinstance(first, r.Cohort)
    second = r.Cohort(
        run=first.run, round=3, attempt=attempt, key_epoch=0, cohort=first.cohort[:3], statements=first.statements[:3],
        checkpoints=first.checkpoints[:3], transcript=first.transcript,
    )  # fmt: skip
    book.insert(COORDINATOR, len(book.logs[COORDINATOR]), second)
    book.write(COORDINATOR)
    last = len(book.logs[COORDINATOR]) - 1
    assert Finding(COORDINATOR, last, "round 3 was sealed for a second cohort") in findings(run)


def test_a_clock_that_goes_backwards_is_found_at_its_entry(run: Run) -> None:
    book = Logbook(run)
    book.logs["cedar"][-1].at = book.logs["cedar"][-2].at - 1
    book.write("cedar")
    last = len(book.logs["cedar"]) - 1
    assert Finding("cedar", last, "the clock went backwards") in findings(run)


def test_a_clock_that_goes_backwards_in_a_local_log_is_found(run: Run) -> None:
    path, key = run.log("ash", local=True), run.keys["ash"]
    lines = path.read_bytes().splitlines(keepends=True)
    log = key.open_log(run.folder / "again.db", "local", "simulation")
    for line in reversed(lines):
        log.append(parse_line(line[:-1])[1])
    log.export(path)
    log.close()
    assert findings(run) == []  # the control: another order, later times, signed by the site
    times = [json.loads(line.split(b" ", 1)[1])["at"] for line in path.read_bytes().splitlines()]
    data = path.read_bytes().replace(b'"at":%d' % times[-1], b'"at":%d' % (times[0] - 1))
    path.write_bytes(data)
    _sign_local(run, "ash")
    assert "ash (local)" in parties(findings(run))


def _sign_local(run: Run, site: str) -> None:
    from confide.privacy.audit.checkpoint import Checkpoint, sign_note
    from confide.privacy.audit.merkle import tree_root

    path, key = run.log(site, local=True), run.keys[site]
    leaves = [parse_line(line)[0] for line in path.read_bytes().splitlines()]
    checkpoint = Checkpoint(f"confide/simulation/{site}/local", len(leaves), tree_root(leaves))
    note = sign_note(checkpoint, site, key.public_key, key.sign)
    path.with_suffix(".checkpoint").write_text(note, encoding="utf-8")


# --- everybody together ----------------------------------------------------------------------------------------------

Lie = Callable[[Logbook], None]


def _charge(round_: int, role: Role, run: str, **other: Any) -> r.Charged:
    fields: dict[str, Any] = {
        "role": role, "unit": "subject", "noise_multiplier": 1.5, "sample_rate": 0.3, "steps": 4, "max_grad_norm": 1.0,
    } | other  # fmt: skip
    charge = f"{run}/{round_}/{role.value}"
    return r.Charged(run=run, round=round_, charge=charge, event=event_to_json(PrivacyEvent(**fields)))


def _run_name(book: Logbook) -> str:
    return book.logs[COORDINATOR][0].record.run


def _delete(party: str, kind: type[r.Record], **where: Any) -> Lie:
    def lie(book: Logbook) -> None:
        del book.logs[party][book.index(party, kind, **where)]

    return lie


def _edit(party: str, kind: type[r.Record], where: dict[str, Any], **fields: Any) -> Lie:
    return lambda book: book.change(party, book.index(party, kind, **where), **fields)


def _charged_as(**fields: Any) -> Lie:
    def lie(book: Logbook) -> None:
        number = book.index("birch", r.Charged, round=2)
        event = json.loads(book.logs["birch"][number].record.event) | fields  # type: ignore[attr-defined]
        book.change("birch", number, event=json.dumps(event, sort_keys=True, separators=(",", ":")))

    return lie


def _fewer(count: int) -> Lie:
    def lie(book: Logbook) -> None:
        number = book.index(COORDINATOR, r.Cohort, round=2)
        entry = book.logs[COORDINATOR][number].record
        assert isinstance(entry, r.Cohort)
        book.change(
            COORDINATOR, number, cohort=entry.cohort[:count], statements=entry.statements[:count],
            checkpoints=entry.checkpoints[:count],
        )  # fmt: skip

    return lie


def _second_cohort(book: Logbook) -> None:
    number = book.index(COORDINATOR, r.Cohort, round=2)
    book.insert(COORDINATOR, number + 1, book.logs[COORDINATOR][number].record)


def _sealed_twice(book: Logbook) -> None:
    number = book.index("doum", r.Sealed, round=1)
    book.insert("doum", number + 1, book.logs["doum"][number].record)


def _settled(book: Logbook) -> None:
    number = book.index("cedar", r.Sealed, round=2)
    run = _run_name(book)
    book.insert("cedar", number + 1, r.Settled(run=run, charge=f"{run}/2/train", steps=0))


def _charged_later(book: Logbook) -> None:
    lines = book.logs["ash"]
    charge, update = book.index("ash", r.Charged, round=1), book.index("ash", r.UpdateCommitted, round=1)
    moved = lines.pop(charge)
    moved.at = lines[update - 1].at
    lines.insert(update, moved)


def _rebound(book: Logbook, round_: int, **changes: Any) -> r.Cohort:
    """The coordinator's cohort of a round with other fields, and the transcript that they hash to."""
    first = book.logs[COORDINATOR][0].record
    of = book.logs[COORDINATOR][book.index(COORDINATOR, r.Cohort, round=round_)].record
    assert isinstance(first, r.RunCreated)
    assert isinstance(of, r.Cohort)
    changed = replace(of, **changes)
    digests = dict(zip(changed.cohort, changed.statements, strict=True))
    bound = transcript(
        digest("manifest", first.manifest.encode()).hex(), json.loads(first.manifest)["roster_version"],
        changed.key_epoch, changed.round, digests, changed.attempt,
    )  # fmt: skip
    assert changes or bound == of.transcript
    return replace(changed, transcript=bound)


def _other_epoch(book: Logbook) -> None:
    """Everybody sealed and opened round 2 under a transcript of key epoch 1, of which nobody has keys."""
    number = book.index(COORDINATOR, r.Cohort, round=2)
    before, after = _rebound(book, 2), _rebound(book, 2, key_epoch=1)
    book.logs[COORDINATOR][number].record = after
    for lines in book.logs.values():
        for line in lines:
            if getattr(line.record, "transcript", "") == before.transcript:
                line.record = replace(line.record, transcript=after.transcript)  # type: ignore[call-arg]


def _second_attempt(book: Logbook) -> None:
    """As a run that retries would have it, in one that does not."""
    number = book.index(COORDINATOR, r.Cohort, round=3)
    book.insert(COORDINATOR, number + 1, _rebound(book, 3, attempt=1))


def _sealed_again(book: Logbook) -> None:
    number = book.index("doum", r.Sealed, round=1)
    sealed = book.logs["doum"][number].record
    assert isinstance(sealed, r.Sealed)
    book.insert("doum", number + 1, replace(sealed, attempt=1, transcript=_rebound(book, 1, attempt=1).transcript))


def _unlocked_without(book: Logbook) -> None:
    of = _rebound(book, 2)
    record = r.Unlocked(run=of.run, round=2, attempt=0, transcript=of.transcript)
    book.insert("cedar", book.index("cedar", r.Sealed, round=2) + 1, record)


def _refusal_received(book: Logbook) -> None:
    reason = r.Refused(run=_run_name(book), round=2, step="train", party="ash", reason="abstains")
    book.insert(COORDINATOR, book.index(COORDINATOR, r.Cohort, round=2), reason)


def _refusal_sent(book: Logbook) -> None:
    reason = r.Refused(run=_run_name(book), round=3, step="train", party="ash", reason="abstains")
    book.insert("ash", book.index("ash", r.UpdateCommitted, round=3), reason)


def _another_runs_entry(party: str) -> Lie:
    def lie(book: Logbook) -> None:
        number = len(book.logs[party]) - 1
        book.change(party, number, run="tiny-00000000")

    return lie


def _second_run(book: Logbook) -> None:
    first = book.logs[COORDINATOR][0].record
    assert isinstance(first, r.RunCreated)
    other = first.manifest.replace('"rounds":2', '"rounds":9')
    assert other != first.manifest
    book.insert(COORDINATOR, 2, r.RunCreated(run=first.run, manifest=other, software=first.software))


def _two_charges_more(book: Logbook) -> None:
    """Four times the charges: all as promised, each one a step too far."""
    charge = next(line.record for line in book.logs["doum"] if isinstance(line.record, r.Charged))
    for i in range(8):
        again = r.Charged(run=charge.run, round=1, charge=f"{charge.charge}-{i}", event=charge.event)
        book.insert("doum", book.index("doum", r.UpdateCommitted, round=1), again)


#: A lie in which every signature and every mutual record holds; whose log tells; the entry (kind, where), if one does.
LIES: dict[str, tuple[Lie, str, tuple[type[r.Record], dict[str, Any]] | None]] = {
    "an update was not charged": (
        _delete("birch", r.Charged, round=1), "birch", (r.UpdateCommitted, {"round": 1})),
    "a metric was not charged": (
        _delete("birch", r.Charged, round=3), "birch", (r.UpdateCommitted, {"round": 3})),
    "an update was charged afterwards": (_charged_later, "ash", (r.UpdateCommitted, {"round": 1})),
    "a charge tells of more noise": (
        _charged_as(noise_multiplier="9.0"), "birch", (r.Charged, {"round": 2})),
    "a charge is composed over other sites": (_charged_as(sites=2), "birch", (r.Charged, {"round": 2})),
    "the charges cost more than promised": (_two_charges_more, "doum", None),
    "a charge was taken back though its update was sealed": (_settled, "cedar", (r.Settled, {})),
    "a cohort is too small": (_fewer(2), COORDINATOR, (r.Cohort, {"round": 2})),
    "a cohort of one": (_fewer(1), COORDINATOR, (r.Cohort, {"round": 2})),
    "a cohort is smaller than what was sealed": (_fewer(3), COORDINATOR, (r.Cohort, {"round": 2})),
    "a cohort names a stranger": (
        _edit(COORDINATOR, r.Cohort, {"round": 1}, cohort=["ash", "birch", "cedar", "elm"]),
        COORDINATOR, (r.Cohort, {"round": 1})),
    "a cohort names a site twice": (
        _edit(COORDINATOR, r.Cohort, {"round": 1}, cohort=["ash", "ash", "birch", "cedar"]),
        COORDINATOR, (r.Cohort, {"round": 1})),
    "a cohort's statement is another": (
        _edit(COORDINATOR, r.Cohort, {"round": 1}, statements=["0" * 64] * 4), COORDINATOR, (r.Cohort, {"round": 1})),
    "a cohort's statement is missing": (
        _edit(COORDINATOR, r.Cohort, {"round": 1}, statements=[]), COORDINATOR, (r.Cohort, {"round": 1})),
    "a cohort's transcript is another": (
        _edit(COORDINATOR, r.Cohort, {"round": 1}, transcript="0" * 64), COORDINATOR, (r.Cohort, {"round": 1})),
    "a second cohort": (_second_cohort, COORDINATOR, None),
    "a cohort is forgotten": (_delete(COORDINATOR, r.Cohort, round=2), "ash", (r.Sealed, {"round": 2})),
    "a site sealed twice": (_sealed_twice, "doum", None),
    "a site sealed for another cohort": (
        _edit("cedar", r.Sealed, {"round": 1}, cohort=["ash", "birch", "cedar"]), "cedar", (r.Sealed, {"round": 1})),
    "a site sealed under another transcript": (
        _edit("cedar", r.Sealed, {"round": 1}, transcript="0" * 64), "cedar", (r.Sealed, {"round": 1})),
    "a cohort names a key epoch that no site agreed on": (_other_epoch, "ash", None),
    "a site agreed on another key epoch": (_edit("cedar", r.KeysAgreed, {}, epoch=1), "cedar", None),
    "a second attempt in a run without retry": (
        _second_attempt, COORDINATOR, (r.Cohort, {"round": 3, "attempt": 1})),
    "a site sealed a second attempt in a run without retry": (
        _sealed_again, "doum", (r.Sealed, {"round": 1, "attempt": 1})),
    "a site unlocked in a run without retry": (_unlocked_without, "cedar", (r.Unlocked, {})),
    "a site never sealed": (_delete("cedar", r.Sealed, round=2), "cedar", None),
    "a site never committed to its update": (_delete("cedar", r.UpdateCommitted, round=2), "cedar", None),
    "a site never asked who consents": (_delete("cedar", r.SnapshotTaken, round=2), "cedar", None),
    "a site never joined": (_delete("cedar", r.Joined), "cedar", None),
    "a site joined another manifest": (
        _edit("doum", r.Joined, {}, manifest="0" * 64), "doum", (r.Joined, {})),
    "one site opened another model": (
        _edit("cedar", r.Opened, {"round": 1}, model="0" * 64), "cedar", (r.Opened, {"round": 1})),
    "the first site opened another model": (
        _edit("ash", r.Opened, {"round": 1}, model="0" * 64), "ash", (r.Opened, {"round": 1})),
    "a site opened under another transcript": (
        _edit("cedar", r.Opened, {"round": 1}, transcript="0" * 64), "cedar", (r.Opened, {"round": 1})),
    "the coordinator released another model": (
        _edit(COORDINATOR, r.ModelReleased, {}, model="0" * 64), COORDINATOR, (r.ModelReleased, {})),
    "the coordinator released under another key": (
        _edit(COORDINATOR, r.ModelReleased, {}, key="0" * 64), COORDINATOR, (r.ModelReleased, {})),
    "a site released under another key": (
        _edit("cedar", r.ModelReleased, {}, key="0" * 64), "cedar", (r.ModelReleased, {})),
    "a site released under a key that is none": (
        _edit("cedar", r.ModelReleased, {}, key="key"), "cedar", (r.ModelReleased, {})),
    "a site released another model": (
        _edit("cedar", r.ModelReleased, {}, model="0" * 64), "cedar", (r.ModelReleased, {})),
    "a refusal that nobody sent": (_refusal_received, COORDINATOR, (r.Refused, {})),
    "a refusal that nobody received": (_refusal_sent, "ash", (r.Refused, {})),
    "an entry of another run at a site": (_another_runs_entry("birch"), "birch", (r.KeysDestroyed, {})),
    "an entry of another run at the coordinator": (
        _another_runs_entry(COORDINATOR), COORDINATOR, (r.RunEnded, {})),
    "a second run in the coordinator's log": (_second_run, COORDINATOR, None),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES, ids=str)
def test_what_everybody_signs_must_still_make_sense(run: Run, name: str) -> None:
    lie, party, place = LIES[name]
    book = Logbook(run)
    lie(book)
    number = None if place is None else book.index(party, place[0], **place[1])
    book.conspire()
    found = findings(run)
    assert found, "nobody noticed"
    assert not any("signed" in f.what or "checkpoint" in f.what for f in found)  # no signature gives it away
    assert party in parties(found), [str(f) for f in found]
    if number is not None:
        assert number in {f.entry for f in found if f.party == party}, [str(f) for f in found]


def test_where_a_cohort_names_another_key_epoch_every_member_says_so(run: Run) -> None:
    book = Logbook(run)
    _other_epoch(book)
    book.conspire()
    what = "agreed on other keys than those of round 2's cohort"
    assert findings(run) == [Finding(site, None, what) for site in run.sites], "and nothing else gives it away"


# --- everybody together, where a round was retried -------------------------------------------------------------------


def _attempt(book: Logbook, attempt: int, kind: type[r.Record] = r.Cohort, party: str = COORDINATOR) -> int:
    """Number of the entry about an attempt at round 2."""
    return book.index(party, kind, round=2, attempt=attempt)


def _bound(book: Logbook, attempt: int) -> str:
    """Transcript of an attempt at round 2."""
    return str(book.logs[COORDINATOR][_attempt(book, attempt)].record.transcript)  # type: ignore[attr-defined]


def _again(party: str, kind: type[r.Record], **changes: Any) -> Lie:
    """A second entry after the one about the second attempt at round 2."""

    def lie(book: Logbook) -> None:
        number = _attempt(book, 1, kind, party)
        book.insert(party, number + 1, replace(book.logs[party][number].record, **changes))

    return lie


def _unlocked_both(book: Logbook) -> None:
    _again("ash", r.Unlocked, attempt=0, transcript=_bound(book, 0))(book)


def _unlocked_the_first(book: Logbook) -> None:
    book.change("ash", _attempt(book, 1, r.Unlocked, "ash"), attempt=0, transcript=_bound(book, 0))


def _opened_the_first(book: Logbook) -> None:
    for site in book.run.sites:
        book.change(site, book.index(site, r.Opened, round=2), transcript=_bound(book, 0))


_NOT_COUNTED = "unlocked in round 2 what the coordinator's log knows nothing of"
#: The lie; whose log tells; the entry about round 2, if one does (kind, where, how many after the first such); what.
RETRY_LIES: dict[str, tuple[Lie, str, tuple[type[r.Record], dict[str, int], int] | None, str]] = {
    "a site unlocked an attempt twice": (
        _again("ash", r.Unlocked), "ash", (r.Unlocked, {}, 1), "unlocked round 2 twice"),
    "a site unlocked both attempts": (
        _unlocked_both, "ash", (r.Unlocked, {"attempt": 0}, 0), "unlocked round 2 twice"),
    "a site unlocked another attempt than was opened": (
        _unlocked_the_first, "ash", (r.Unlocked, {}, 0), "unlocked another attempt of round 2 than was opened"),
    "a site unlocked what nobody sealed": (
        _edit("cedar", r.Unlocked, {"round": 2}, transcript="0" * 64), "cedar", (r.Unlocked, {}, 0), _NOT_COUNTED),
    "a site tells of another attempt than it unlocked": (
        _edit("cedar", r.Unlocked, {"round": 2}, attempt=0), "cedar", (r.Unlocked, {}, 0), _NOT_COUNTED),
    "a site never unlocked": (
        _delete("birch", r.Unlocked, round=2), "birch", None, "did not unlock round 2, yet it was counted"),
    "a site sealed an attempt twice": (
        _again("ash", r.Sealed), "ash", (r.Sealed, {"attempt": 1}, 1), "sealed round 2 twice"),
    "a site never sealed the second attempt": (
        _delete("ash", r.Sealed, round=2, attempt=1), "ash", None,
        "nothing was sealed for round 2, yet it was counted"),
    "an attempt has two cohorts": (
        _again(COORDINATOR, r.Cohort), COORDINATOR, (r.Cohort, {"attempt": 1}, 1),
        "round 2 was sealed for a second cohort"),
    "the first attempt is forgotten": (
        _delete(COORDINATOR, r.Cohort, round=2, attempt=0), "ash", (r.Sealed, {"attempt": 0}, 0),
        "sealed round 2, of which the coordinator's log knows no cohort"),
    "the second attempt is called a third": (
        _edit(COORDINATOR, r.Cohort, {"round": 2, "attempt": 1}, attempt=2), COORDINATOR,
        (r.Cohort, {"attempt": 2}, 0), "the transcript is not the hash of what was agreed"),
    "the second attempt has too small a cohort": (
        _edit(COORDINATOR, r.Cohort, {"round": 2, "attempt": 1}, cohort=["ash", "birch"]), COORDINATOR,
        (r.Cohort, {"attempt": 1}, 0), "a cohort that the run does not allow"),
    "all opened the first attempt": (
        _opened_the_first, "doum", (r.Opened, {}, 0), "opened round 2 under another transcript than its cohort's"),
}  # fmt: skip


@pytest.mark.parametrize("name", RETRY_LIES, ids=str)
def test_what_everybody_signs_of_a_retried_round_must_still_make_sense(twice: Run, name: str) -> None:
    lie, party, place, what = RETRY_LIES[name]
    book = Logbook(twice)
    lie(book)
    number = None if place is None else book.index(party, place[0], round=2, **place[1]) + place[2]
    book.conspire()
    found = findings(twice)
    assert Finding(party, number, what) in found, [str(f) for f in found]
    assert not any("signed" in f.what or "checkpoint" in f.what for f in found)


def test_signing_a_retried_run_again_is_no_finding_by_itself(twice: Run) -> None:
    """The control of those above."""
    Logbook(twice).conspire()
    assert findings(twice) == []


# --- the model -------------------------------------------------------------------------------------------------------


def test_every_part_of_the_weights_in_the_model_file_counts(run: Run) -> None:
    path = run.folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert findings(run) == []  # the control
    for at in range(start, len(data)):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(bytes(changed))
        found = findings(run)
        assert [f.what for f in found] == ["model.safetensors does not hold the released model"], at
        assert parties(found) == {COORDINATOR}


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "header of nonsense"])
def test_a_damaged_model_file_is_found(run: Run, damage: str) -> None:
    path = run.folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({
        "empty": b"", "cut": data[:-3], "garbage": b"\xff" * 500,
        "header of nonsense": (9).to_bytes(8, "little") + b'{"a": []}',
    }[damage])  # fmt: skip
    assert [f.party for f in findings(run)] == [COORDINATOR]


def test_weights_in_another_order_are_found(run: Run) -> None:
    """The card inside the file names the order; it must not be the file that decides what was released."""
    path = run.folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [n for n in header if n != "__metadata__"]
    first, second = sorted(names, key=lambda n: header[n]["data_offsets"])[:2]
    header[first], header[second] = header[second], header[first]
    card = json.loads(header["__metadata__"]["confide"])
    order = card["layout"]["names"]
    i, j = order.index(first), order.index(second)
    order[i], order[j] = order[j], order[i]
    header["__metadata__"]["confide"] = json.dumps(card)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert COORDINATOR in parties(findings(run))


# --- a coordinator that writes nonsense ------------------------------------------------------------------------------

HOSTILE: dict[str, Any] = {
    "nothing": None, "a small number": -1, "a large number": 1e308, "an endless number": 10**400, "no text": "",
    "broken text": "\ud800", "a list": [None], "an object": {}, "missing": (_GONE := object()),
}  # fmt: skip


def _paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += _paths(value, (*prefix, key))
    return found


def _with(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(tree))
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is _GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def _write_manifest(run: Run, manifest: str, book: Logbook | None = None) -> None:
    book = book or Logbook(run)
    book.change(COORDINATOR, 0, manifest=manifest)
    book.write(COORDINATOR)


def _manifest(run: Run) -> dict[str, Any]:
    first = run.records(COORDINATOR)[0]
    assert isinstance(first, r.RunCreated)
    return dict(json.loads(first.manifest))


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_a_manifest_of_nonsense_is_a_finding_and_no_crash(run: Run, value: str) -> None:
    """Signed by the coordinator's own key; each value of the manifest in turn."""
    manifest, book, crashed, unnoticed = _manifest(run), Logbook(run), [], []
    for path in _paths(manifest):
        _write_manifest(run, json.dumps(_with(manifest, path, HOSTILE[value])), book)
        try:
            if not findings(run):
                unnoticed.append(path)
        except Exception as error:
            crashed.append((path, type(error).__name__))
    assert crashed == []
    assert unnoticed == []


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "{}", "[" * 100_000, '{"members": []}', "\ud800", "7"],
    ids=["empty", "null", "list", "half", "object", "deep", "no keys", "no text", "number"],
)  # fmt: skip
def test_a_manifest_that_is_none_is_an_audit_error(run: Run, text: str) -> None:
    _write_manifest(run, text)
    with pytest.raises(AuditError):
        verify(run.folder)


def test_a_manifest_cannot_make_the_verifier_read_elsewhere(run: Run, tmp_path: Path) -> None:
    """A site's name becomes a file's name: it must be no path."""
    shutil.copy(run.log("ash"), tmp_path / "outside.log")
    shutil.copy(run.log("ash").with_suffix(".checkpoint"), tmp_path / "outside.checkpoint")
    manifest = _manifest(run)
    manifest["members"].append({**manifest["members"][0], "site": "../../outside"})
    _write_manifest(run, json.dumps(manifest))
    try:
        evidence = verify(run.folder)
    except AuditError:
        return
    read = evidence.sites.get("../../outside")
    assert read is None or read.entries == []


@pytest.mark.parametrize("party", [COORDINATOR, "ash"])
def test_entries_of_nonsense_are_findings_and_no_crash(run: Run, party: str) -> None:
    """Each text field of each entry in turn, signed by the party's own key."""
    crashed, unnoticed, seen, book = [], [], _seen(run, party), Logbook(run)
    for number, line in enumerate(book.logs[party]):
        honest = line.record
        for field, value in ((f.name, getattr(honest, f.name)) for f in fields(honest)):
            for wrong in _nonsense(value):
                line.record = honest
                book.change(party, number, **{field: wrong})
                book.write(party)
                try:
                    found = findings(run)
                except Exception as error:
                    crashed.append((honest.KIND, field, wrong, type(error).__name__))
                else:
                    if not found and number < seen:
                        unnoticed.append((honest.KIND, field, wrong))
        line.record = honest
    assert crashed == []
    assert unnoticed == []


def _nonsense(value: Any) -> list[Any]:
    if isinstance(value, int):
        return [-(2**60), 2**60]
    if isinstance(value, list):
        return [[], ["\ud800"] * len(value), [*value, "x"]]
    return [{}] if isinstance(value, dict) else ["", "-1:x", "²:0", "9" * 5000, "\ud800"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_that_a_run_is_verified(finished: Run) -> None:
    answer = confide("audit", "verify", finished.folder)
    assert finished.result is not None
    assert (answer.code, answer.err) == (0, "")
    assert f"verified: run {finished.result.run_id}, 5 logs" in answer.out
    assert "no finding" in answer.out


def test_the_command_gives_one_object_as_json(finished: Run) -> None:
    answer = confide("audit", "verify", finished.folder, "--json")
    found = json.loads(answer.out)
    evidence: Evidence = verify(finished.folder)
    assert finished.result is not None
    assert answer.code == 0
    assert found == {
        "run_id": (run := finished.result.run_id), "runs": [run], "parties": 5, "verified": True, "findings": [],
        "entries": len(evidence.coordinator.entries) + sum(len(s.entries) for s in evidence.sites.values()),
        "roster": {
            "federation": "simulation", "version": 1, "members": 4, "digest": evidence.manifest["roster"],
            "fingerprint": fingerprint(RosterBook.read(finished.folder).chain[0].roster),
        },
    }  # fmt: skip


def test_the_command_names_the_first_bad_entry_and_exits_with_7(run: Run) -> None:
    data = run.log("cedar").read_bytes()
    run.log("cedar").write_bytes(data.replace(b'"kind":"sealed"', b'"kind":"leaked"', 1))
    number = next(i for i, e in enumerate(run.records("birch")) if isinstance(e, r.Sealed))
    answer = confide("audit", "verify", run.folder)
    assert (answer.code, answer.out) == (7, "")
    assert f"log of cedar, entry {number}" in " ".join(answer.err.split())
    assert "do not rely on this run's evidence" in answer.err
    assert "Traceback" not in answer.err


def test_the_command_names_findings_in_json_and_exits_with_7(run: Run) -> None:
    run.log("doum").write_bytes(run.log("doum").read_bytes()[:-1] + b"!")
    answer = confide("audit", "verify", run.folder, "--json")
    assert answer.code == 7
    found = json.loads(answer.out.splitlines()[0])
    assert found["verified"] is False
    assert "doum" in {f["party"] for f in found["findings"]}
    assert all(set(f) == {"party", "entry", "what", "severity"} for f in found["findings"])


def test_json_is_one_object_also_where_something_is_found(run: Run) -> None:
    """`--json`: "Print one JSON object." A script reads stdout whole."""
    run.log("doum").unlink()
    answer = confide("audit", "verify", run.folder, "--json")
    assert answer.code == 7
    assert json.loads(answer.out)["verified"] is False


@pytest.mark.parametrize("as_json", [False, True])
def test_where_there_is_no_run_the_command_says_so(tmp_path: Path, as_json: bool) -> None:
    answer = confide("audit", "verify", tmp_path, *(["--json"] if as_json else []))
    assert answer.code == 7
    assert "there is no coordinator's log here" in answer.err
    if as_json:
        assert json.loads(answer.out)["error"]["exit_code"] == 7
