"""What a group of databases commits together, and what outside of one is on the disk at once."""

from __future__ import annotations

import os
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


def test_a_new_database_begins_as_a_copy_and_shares_nothing(tmp_path: Path) -> None:
    with GroupCommit() as group:
        first = open_durable(tmp_path / "first.db", SCHEMA)
        first.execute("INSERT INTO kept VALUES ('mine')")
        os.close(os.open(tmp_path / "second.db", os.O_CREAT, 0o600))
        second = open_durable(tmp_path / "second.db", SCHEMA)
        assert list(group._templates) == [SCHEMA]
        assert second.execute("SELECT value FROM kept").fetchall() == []
        second.execute("INSERT INTO kept VALUES ('yours')")
        assert first.execute("SELECT value FROM kept").fetchall() == [("mine",)]
        assert (tmp_path / "second.db").stat().st_mode & 0o777 == 0o600
        first.close()
        second.close()


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
