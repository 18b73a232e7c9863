"""When what is written reaches the disk.

A commit is on the disk when it returns, but inside a `GroupCommit`: there it is the operating system's, which a process
that is killed takes nothing from, and `flush` puts the commits of all files on the disk at once. That is for a
simulation, where many sites are one process and nothing leaves it between two flushes; a deployed site enters none.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, Token
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from confide.errors import ConfideError

__all__ = ["GroupCommit", "begins_as_copy", "durability", "flush_commits", "flushed_later"]

_FLUSHING = 32
_SETTLED = 100_000_000  # nanoseconds


class GroupCommit:
    """While it is entered, databases that are opened commit together, at `flush`; leaving it flushes, too."""

    def __init__(self) -> None:
        #: What was last seen of each file's write-ahead log, and is on the disk: (changed at, bytes).
        self._seen: dict[Path, tuple[int, int] | None] = {}
        #: New databases by their kind; databases that began as copies of them, and files, that are not flushed yet.
        self._templates: dict[str, bytes] = {}
        self._copied: set[Path] = set()
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

    def add_copy(self, path: Path) -> None:
        """A database that was just put in its place is flushed with the others."""
        self._copied.add(path.absolute())

    def template(self, kind: str, make: Callable[[Path], None]) -> bytes:
        """A new database of a kind, and nothing else in it: made once, apart from everybody's."""
        if kind not in self._templates:
            alone = _GROUP.set(None)
            try:
                with TemporaryDirectory(prefix="confide-") as folder:
                    make(Path(folder) / "new.db")
                    self._templates[kind] = (Path(folder) / "new.db").read_bytes()
            finally:
                _GROUP.reset(alone)
        return self._templates[kind]

    def flush(self) -> None:
        """Everything that was committed is on the disk.

        Raises:
            OSError: The disk does not take it: nothing that rests on it may be shown.
        """
        settled = time.time_ns() - _SETTLED
        changed = {path: state for path, seen in self._seen.items() if (state := _log_state(path)) not in (None, seen)}
        _sync_all([*(Path(f"{path}-wal") for path in changed), *self._written])
        # And databases that began as copies, our own and those that another process has put where we write to them.
        _sync_file_systems({path.parent for path in (*changed, *self._copied)})
        self._written.clear()
        self._copied.clear()
        # What changed just now may change once more within one tick of the file system's clock.
        self._seen |= {path: state if state and state[0] < settled else None for path, state in changed.items()}


_GROUP: ContextVar[GroupCommit | None] = ContextVar("confide_group_commit", default=None)


def begins_as_copy(kind: str, path: Path, make: Callable[[Path], None], mode: int = 0o644) -> bool:
    """Before a database is opened: inside a `GroupCommit` a new one begins as a copy of one that was made apart.

    What lies there is left alone, also what another process has put there this instant: two of them may begin with one
    ledger, and what the first one charges must not be written over.

    Args:
        kind: Databases of one kind begin alike.
        path: The database's file.
        make: Makes one, holding what every new one holds, at another place, and closes it.
        mode: Who may read and write it.

    Returns:
        Is it such a copy now?
    """
    group = _GROUP.get()
    # To flush them one by one they would have to be opened and closed, and with that a process loses all of SQLite's
    # locks on them. A log without its database is what somebody has left: SQLite removes it when it makes the database.
    if group is None or _SYNCFS is None or path.exists() or Path(f"{path}-wal").exists():
        return False
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        data = group.template(kind, make)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(data)
        os.link(temporary, path)  # as a whole, and only where there is nothing yet
    except (OSError, sqlite3.Error, ConfideError):
        return False  # somebody was faster, or whoever opens it will say what is wrong
    finally:
        with suppress(OSError):
            temporary.unlink()
    group.add_copy(path)
    return True


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
    """A file that no database of this process is: closing it drops every lock of the process on it (fcntl)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # a log that was closed meanwhile, and so is in the database
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _find_syncfs() -> Callable[[int], int] | None:
    """Linux's syncfs; None on other systems."""
    try:
        found = ctypes.CDLL(None, use_errno=True).syncfs
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_int], ctypes.c_int
    return cast("Callable[[int], int]", found)


_SYNCFS = _find_syncfs()


def _sync_file_systems(folders: Iterable[Path]) -> None:
    """All that was written to the file systems of these folders; each of them once."""
    done = set[int]()
    for folder in folders:
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # it was removed meanwhile
            continue
        try:
            device = os.fstat(handle).st_dev
            if _SYNCFS is not None and device not in done and _SYNCFS(handle):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
            done.add(device)
        finally:
            os.close(handle)


def flushed_later(path: Path) -> bool:
    """Inside a `GroupCommit`: a file that was just written is flushed with everything else, not now."""
    group = _GROUP.get()
    if group is not None:
        group.add_file(path)
    return group is not None
