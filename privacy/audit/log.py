"""An append-only log in a flat file, a line an entry (`<salt hex> <canonical JSON>`), and its signed checkpoint.

Invariants:
1. `append` returns only when the entries are on the disk (fsync): a decision is logged before its effect is visible.
2. Every byte of the file is covered: leaf = H(0x00 ‖ salt ‖ JSON), and lines have one canonical form.
3. On opening, an unfinished last line (a crash in the middle of a write) is dropped: nobody was told of it. A log
   shorter than its checkpoint, or with another root, is refused.
4. Times never go backwards: a clock that is behind the log's last entry by more than a correction is refused.

The random salt keeps a leaf hash from telling what an entry says. Why a file and not a database: docs/adr/0003.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from confide.errors import AuditError, StorageError
from confide.privacy.audit.checkpoint import Checkpoint, parse_note, sign_note
from confide.privacy.audit.merkle import Frontier, leaf_hash, tree_root
from confide.privacy.audit.records import Record, decode, encode

__all__ = ["CHECKPOINT_SUFFIX", "CLOCK_STEP", "LOG_SUFFIX", "Log", "parse_line", "read_lines"]

LOG_SUFFIX, CHECKPOINT_SUFFIX = ".log", ".checkpoint"
_SALT_BYTES = 16
#: Microseconds that a clock may be set back by (time services step by less); until it catches up, time stands still.
CLOCK_STEP = 5_000_000


class Log:
    """One party's log.

    Args:
        path: The log file, ending in `.log`; made where it does not exist.
        origin: The log's name in its checkpoints, e.g. `confide/simulation/ash/federated`.
        name: The signer's name.
        public_key: The signer's Ed25519 public key.
        sign: Its signing function.

    Raises:
        AuditError: The file does not follow from its checkpoint.
    """

    def __init__(
        self, path: Path, *, origin: str, name: str, public_key: bytes, sign: Callable[[bytes], bytes]
    ) -> None:
        self.path, self.origin = path, origin
        self._name, self._public_key, self._sign = name, public_key, sign
        self._frontier, self._leaves, self._latest = Frontier(), list[bytes](), 0
        self._checkpoint_path = path.with_suffix(CHECKPOINT_SUFFIX)
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise StorageError(f"cannot be opened: {error.strerror}", where=str(path)) from None
        try:
            self._load()
        except OSError as error:
            os.close(self._descriptor)
            raise StorageError(f"cannot be opened: {error.strerror}", where=str(path)) from None
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, *records: Record) -> None:
        """Add entries durably, in order.

        Raises:
            StorageError: They could not be written; the log is as before, and the effect must not happen.
            AuditError: The clock was set back.
        """
        at = self.now()
        lines, leaves = [], []
        for record in records:
            salt, data = secrets.token_bytes(_SALT_BYTES), encode(record, at)
            lines.append(salt.hex().encode() + b" " + data + b"\n")
            leaves.append(leaf_hash(salt + data))
        before, frontier = os.fstat(self._descriptor).st_size, self._frontier.copy()
        for leaf in leaves:
            frontier.append(leaf)
        try:
            _write_all(self._descriptor, b"".join(lines))
            os.fsync(self._descriptor)
            self._write_checkpoint(Checkpoint(self.origin, frontier.size, frontier.root()))
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise StorageError(f"cannot be written: {error.strerror}", where=str(self.path),
                               hint="free space, then start again: what was durable is kept") from None  # fmt: skip
        self._frontier, self._latest = frontier, at
        self._leaves += leaves

    def checkpoint(self) -> Checkpoint:
        """The log's state now."""
        return Checkpoint(self.origin, self._frontier.size, self._frontier.root())

    def now(self) -> int:
        """Microseconds since 1970, never before the log's last entry.

        Raises:
            AuditError: The clock is behind that entry by more than a correction: consent that was withdrawn would stand
                again.
        """
        now = time.time_ns() // 1000
        if now < self._latest - CLOCK_STEP:
            raise AuditError(
                f"the clock is {(self._latest - now) / 1e6:,.0f} s behind this log's last entry", where=str(self.path),
                hint="set the clock right (NTP) and start again; if it was ahead when that entry was written, wait "
                "until it has caught up: entries are never re-dated",
            )  # fmt: skip
        return max(now, self._latest)

    def entries(self) -> Iterator[Record]:
        """Every entry, oldest first, read from the file."""
        return (record for record, _, _ in read_lines(self.path.read_bytes(), str(self.path)))

    def held(self, size: int, root: bytes) -> bool:
        """Did the log have this root when it had `size` entries?"""
        return 0 <= size <= len(self._leaves) and tree_root(self._leaves[:size]) == root

    def close(self) -> None:
        """Release the file. Closing twice is harmless: the number may be another file's by then."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replaced atomically, without fsync: after a crash an older checkpoint is a true statement too."""
        note = sign_note(checkpoint, self._name, self._public_key, self._sign)
        temporary = self._checkpoint_path.with_name(f".{self._checkpoint_path.name}")
        try:
            temporary.write_text(note, encoding="utf-8")
            os.replace(temporary, self._checkpoint_path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _load(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        noted = None
        if self._checkpoint_path.exists():
            note = self._checkpoint_path.read_bytes().decode("utf-8", errors="replace")
            noted = parse_note(note, self.origin, self._name, self._public_key)
        root_then = self._frontier.root() if noted and noted.size == 0 else None
        for _, leaf, at in read_lines(data[:whole], str(self.path)):
            self._frontier.append(leaf)
            self._leaves.append(leaf)
            self._latest = max(self._latest, at)
            if noted and self._frontier.size == noted.size:
                root_then = self._frontier.root()
        if noted and root_then != noted.root:
            raise AuditError("does not hold what its own checkpoint says", where=str(self.path),
                             hint="the file was changed or cut; restore it from the backup")  # fmt: skip
        if whole != len(data):
            os.ftruncate(self._descriptor, whole)
        if noted is None:
            # A log has a checkpoint from the start: a missing one is always a finding.
            self._write_checkpoint(self.checkpoint())


def parse_line(line: bytes) -> tuple[bytes, Record, int]:
    """(leaf hash, record, time) of one line without its newline.

    Raises:
        AuditError: It is not in its one canonical form.
    """
    salt_text, space, data = line.partition(b" ")
    try:
        salt = bytes.fromhex(salt_text.decode("ascii"))
    except ValueError:
        raise AuditError("is not a log entry") from None
    if not space or len(salt) != _SALT_BYTES or salt.hex().encode() != salt_text:
        raise AuditError("is not a log entry")
    record, at = decode(data)
    return leaf_hash(salt + data), record, at


def read_lines(data: bytes, where: str) -> Iterator[tuple[Record, bytes, int]]:
    """(record, leaf hash, time) of every line.

    Raises:
        AuditError: Names the first entry that is not one.
    """
    for number, line in enumerate(data.split(b"\n")[:-1]):
        try:
            leaf, record, at = parse_line(line)
        except AuditError as error:
            raise AuditError(error.what, where=f"{where}, entry {number}") from None
        yield record, leaf, at


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
