"""When what is written reaches the disk.

A commit is on the disk when it returns, but inside a `GroupCommit`: there it is the operating system's, which a process
that is killed takes nothing from, and `flush` puts the commits of all files on the disk at once. That is for a
simulation, where many sites are one process and nothing leaves it between two flushes; a deployed site enters none.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import ContextVar, Token
from pathlib import Path

__all__ = ["GroupCommit", "durability", "flush_commits", "flushed_later", "template_for"]

_FLUSHING = 32
_SETTLED = 100_000_000  # nanoseconds


class GroupCommit:
    """While it is entered, databases that are opened commit together, at `flush`; leaving it flushes, too."""

    def __init__(self) -> None:
        #: What was last seen of each file's write-ahead log, and is on the disk: (changed at, bytes).
        self._seen: dict[Path, tuple[int, int] | None] = {}
        #: Files of a new database by what was made in it, and those that were copied from them and are not flushed yet.
        self._templates: dict[str, bytes] = {}
        self._written: set[Path] = set()
        self._entered: Token[GroupCommit | None] | None = None

    def __enter__(self) -> GroupCommit:
        self._entered = _GROUP.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._entered is not None:
            _GROUP.reset(self._entered)
        self.flush()

    def add(self, path: Path) -> None:
        """Commits to this database are flushed with the others'."""
        self._seen.setdefault(path.absolute())

    def add_file(self, path: Path) -> None:
        """A file that was just written is flushed with the databases, once."""
        self._written.add(path.absolute())

    def copy_template(self, schema: str, path: Path) -> bool:
        """Where a database of this schema was made before, let a new one begin as a copy of it; was there one?"""
        data = self._templates.get(schema)
        if data is not None:
            # What was made for its owner only stays so.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as stream:
                stream.write(data)
            self.add_file(path)
        return data is not None

    def keep_template(self, schema: str, path: Path) -> None:
        """A database that was made just now, and holds its schema only, is what others of its kind begin as."""
        if schema not in self._templates:
            with closing(sqlite3.connect(path, isolation_level=None)) as db:
                busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if not busy:
                    self._templates[schema] = path.read_bytes()

    def flush(self) -> None:
        """Everything that was committed is on the disk.

        Raises:
            OSError: The disk does not take it: nothing that rests on it may be shown.
        """
        settled = time.time_ns() - _SETTLED
        changed = {path: state for path, seen in self._seen.items() if (state := _log_state(path)) not in (None, seen)}
        _sync_all([*(Path(f"{path}-wal") for path in changed), *self._written])
        self._written.clear()
        # What changed just now may change once more within one tick of the file system's clock.
        self._seen |= {path: state if state and state[0] < settled else None for path, state in changed.items()}


_GROUP: ContextVar[GroupCommit | None] = ContextVar("confide_group_commit", default=None)


def template_for(schema: str, path: Path) -> tuple[bool, Callable[[], None]]:
    """Before a database is opened: inside a `GroupCommit` a new one begins as a copy, where there is one to copy.

    Args:
        schema: Names what is made in it; databases of one name begin alike.
        path: Its file.

    Returns:
        Is it such a copy? And what is to be called once its schema, and nothing else, has been made in it.
    """
    group = _GROUP.get()
    if group is None or (path.exists() and path.stat().st_size):
        return False, lambda: None
    if group.copy_template(schema, path):
        return True, lambda: None
    return False, lambda: group.keep_template(schema, path)


def flush_commits() -> None:
    """What was committed so far is on the disk, also inside a `GroupCommit`: what rests on it may be shown.

    Raises:
        OSError: The disk does not take it.
    """
    group = _GROUP.get()
    if group is not None:
        group.flush()


def durability(path: Path | str) -> str:
    """The value of SQLite's `synchronous` for a database that is being opened. Its journal must be write-ahead."""
    group = _GROUP.get()
    if group is None:
        return "FULL"
    group.add(Path(path))
    return "NORMAL"


def _log_state(path: Path) -> tuple[int, int] | None:
    """None where there is no write-ahead log: what it held was put into the database, which SQLite flushes itself."""
    try:
        found = os.stat(f"{path}-wal")
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def _sync_all(paths: Sequence[Path]) -> None:
    """Each by itself, many at a time: the disk then writes its own journal once for all of them."""
    with ThreadPoolExecutor(_FLUSHING) as pool:
        list(pool.map(_sync, paths))


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # a log that was closed meanwhile, and so is in the database
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flushed_later(path: Path) -> bool:
    """Inside a `GroupCommit`: a file that was just written is flushed with everything else, not now."""
    group = _GROUP.get()
    if group is not None:
        group.add_file(path)
    return group is not None
