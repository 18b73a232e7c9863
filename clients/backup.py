"""A site's backup: one encrypted file with everything that must not be lost, of one moment.

File: 4 bytes (big endian: length of the head), the head, then boxes, each after its length (4 bytes). The head is a
vault file (Argon2id, AES-256-GCM) that holds a random key; each box is AES-256-GCM under it, bound to its number and to
whether it is the last: none can be left out, exchanged or cut off. Inside is a tar archive.

Invariants:
1. Run keys are not in it: a run's keys die with the run, and a backup would keep them.
2. It is of one moment: all of the site's databases are held against writing while they are copied, so what is restored
   is what a power cut at that moment would have left. The site waits, as for any other process that writes. A registry
   in PostgreSQL is read as one state of it while they are held, and lies in the backup as `REGISTRY_COPY`.
3. Restored is all of it or nothing, and into a new folder only.

The table is not in it: it is the site's own, and backed up where it lives.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import sqlite3
import struct
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO

from confide.clients.assembly import SiteFolder
from confide.clients.enrolment import AUTHORITY, CONFIG, REQUEST
from confide.clients.membership import KEYS, MEMBERSHIP, NEXT_KEYS
from confide.errors import ConfigError, SealingError, StorageError
from confide.privacy.atrest import close_box, new_key, open_box
from confide.privacy.consent.transfer import copy_registry
from confide.privacy.sealing.vault import close_vault_file, open_vault_file

__all__ = ["REGISTRY_COPY", "back_up", "left_out", "restore"]

#: A registry that lies in a database server, as it lies in the backup: a registry in a file.
REGISTRY_COPY = "consent-from-server.db"

_NAME = "site-backup"
_LENGTH = struct.Struct(">I")
_CHUNK = 2**20
_MOST_HEAD, _MOST_BOX = 4096, _CHUNK + 64
_SQLITE = b"SQLite format 3\x00"
#: Seconds that a database is waited for before all are let go again, and how often.
_PATIENCE, _TRIES = 1.0, 30
_SIDE_FILES = ("-wal", "-shm", "-journal")


def back_up(folder: Path, out: Path, passphrase: str) -> list[str]:
    """Write the backup; the names of the files in it.

    Raises:
        ConfigError: There is no site, or `out` is there already.
        StorageError: A file cannot be read, or the backup not be written.
    """
    place = SiteFolder.read(folder)
    if out.exists():
        raise ConfigError("is there already", where=str(out), hint="a backup is never written over")
    files = _files(place)
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with tempfile.TemporaryDirectory(prefix=".backup-", dir=folder) as scratch:
            copies = _copies(place, files, Path(scratch))
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                with _Closer(stream, passphrase) as closer, tarfile.open(fileobj=closer, mode="w|") as archive:
                    for name, copy in copies.items():
                        archive.add(copy, name, recursive=False)
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(part, out)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(error.filename or out)) from None
    finally:
        part.unlink(missing_ok=True)
    return list(copies)


def left_out(folder: Path) -> list[str]:
    """What of a site a backup does not hold, and what to do about it."""
    data = SiteFolder.read(folder).config.data
    table = data.file if data.file is not None else "the database behind [data] url"
    return [f"the table ({table}): back it up where it lives", "keys of runs: they die with their run"]


def restore(file: Path, folder: Path, passphrase: str) -> list[str]:
    """Unpack a backup into a new folder; the names of the files in it.

    Raises:
        ConfigError: The folder holds something already, or there is no such file.
        SealingError: A wrong passphrase, or a changed or cut file; nothing was written.
        StorageError: It cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError("holds something already", where=str(folder), hint="name a new folder")
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir(mode=0o700, parents=True)
        with file.open("rb") as stream:
            opener = _Opener(stream, passphrase)
            with tarfile.open(fileobj=opener, mode="r|") as archive:
                archive.extractall(part, filter="data")
            opener.drain()
        names = sorted(str(p.relative_to(part)) for p in part.rglob("*") if p.is_file())
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(file), hint="name a backup") from None
    except tarfile.TarError:
        raise SealingError("is no site's backup", where=str(file)) from None
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return names


def _files(place: SiteFolder) -> dict[str, Path]:
    """Everything of the site that is confide's, by its path in the folder; run keys and the agent's files are not."""
    folder, registry = place.folder, place.registry
    roots = [folder / n for n in (CONFIG, MEMBERSHIP, REQUEST, AUTHORITY, KEYS, NEXT_KEYS)]
    roots += [place.site_key, place.ledger, place.state.parent, place.federated_log.parent]
    roots += [registry] if isinstance(registry, Path) else []
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file() and place.vault not in path.parents and not path.name.endswith(_SIDE_FILES):
                if not path.is_relative_to(folder):
                    raise ConfigError("lies outside the site's folder", where=str(path),
                                      hint="back it up where it lies; [folders] in site.toml names it")  # fmt: skip
                found[str(path.relative_to(folder))] = path
    return found


def _copies(place: SiteFolder, files: dict[str, Path], scratch: Path) -> dict[str, Path]:
    """Copies of all databases, of one moment; other files as they are."""
    registry = place.registry
    databases = {name: path for name, path in files.items() if _is_database(path)}
    found = dict(files)
    with _held(list(databases.values())):
        for number, (name, path) in enumerate(databases.items()):
            found[name] = scratch / f"{number}.db"
            with (
                closing(sqlite3.connect(path, timeout=_PATIENCE)) as source,
                closing(sqlite3.connect(found[name])) as target,
            ):
                source.backup(target)
        if not isinstance(registry, Path):
            found[REGISTRY_COPY] = scratch / REGISTRY_COPY
            copy_registry(registry, found[REGISTRY_COPY])
    return found


@contextmanager
def _held(paths: Sequence[Path]) -> Iterator[None]:
    """Nobody writes to any of these databases meanwhile.

    Raises:
        StorageError: They cannot all be held at once.
    """
    for _ in range(_TRIES):
        with ExitStack() as stack:
            try:
                for path in paths:
                    db = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None, timeout=_PATIENCE)))
                    db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if (error.sqlite_errorcode or 0) & 0xFF != sqlite3.SQLITE_BUSY:
                    raise StorageError(f"cannot be read ({error})", where=str(path)) from None
            else:
                yield
                return
        time.sleep(secrets.randbelow(100) / 1000)  # whoever waits for one of them goes first
    raise StorageError("are being written to without a pause", where="the site's databases", hint="try again later")


def _is_database(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_SQLITE)) == _SQLITE


def _context(number: int, last: bool) -> bytes:
    return b"confide/backup/" + struct.pack(">Q?", number, last)


class _Closer(io.RawIOBase):
    """Encrypts what is written to it."""

    def __init__(self, stream: IO[bytes], passphrase: str) -> None:
        self._stream, self._key, self._number, self._held = stream, new_key(), 0, bytearray()
        self._put(close_vault_file(self._key, passphrase, _NAME))

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]  # tarfile writes bytes
        self._held += data
        while len(self._held) > _CHUNK:
            self._box(bytes(self._held[:_CHUNK]), last=False)
            del self._held[:_CHUNK]
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._box(bytes(self._held), last=True)
        super().close()

    def _box(self, data: bytes, *, last: bool) -> None:
        self._put(close_box(self._key, _context(self._number, last), data))
        self._number += 1

    def _put(self, data: bytes) -> None:
        self._stream.write(_LENGTH.pack(len(data)) + data)


class _Opener(io.RawIOBase):
    """Decrypts what is read from it: whole boxes, in their order, to the last one."""

    def __init__(self, stream: IO[bytes], passphrase: str) -> None:
        self._stream, self._number, self._held, self._ended = stream, 0, b"", False
        self._key = open_vault_file(self._take(_MOST_HEAD), passphrase, _NAME)
        self._next = self._take(_MOST_BOX)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        while not self._ended and (size < 0 or len(self._held) < size):
            self._held += self._open()
        found, self._held = (self._held, b"") if size < 0 else (self._held[:size], self._held[size:])
        return found

    def drain(self) -> None:
        """To the end: that nothing is missing there is known only then."""
        while not self._ended:
            self._open()

    def _open(self) -> bytes:
        box, self._next = self._next, self._take(_MOST_BOX, may_end=True)
        self._ended = not self._next
        data = open_box(self._key, _context(self._number, self._ended), box)
        self._number += 1
        return data

    def _take(self, most: int, *, may_end: bool = False) -> bytes:
        head = self._stream.read(_LENGTH.size)
        if may_end and not head:
            return b""
        size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else most + 1
        data = self._stream.read(size) if size <= most else b""
        if not data or len(data) != size:
            raise SealingError("is no site's backup, or was cut", where="backup")
        return data
