"""An independent witness: it remembers the state of every log that it has been shown, and signs only what only grew.

Whoever later holds a log against the witness's notes finds out if it was cut, rolled back, or swapped as a whole,
which no file of the log's own party can show. A witness is a folder and a command; it needs no network.

Invariants:
1. A note is cosigned only if the log it is about, hashed anew from its entries, is the one it signs, and holds the
   state that the witness has cosigned before.
2. What the witness remembers is on the disk before it gives a signature away; it never goes back.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.errors import AuditError, ConfigError, StorageError
from confide.privacy.audit.checkpoint import Checkpoint, cosign_note, parse_cosigned, parse_note
from confide.privacy.audit.log import CHECKPOINT_SUFFIX, read_lines
from confide.privacy.audit.merkle import Tree
from confide.privacy.files import write_atomically, write_private

__all__ = ["NOTE_SUFFIX", "Cosigned", "Witness", "WitnessNotes"]

NOTE_SUFFIX = ".cosigned"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Cosigned:
    """What a witness says of a log: that it had this state at a time (seconds since 1970)."""

    checkpoint: Checkpoint
    at: int


class Witness:
    """A witness's folder: `name`, `key` (private), `key.pub`, `notes/`.

    Args:
        folder: Made by `Witness.create`.

    Raises:
        ConfigError: It is no witness's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.name = (folder / "name").read_text(encoding="utf-8").strip()
            self._key = Ed25519PrivateKey.from_private_bytes((folder / "key").read_bytes())
        except (OSError, ValueError):
            raise ConfigError("is not a witness's folder", where=str(folder),
                              hint="make one: confide audit witness init FOLDER --name NAME") from None  # fmt: skip
        self.notes = WitnessNotes(folder)

    @classmethod
    def create(cls, folder: Path, name: str) -> Witness:
        """A new witness with a key from the operating system.

        Raises:
            ConfigError: The folder holds something, or the name cannot stand in a note.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name[:80]!r} cannot be a witness's name", where="--name",
                              hint="use letters, digits, dots, dashes; at most 64")  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError("is there already and is not empty", where=str(folder), hint="name a new folder")
            key = Ed25519PrivateKey.generate()
            (folder / "notes").mkdir()
            write_private(folder / "key", key.private_bytes_raw())
            write_atomically(folder / "key.pub", key.public_key().public_bytes_raw().hex().encode() + b"\n")
            write_atomically(folder / "name", name.encode() + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot be made: {error.strerror}", where=str(folder),
                              hint="name a folder you may write to") from None  # fmt: skip
        return cls(folder)

    def cosign(self, log: Path, origin: str, name: str, public_key: bytes, former: Sequence[bytes] = ()) -> Cosigned:
        """Look at an exported log, and cosign its checkpoint.

        Args:
            log: The exported file; its checkpoint lies beside it.
            origin: The log's name in its checkpoints.
            name: Its signer.
            public_key: The signer's key, which the witness got from somebody it trusts.
            former: Those that it has had before, under which this witness may have seen the log.

        Raises:
            AuditError: The log is damaged, or is not the one that was cosigned before, grown.
            StorageError: The note cannot be kept.
        """
        try:
            data, note = log.read_bytes(), log.with_suffix(CHECKPOINT_SUFFIX).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AuditError(f"cannot be read ({type(error).__name__})", where=str(log)) from None
        checkpoint = parse_note(note, origin, name, public_key)
        tree = Tree(leaf for _, leaf, _ in read_lines(data, str(log)))
        if checkpoint.size > tree.size or tree.root(checkpoint.size) != checkpoint.root:
            raise AuditError("does not hold what its own checkpoint says", where=str(log))
        before = self.notes.of(origin, name, (public_key, *former))
        if before is not None and (
            before.checkpoint.size > checkpoint.size or tree.root(before.checkpoint.size) != before.checkpoint.root
        ):
            raise AuditError(
                f"is not the log that this witness cosigned before, with {before.checkpoint.size} entries: it was cut, "
                "rolled back or swapped", where=str(log), hint="ask its party for the log that it had then",
            )  # fmt: skip
        found = Cosigned(checkpoint, max(int(time.time()), before.at if before is not None else 0))
        public = self._key.public_key().public_bytes_raw()
        try:
            self.notes.path(origin).parent.mkdir(exist_ok=True)
            write_atomically(
                self.notes.path(origin), cosign_note(note, found.at, self.name, public, self._key.sign).encode()
            )
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(self.notes.path(origin)),
                               hint="free space, then cosign again") from None  # fmt: skip
        return found


class WitnessNotes:
    """What a witness has given away, as anybody can read it: `name`, `key.pub`, `notes/`.

    Raises:
        ConfigError: It is no folder of a witness's notes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.name = (folder / "name").read_text(encoding="utf-8").strip()
            self.public_key = bytes.fromhex((folder / "key.pub").read_text(encoding="ascii"))
        except (OSError, ValueError):
            raise ConfigError("holds no witness's notes (name, key.pub, notes/)", where=str(folder),
                              hint="ask the witness for a copy of its folder without the key") from None  # fmt: skip

    def of(self, origin: str, name: str, keys: bytes | Sequence[bytes]) -> Cosigned | None:
        """The latest state of a log that the witness has cosigned, signed by its party with one of these keys; None
        where it has seen none.

        Raises:
            AuditError: The note does not hold.
        """
        try:
            note = self.path(origin).read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise AuditError(f"cannot be read: {error.strerror}", where=str(self.path(origin))) from None
        first: AuditError | None = None
        for key in (keys,) if isinstance(keys, bytes) else keys:
            try:
                return Cosigned(*parse_cosigned(note, origin, name, key, self.name, self.public_key))
            except AuditError as error:
                first = first or error
        raise first or AuditError("names no key", where=str(self.path(origin)))

    def path(self, origin: str) -> Path:
        """Where the note of a log lies; its origin may hold any character."""
        return self.folder / "notes" / (hashlib.sha256(origin.encode()).hexdigest()[:32] + NOTE_SUFFIX)
