"""Logs that live longer than a run: each run is verified by itself, and none stands in for another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from confide.errors import AuditError
from confide.privacy.audit import records as r
from confide.privacy.audit.evidence import load_evidence, load_runs
from confide.privacy.audit.report import write_report
from confide.privacy.audit.verify import verify, verify_runs
from tests.attacks.federation import Federation
from tests.cli.command import confide
from tests.privacy.audit.logbook import COORDINATOR, Logbook, Run


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three runs of one federation; the third without doum, and refused by cedar."""
    made = Federation(tmp_path_factory.mktemp("runs") / "f", run={"rounds": 2})
    first = made.manifest
    for name in ("second", "third"):
        made.coordinator().run()
        members = tuple(m for m in first.members if m.site != "doum") if name == "third" else first.members
        made.world.manifest = first.model_copy(update={"run": f"{first.run}-{name}", "members": members})
    made.set_policy("cedar", purposes=frozenset({"something/else"}))
    made.set_policy("ash", min_sites=2)
    yield made
    made.world.close()


@pytest.fixture(scope="module")
def logs(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What travels of them."""
    with pytest.raises(Exception, match="sites"):  # three members, of whom one refuses
        federation.coordinator().run()
    federation.world.export()
    to = tmp_path_factory.mktemp("exported") / "logs"
    shutil.copytree(federation.folder / "logs", to)
    return to


def names(federation: Federation) -> list[str]:
    first = federation.world.manifest.run.removesuffix("-third")
    return [first, f"{first}-second", f"{first}-third"]


def test_every_run_in_the_logs_is_verified(federation: Federation, logs: Path) -> None:
    found = verify_runs(logs)
    assert [evidence.run for evidence in found] == names(federation)
    assert [evidence.findings for evidence in found] == [[], [], []]
    assert [len(list(e.coordinator.of(r.Cohort))) for e in found] == [3, 3, 0]
    assert [sorted(e.sites) for e in found] == [["ash", "birch", "cedar", "doum"]] * 2 + [["ash", "birch", "cedar"]]
    told = confide("audit", "verify", logs, "--json")
    assert (told.code, told.last_line["runs"], told.last_line["verified"]) == (0, names(federation), True)
    assert told.last_line["parties"] == 5


def test_a_run_is_named_where_there_are_several(federation: Federation, logs: Path, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="the logs hold 3 runs"):
        load_evidence(logs)
    with pytest.raises(AuditError, match="no run 'another'"):
        load_evidence(logs, "another")
    second = names(federation)[1]
    assert (verify(logs, run=second).run, verify(logs, run=second).findings) == (second, [])
    assert write_report(logs, tmp_path / "report.html", second)["verified"]
    page = (tmp_path / "report.html").read_text()
    assert second in page
    assert page.count("sum opened") == 3  # this run's rounds, and no other's
    assert confide("audit", "report", logs, "--out", tmp_path / "x.html", "--json").code == 7
    proof = tmp_path / "proof.json"
    assert confide("audit", "prove", logs, "--party", "ash", "--charge", f"{second}/1/train", "--out", proof).code == 7
    assert confide(
        "audit", "prove", logs, "--run", second, "--party", "ash", "--charge", f"{second}/1/train", "--out", proof,
    ).code == 0  # fmt: skip
    assert confide("audit", "verify", proof, "--json").last_line["record"]["run"] == second


@pytest.fixture
def book(federation: Federation, logs: Path, tmp_path: Path) -> Logbook:
    """A copy of the logs, and everybody's keys."""
    shutil.copytree(logs, tmp_path / "run" / "logs")
    keys = {COORDINATOR: federation.world.coordinator, **{n: s.identity for n, s in federation.sites.items()}}
    return Logbook(Run(tmp_path / "run", keys, {}))


def test_what_is_changed_in_one_run_is_found_there(federation: Federation, book: Logbook) -> None:
    second = names(federation)[1]
    number = book.index("birch", r.Sealed, run=second, round=1)
    book.change("birch", number, transcript="ab" * 32)
    book.conspire()
    clean, changed, other = verify_runs(book.run.folder)
    assert [str(f) for f in changed.findings if f.entry == number]
    assert (clean.findings, other.findings) == ([], [])


@pytest.mark.parametrize("party", ["ash", COORDINATOR])
def test_what_is_cut_out_of_the_middle_is_found(federation: Federation, book: Logbook, party: str) -> None:
    """A whole run is taken out of one party's log, which is then signed anew."""
    second = names(federation)[1]
    book.logs[party] = [line for line in book.logs[party] if line.record.run != second]
    book.write(party)
    findings = [f for evidence in verify_runs(book.run.folder) for f in evidence.findings]
    assert findings
    if party == COORDINATOR:
        assert any("belongs to another run" in f.what for f in findings)
    else:
        assert {f.party for f in findings} >= {party}


def test_an_entry_of_one_run_does_not_stand_in_for_anothers(federation: Federation, book: Logbook) -> None:
    """A charge of the first run is all that the second one has to show."""
    first, second, _ = names(federation)
    mine = book.logs["ash"][book.index("ash", r.Charged, run=second, round=1)].record
    book.change("ash", book.index("ash", r.Charged, run=second, round=1), run=first)
    book.conspire()
    found = verify(book.run.folder, run=second).findings
    assert isinstance(mine, r.Charged)
    assert any("was not charged first" in f.what for f in found)


def test_a_run_that_the_coordinator_says_nothing_of_is_found(federation: Federation, book: Logbook) -> None:
    stray = r.Refused(run="elsewhere", round=1, step="train", party="ash", reason="abstains")
    book.insert("ash", len(book.logs["ash"]), stray)
    book.write("ash")
    for evidence in load_runs(book.run.folder):
        assert any("belongs to another run (elsewhere)" in f.what for f in evidence.findings)


def test_two_runs_of_one_name_are_one_too_many(federation: Federation, book: Logbook) -> None:
    created = book.logs[COORDINATOR][0].record
    book.insert(COORDINATOR, len(book.logs[COORDINATOR]), created)
    book.write(COORDINATOR)
    assert all(
        any("belongs to another run" in f.what for f in evidence.findings) for evidence in load_runs(book.run.folder)
    )
