"""The append-only file: what was told to be durable is there after any crash, and nothing else opens."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.errors import AuditError, StorageError
from confide.privacy.audit.checkpoint import parse_note
from confide.privacy.audit.log import Log, parse_line, read_lines
from confide.privacy.audit.merkle import tree_root
from confide.privacy.audit.records import Opened, Record, Sealed

ORIGIN = "confide/test/ash/federated"
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
ROOT = Path(__file__).parents[3]


def entry(number: int) -> Record:
    """An entry that can be told from others."""
    return Opened(run="r", round=number, transcript=f"t{number}", model="m" * (number % 7), saturated="0")


def open_log(path: Path, origin: str = ORIGIN) -> Log:
    """The log at a path."""
    return Log(path, origin=origin, name="ash", public_key=PUBLIC, sign=KEY.sign)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the log lies."""
    return tmp_path / "ash.log"


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    """A log with five entries."""
    found = open_log(path)
    for number in range(5):
        found.append(entry(number))
    yield found
    found.close()


def reopen(path: Path) -> list[Record]:
    """Open, check, close: what the log holds."""
    log = open_log(path)
    size, root = log.checkpoint().size, log.checkpoint().root
    log.close()
    lines = [parse_line(line) for line in path.read_bytes().splitlines()]
    assert (size, root) == (len(lines), tree_root([leaf for leaf, _, _ in lines]))
    return [record for _, record, _ in lines]


# --- appending -------------------------------------------------------------------------------------------------------


def test_what_was_appended_is_there_in_order(log: Log, path: Path) -> None:
    assert reopen(path) == [entry(n) for n in range(5)]
    log.append(entry(5), entry(6))
    assert reopen(path) == [entry(n) for n in range(7)]


def test_the_checkpoint_beside_it_is_signed_and_up_to_date(log: Log, path: Path) -> None:
    for number in range(5, 8):
        log.append(entry(number))
        note = path.with_suffix(".checkpoint").read_text(encoding="utf-8")
        assert parse_note(note, ORIGIN, "ash", PUBLIC) == log.checkpoint()
        assert log.checkpoint().size == number + 1


def test_equal_entries_have_different_leaves(log: Log, path: Path) -> None:
    """The salt: who sees a leaf hash cannot guess what the entry says."""
    log.append(entry(9), entry(9))
    leaves = [leaf for _, leaf, _ in read_lines(path.read_bytes(), "here")]
    assert len(set(leaves)) == len(leaves) == 7


def test_nobody_else_on_the_machine_may_read_it(log: Log, path: Path) -> None:
    assert path.stat().st_mode & 0o077 == 0


def test_an_entry_is_synced_to_the_disk_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, order = open_log(path), list[str]()
    write, sync = os.write, os.fsync

    def noted_write(descriptor: int, data: bytes) -> int:
        order.append("write")
        return write(descriptor, data)

    def noted_sync(descriptor: int) -> None:
        order.append("sync")
        sync(descriptor)

    monkeypatch.setattr(os, "write", noted_write)
    monkeypatch.setattr(os, "fsync", noted_sync)
    log.append(entry(0))
    monkeypatch.undo()
    log.close()
    assert order[:2] == ["write", "sync"]


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_killed_writer_never_loses_what_it_was_told_to_be_durable(path: Path) -> None:
    """Eighty writers in turn on one log, each killed with SIGKILL at a random moment."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.privacy.audit.crash_writer", str(path), "80"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(looks) == 80
    assert looks[-1]["acknowledged"] > 80  # the control: they did write in between
    for look in looks:
        assert look["in_order"]
        assert look["size"] == look["held"]
        assert look["acknowledged"] <= look["held"] <= look["acknowledged"] + 1


def test_an_unfinished_last_line_is_dropped_wherever_it_was_cut(log: Log, path: Path) -> None:
    """A power cut in the middle of a write that nobody was told of: every length of it, with the old checkpoint."""
    note = path.with_suffix(".checkpoint").read_bytes()
    whole = path.read_bytes()
    log.append(entry(5))
    unfinished = path.read_bytes()[len(whole) :]
    for length in range(len(unfinished)):
        path.write_bytes(whole + unfinished[:length])
        path.with_suffix(".checkpoint").write_bytes(note)
        assert reopen(path) == [entry(n) for n in range(5)]
        assert path.read_bytes() == whole


def test_a_line_whose_end_is_garbage_is_dropped(log: Log, path: Path) -> None:
    """A file that the crash left longer than what was written: zeros, as some file systems do."""
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 100)
    assert reopen(path) == [entry(n) for n in range(5)]


def test_after_a_crash_the_log_goes_on(log: Log, path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0123")
    again = open_log(path)
    again.append(entry(5))
    again.close()
    assert reopen(path) == [entry(n) for n in range(6)]


def test_an_older_checkpoint_is_a_true_statement_too(log: Log, path: Path) -> None:
    older = path.with_suffix(".checkpoint").read_bytes()
    log.append(entry(5))
    path.with_suffix(".checkpoint").write_bytes(older)
    assert reopen(path) == [entry(n) for n in range(6)]


# --- what is refused -------------------------------------------------------------------------------------------------


def _lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "shorter by an entry": lambda d: b"".join(_lines(d)[:-1]),
    "shorter by half an entry": lambda d: d[:-40],
    "empty": lambda d: b"",
    "an entry taken from the middle": lambda d: b"".join(_lines(d)[:2] + _lines(d)[3:]),
    "two entries exchanged": lambda d: b"".join([_lines(d)[i] for i in (0, 2, 1, 3, 4)]),
    "an entry twice": lambda d: b"".join([_lines(d)[i] for i in (0, 1, 1, 3, 4)]),
    "an entry edited": lambda d: d.replace(b'"round":2', b'"round":7'),
    "a time edited": lambda d: d.replace(b'"at":1', b'"at":2', 1),
    "another salt": lambda d: bytes([d[0] ^ 1]) + d[1:],
    "a salt in capitals": lambda d: d[:32].upper() + d[32:],
    "a space more": lambda d: d.replace(b'"run"', b' "run"', 1),
    "an empty line": lambda d: b"\n" + d,
    "Windows line ends": lambda d: d.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda d: b"\xef\xbb\xbf" + d,
    "garbage": lambda d: b"\x00\xff" * 200 + b"\n",
    "another text": lambda d: b"hello\n",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_log_that_does_not_follow_from_its_checkpoint_is_refused(log: Log, path: Path, damage: str) -> None:
    honest = path.read_bytes()
    changed = DAMAGES[damage](honest)
    assert changed != honest or damage == "a salt in capitals"
    if changed == honest:  # a salt without letters; rare, and nothing to see
        return
    assert len(reopen(path)) == 5  # the control
    path.write_bytes(changed)
    with pytest.raises(AuditError):
        open_log(path)


CHECKPOINT_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda d: d[:30] + bytes([d[30] ^ 1]) + d[31:],
    "empty": lambda d: b"",
    "cut": lambda d: d[: len(d) // 2],
    "not text": lambda d: b"\xff\xfe\x80" * 50,
    "another log's": lambda d: d.replace(b"ash/federated", b"ash/local"),
}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES, ids=str)
def test_a_damaged_checkpoint_is_refused(log: Log, path: Path, damage: str) -> None:
    note = path.with_suffix(".checkpoint")
    note.write_bytes(CHECKPOINT_DAMAGES[damage](note.read_bytes()))
    with pytest.raises(AuditError):
        open_log(path)


def test_the_log_of_another_party_is_refused(log: Log, path: Path) -> None:
    with pytest.raises(AuditError, match="another log"):
        open_log(path, origin="confide/test/birch/federated")


def test_a_refused_log_is_left_as_it_was(log: Log, path: Path) -> None:
    """Whatever it is evidence of, opening must not change it: not even its unfinished last line."""
    damaged = path.read_bytes().replace(b'"round":2', b'"round":7') + b"unfinished"
    path.write_bytes(damaged)
    with pytest.raises(AuditError):
        open_log(path)
    assert path.read_bytes() == damaged


def test_a_refused_log_is_not_kept_open(log: Log, path: Path) -> None:
    path.write_bytes(b"garbage\n")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(AuditError):
            open_log(path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("place", ["a folder", "below a file", "in no folder"])
def test_a_place_that_holds_no_file_is_a_storage_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.log").mkdir()
    paths = {"a folder": "folder.log", "below a file": "file/x.log", "in no folder": "none/x.log"}
    with pytest.raises(StorageError):
        open_log(tmp_path / paths[place])


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1, 40, 100])
def test_a_full_disk_is_told_and_leaves_the_log_as_it_was(
    log: Log, path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, note, write = path.read_bytes(), path.with_suffix(".checkpoint").read_bytes(), os.write
    left = [room]

    def full(descriptor: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = write(descriptor, bytes(data)[: left[0]])
        left[0] -= part
        return part

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        log.append(entry(5))
    monkeypatch.undo()
    assert (path.read_bytes(), path.with_suffix(".checkpoint").read_bytes()) == (before, note)
    assert log.checkpoint().size == 5
    log.append(entry(5))  # space was made
    assert reopen(path) == [entry(n) for n in range(6)]


def test_a_disk_that_does_not_sync_is_told_and_leaves_the_log_as_it_was(
    log: Log, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        log.append(entry(5))
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_where_the_checkpoint_does_not_fit_either_nothing_was_appended_or_it_is_no_error(
    log: Log, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error says that the effect must not happen: then the entry must not stand in the log either."""
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    try:
        log.append(entry(5))
    except StorageError:
        assert path.read_bytes() == before
        assert log.checkpoint().size == 5
    else:
        assert reopen(path)[-1] == entry(5)


def test_a_file_limit_of_the_operating_system_is_met_in_the_same_way(tmp_path: Path) -> None:
    """The real thing: RLIMIT_FSIZE in a process of its own, entries until no more fits, then room again."""
    program = """
import json, resource, signal, sys
from pathlib import Path
from confide.errors import StorageError
from tests.privacy.audit.test_log import entry, open_log, reopen
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
log, done = open_log(path), 0
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    while True:
        log.append(entry(done), entry(done))
        done += 1
except StorageError as error:
    told = str(error)
held = len(reopen(path))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append(entry(99))
print(json.dumps({"done": done, "held": held, "told": told, "after": reopen(path)[-1].round}))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "ash.log")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["done"] > 3
    assert found["held"] == 2 * found["done"]
    assert "cannot be written" in found["told"]
    assert found["after"] == 99


# --- lines -----------------------------------------------------------------------------------------------------------


def test_the_first_bad_entry_is_named(log: Log, path: Path) -> None:
    data = path.read_bytes().replace(b'"round":3', b'"round":"3"')
    with pytest.raises(AuditError) as error:
        list(read_lines(data, "here"))
    assert error.value.where == "here, entry 3"


@pytest.mark.parametrize(
    "line",
    [b"", b" ", b"00", b"0" * 32, b"0" * 31 + b" {}", b"0" * 32 + b" {}", b"g" * 32 + b" {}", b"\xff" * 40,
     b"00 " * 10 + b"00 {}", b"0" * 34 + b" {}"],
)  # fmt: skip
def test_what_is_no_line_is_refused(line: bytes) -> None:
    with pytest.raises(AuditError):
        parse_line(line)


def test_an_entry_after_another_kind_is_told_apart(log: Log, path: Path) -> None:
    log.append(Sealed(run="r", round=1, attempt=0, cohort=["a"], transcript="x", coordinator="0:00"))
    assert [type(e).__name__ for e in reopen(path)[-2:]] == ["Opened", "Sealed"]
