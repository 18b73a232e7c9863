"""Folders that are not what they should be, and disks that fill up: a clear error; what was durable stays usable."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import confide as package
from confide.errors import AuditError, StorageError
from confide.privacy import files
from confide.privacy.audit import log as audit_log
from confide.privacy.audit import records as r
from confide.privacy.audit.verify import verify
from confide.privacy.database import open_durable
from tests.privacy.audit.command import Answer, confide
from tests.privacy.audit.logbook import COORDINATOR, Run, databases, export_left
from tests.support import experiment_tree, write_people

ROOT = Path(__file__).parents[3]


def is_clear(answer: Answer, code: int, *words: str) -> None:
    """It says what is wrong and where, in words of its own."""
    said = " ".join(answer.err.split())
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert "→" in said
    for word in words:
        assert word in said


# --- no run to verify ------------------------------------------------------------------------------------------------


def _nothing(folder: Path) -> Path:
    return folder / "nowhere"


def _a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file"


def _empty(folder: Path) -> Path:
    return folder


def _empty_logs(folder: Path) -> Path:
    (folder / "logs").mkdir()
    return folder


def _logs_is_a_file(folder: Path) -> Path:
    (folder / "logs").write_text("x")
    return folder


@pytest.mark.parametrize("make", [_nothing, _a_file, _empty, _empty_logs, _logs_is_a_file], ids=lambda f: f.__name__)
@pytest.mark.parametrize("command", ["verify", "report"])
def test_where_there_is_no_run_it_says_so(tmp_path: Path, make: Callable[[Path], Path], command: str) -> None:
    place = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    # `verify` takes a single file for a proof.
    proof = command == "verify" and place.is_file()
    told = ("is not a proof", "give a file") if proof else ("there is no coordinator's log here", "give the output")
    is_clear(confide("audit", command, place), 7, told[0], str(place), told[1])
    assert sorted(tmp_path.rglob("*")) == before


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "garbage": lambda d: bytes(range(256)) * 40,
    "zeros": lambda d: b"\0" * len(d),
    "newlines": lambda d: b"\n" * 1000,
    "without its first entry": lambda d: b"".join(d.splitlines(keepends=True)[1:]),
    "with a damaged first entry": lambda d: b"0" + d[1:] if d[:1] != b"0" else b"1" + d[1:],
    "as UTF-16": lambda d: d.decode().encode("utf-16"),
    "one endless line": lambda d: d.replace(b"\n", b""),
    "a text": lambda d: b"Dear auditor,\nthere was a log here.\n",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_coordinators_log_that_cannot_be_read_from_its_start(run: Run, damage: str, command: str) -> None:
    path = run.log(COORDINATOR)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    answer = confide("audit", command, run.folder)
    if damage == "with a damaged first entry" and command == "report" and answer.code == 0:
        assert "does not hold together" in (run.folder / "report.html").read_text(encoding="utf-8")
    else:
        is_clear(answer, 7)


@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_folder_in_place_of_the_coordinators_log(run: Run, command: str) -> None:
    run.log(COORDINATOR).unlink()
    run.log(COORDINATOR).mkdir()
    answer = confide("audit", command, run.folder)
    is_clear(answer, 7, "there is no coordinator's log")
    assert answer.code == 7


@pytest.mark.parametrize("name", ["ash.log", "ash.checkpoint", "coordinator.checkpoint"])
def test_a_folder_in_place_of_another_file(run: Run, name: str) -> None:
    (run.folder / "logs" / name).unlink()
    (run.folder / "logs" / name).mkdir()
    party = name.partition(".")[0]
    is_clear(confide("audit", "verify", run.folder), 7, f"log of {party}")
    assert confide("audit", "report", run.folder).code == 0
    assert f"log of {party}" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_empty_logs_of_all_sites_are_findings(run: Run) -> None:
    for site in run.sites:
        run.log(site).write_bytes(b"")
    is_clear(confide("audit", "verify", run.folder), 7)
    assert {f.party for f in verify(run.folder).findings} >= set(run.sites)
    assert confide("audit", "report", run.folder).code == 0


def test_logs_of_no_site_at_all_are_findings(run: Run) -> None:
    for site in run.sites:
        run.log(site).unlink()
        run.log(site).with_suffix(".checkpoint").unlink()
    is_clear(confide("audit", "verify", run.folder), 7, "the log is missing")
    assert confide("audit", "report", run.folder).code == 0


@pytest.mark.parametrize("name", ["coordinator.log", "ash.log", "local.log", "ash.checkpoint", "model.safetensors"])
@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_file_that_may_not_be_read_is_a_finding(
    run: Run, name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions, or a disk that is failing (tests may run as root, who may read everything)."""
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    answer = confide("audit", command, run.folder)
    monkeypatch.undo()
    if command == "report" and name != "coordinator.log":
        assert answer.code == 0
        assert "does not hold together" in (run.folder / "report.html").read_text(encoding="utf-8")
    else:
        is_clear(answer, 7)


def test_a_link_that_leads_nowhere_is_a_missing_log(run: Run) -> None:
    run.log("ash").unlink()
    run.log("ash").symlink_to(run.folder / "gone.log")
    answer = confide("audit", "verify", run.folder)
    is_clear(answer, 7, "log of ash: the log is missing")
    assert answer.code == 7


def test_a_site_log_of_another_run_is_a_finding_of_the_command(run: Run, another: Run) -> None:
    for suffix in (".log", ".checkpoint"):
        shutil.copy(another.log("cedar").with_suffix(suffix), run.log("cedar").with_suffix(suffix))
    answer = confide("audit", "verify", run.folder)
    assert another.result is not None
    is_clear(answer, 7, f"log of cedar, entry 0: belongs to another run ({another.result.run_id})")


# --- where the report goes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["a folder", "below a file", "in no folder", "a name too long"])
def test_a_report_that_cannot_be_written_is_a_usage_error(run: Run, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    out = {
        "a folder": tmp_path / "folder", "below a file": tmp_path / "file" / "report.html",
        "in no folder": tmp_path / "none" / "report.html", "a name too long": tmp_path / ("x" * 300),
    }[place]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    is_clear(confide("audit", "report", run.folder, "--out", out), 2, "cannot be written", str(out))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_that_cannot_be_written_is_one_json_object(run: Run, tmp_path: Path) -> None:
    answer = confide("audit", "report", run.folder, "--out", tmp_path / "none" / "x.html", "--json")
    assert json.loads(answer.out)["error"]["exit_code"] == 2


def test_a_report_never_leaves_half_a_page(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    page.write_text("the page of last week")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    answer = confide("audit", "report", run.folder, "--out", page)
    monkeypatch.undo()
    is_clear(answer, 2, "No space left")
    assert page.read_text() == "the page of last week"
    assert [p.name for p in tmp_path.iterdir() if "page" in p.name] == ["page.html"]


def test_the_report_of_an_interrupted_run_is_written(stopped: Run) -> None:
    answer = confide("audit", "report", stopped.folder, "--json")
    assert answer.code == 0
    found = json.loads(answer.out)
    assert found == {
        "report": str(stopped.folder / "report.html"), "verified": True, "findings": 0, "interrupted": True,
    }  # fmt: skip


# --- a disk that fills up --------------------------------------------------------------------------------------------


def _status(folder: Path) -> str:
    return str(json.loads((folder / "status.json").read_text())["status"])


def _is_still_usable(folder: Path) -> None:
    """What was durable verifies and can be reported on, and no log tells of a charge that its ledger lost."""
    assert verify(folder).findings == []
    answer = confide("audit", "report", folder, "--json")
    assert answer.code == 0
    found = json.loads(answer.out)
    assert (found["verified"], found["interrupted"]) == (True, True)
    assert "This run failed." in (folder / "report.html").read_text(encoding="utf-8")
    evidence = verify(folder)
    for site, log in evidence.sites.items():
        with contextlib.closing(sqlite3.connect(folder / "ledgers" / site / "ledger.db")) as database:
            held = {charge for (charge,) in database.execute("SELECT charge FROM entry WHERE kind = 'reserve'")}
        assert {e.charge for _, e in log.of(r.Charged)} <= held  # none is told of that the ledger does not hold


def test_a_disk_that_fills_up_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """The real thing: after round 1 no file may grow beyond the largest there is, by the operating system's limit."""
    program = """
import resource, signal, sys, json
from pathlib import Path
import confide
from confide.cli import render
from confide.errors import ConfideError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out = Path(sys.argv[2])
def fill(progress):
    if progress.round == 1:
        logs = [p.stat().st_size for name in ("federated", "local", "coordinator") for p in out.rglob(f"{name}.db*")]
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(logs) + 50, resource.RLIM_INFINITY))
try:
    confide.simulate(json.loads(sys.argv[1]), out=out, progress=fill)
except ConfideError as error:
    render.show_error(error, as_json=True)
    sys.exit(error.exit_code)
"""
    tree = experiment_tree(str(write_people(tmp_path)), sealing={"profile": "sealed"})
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(tree), str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode not in (0, 1)
    assert _status(tmp_path / "out") == "failed"
    export_left(tmp_path / "out")
    _is_still_usable(tmp_path / "out")
    assert done.returncode == StorageError.exit_code, done.stderr  # and not as if peers had stayed away
    assert "space" in done.stderr


class _Disk:
    """A log's database on a disk that fills up: no entry goes in once `armed` holds something."""

    def __init__(self, database: sqlite3.Connection, armed: list[bool]) -> None:
        self._database, self._armed = database, armed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def executemany(self, *arguments: Any) -> Any:
        if self._armed:
            raise sqlite3.OperationalError("database or disk is full")
        return self._database.executemany(*arguments)


def _fail_writes(monkeypatch: pytest.MonkeyPatch, which: Callable[[str], bool], armed: list[bool]) -> None:
    """Entries of logs that `which` picks cannot be written, once `armed` holds something."""
    make = open_durable

    def opened(path: Path, schema: str, **options: Any) -> Any:
        found = make(path, schema, **options)
        return _Disk(found, armed) if which(str(path)) else found

    monkeypatch.setattr(audit_log, "open_durable", opened)


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A small experiment."""
    return experiment_tree(str(write_people(tmp_path)))


@pytest.mark.parametrize("which", ["sites/coordinator.db", "/federated.db", "/local.db", ".db"])
def test_no_room_for_the_next_log_entry_stops_the_run(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    armed: list[bool] = []
    _fail_writes(monkeypatch, lambda path: which in path, armed)
    with pytest.raises(StorageError, match=r"disk is full|does not take"):
        package.simulate(tree, out=tmp_path / "out", progress=lambda p: armed.append(True) if p.round == 1 else None)
    monkeypatch.undo()
    assert _status(tmp_path / "out") == "failed"
    _is_still_usable(tmp_path / "out")
    for path, database in databases(tmp_path / "out").items():
        audit_log.export_log(database, tmp_path / "copy.log")
        assert (tmp_path / "copy.log").read_bytes() == path.read_bytes(), "what was durable has been exported"


def test_no_room_at_one_site_only_costs_that_site_and_not_the_run(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: three of four sites are enough, and the fourth is heard of in no sum."""
    armed: list[bool] = []
    _fail_writes(monkeypatch, lambda path: path.endswith("/doum/federated.db"), armed)
    package.simulate(tree, out=tmp_path / "out", progress=lambda p: armed.append(True) if p.round == 1 else None)
    monkeypatch.undo()
    evidence = verify(tmp_path / "out")
    assert evidence.findings == []
    cohorts = {e.round: e.cohort for _, e in evidence.coordinator.of(r.Cohort)}
    assert cohorts[1] == ["ash", "birch", "cedar", "doum"]
    assert cohorts[4] == ["ash", "birch", "cedar"]


@pytest.mark.parametrize(
    "name",
    [
        "rounds.jsonl", "quality.svg", "index.html", "result.json", "model.safetensors", "coordinator.log", "doum.log",
        "ash.checkpoint", "local.log",
    ],
)  # fmt: skip
def test_no_room_for_a_result_is_a_storage_error_too(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not a crash (exit 1, a bug's code): the disk is what must be seen to."""

    write = files.write_atomically

    def guarded(path: Path, data: bytes, **options: Any) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data, **options)

    for module in [m for m in sys.modules.values() if vars(m).get("write_atomically") is write]:
        monkeypatch.setattr(module, "write_atomically", guarded)
    with pytest.raises(StorageError, match=r"No space left"):
        package.simulate(tree, out=tmp_path / "out")
    assert _status(tmp_path / "out") == "failed"
    monkeypatch.undo()
    export_left(tmp_path / "out")
    assert confide("audit", "verify", tmp_path / "out").code == 0, "the evidence is there, once there is room for it"


def test_where_even_the_status_cannot_be_written_the_first_error_is_told(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for good: the error is the disk's, and not what its own report ran into."""
    full: list[bool] = []
    write = files.write_atomically

    def guarded(path: Path, data: bytes, **options: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data, **options)

    def stop(_: object) -> None:
        full.append(True)
        raise KeyboardInterrupt

    for module in [m for m in sys.modules.values() if vars(m).get("write_atomically") is write]:
        monkeypatch.setattr(module, "write_atomically", guarded)
    with pytest.raises((KeyboardInterrupt, StorageError)):
        package.simulate(tree, out=tmp_path / "out", progress=stop)


def test_a_killed_run_can_be_exported_verified_and_reported_on(tmp_path: Path) -> None:
    """SIGKILL in the middle of round 2: no handler runs, nobody says goodbye, nothing is exported."""
    program = """
import json, os, signal, sys
import confide
def kill(progress):
    if progress.round == 1:
        os.kill(os.getpid(), signal.SIGKILL)
confide.simulate(json.loads(sys.argv[1]), out=sys.argv[2], progress=kill)
"""
    tree = experiment_tree(str(write_people(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(tree), str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert _status(tmp_path / "out") == "running"
    is_clear(confide("audit", "verify", tmp_path / "out"), 7, "there is no coordinator's log")
    left = databases(tmp_path / "out")
    assert all(database.with_name(f"{database.name}-wal").stat().st_size for database in left.values()), "the control"
    export_left(tmp_path / "out")
    evidence = verify(tmp_path / "out")
    assert evidence.findings == []
    assert {e.round for site in evidence.sites.values() for _, e in site.of(r.Sealed)} == {1, 2}
    assert len(evidence.local) == 4
    answer = confide("audit", "report", tmp_path / "out", "--json")
    assert json.loads(answer.out)["interrupted"] is True
    assert "This run was interrupted." in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_verify_never_raises_anything_but_its_own_error(tmp_path: Path) -> None:
    """A folder of files with the right names and nothing right in them."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for number in range(60):
        for name in ("coordinator.log", "coordinator.checkpoint", "ash.log"):
            (logs / name).write_bytes(os.urandom(number * 7))
        with pytest.raises(AuditError):
            verify(tmp_path)
