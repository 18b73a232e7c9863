"""The append-only log: what was told to be durable is there after any crash, nothing else opens, and what is exported
is what it holds."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.clients.store import SiteStore
from confide.errors import AuditError, StorageError
from confide.privacy.audit.checkpoint import Checkpoint, parse_note, sign_note
from confide.privacy.audit.log import Log, export_log, parse_line, read_lines
from confide.privacy.audit.merkle import leaf_hash, tree_root, verify_consistency, verify_inclusion
from confide.privacy.audit.records import Opened, Record, RunEnded, Sealed
from confide.privacy.dp import Ledger, RenyiBudget
from confide.protocol.identity import Identity

ORIGIN = "confide/test/ash/federated"
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
ROOT = Path(__file__).parents[3]


def entry(number: int) -> Record:
    """An entry that can be told from others."""
    return Opened(run="r", round=number, transcript=f"t{number}", model="m" * (number % 7), saturated="0")


def open_log(path: Path, origin: str = ORIGIN, sign: Callable[[bytes], bytes] = KEY.sign) -> Log:
    """The log at a path."""
    return Log(path, origin=origin, name="ash", public_key=PUBLIC, sign=sign)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the log lies."""
    return tmp_path / "ash.db"


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    """A log with five entries."""
    found = open_log(path)
    for number in range(5):
        found.append(entry(number))
    yield found
    found.close()


@pytest.fixture
def closed(log: Log, path: Path) -> Path:
    """The file of a log with five entries that nobody has open."""
    log.close()
    return path


def reopen(path: Path) -> list[Record]:
    """Open, check, close: what the log holds."""
    log = open_log(path)
    size, root, entries = log.checkpoint().size, log.checkpoint().root, list(log.entries())
    rows = [log.entry(number) for number in range(size)]
    log.close()
    assert len(entries) == size
    assert root == tree_root(leaf_hash(salt + data) for salt, data in rows)
    return entries


def rows(path: Path) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """Everything that the file holds, read by somebody else."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT * FROM entry ORDER BY seq").fetchall(), db.execute("SELECT * FROM head").fetchall()


def note_in(path: Path) -> str:
    """The signed checkpoint that the file holds, read by somebody else."""
    ((_, note),) = rows(path)[1]
    return str(note)


def edit(path: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    """What somebody who may write the file can do: the triggers are off meanwhile."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement, values)
        for _, again in triggers:
            db.execute(again)


# --- appending -------------------------------------------------------------------------------------------------------


def test_what_was_appended_is_there_in_order(log: Log, path: Path) -> None:
    assert reopen(path) == list(log.entries()) == [entry(n) for n in range(5)]
    log.append(entry(5), entry(6))
    assert reopen(path) == list(log.entries()) == [entry(n) for n in range(7)]
    assert log.size == 7


def test_the_checkpoint_in_the_file_is_signed_and_up_to_date(log: Log, path: Path) -> None:
    for number in range(5, 8):
        log.append(entry(number))
        assert parse_note(note_in(path), ORIGIN, "ash", PUBLIC) == log.checkpoint()
        assert log.checkpoint().size == number + 1
        assert log.note() == note_in(path)


def test_a_log_has_a_checkpoint_from_the_start(path: Path) -> None:
    open_log(path).close()
    assert parse_note(note_in(path), ORIGIN, "ash", PUBLIC) == Checkpoint(ORIGIN, 0, tree_root([]))


def test_equal_entries_have_different_leaves(log: Log) -> None:
    """The salt: who sees a leaf hash cannot guess what the entry says."""
    log.append(entry(9), entry(9))
    leaves = {leaf_hash(salt + data) for salt, data in map(log.entry, range(log.size))}
    assert len(leaves) == 7
    assert log.entry(5)[1] == log.entry(6)[1], "the control: they say the same"


def test_nobody_else_on_the_machine_may_read_it_nor_what_lies_beside_it(log: Log, path: Path, tmp_path: Path) -> None:
    log.export(tmp_path / "ash.log")
    found = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert found == dict.fromkeys(["ash.db", "ash.db-wal", "ash.db-shm", "ash.log", "ash.checkpoint"], 0o600)


def test_an_entry_is_on_the_disk_before_append_returns(log: Log, path: Path) -> None:
    """Every commit of a write-ahead log is synced where `synchronous` is FULL (2) or more."""
    assert log._db.execute("PRAGMA synchronous").fetchone()[0] >= 2
    assert log._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    log.append(Opened(run="r", round=1, transcript="a word to look for", model="m", saturated="0"))
    written = path.read_bytes() + path.with_name("ash.db-wal").read_bytes()
    assert b"a word to look for" in written


def test_the_log_tells_what_it_holds_and_what_not(log: Log) -> None:
    states = []
    for number in range(5, 9):
        states.append(log.checkpoint())
        log.append(entry(number))
    assert all(log.held(s.size, s.root) for s in states)
    assert not log.held(states[0].size + 1, states[0].root)
    assert not log.held(10, states[0].root)
    assert not log.held(-1, states[0].root)
    for wrong in (9, -1, 10**6):
        with pytest.raises(AuditError, match="there is no entry"):
            log.entry(wrong)


def test_what_the_log_proves_holds_against_its_checkpoints(log: Log) -> None:
    earlier = log.checkpoint()
    log.append(entry(5), entry(6))
    now = log.checkpoint()
    for number in range(7):
        leaf = leaf_hash(b"".join(log.entry(number)))
        assert verify_inclusion(leaf, number, 7, log.inclusion_proof(number), now.root)
        assert verify_inclusion(leaf, number, 5, log.inclusion_proof(number, 5), earlier.root) if number < 5 else True
        assert not verify_inclusion(leaf, number, 7, log.inclusion_proof((number + 1) % 7), now.root)
    proof = log.consistency_proof(5)
    assert verify_consistency(5, earlier.root, 7, now.root, proof)
    assert proof == log.consistency_proof(5, 7)
    assert not verify_consistency(5, earlier.root, 7, now.root, proof[:-1]), "the control"


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_killed_writer_never_loses_what_it_was_told_to_be_durable(path: Path) -> None:
    """Eighty writers in turn on one log, each killed with SIGKILL at a random moment. An append is there wholly or not
    at all, and what can be exported without a key is what the log holds."""
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
        assert look["left"]
        assert look["held"] == int(look["held"]), "half an append"
        assert look["acknowledged"] <= look["held"] <= look["acknowledged"] + 1


def _as_it_lies(path: Path, to: Path) -> dict[str, bytes]:
    """The bytes of a log that is open: what a power cut would leave. (The third file is SQLite's shared memory.)"""
    to.mkdir(exist_ok=True)
    return {suffix: path.with_name(path.name + suffix).read_bytes() for suffix in ("", "-wal")}


def _lay(lying: dict[str, bytes], to: Path) -> Path:
    for old in to.glob("ash.db*"):
        old.unlink()
    for suffix, data in lying.items():
        (to / f"ash.db{suffix}").write_bytes(data)
    return to / "ash.db"


def test_an_unfinished_write_is_dropped_wherever_it_was_cut(log: Log, path: Path, tmp_path: Path) -> None:
    """A power cut in the middle of a write that nobody was told of."""
    before = _as_it_lies(path, tmp_path / "cut")
    log.append(entry(5))
    after = _as_it_lies(path, tmp_path / "cut")
    start, end = len(before["-wal"]), len(after["-wal"])
    assert after[""] == before[""], "the control: nothing but the write-ahead file has grown"
    assert end > start + 4096
    cuts = {start, start + 1, start + 23, start + 24, end - 1, *range(start, end, 211)}
    for cut in sorted(cuts):
        lying = _lay({**before, "-wal": after["-wal"][:cut]}, tmp_path / "cut")
        assert reopen(lying) == [entry(n) for n in range(5)], cut
    assert reopen(_lay(after, tmp_path / "cut")) == [entry(n) for n in range(6)], "the control: the whole of it"


def test_a_write_whose_end_is_garbage_is_dropped(log: Log, path: Path, tmp_path: Path) -> None:
    """A file that the crash left longer than what was written: zeros, as some file systems do, or what lay there."""
    lying = _as_it_lies(path, tmp_path / "left")
    for rest in (bytes(100), bytes(50_000), os.urandom(9000), lying["-wal"][-5000:]):
        left = _lay({**lying, "-wal": lying["-wal"] + rest}, tmp_path / "left")
        assert reopen(left) == [entry(n) for n in range(5)]
        again = open_log(left)
        again.append(entry(5))
        again.close()
        assert reopen(left) == [entry(n) for n in range(6)], "and it goes on"


def test_whatever_is_cut_off_the_write_ahead_file_no_entry_is_half_there(log: Log, path: Path, tmp_path: Path) -> None:
    """A disk that lied about what it synced: the log is as it was after an earlier append, or refused."""
    lying, seen = _as_it_lies(path, tmp_path / "cut"), set()
    for cut in range(0, len(lying["-wal"]), 1021):
        held = reopen(_lay({**lying, "-wal": lying["-wal"][:cut]}, tmp_path / "cut"))
        assert held == [entry(n) for n in range(len(held))]
        seen.add(len(held))
    assert seen >= {0, 1, 2, 3, 4}


# --- what is refused -------------------------------------------------------------------------------------------------

_SWAP = ("UPDATE entry SET seq = -1 WHERE seq = 1", "UPDATE entry SET seq = 1 WHERE seq = 2",
         "UPDATE entry SET seq = 2 WHERE seq = -1")  # fmt: skip
_CLOSE_UP = "UPDATE entry SET seq = seq - 1 WHERE seq > 2"
_MAKE_ROOM = ("UPDATE entry SET seq = -seq WHERE seq > 2", "UPDATE entry SET seq = 1 - seq WHERE seq < 0")

DAMAGES: dict[str, tuple[str, ...]] = {
    "shorter by an entry": ("DELETE FROM entry WHERE seq = 4",),
    "without its first entry": ("DELETE FROM entry WHERE seq = 0",),
    "empty": ("DELETE FROM entry",),
    "an entry taken from the middle": ("DELETE FROM entry WHERE seq = 2",),
    "an entry taken from the middle and the gap closed": ("DELETE FROM entry WHERE seq = 2", _CLOSE_UP),
    "two entries exchanged": _SWAP,
    "an entry twice": ("INSERT INTO entry SELECT 5, salt, data FROM entry WHERE seq = 4",),
    "an entry inserted": (*_MAKE_ROOM, "INSERT INTO entry SELECT 3, salt, data FROM entry WHERE seq = 1"),
    "an entry added": ("INSERT INTO entry SELECT 5, zeroblob(16), data FROM entry WHERE seq = 4",),
    "an entry far away added": ("INSERT INTO entry SELECT 99, salt, data FROM entry WHERE seq = 4",),
    "an entry before the first": ("INSERT INTO entry SELECT -1, salt, data FROM entry WHERE seq = 4",),
    "all entries moved": ("UPDATE entry SET seq = seq + 100", "UPDATE entry SET seq = seq - 99"),
    "an entry put over another": ("UPDATE entry SET data = (SELECT data FROM entry WHERE seq = 1) WHERE seq = 3",),
    "an entry edited": ("UPDATE entry SET data = CAST(replace(data, '\"round\":2', '\"round\":7') AS BLOB)",),
    "a time edited": ("UPDATE entry SET data = CAST(replace(data, '\"at\":1', '\"at\":2') AS BLOB) WHERE seq = 4",),
    "a space more": ("UPDATE entry SET data = CAST(data || ' ' AS BLOB) WHERE seq = 2",),
    "the last entry no entry": ("UPDATE entry SET data = x'ff00' WHERE seq = 4",),
    "another salt": ("UPDATE entry SET salt = zeroblob(16) WHERE seq = 0",),
    "a longer salt": ("UPDATE entry SET salt = CAST(salt || x'00' AS BLOB) WHERE seq = 0",),
    "a byte moved from the entry to its salt": (
        "UPDATE entry SET salt = CAST(salt || substr(data, 1, 1) AS BLOB), data = substr(data, 2) WHERE seq = 2",),
    "an entry of text": ("UPDATE entry SET data = CAST(data AS TEXT) WHERE seq = 2",),
    "a salt of text": ("UPDATE entry SET salt = '0123456789abcdef' WHERE seq = 2",),
    "a salt that is a number": ("UPDATE entry SET salt = 7 WHERE seq = 2",),
    "no checkpoint": ("DELETE FROM head",),
    "no checkpoint and no entry but the first": ("DELETE FROM head", "DELETE FROM entry WHERE seq > 0"),
    "a checkpoint with another size": ("UPDATE head SET note = replace(note, char(10) || '5', char(10) || '4')",),
    "a checkpoint about another log": ("UPDATE head SET note = replace(note, 'ash/federated', 'ash/local')",),
    "an empty checkpoint": ("UPDATE head SET note = ''",),
    "a cut checkpoint": ("UPDATE head SET note = substr(note, 1, length(note) / 2)",),
    "a checkpoint and a line more": ("UPDATE head SET note = note || '— birch AAAA' || char(10)",),
    "a checkpoint of bytes": ("UPDATE head SET note = CAST(note AS BLOB)",),
    "a checkpoint that is no text": ("UPDATE head SET note = CAST(x'fffe80' AS TEXT)",),
    "a table of entries without salts": ("ALTER TABLE entry DROP COLUMN salt",),
    "no table of entries": ("DROP TABLE entry",),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_log_that_does_not_hold_what_its_checkpoint_says_is_refused(closed: Path, damage: str) -> None:
    assert len(reopen(closed)) == 5  # the control
    before = rows(closed)
    edit(closed, "UPDATE entry SET seq = seq")
    assert len(reopen(closed)) == 5  # another control: the pen leaves no trace
    if "table" in damage:
        with closing(sqlite3.connect(closed)) as db:
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                db.execute(f"DROP TRIGGER {name}")
            for statement in DAMAGES[damage]:
                db.execute(statement)
    else:
        edit(closed, *DAMAGES[damage])
        assert damage == "a checkpoint that is no text" or rows(closed) != before
    with pytest.raises(AuditError):
        open_log(closed)


@pytest.mark.parametrize("number", range(5))
def test_no_byte_of_any_entry_can_be_changed(closed: Path, number: int) -> None:
    (_, salt, data), places = rows(closed)[0][number], range(0, 60, 7)
    assert isinstance(salt, bytes)
    assert isinstance(data, bytes)
    for honest, put in ((salt, "UPDATE entry SET salt = ? WHERE seq = ?"),
                        (data, "UPDATE entry SET data = ? WHERE seq = ?")):  # fmt: skip
        for place in (p for p in (*places, len(honest) - 1) if p < len(honest)):
            changed = bytearray(honest)
            changed[place] ^= 1
            edit(closed, put, values=(bytes(changed), number))
            with pytest.raises(AuditError):
                open_log(closed)
        edit(closed, put, values=(honest, number))
    assert len(reopen(closed)) == 5, "the control: as it was, it opens"


def test_no_flipped_bit_of_the_file_changes_what_the_log_says(closed: Path, tmp_path: Path) -> None:
    """Anywhere in it: refused, or without any meaning for the log."""
    honest, said, rng = closed.read_bytes(), (rows(closed)[0], note_in(closed)), random.Random()  # noqa: S311  # no secret
    refused = 0
    for bit in {*range(0, 8 * 100, 13), *(rng.randrange(8 * len(honest)) for _ in range(400))}:
        damaged = bytearray(honest)
        damaged[bit // 8] ^= 1 << bit % 8
        path = _lay({"": bytes(damaged)}, tmp_path)
        try:
            reopen(path)
        except (AuditError, StorageError):
            refused += 1
        else:
            assert (rows(path)[0], note_in(path)) == said, bit
    assert refused > 20, "the control: most places that hold something were met"


def test_a_checkpoint_of_an_earlier_day_is_refused(log: Log, path: Path) -> None:
    """Entries and checkpoint are written as one: nothing but a hand can bring them apart."""
    older = note_in(path)
    log.append(entry(5))
    log.close()
    assert len(reopen(path)) == 6  # the control
    edit(path, "UPDATE head SET note = ?", values=(older,))
    with pytest.raises(AuditError, match="does not hold what its own checkpoint says"):
        open_log(path)


def test_entries_signed_by_another_key_are_refused(closed: Path) -> None:
    """Whoever rewrites all of it and signs it well, under the same name."""
    stranger = Ed25519PrivateKey.generate()
    public = stranger.public_key().public_bytes_raw()
    checkpoint = parse_note(note_in(closed), ORIGIN, "ash", PUBLIC)
    honest = sign_note(checkpoint, "ash", PUBLIC, KEY.sign)
    for note, opens in ((sign_note(checkpoint, "ash", public, stranger.sign), False),
                        (sign_note(checkpoint, "ash", PUBLIC, stranger.sign), False), (honest, True)):  # fmt: skip
        edit(closed, "UPDATE head SET note = ?", values=(note,))
        if opens:  # the control
            assert len(reopen(closed)) == 5
        else:
            with pytest.raises(AuditError):
                open_log(closed)


def test_the_log_of_another_party_is_refused(closed: Path) -> None:
    with pytest.raises(AuditError, match="another log"):
        open_log(closed, origin="confide/test/birch/federated")


def test_a_partys_local_log_in_place_of_its_federated_one_is_refused(closed: Path, tmp_path: Path) -> None:
    """Two logs under one key, one put where the other was."""
    local = open_log(tmp_path / "local.db", origin="confide/test/ash/local")
    local.append(entry(0))
    local.close()
    shutil.copy(tmp_path / "local.db", closed)
    with pytest.raises(AuditError, match="another log"):
        open_log(closed)


@pytest.mark.parametrize("damage", ["an entry edited", "an entry added", "no checkpoint", "an entry of text"])
def test_a_refused_log_is_left_as_it_was(closed: Path, damage: str) -> None:
    """Whatever it is evidence of, opening must not change it."""
    edit(closed, *DAMAGES[damage])
    before = closed.read_bytes()
    with pytest.raises(AuditError):
        open_log(closed)
    assert closed.read_bytes() == before
    assert [p.name for p in closed.parent.iterdir()] == ["ash.db"]


def test_a_refused_log_is_not_kept_open(closed: Path, tmp_path: Path) -> None:
    edit(closed, *DAMAGES["an entry edited"])
    (tmp_path / "text.db").write_bytes(b"garbage\n" * 100)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for path in (closed, tmp_path / "text.db"):
            with pytest.raises(AuditError):
                open_log(path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("what", ["a text", "zeros", "an exported log", "half a database", "one byte"])
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(
    log: Log, path: Path, tmp_path: Path, what: str
) -> None:
    log.export(tmp_path / "ash.log")
    log.close()
    data = {
        "a text": b"Dear operator,\nthere was a log here.\n" * 99, "zeros": bytes(8192), "one byte": b"S",
        "an exported log": (tmp_path / "ash.log").read_bytes(), "half a database": path.read_bytes()[:6000],
    }[what]  # fmt: skip
    path.write_bytes(data)
    with pytest.raises(AuditError, match=r"is not a log|does not hold"):
        open_log(path)
    assert path.read_bytes() == data


def test_a_database_that_is_another_thing_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """A ledger has a table `entry` of its own; a site's state has none."""
    Ledger(tmp_path / "ledger.db", RenyiBudget.for_limit(8.0, 1e-5)).close()
    SiteStore(tmp_path / "state.db").close()
    with closing(sqlite3.connect(tmp_path / "mine.db")) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    for name in ("ledger.db", "state.db", "mine.db"):
        before = (tmp_path / name).read_bytes()
        assert before, "the control: there is something in it"
        with pytest.raises(AuditError, match="is not a log"):
            open_log(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
        assert len(list(tmp_path.glob(f"{name}*"))) == 1


def test_an_empty_file_is_a_log_without_entries(path: Path) -> None:
    """As a process leaves it that was killed before it had made the first table."""
    path.touch()
    assert reopen(path) == []


@pytest.mark.parametrize("place", ["a folder", "below a file", "in no folder"])
def test_a_place_that_holds_no_file_is_a_storage_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.db").mkdir()
    paths = {"a folder": "folder.db", "below a file": "file/x.db", "in no folder": "none/x.db"}
    with pytest.raises(StorageError):
        open_log(tmp_path / paths[place])


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET data = x'00' WHERE seq = 2", "UPDATE entry SET seq = 9 WHERE seq = 4",
        "DELETE FROM entry WHERE seq = 4", "DELETE FROM entry",
        "INSERT OR REPLACE INTO entry SELECT 2, salt, data FROM entry WHERE seq = 3",
        "REPLACE INTO entry VALUES (4, zeroblob(16), x'00')",
        "INSERT INTO entry VALUES (2, zeroblob(16), x'00') ON CONFLICT (seq) DO UPDATE SET data = excluded.data",
    ],
)  # fmt: skip
def test_no_slip_of_a_program_changes_an_entry(log: Log, path: Path, statement: str) -> None:
    """No more than that: whoever may write the file can drop the triggers, and is found on opening."""
    before = rows(path)
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)
    assert rows(path) == before
    edit(path, statement)
    assert rows(path) != before, "the control: without the triggers it does"


# --- behind a running process's back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        DAMAGES["an entry added"][0], DAMAGES["an entry far away added"][0], DAMAGES["no checkpoint"][0],
        DAMAGES["a checkpoint with another size"][0], DAMAGES["a checkpoint of bytes"][0],
    ],
)  # fmt: skip
def test_what_somebody_without_the_key_adds_is_not_signed_by_the_next_append(
    log: Log, path: Path, statement: str
) -> None:
    edit(path, statement)
    before, state = rows(path), log.checkpoint()
    for _ in range(2):
        with pytest.raises(AuditError):
            log.append(entry(5))
    assert rows(path) == before
    assert log.checkpoint() == state


def test_what_another_process_with_the_key_adds_is_taken_over(log: Log, path: Path) -> None:
    """The control of the one above."""
    other = open_log(path)
    other.append(entry(5))
    log.append(entry(6))
    other.append(entry(7), entry(8))
    assert reopen(path) == [entry(n) for n in range(9)]
    assert other.checkpoint().size == 9
    other.close()


def test_processes_that_append_at_once_lose_nothing_and_take_turns(path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from confide.privacy.audit.records import Opened
from tests.privacy.audit.crash_writer import open_log
me = sys.argv[2]
log = open_log(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    log.append(Opened(run=me, round=number, transcript="t", model="m", saturated="0"))
    time.sleep(0.002)
print("done", flush=True)
sys.stdin.readline()
assert log.checkpoint().size >= 60
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), me], cwd=ROOT, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for me in "abc"
    ]  # fmt: skip
    try:
        for word in ("ready", "done"):  # all have it open from the first entry until the last
            for writer in writers:
                assert writer.stdout is not None
                assert writer.stdout.readline().strip() == word
            for writer in writers:
                assert writer.stdin is not None
                writer.stdin.write("go\n")
                writer.stdin.flush()
        assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    found = [e for e in reopen(path) if isinstance(e, Opened)]
    for me in "abc":
        assert [e.round for e in found if e.run == me] == list(range(60))
    turns = sum(a.run != b.run for a, b in pairwise(found))
    assert turns > 2, "one wrote only when another was done"
    log = open_log(path)
    times = [json.loads(data)["at"] for _, data in map(log.entry, range(log.size))]
    log.close()
    assert times == sorted(times)


def test_processes_that_make_a_log_at_once_make_one(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from confide.privacy.audit.records import Opened
from tests.privacy.audit.crash_writer import open_log
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    log = open_log(Path(sys.argv[1]) / f"{number}.db")
    log.append(Opened(run="r", round=number, transcript="t", model="m", saturated="0"))
    log.close()
"""
    makers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]  # fmt: skip
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    told = [maker.communicate(timeout=100)[1] for maker in makers]
    assert told == ["", "", ""]
    found = [reopen(tmp_path / f"{n}.db") for n in range(10)]
    assert [[e.round for e in log if isinstance(e, Opened)] for log in found] == [[n] * 3 for n in range(10)]


# --- the clock -------------------------------------------------------------------------------------------------------


def _set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    real = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: real + int(seconds * 1e9))


def test_a_clock_that_was_set_back_is_refused_and_nothing_is_appended(
    log: Log, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(path)
    _set_clock(monkeypatch, -60)
    with pytest.raises(AuditError, match=r"the clock is \d+ s behind") as refused:
        log.append(entry(5))
    assert "NTP" in refused.value.hint
    assert rows(path) == before
    again = open_log(path)
    with pytest.raises(AuditError, match="the clock is"):
        again.now()
    again.close()
    monkeypatch.undo()
    log.append(entry(5))
    assert len(reopen(path)) == 6, "the control: with the right clock it goes on"


def test_a_clock_behind_another_process_of_the_party_is_refused_too(
    log: Log, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_log(path)
    _set_clock(monkeypatch, 3600)
    other.append(entry(5))
    other.close()
    monkeypatch.undo()
    with pytest.raises(AuditError, match="the clock is"):
        log.append(entry(6))
    assert len(reopen(path)) == 6


def test_a_correction_of_seconds_makes_time_stand_still(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_clock(monkeypatch, -3)
    log.append(entry(5))
    times = [json.loads(data)["at"] for _, data in map(log.entry, range(log.size))]
    assert times[5] == times[4]
    assert times == sorted(times)


# --- a full disk -----------------------------------------------------------------------------------------------------


def _fill(log: Log) -> int:
    """Let the file grow no further, and append until it is full; how much went in."""
    pages = log._db.execute("PRAGMA page_count").fetchone()[0]
    log._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    number = log.size
    while True:
        log.append(entry(number))
        number += 1


def test_a_full_disk_is_told_and_leaves_the_log_as_it_was(log: Log, path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written .*full") as told:
        _fill(log)
    assert "free space" in told.value.hint
    held = log.size
    assert held > 5, "the control: there was some room"
    before, state = rows(path), log.checkpoint()
    for _ in range(3):
        with pytest.raises(StorageError, match="full"):
            log.append(Opened(run="r" * 9000, round=1, transcript="t", model="m", saturated="0"), entry(0))
    assert rows(path) == before
    assert log.checkpoint() == state == parse_note(note_in(path), ORIGIN, "ash", PUBLIC)
    assert len(reopen(path)) == held
    log._db.execute("PRAGMA max_page_count = 100000")  # space was made
    log.append(entry(held))
    assert reopen(path) == [entry(n) for n in range(held + 1)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_append_that_is_interrupted_leaves_the_log_as_it_was(path: Path, error: type[BaseException]) -> None:
    """At the last moment before it is durable: the entries are in the transaction, the checkpoint is being signed."""
    broken: list[bool] = []

    def sign(message: bytes) -> bytes:
        if broken:
            raise error
        return KEY.sign(message)

    log = open_log(path, sign=sign)
    log.append(entry(0))
    before, state = rows(path), log.checkpoint()
    broken.append(True)
    with pytest.raises(error):
        log.append(entry(1), entry(2))
    assert (rows(path), log.checkpoint()) == (before, state)
    assert log.held(state.size, state.root)
    broken.clear()
    log.append(entry(1))
    log.close()
    assert reopen(path) == [entry(0), entry(1)]


def test_a_lock_that_somebody_else_never_lets_go_of_is_told(
    log: Log, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log._db.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked"):
            log.append(entry(5))
        holder.execute("ROLLBACK")
    log.append(entry(5))
    assert len(reopen(path)) == 6


def test_a_file_limit_of_the_operating_system_is_met_in_the_same_way(tmp_path: Path) -> None:
    """The real thing: RLIMIT_FSIZE in a process of its own, entries until no more fits, then room again."""
    program = """
import json, resource, signal, sys
from pathlib import Path
from confide.errors import StorageError
from confide.privacy.audit.records import Opened
from tests.privacy.audit.crash_writer import open_log

def entry(number):
    return Opened(run="r", round=number, transcript="t", model="m", saturated="0")

def reopen(path):
    log = open_log(path)
    found = list(log.entries())
    assert log.size == len(found)
    log.close()
    return found

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, told = Path(sys.argv[1]), []
log, done = open_log(path), 0
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    while True:
        log.append(entry(done), entry(done))
        done += 1
except StorageError as error:
    told.append(str(error))
try:
    open_log(path.with_name("another.db")).append(*map(entry, range(2000)))
except StorageError as error:
    told.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    open_log(path.with_name("third.db"))
except StorageError as error:
    told.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
held = len(reopen(path))
log.append(entry(99))
print(json.dumps({"done": done, "held": held, "told": told, "after": reopen(path)[-1].round,
                  "another": len(reopen(path.with_name("another.db"))),
                  "third": len(reopen(path.with_name("third.db")))}))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "ash.db")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["done"] > 3
    assert found["held"] == 2 * found["done"]
    assert len(found["told"]) == 3
    assert all("cannot be" in told for told in found["told"])
    assert (found["after"], found["another"], found["third"]) == (99, 0, 0)


# --- what travels ----------------------------------------------------------------------------------------------------


def exported(path: Path) -> tuple[list[Record], Checkpoint]:
    """Entries and checkpoint of an export; fails where the one is not what the other says."""
    found = list(read_lines(path.read_bytes(), "here"))
    checkpoint = parse_note(path.with_suffix(".checkpoint").read_text(encoding="utf-8"), ORIGIN, "ash", PUBLIC)
    assert path.read_bytes().endswith(b"\n") or not found
    assert (len(found), tree_root(leaf for _, leaf, _ in found)) == (checkpoint.size, checkpoint.root)
    return [record for record, _, _ in found], checkpoint


def test_what_is_exported_is_what_the_log_holds_byte_for_byte(log: Log, path: Path, tmp_path: Path) -> None:
    log.export(tmp_path / "ash.log")
    held = [salt.hex().encode() + b" " + data + b"\n" for salt, data in map(log.entry, range(log.size))]
    assert (tmp_path / "ash.log").read_bytes() == b"".join(held)
    assert (tmp_path / "ash.checkpoint").read_text(encoding="utf-8") == note_in(path)
    assert exported(tmp_path / "ash.log") == ([entry(n) for n in range(5)], log.checkpoint())
    log.append(entry(5))
    log.export(tmp_path / "ash.log")
    assert exported(tmp_path / "ash.log") == ([entry(n) for n in range(6)], log.checkpoint()), "and again, later"


def test_a_log_without_entries_is_exported_too(path: Path, tmp_path: Path) -> None:
    log = open_log(path)
    log.export(tmp_path / "ash.log")
    log.close()
    assert exported(tmp_path / "ash.log") == ([], Checkpoint(ORIGIN, 0, tree_root([])))


@pytest.mark.parametrize("alive", [True, False], ids=["while its process runs", "after its process has ended"])
def test_without_a_key_the_same_is_exported(log: Log, path: Path, tmp_path: Path, alive: bool) -> None:
    log.export(tmp_path / "ash.log")
    if not alive:
        log.close()
    beside = sorted(p.name for p in tmp_path.iterdir())
    (tmp_path / "else").mkdir()
    export_log(path, tmp_path / "else" / "copy.log")
    for suffix in (".log", ".checkpoint"):
        assert (tmp_path / "else" / f"copy{suffix}").read_bytes() == (tmp_path / f"ash{suffix}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "else") == beside, "and nothing is left beside it"
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "else").iterdir()} == {0o600}


def test_a_damaged_log_can_be_exported_and_its_export_is_what_tells(closed: Path, tmp_path: Path) -> None:
    """Without a key nothing is vouched for: the damage travels along, and whoever reads it finds it."""
    edit(closed, *DAMAGES["an entry edited"])
    export_log(closed, tmp_path / "ash.log")
    found = list(read_lines((tmp_path / "ash.log").read_bytes(), "here"))
    checkpoint = parse_note((tmp_path / "ash.checkpoint").read_text(encoding="utf-8"), ORIGIN, "ash", PUBLIC)
    assert tree_root(leaf for _, leaf, _ in found) != checkpoint.root


@pytest.mark.parametrize("without_key", [True, False], ids=["without the key", "by another process with the key"])
def test_what_is_exported_while_somebody_appends_is_of_one_moment(
    log: Log, path: Path, tmp_path: Path, without_key: bool
) -> None:
    ended = threading.Event()

    def append() -> None:
        other, number = open_log(path), 5
        while not ended.is_set():
            other.append(entry(number), entry(number))
            number += 1
        other.close()

    writer, sizes = threading.Thread(target=append), list[int]()
    writer.start()
    try:
        for _ in range(60):
            if without_key:
                export_log(path, tmp_path / "ash.log")
            else:
                log.export(tmp_path / "ash.log")
            sizes.append(exported(tmp_path / "ash.log")[1].size)
    finally:
        ended.set()
        writer.join()
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 5, "the control: it did grow meanwhile"


@pytest.mark.parametrize(
    "what", ["nothing", "a folder", "a text", "another database", "an empty file", "no checkpoint"]
)
def test_what_is_no_log_is_not_exported(closed: Path, tmp_path: Path, what: str) -> None:
    place = tmp_path / "it.db"
    if what == "a folder":
        place.mkdir()
    elif what == "a text":
        place.write_bytes(b"Dear auditor,\n" * 200)
    elif what == "another database":
        Ledger(place, RenyiBudget.for_limit(8.0, 1e-5)).close()
    elif what == "an empty file":
        place.touch()
    elif what == "no checkpoint":
        shutil.copy(closed, place)
        edit(place, *DAMAGES["no checkpoint"])
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(AuditError, match="is not a log") as refused:
        export_log(place, tmp_path / "it.log")
    assert refused.value.where == str(place)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "damage",
    [
        "an entry of text", "a salt of text", "a salt that is a number", "no table of entries",
        "a checkpoint that is no text",
    ],
)  # fmt: skip
def test_rows_of_the_wrong_kind_are_refused_also_without_a_key(closed: Path, tmp_path: Path, damage: str) -> None:
    with closing(sqlite3.connect(closed, isolation_level=None)) as db:
        db.execute("DROP TRIGGER entry_no_update")
        for statement in DAMAGES[damage]:
            db.execute(statement)
    with pytest.raises(AuditError, match="is not a log"):
        export_log(closed, tmp_path / "it.log")
    assert not (tmp_path / "it.log").exists()


def test_an_export_that_cannot_be_written_is_a_storage_error(
    log: Log, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for export in (log.export, lambda to: export_log(path, to)):
        with pytest.raises(StorageError, match="cannot be written"):
            export(tmp_path / "none" / "ash.log")
    log.export(tmp_path / "ash.log")
    before = (tmp_path / "ash.log").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log.append(entry(5))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        log.export(tmp_path / "ash.log")
    monkeypatch.undo()
    assert (tmp_path / "ash.log").read_bytes() == before, "half of it would be evidence of nothing"
    log.export(tmp_path / "ash.log")
    assert exported(tmp_path / "ash.log")[1].size == 6, "the log itself is none the worse"


def test_the_first_bad_line_of_an_export_is_named(log: Log, tmp_path: Path) -> None:
    log.export(tmp_path / "ash.log")
    data = (tmp_path / "ash.log").read_bytes().replace(b'"round":3', b'"round":"3"')
    with pytest.raises(AuditError) as error:
        list(read_lines(data, "here"))
    assert error.value.where == "here, entry 3"


EXPORT_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a salt in capitals": lambda d: d[:32].upper() + d[32:],
    "a space more": lambda d: d.replace(b'"run"', b' "run"', 1),
    "an empty line": lambda d: b"\n" + d,
    "Windows line ends": lambda d: d.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda d: b"\xef\xbb\xbf" + d,
    "garbage": lambda d: b"\x00\xff" * 200 + b"\n",
    "another text": lambda d: b"hello\n",
}


@pytest.mark.parametrize("damage", EXPORT_DAMAGES, ids=str)
def test_an_export_that_is_not_in_its_one_form_is_refused(log: Log, tmp_path: Path, damage: str) -> None:
    """What a line means is what is hashed; that the file is nothing else is checked line by line."""
    log.export(tmp_path / "ash.log")
    honest = (tmp_path / "ash.log").read_bytes()
    assert len(list(read_lines(honest, "here"))) == 5  # the control
    changed = EXPORT_DAMAGES[damage](honest)
    if changed == honest:
        pytest.skip("a salt without letters")
    with pytest.raises(AuditError):
        list(read_lines(changed, "here"))


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


# --- new keys ---------------------------------------------------------------------------------------------------------


def test_a_log_goes_on_under_a_new_key_and_not_under_a_strangers(tmp_path: Path) -> None:
    old, new, stranger = (Identity.generate("ash") for _ in range(3))
    log = old.open_log(tmp_path / "log.db", "federated", "f")
    log.append(RunEnded(run="a", status="finished"))
    state = log.checkpoint()
    log.close()
    for former in ((), (stranger.public_key,)):
        with pytest.raises(AuditError, match="signed by another key"):
            new.open_log(tmp_path / "log.db", "federated", "f", former)
    log = new.open_log(tmp_path / "log.db", "federated", "f", (stranger.public_key, old.public_key))
    assert (log.checkpoint(), parse_note(log.note(), log.origin, "ash", new.public_key)) == (state, state)
    log.append(RunEnded(run="b", status="finished"))
    log.close()
    new.open_log(tmp_path / "log.db", "federated", "f").close()
    with pytest.raises(AuditError, match="signed by another key"):
        old.open_log(tmp_path / "log.db", "federated", "f")


def test_a_log_that_was_changed_is_not_taken_over(tmp_path: Path) -> None:
    old, new = Identity.generate("ash"), Identity.generate("ash")
    log = old.open_log(tmp_path / "log.db", "federated", "f")
    log.append(RunEnded(run="a", status="finished"))
    log.close()
    with closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as db:
        db.execute("DROP TRIGGER entry_no_update")
        db.execute("UPDATE entry SET salt = zeroblob(16)")
    with pytest.raises(AuditError, match="signed by another key"):
        new.open_log(tmp_path / "log.db", "federated", "f", (old.public_key,))
