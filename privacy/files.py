"""Files that must not be half-written and that nobody else may read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from confide.privacy.flushing import flushed_later

__all__ = ["write_atomically", "write_private"]


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old content or the whole new one, also after a power cut (inside a
    `GroupCommit`: one after its next flush)."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            later = flushed_later(path)
            if not later:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if later:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_private(path: Path, data: bytes) -> None:
    """The same, readable by the owner only."""
    write_atomically(path, data, mode=0o600)
