"""Who was in each round's snapshot, kept at the site so that one person's part in a round can be shown later.

Invariants:
1. It never leaves the site: what leaves is the root of `confide.privacy.consent.commitment`.
2. It is durable before the root is logged: a root that its site could not open would prove nothing.
3. It names nobody: persons stand here under their pseudonyms, in no order. Whoever is erased cannot be found in it any
   more, as the key that makes the pseudonym of the identifier is gone.

A person's place is the number of her pseudonym, counted from 0; snapshots are marks over places. Those who come at one
time lie in one row: of a million rows, and their index, a first round would cost as much as its whole commitment.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confide.errors import AuditError, StorageError
from confide.privacy.consent import RoundKeys, SnapshotCommitment, member_name, slots_for
from confide.privacy.database import open_durable, open_read_only
from confide.privacy.dp import Role

__all__ = ["SnapshotStore"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS members (first INTEGER PRIMARY KEY, pseudonyms BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS snapshot (
  run TEXT, round INTEGER, slots INTEGER NOT NULL, train BLOB NOT NULL, held_out BLOB NOT NULL,
  PRIMARY KEY (run, round));
"""
#: Bytes of a pseudonym.
_WIDTH = 32


class SnapshotStore:
    """Snapshots of a site's runs, in one SQLite file.

    Args:
        path: The file; made where it does not exist.
        read_only: It must exist, and nothing is changed.

    Raises:
        AuditError: The file cannot be read.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path, self._rows = path, 0
        try:
            self._db = open_read_only(path) if read_only else open_durable(path, _SCHEMA)
            self._places = self._read_places()
        except (sqlite3.Error, FileNotFoundError) as error:
            raise AuditError(
                f"is not a readable record of snapshots ({type(error).__name__})", where=str(path),
                hint="restore the file from the site's backup: without it nobody's part in a round can be shown",
            ) from None  # fmt: skip

    def put(
        self, run: str, round_: int, members: Mapping[Role, Sequence[bytes]], population: int, keys: RoundKeys
    ) -> str:
        """Keep a round's snapshot, durably.

        Args:
            run: The run.
            round_: The round. Where it is taken again before anything was logged, the later one holds.
            members: Pseudonyms of those who take part, by role.
            population: The site's declared population.
            keys: The round's keys.

        Returns:
            The root to be logged, hex.

        Raises:
            StorageError: The disk does not take it.
        """
        slots = slots_for(population, sum(map(len, members.values())))
        try:
            self._db.execute("BEGIN IMMEDIATE")
            # Another process at this site may have added persons: places are numbered under the lock.
            if self._db.execute("SELECT COUNT(*) FROM members").fetchone()[0] != self._rows:
                self._places = self._read_places()
            new = [name for names in members.values() for name in names if name not in self._places]
            # No place tells in which order persons came.
            order = np.argsort(np.frombuffer(os.urandom(8 * len(new)), dtype=np.uint64)).tolist()
            added = {new[number]: len(self._places) + place for place, number in enumerate(order)}
            if any(len(name) != _WIDTH for name in added):
                raise ValueError(f"a pseudonym has {_WIDTH} bytes")
            if added:
                self._db.execute("INSERT INTO members VALUES (?, ?)", (len(self._places), b"".join(added)))
            rows = self._rows + bool(added)
            places = self._places | added
            marks = [self._marks([places[name] for name in members.get(role, ())], len(places)) for role in Role]
            self._db.execute(
                "INSERT OR REPLACE INTO snapshot (run, round, slots, train, held_out) VALUES (?, ?, ?, ?, ?)",
                (run, round_, slots, *marks),
            )
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise StorageError(f"cannot be written ({type(error).__name__}): nothing may leave",
                                   where=str(self._path), hint="check the disk") from None  # fmt: skip
            raise
        self._places, self._rows = places, rows
        return _tree(members, slots, keys).root.hex()

    def commitment(self, run: str, round_: int, keys: RoundKeys) -> SnapshotCommitment | None:
        """A round's tree again; None where no snapshot of it is kept.

        Raises:
            AuditError: The file cannot be read.
        """
        query = "SELECT slots, train, held_out FROM snapshot WHERE run = ? AND round = ?"
        try:
            row = self._db.execute(query, (run, round_)).fetchone()
        except sqlite3.Error as error:
            raise AuditError(f"cannot be read ({type(error).__name__})", where=str(self._path),
                             hint="restore the file from the site's backup") from None  # fmt: skip
        if row is None:
            return None
        names = {place: name for name, place in self._places.items()}
        members = {
            role: [names[place] for place in np.flatnonzero(np.unpackbits(np.frombuffer(marks, np.uint8))).tolist()]
            for role, marks in zip(Role, row[1:], strict=True)
        }
        return _tree(members, row[0], keys)

    def rounds_of(self, pseudonym: bytes) -> list[tuple[str, int, Role]]:
        """(run, round, role) of every snapshot that held a person."""
        place, found = self._places.get(pseudonym), list[tuple[str, int, Role]]()
        if place is None:
            return found
        for run, round_, *marks in self._db.execute("SELECT run, round, train, held_out FROM snapshot ORDER BY rowid"):
            for role, part in zip(Role, marks, strict=True):
                if place >> 3 < len(part) and part[place >> 3] >> (7 - (place & 7)) & 1:
                    found.append((run, round_, role))
        return found

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _read_places(self) -> dict[bytes, int]:
        """Every pseudonym's place.

        Raises:
            AuditError: Rows are missing, or somebody stands there twice.
        """
        there = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        names, self._rows = list[bytes](), 0
        if "member" in there:  # what an earlier version wrote: a row a person
            names += [name for (name,) in self._db.execute("SELECT pseudonym FROM member ORDER BY place")]
        if "members" in there:
            for first, row in self._db.execute("SELECT first, pseudonyms FROM members ORDER BY first"):
                if first != len(names) or len(row) % _WIDTH:
                    raise AuditError("misses pseudonyms", where=str(self._path), hint="restore the site's backup")
                self._rows += 1
                names += [row[at : at + _WIDTH] for at in range(0, len(row), _WIDTH)]
        places = {name: place for place, name in enumerate(names)}
        if len(places) != len(names):
            raise AuditError("holds a pseudonym twice", where=str(self._path), hint="restore the site's backup")
        return places

    @staticmethod
    def _marks(places: Sequence[int], size: int) -> bytes:
        mask: NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)
        mask[np.array(places, dtype=np.int64)] = True
        return np.packbits(mask).tobytes()


def _tree(members: Mapping[Role, Sequence[bytes]], slots: int, keys: RoundKeys) -> SnapshotCommitment:
    return SnapshotCommitment(
        keys, (member_name(role, name) for role, names in members.items() for name in names), slots
    )
