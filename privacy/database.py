"""Opening the SQLite files of ledgers and logs: to append to them, or to read them and nothing else."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from confide.errors import StorageError
from confide.privacy.flushing import begins_as_copy, durability

__all__ = ["copy_database", "full_disk", "open_durable", "open_read_only"]

_PATIENCE = 30.0
#: Bytes of a page, and how many statements a connection keeps: the library's own defaults, and for bulk.
_PAGE, _BULK_PAGE, _STATEMENTS = 4096, 16384, 128
#: What SQLite says where a file, or what lies beside it, cannot grow; nothing is wrong with what it holds.
_FULL = frozenset({
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMOPEN, sqlite3.SQLITE_IOERR_TRUNCATE,
})  # fmt: skip


def open_durable(
    path: Path, schema: str, *, private: bool = False, look: Callable[[Path], None] = lambda _: None,
    bulk: bool = False,
) -> sqlite3.Connection:  # fmt: skip
    """A connection whose every commit is on the disk; the file and its tables are made where they are missing.

    Args:
        path: The file.
        schema: Makes what is missing.
        private: A new file is its owner's only.
        look: Told the path where tables may be made in a file that was there before; raises if they must not be.
        bulk: It takes whole models. The pages of a new file are larger, for fewer calls; and no statement is kept, as a
            copy of what was bound to it last would be kept with it.

    Raises:
        sqlite3.Error: It cannot be opened, or is no database.
        OSError: A private file cannot be opened.
    """
    copied = begins_as_copy(
        schema, path, lambda at: open_durable(at, schema, bulk=bulk).close(), 0o600 if private else 0o644
    )
    if not copied:
        if private:
            # Only a file that is new: to close one that this process has open would drop its locks on it.
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        look(path)
    # A copy has its tables; what a connection is told stands in PRAGMA lines.
    wanted = "".join(line for line in schema.splitlines() if line.startswith("PRAGMA")) if copied else schema
    kept = 0 if bulk else _STATEMENTS
    db = sqlite3.connect(path, isolation_level=None, timeout=_PATIENCE, cached_statements=kept)
    start = f"PRAGMA page_size={_BULK_PAGE if bulk else _PAGE}; PRAGMA journal_mode=WAL"
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            db.executescript(f"{start}; PRAGMA synchronous={durability(path)}; {wanted}")
        except sqlite3.OperationalError as error:
            # Where several processes make the file at once SQLite does not wait for the change of the journal's mode.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                db.close()
                raise
            time.sleep(0.01)
        except BaseException:
            db.close()
            raise
        else:
            return db


def full_disk(error: BaseException, where: str) -> StorageError | None:
    """The error to raise where a database does not open only because its disk takes no more; None: it is another one.

    Args:
        error: SQLite's own, or SQLAlchemy's around it.
        where: The file.
    """
    original = getattr(error, "orig", error)
    if not isinstance(original, sqlite3.Error) or getattr(original, "sqlite_errorcode", None) not in _FULL:
        return None
    return StorageError(f"cannot be written ({original})", where=where,
                        hint="free space, then start again: what was durable is kept")  # fmt: skip


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, and that leaves the folder as it was.

    A reader of a write-ahead log makes the log's side files where they are missing, and cannot remove them again. So
    where there is no log (nobody has the file open, and whoever had it closed it), the file is read as it lies.

    Raises:
        FileNotFoundError: There is no such file.
        sqlite3.Error: It is no database.
    """
    if not path.is_file():
        raise FileNotFoundError(str(path))
    log = path.with_name(path.name + "-wal")
    mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?{mode}", uri=True, isolation_level=None, timeout=30)


def copy_database(source: Path, target: Path) -> None:
    """One state of a database, also while others write to it, as a new file.

    Raises:
        FileNotFoundError: There is no such file.
        FileExistsError: The target is there already.
        sqlite3.Error: It is no database, or the copy cannot be written.
    """
    if target.exists():
        raise FileExistsError(str(target))
    with closing(open_read_only(source)) as held, closing(sqlite3.connect(target)) as made:
        held.backup(made)
