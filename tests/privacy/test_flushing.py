"""What a group of databases commits together, and what outside of one is on the disk at once."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from confide.privacy import flushing
from confide.privacy.database import open_durable
from confide.privacy.files import write_private
from confide.privacy.flushing import GroupCommit, flush_commits

SCHEMA = "CREATE TABLE IF NOT EXISTS kept (value TEXT)"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were put on the disk."""
    found: list[str] = []
    real = flushing._sync
    monkeypatch.setattr(flushing, "_sync", lambda path: (found.append(path.name), real(path))[1])
    return found


def synchronous(path: Path) -> int:
    with closing(open_durable(path, SCHEMA)) as db:
        return int(db.execute("PRAGMA synchronous").fetchone()[0])


def test_only_inside_a_group_is_a_commit_not_on_the_disk_at_once(tmp_path: Path) -> None:
    full, normal = 2, 1
    assert synchronous(tmp_path / "before.db") == full
    with GroupCommit():
        assert synchronous(tmp_path / "inside.db") == normal
    assert synchronous(tmp_path / "after.db") == full


def test_a_flush_puts_every_log_that_changed_on_the_disk(tmp_path: Path, synced: list[str]) -> None:
    with GroupCommit():
        first, second = (open_durable(tmp_path / f"{name}.db", SCHEMA) for name in ("first", "second"))
        write_private(tmp_path / "secret", b"x")
        flush_commits()
        assert {"first.db-wal", "secret"} <= set(synced)
        flushing._GROUP.get()._seen = {  # type: ignore[union-attr]  # as they are once the clock has gone on
            path: flushing._log_state(path)
            for path in flushing._GROUP.get()._seen  # type: ignore[union-attr]
        }
        synced.clear()
        second.execute("INSERT INTO kept VALUES ('new')")
        flush_commits()
        assert synced == ["second.db-wal"]
        first.close()
        second.close()


def values(db: sqlite3.Connection) -> list[str]:
    return [value for (value,) in db.execute("SELECT value FROM kept")]


def test_a_new_database_begins_as_a_copy_and_shares_nothing(tmp_path: Path) -> None:
    with GroupCommit() as group:
        first = open_durable(tmp_path / "first.db", SCHEMA)
        first.execute("INSERT INTO kept VALUES ('mine')")
        second = open_durable(tmp_path / "second.db", SCHEMA)
        assert list(group._templates) == [SCHEMA]
        assert values(second) == []
        second.execute("INSERT INTO kept VALUES ('yours')")
        assert values(first) == ["mine"]
        first.close()
        second.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["first.db", "second.db"]


def test_what_was_made_for_its_owner_only_stays_so(tmp_path: Path) -> None:
    with GroupCommit():
        os.close(os.open(tmp_path / "a.db", os.O_CREAT, 0o600))
        open_durable(tmp_path / "a.db", SCHEMA).close()
        assert (tmp_path / "a.db").stat().st_mode & 0o777 == 0o600
        for name in ("b.db", "c.db"):
            open_durable(tmp_path / name, SCHEMA, private=True).close()
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    open_durable(tmp_path / "d.db", SCHEMA, private=True).close()
    assert (tmp_path / "d.db").stat().st_mode & 0o777 == 0o600


def test_only_what_was_there_before_is_looked_at(tmp_path: Path) -> None:
    seen = list[str]()
    with GroupCommit():
        for name in ("a.db", "a.db", "b.db"):
            open_durable(tmp_path / name, SCHEMA, look=lambda path: seen.append(path.name)).close()
    assert seen == ["a.db"]


@pytest.mark.parametrize("first", [True, False], ids=["the first of its kind", "a later one"])
def test_a_database_that_another_process_makes_this_instant_is_not_written_over(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes begin with one ledger; the one is about to put a new one there, the other has just charged it."""
    path, link = tmp_path / "ledger.db", os.link

    def late(source: Path, target: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.executescript(f"PRAGMA journal_mode=WAL; {SCHEMA}")
            other.execute("INSERT INTO kept VALUES ('charged')")
        monkeypatch.undo()
        link(source, target)

    with GroupCommit():
        if not first:
            open_durable(tmp_path / "before.db", SCHEMA).close()
        monkeypatch.setattr(os, "link", late)
        with closing(open_durable(path, SCHEMA)) as db:
            assert values(db) == ["charged"]
        with closing(open_durable(tmp_path / "later.db", SCHEMA)) as db:
            assert values(db) == [], "nor is what it holds copied"


def test_where_it_would_be_replaced_the_charge_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    path = tmp_path / "ledger.db"

    def late(source: Path, target: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.executescript(SCHEMA)
            other.execute("INSERT INTO kept VALUES ('charged')")
        os.replace(source, target)

    with GroupCommit():
        monkeypatch.setattr(os, "link", late)
        with closing(open_durable(path, SCHEMA)) as db:
            assert values(db) == []


def test_a_log_that_somebody_left_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(f"PRAGMA journal_mode=WAL; {SCHEMA}; PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("INSERT INTO kept VALUES ('old')")
        log = Path(f"{path}-wal").read_bytes()
    path.unlink()
    Path(f"{path}-wal").write_bytes(log)
    with GroupCommit(), closing(open_durable(path, SCHEMA)) as db:
        assert values(db) == []


@pytest.mark.parametrize("place", ["file/a.db", "nowhere/a.db"])
def test_what_cannot_be_made_is_sqlites_to_say(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with GroupCommit(), pytest.raises(sqlite3.OperationalError):
        open_durable(tmp_path / place, SCHEMA)


def test_without_links_databases_are_made_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with GroupCommit():
        for name in ("a.db", "b.db"):
            with closing(open_durable(tmp_path / name, SCHEMA)) as db:
                db.execute("INSERT INTO kept VALUES ('x')")
                assert values(db) == ["x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db", "b.db"]


def test_what_the_disk_does_not_take_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    with GroupCommit():
        db = open_durable(tmp_path / "a.db", SCHEMA)
        with monkeypatch.context() as patch:
            patch.setattr(flushing, "_sync", full)
            with pytest.raises(OSError, match="No space"):
                flush_commits()
        db.close()


def test_outside_a_group_a_file_is_on_the_disk_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(handle), real(handle))[1])
    write_private(tmp_path / "a", b"x")
    assert len(calls) == 2  # the file, and its folder
    with GroupCommit():
        calls.clear()
        write_private(tmp_path / "b", b"x")
        assert calls == []
    assert len(calls) == 1
