"""Log files of processes that run for years: a file is set aside when it is full, and the oldest one goes."""

from __future__ import annotations

import logging
import os
import threading
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

__all__ = ["KEPT", "MOST_BYTES", "PrivateLog", "drain"]

#: Bytes of a file, and how many full ones are kept beside it: NAME.1 is the latest.
MOST_BYTES, KEPT = 10 * 2**20, 5
#: A line that is longer comes in parts.
_LINE = 65_536


class PrivateLog(RotatingFileHandler):
    """A log file that nobody but its owner reads.

    Args:
        path: The file.
        most_bytes: Its size before it is set aside.
        kept: How many are.
    """

    def __init__(self, path: Path, most_bytes: int | None = None, kept: int | None = None) -> None:
        super().__init__(
            path, maxBytes=MOST_BYTES if most_bytes is None else most_bytes,
            backupCount=KEPT if kept is None else kept, encoding="utf-8", errors="replace",
        )  # fmt: skip

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.fchmod(descriptor, 0o600)
        return os.fdopen(descriptor, "a", encoding=self.encoding, errors=self.errors)


def drain(stream: IO[bytes], log: PrivateLog) -> threading.Thread:
    """Write everything that a process says, line by line as it is, until it has closed its end; the stream is closed
    then. A full disk loses lines, and keeps nobody waiting.

    Args:
        stream: The reading end of its output.
        log: Where it goes.

    Returns:
        The thread that does it.
    """

    def work() -> None:
        with stream:
            while line := stream.readline(_LINE):
                text = line.decode("utf-8", errors="replace").rstrip("\n")
                log.handle(logging.LogRecord("process", logging.INFO, "", 0, text, None, None))

    thread = threading.Thread(target=work, name="drain", daemon=True)
    thread.start()
    return thread
