"""An append-only log in one SQLite file, with its Merkle tree and its signed checkpoint.

Invariants:
1. `append` returns only when the entries, and the checkpoint over them, are on the disk in one transaction: a decision
   is logged before its effect is visible, and a crash leaves the log as it was before or after.
2. Every entry is covered: leaf = H(0x00 ‖ salt ‖ JSON). Rows are never changed; on opening, all leaves are hashed again
   and must give the signed root.
3. Times never go backwards: a clock that is behind the log's last entry by more than a correction is refused.
4. A log goes on under a party's new key: the first process that has it signs the state that the old one has signed.

The random salt keeps a leaf hash from telling what an entry says. `export` writes what travels: a line an entry
(`<salt hex> <canonical JSON>`) and the checkpoint as a C2SP note beside it. Why a database: docs/adr/0011.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from confide.errors import AuditError, StorageError
from confide.privacy.audit.checkpoint import Checkpoint, parse_note, sign_note
from confide.privacy.audit.entries import decode, encode
from confide.privacy.audit.merkle import Tree, leaf_hash
from confide.privacy.audit.records import Record
from confide.privacy.database import open_durable, open_read_only
from confide.privacy.files import write_private

__all__ = [
    "CHECKPOINT_SUFFIX",
    "CLOCK_STEP",
    "LOG_SUFFIX",
    "Log",
    "export_log",
    "parse_line",
    "read_lines",
    "stored_entries",
]

LOG_SUFFIX, CHECKPOINT_SUFFIX = ".log", ".checkpoint"
_SALT_BYTES = 16
#: Microseconds that a clock may be set back by (time services step by less); until it catches up, time stands still.
CLOCK_STEP = 5_000_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (seq INTEGER PRIMARY KEY, salt BLOB NOT NULL, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS head (one INTEGER PRIMARY KEY CHECK (one = 1), note TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS entry_no_update BEFORE UPDATE ON entry BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_no_delete BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_no_replace BEFORE INSERT ON entry
  WHEN EXISTS (SELECT 1 FROM entry WHERE seq = NEW.seq) BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
_TABLES = {"entry", "head"}
#: Bytes of the smallest database; what is shorter, SQLite takes for an empty one.
_SMALLEST = 512
#: What the disk or its lock refuses; every other error of SQLite's says that the file is not what it should be.
_OF_STORAGE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}  # fmt: skip


class Log:
    """One party's log.

    Args:
        path: The database file; made where it does not exist.
        origin: The log's name in its checkpoints, e.g. `confide/simulation/ash/federated`.
        name: The signer's name.
        public_key: The signer's Ed25519 public key.
        sign: Its signing function.
        former: Keys that the signer has had before, which may have signed the latest checkpoint.

    Raises:
        AuditError: The file is no log, or does not hold what its signed checkpoint says.
        StorageError: It cannot be opened.
    """

    def __init__(
        self, path: Path, *, origin: str, name: str, public_key: bytes, sign: Callable[[bytes], bytes],
        former: Sequence[bytes] = (),
    ) -> None:  # fmt: skip
        self.path, self.origin, self._former = path, origin, tuple(former)
        self._name, self._public_key, self._sign = name, public_key, sign
        self._tree, self._latest = Tree(), 0
        #: The note that this object has verified or signed last, to the letter, and what it says.
        self._known: tuple[str, Checkpoint] | None = None
        try:
            self._db = open_durable(path, _SCHEMA, private=True, look=_refuse_another_database)
        except OSError as error:
            raise StorageError(f"cannot be opened: {error.strerror}", where=str(path)) from None
        except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's own message may quote what is no text
            if _is_of_storage(error):
                raise StorageError(f"cannot be opened ({error})", where=str(path)) from None
            raise _no_log(path) from None
        try:
            self._load()
        except BaseException as error:
            self.close()
            if isinstance(error, sqlite3.Error) and _is_of_storage(error):
                raise self._unwritable(error) from None
            if isinstance(error, (sqlite3.Error, UnicodeDecodeError)):
                raise self._damaged() from None
            raise

    @property
    def size(self) -> int:
        """Number of entries."""
        return self._tree.size

    def append(self, *records: Record) -> None:
        """Add entries durably, in order.

        Raises:
            StorageError: They could not be written; the log is as before, and the effect must not happen.
            AuditError: The clock was set back, or another process has changed the log into one that does not hold.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._unwritable(error) from None
        before = self.size
        try:
            self._load_new()  # what another process of this party appended
            self._check_head()
            at, first = self.now(), self.size
            rows = []
            for seq, record in enumerate(records, start=first):
                salt, data = secrets.token_bytes(_SALT_BYTES), encode(record, at)
                rows.append((seq, salt, data))
                self._tree.append(leaf_hash(salt + data))
            self._db.executemany("INSERT INTO entry VALUES (?, ?, ?)", rows)
            state, note = self.checkpoint(), self._signed()
            self._db.execute("INSERT OR REPLACE INTO head VALUES (1, ?)", (note,))
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._tree.truncate(before)
            if isinstance(error, sqlite3.Error):
                raise self._unwritable(error) from None
            raise
        self._latest, self._known = at, (note, state)

    def checkpoint(self) -> Checkpoint:
        """The log's state now."""
        return Checkpoint(self.origin, self.size, self._tree.root())

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

    def refresh(self) -> None:
        """Take in what others of this party have appended meanwhile; `append` does so by itself.

        Raises:
            StorageError: The file cannot be read.
            AuditError: It does not hold what it should.
        """
        try:
            self._load_new()
        except sqlite3.Error as error:
            raise self._unwritable(error) from None

    def entries(self) -> Iterator[Record]:
        """Every entry, oldest first."""
        return (decode(data)[0] for _, data in self._rows(0))

    def entry(self, number: int) -> tuple[bytes, bytes]:
        """(salt, canonical JSON) of one entry, counted from 0.

        Raises:
            AuditError: There is none.
        """
        row = self._db.execute("SELECT salt, data FROM entry WHERE seq = ?", (number,)).fetchone()
        if row is None:
            raise AuditError(f"there is no entry {number}", where=str(self.path), hint=f"it has {self.size}")
        return row[0], row[1]

    def held(self, size: int, root: bytes) -> bool:
        """Did the log have this root when it had `size` entries?"""
        return 0 <= size <= self.size and self._tree.root(size) == root

    def inclusion_proof(self, number: int, size: int | None = None) -> list[bytes]:
        """Audit path of an entry in the log's first `size` entries (None: in all)."""
        return self._tree.inclusion_proof(number, size)

    def consistency_proof(self, old: int, size: int | None = None) -> list[bytes]:
        """Proof that the log's first `old` entries are a prefix of its first `size` ones (None: of all)."""
        return self._tree.consistency_proof(old, size)

    def note(self) -> str:
        """The latest checkpoint as a signed note."""
        return _note(self._db)

    def export(self, path: Path) -> None:
        """Write what travels: the entries as lines into `path` (ending in `.log`), the note beside it.

        Raises:
            StorageError: It cannot be written.
        """
        _export(self._db, path)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _signed(self) -> str:
        return sign_note(self.checkpoint(), self._name, self._public_key, self._sign)

    def _rows(self, first: int) -> Iterator[tuple[bytes, bytes]]:
        lowest = first or -(2**63)  # whoever starts at the first entry meets what was put before it
        found = self._db.execute("SELECT seq, salt, data FROM entry WHERE seq >= ? ORDER BY seq", (lowest,))
        for expected, (seq, salt, data) in enumerate(found, start=first):
            if seq != expected or type(salt) is not bytes or len(salt) != _SALT_BYTES or type(data) is not bytes:
                raise self._damaged()
            yield salt, data

    def _load_new(self) -> None:
        data = b""
        for salt, data in self._rows(self.size):
            self._tree.append(leaf_hash(salt + data))
        if data:
            self._latest = decode(data)[1]

    def _load(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        self._load_new()
        if self.size == 0 and self._db.execute("SELECT note FROM head").fetchone() is None:
            # A log has a checkpoint from the start: a missing one is always a finding.
            self._db.execute("INSERT INTO head VALUES (1, ?)", (self._signed(),))
        self._take_over()
        self._check_head()
        self._db.execute("COMMIT")

    def _take_over(self) -> None:
        """Invariant 4: what an earlier key of this party has signed, and holds, is signed with the present one."""
        found = self._db.execute("SELECT note FROM head").fetchall()
        for key in self._former if len(found) == 1 and type(found[0][0]) is str else ():
            try:
                held = parse_note(found[0][0], self.origin, self._name, key)
            except AuditError:
                continue
            if held == self.checkpoint():
                self._db.execute("UPDATE head SET note = ?", (self._signed(),))

    def _check_head(self) -> None:
        found = self._db.execute("SELECT note FROM head").fetchall()
        if len(found) != 1 or type(found[0][0]) is not str:
            raise self._damaged()
        note = found[0][0]
        # What was verified once holds as long as it stands there to the letter: this log's name and key never change.
        # Any other note, another process's too, is verified anew; and each is compared with the entries, always.
        if self._known is None or self._known[0] != note:
            self._known = note, parse_note(note, self.origin, self._name, self._public_key)
        if self._known[1] != self.checkpoint():
            raise self._damaged()

    def _damaged(self) -> AuditError:
        return AuditError("does not hold what its own checkpoint says", where=str(self.path),
                          hint="the file was changed or cut; restore it from the backup")  # fmt: skip

    def _unwritable(self, error: sqlite3.Error) -> StorageError:
        return StorageError(f"cannot be written ({error})", where=str(self.path),
                            hint="free space, then start again: what was durable is kept")  # fmt: skip


def stored_entries(database: Path) -> list[tuple[Record, int]]:
    """(record, time) of every entry of a log of one's own, read without its key and without checking its signature.

    Raises:
        AuditError: There is no log in the file.
    """
    try:
        db = open_read_only(database)
        try:
            return [decode(data) for (data,) in db.execute("SELECT data FROM entry ORDER BY seq")]
        finally:
            db.close()
    except (sqlite3.Error, FileNotFoundError):
        raise AuditError("is not a log", where=str(database)) from None


def export_log(database: Path, path: Path) -> None:
    """Export the log of a party whose program is not running, e.g. because it was killed; needs no key.

    Raises:
        AuditError: There is no log in the file.
        StorageError: The export cannot be written.
    """
    try:
        db = open_read_only(database)
        try:
            _export(db, path)
        finally:
            db.close()
    except (sqlite3.Error, FileNotFoundError, AttributeError, TypeError, ValueError):
        raise _no_log(database) from None


def _refuse_another_database(path: Path) -> None:
    """Before tables are made in it."""
    if 0 < path.stat().st_size < _SMALLEST:
        raise _no_log(path)
    with closing(sqlite3.connect(path, timeout=30)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")}
    if not tables <= _TABLES:
        raise _no_log(path)


def _is_of_storage(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_STORAGE


def _no_log(path: Path) -> AuditError:
    return AuditError("is not a log", where=str(path), hint="restore it from the backup")


def _export(db: sqlite3.Connection, path: Path) -> None:
    db.execute("BEGIN")  # entries and note of one moment, whoever appends meanwhile
    try:
        found = db.execute("SELECT salt, data FROM entry ORDER BY seq")
        lines = b"".join(salt.hex().encode() + b" " + data + b"\n" for salt, data in found)
        note = _note(db).encode()
    finally:
        db.execute("ROLLBACK")
    try:
        write_private(path, lines)
        write_private(path.with_suffix(CHECKPOINT_SUFFIX), note)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from None


def _note(db: sqlite3.Connection) -> str:
    ((note,),) = db.execute("SELECT note FROM head").fetchall()
    return str(note)


def parse_line(line: bytes) -> tuple[bytes, Record, int]:
    """(leaf hash, record, time) of one exported line without its newline.

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
    """(record, leaf hash, time) of every exported line.

    Raises:
        AuditError: Names the first entry that is not one.
    """
    for number, line in enumerate(data.split(b"\n")[:-1]):
        try:
            leaf, record, at = parse_line(line)
        except AuditError as error:
            raise AuditError(error.what, where=f"{where}, entry {number}") from None
        yield record, leaf, at
