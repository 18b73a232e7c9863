"""Opening an SQLite file to read it and nothing else."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from urllib.parse import quote

__all__ = ["open_read_only"]


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
