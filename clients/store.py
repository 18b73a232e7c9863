"""A site's durable state of its runs, in one SQLite file: what was answered, what may be sealed, which model holds.

Invariants:
1. A request is answered at most one way: the same request gets the stored reply; the same place (run, epoch, round,
   step, attempt) with another request is an equivocation and refused.
2. A round is sealed for one cohort, ever (once for each attempt, and unlocked once, where the run retries). An update
   itself is never here: it lives in its process's memory, so that no restart and no restored backup can seal it twice.
3. A site's own control variate (SCAFFOLD) is kept from the moment its update is sealed, in the same transaction, never
   earlier, and is in force from the moment that update's sum is applied.
4. The replicated model and the control variates are encrypted under the run's storage key: with its keys their
   copies in backups are gone.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.atrest import close_box, open_box
from confide.privacy.database import open_durable
from confide.protocol.envelope import Address, Envelope
from confide.protocol.sightings import Sighting

__all__ = ["ModelState", "SiteStore"]

_SCHEMA = """
PRAGMA secure_delete=ON;
CREATE TABLE IF NOT EXISTS run (run TEXT PRIMARY KEY, manifest BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS reply (
  run TEXT, epoch INTEGER, round INTEGER, step TEXT, attempt INTEGER, request TEXT NOT NULL, header BLOB NOT NULL,
  signature BLOB NOT NULL, body BLOB NOT NULL, PRIMARY KEY (run, epoch, round, step, attempt));
CREATE TABLE IF NOT EXISTS chunk (
  run TEXT, epoch INTEGER, round INTEGER, step TEXT, attempt INTEGER, number INTEGER, data BLOB NOT NULL,
  PRIMARY KEY (run, epoch, round, step, attempt, number));
CREATE TABLE IF NOT EXISTS sealed (
  run TEXT, round INTEGER, attempt INTEGER, transcript TEXT NOT NULL, PRIMARY KEY (run, round, attempt));
CREATE TABLE IF NOT EXISTS unlocked (
  run TEXT, round INTEGER, transcript TEXT NOT NULL, PRIMARY KEY (run, round));
CREATE TABLE IF NOT EXISTS stopped (run TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS halted (one INTEGER PRIMARY KEY CHECK (one = 1), reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sighting (
  federation TEXT, key TEXT, size INTEGER NOT NULL, sighting TEXT NOT NULL, PRIMARY KEY (federation, key));
CREATE TABLE IF NOT EXISTS model (run TEXT PRIMARY KEY, round INTEGER NOT NULL, box BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS control (
  run TEXT, round INTEGER, applied INTEGER NOT NULL, box BLOB NOT NULL, PRIMARY KEY (run, round));
"""
_REPLY = (
    "SELECT request, header, signature, body FROM reply "
    "WHERE run = ? AND epoch = ? AND round = ? AND step = ? AND attempt = ?"
)
_CHUNKS = (
    "SELECT data FROM chunk WHERE run = ? AND epoch = ? AND round = ? AND step = ? AND attempt = ? ORDER BY number"
)


#: How a model is stored: share clipped, round trained, weights, arrays of memory, are there metrics? Then the lengths
#: of those arrays, and all numbers, little endian.
_HEAD = struct.Struct("<dqqqq")


@dataclass(frozen=True, slots=True)
class ModelState:
    """The replicated model: the last round whose sum was applied, weights, strategy memory, metrics just opened, and
    the share of that sum's coordinates that were clipped."""

    round: int
    weights: NDArray[np.float32]
    state: tuple[NDArray[np.float64], ...]
    metrics: NDArray[np.float64] | None
    saturated: float = 0.0
    #: The last training round that was applied; a round that only evaluates leaves the weights as they are.
    trained: int = 0

    @property
    def metric_chunks(self) -> tuple[bytes, ...]:
        """The opened metrics as they leave: float64, little endian; nothing where none are due."""
        return () if self.metrics is None else (self.metrics.astype("<f8").tobytes(),)

    @property
    def chunks(self) -> tuple[bytes, ...]:
        """Weights and strategy memory as they are handed over: float32 and float64, little endian."""
        return (self.weights.astype("<f4").tobytes(), *(part.astype("<f8").tobytes() for part in self.state))

    def to_bytes(self) -> bytes:
        """As it is stored."""
        parts = [self.weights.astype("<f4"), *(part.astype("<f8") for part in self.state)]
        parts += [] if self.metrics is None else [self.metrics.astype("<f8")]
        head = _HEAD.pack(
            self.saturated, self.trained, len(self.weights), len(self.state), -1 if self.metrics is None else 1
        )
        sizes = np.array([len(part) for part in parts[1:]], dtype="<i8")
        return b"".join((head, sizes.tobytes(), *(part.tobytes() for part in parts)))

    @classmethod
    def from_bytes(cls, round_: int, data: bytes) -> ModelState:
        """Inverse of `to_bytes`."""
        saturated, trained, length, states, metrics = _HEAD.unpack_from(data)
        many = states + (metrics > 0)
        sizes, at = np.frombuffer(data, "<i8", many, _HEAD.size).tolist(), _HEAD.size + 8 * many
        weights, at = np.frombuffer(data, "<f4", length, at).astype(np.float32), at + 4 * length
        parts = []
        for size in sizes:
            parts.append(np.frombuffer(data, "<f8", size, at).astype(np.float64))
            at += 8 * size
        return cls(
            round=round_, weights=weights, state=tuple(parts[:states]), metrics=parts[-1] if metrics > 0 else None,
            saturated=saturated, trained=trained,
        )  # fmt: skip


class SiteStore:
    """See the module. One writer: a site's agent is one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = open_durable(path, _SCHEMA, bulk=True)

    def add_run(self, run: str, manifest: bytes, model: ModelState, key: bytes) -> None:
        """Remember a run that was joined. Joining again changes nothing."""
        with self._transaction():
            if not self._db.execute("SELECT 1 FROM run WHERE run = ?", (run,)).fetchone():
                self._db.execute("INSERT INTO run VALUES (?, ?)", (run, manifest))
                self.put_model(run, model, key)

    def manifest(self, run: str) -> bytes | None:
        """The manifest of a joined run."""
        row = self._db.execute("SELECT manifest FROM run WHERE run = ?", (run,)).fetchone()
        return row[0] if row else None

    def stored_reply(self, place: Address, request: str) -> Envelope | None:
        """What was answered before at a place, or None.

        Raises:
            SealingError: Another request was answered there.
        """
        row = self._db.execute(_REPLY, _key(place)).fetchone()
        if row is None:
            return None
        if row[0] != request:
            raise SealingError(
                f"another {place.step} request for round {place.round} was answered already: "
                "the coordinator contradicts itself",
                where=f"run {place.run}",
            )
        chunks = self._db.execute(_CHUNKS, _key(place)).fetchall()
        return Envelope(row[1], row[2], row[3], tuple(c for (c,) in chunks))

    def reply_digest(self, place: Address) -> str | None:
        """Digest of the reply given at a place, or None."""
        row = self._db.execute(_REPLY, _key(place)).fetchone()
        return Envelope(row[1], row[2], b"").digest if row else None

    def latest_round(self, run: str) -> int:
        """The latest round that anything was answered for; 0 before the first."""
        row = self._db.execute("SELECT MAX(round) FROM reply WHERE run = ?", (run,)).fetchone()
        return int(row[0] or 0)

    def commit_reply(
        self,
        place: Address,
        request: str,
        reply: Envelope,
        *,
        sealed: str | None = None,
        unlocked: str | None = None,
        control: bytes | None = None,
    ) -> None:
        """Make a reply durable together with its effect, before it is sent.

        Args:
            place: Where in the run it belongs.
            request: Digest of the request.
            reply: The signed reply.
            sealed: Transcript that a `seal` reply is for.
            unlocked: Transcript that an `unlock` reply is for.
            control: With a `seal` reply: the site's control variate once the round is applied, from `box_control`.

        Raises:
            SealingError: The round was sealed for another cohort, or unlocked, before.
        """
        try:
            with self._transaction():
                if sealed is not None:
                    values = (place.run, place.round, place.attempt, sealed)
                    self._db.execute("INSERT INTO sealed VALUES (?, ?, ?, ?)", values)
                if unlocked is not None:
                    self._db.execute("INSERT INTO unlocked VALUES (?, ?, ?)", (place.run, place.round, unlocked))
                if control is not None:
                    self._db.execute(
                        "INSERT OR REPLACE INTO control VALUES (?, ?, 0, ?)", (place.run, place.round, control)
                    )
                # Bulk of rounds long past need not be answered again.
                self._db.execute("DELETE FROM chunk WHERE run = ? AND round < ?", (place.run, place.round - 1))
                self._db.execute(
                    "INSERT INTO reply VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*_key(place), request, reply.header, reply.signature, reply.body),
                )
                self._db.executemany(
                    "INSERT INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?)",
                    ((*_key(place), number, chunk) for number, chunk in enumerate(reply.chunks)),
                )
        except sqlite3.IntegrityError:
            raise SealingError(f"round {place.round} was sealed or unlocked before", where=f"run {place.run}") from None

    def sealed_transcript(self, run: str, round_: int, attempt: int = 0) -> str | None:
        """The transcript under which this site sealed an attempt of a round."""
        row = self._db.execute(
            "SELECT transcript FROM sealed WHERE run = ? AND round = ? AND attempt = ?", (run, round_, attempt)
        ).fetchone()
        return row[0] if row else None

    def unlocked_transcript(self, run: str, round_: int) -> str | None:
        """The transcript of the one attempt of a round that this site unlocked."""
        row = self._db.execute("SELECT transcript FROM unlocked WHERE run = ? AND round = ?", (run, round_)).fetchone()
        return row[0] if row else None

    def model(self, run: str, key: bytes) -> ModelState:
        """The replicated model of a joined run.

        Raises:
            SealingError: `key` is not the run's storage key.
        """
        round_, box = self._db.execute("SELECT round, box FROM model WHERE run = ?", (run,)).fetchone()
        return ModelState.from_bytes(round_, open_box(key, _context(run, round_), box))

    def put_model(self, run: str, model: ModelState, key: bytes) -> None:
        """Replace the replicated model."""
        box = close_box(key, _context(run, model.round), model.to_bytes())
        self._db.execute("INSERT OR REPLACE INTO model VALUES (?, ?, ?)", (run, model.round, box))

    def put_model_and_control(self, run: str, model: ModelState, key: bytes, *, counted: bool) -> None:
        """Replace the replicated model after a sum; where the site's own update was counted in it, its control variate
        of that round is in force. One of a round that came to nothing is forgotten."""
        with self._transaction():
            self.put_model(run, model, key)
            if counted:
                self._db.execute("UPDATE control SET applied = 1 WHERE run = ? AND round = ?", (run, model.round))
            keep = "SELECT MAX(round) FROM control WHERE run = :run AND applied = 1"
            self._db.execute(
                f"DELETE FROM control WHERE run = :run AND round <= :round AND round IS NOT ({keep})",  # noqa: S608
                {"run": run, "round": model.round},
            )

    def box_control(self, run: str, round_: int, control: NDArray[np.float64], key: bytes) -> bytes:
        """A control variate as it is stored."""
        return close_box(key, _control_context(run, round_), control.astype("<f8").tobytes())

    def control(self, run: str, key: bytes) -> NDArray[np.float64] | None:
        """The site's own control variate in force; None before its first update was applied.

        Raises:
            SealingError: `key` is not the run's storage key.
        """
        row = self._db.execute("SELECT round, box FROM control WHERE run = ? AND applied = 1", (run,)).fetchone()
        if row is None:
            return None
        return np.frombuffer(open_box(key, _control_context(run, row[0]), row[1]), dtype="<f8").astype(np.float64)

    def stop_run(self, run: str, reason: str) -> None:
        """Never answer for this run again, also after a restart."""
        self._db.execute("INSERT OR IGNORE INTO stopped VALUES (?, ?)", (run, reason))

    def stopped(self, run: str) -> str | None:
        """Why a run was stopped, or None."""
        row = self._db.execute("SELECT reason FROM stopped WHERE run = ?", (run,)).fetchone()
        return row[0] if row else None

    def halt(self, reason: str) -> None:
        """Never answer anything again from this state."""
        self._db.execute("INSERT OR IGNORE INTO halted VALUES (1, ?)", (reason,))

    def halted(self) -> str | None:
        """Why this site answers nothing any more, or None."""
        row = self._db.execute("SELECT reason FROM halted").fetchone()
        return row[0] if row else None

    def note_sightings(self, federation: str, sightings: Sequence[tuple[str, int, Sighting]]) -> None:
        """Keep, of each public key, the sighting of the longest log: (key, entries, sighting)."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO sighting VALUES (?, ?, ?, ?) ON CONFLICT (federation, key) DO UPDATE "
                "SET size = excluded.size, sighting = excluded.sighting WHERE excluded.size > size",
                ((federation, key, size, sighting.model_dump_json()) for key, size, sighting in sightings),
            )

    def sighting(self, federation: str, key: str) -> Sighting | None:
        """What is kept of a public key's log."""
        row = self._db.execute(
            "SELECT sighting FROM sighting WHERE federation = ? AND key = ?", (federation, key)
        ).fetchone()
        return Sighting.model_validate_json(row[0]) if row else None

    def runs(self) -> list[str]:
        """Names of all runs that were joined."""
        return [run for (run,) in self._db.execute("SELECT run FROM run")]

    def ended_runs(self) -> list[bytes]:
        """Manifests of runs that this site stopped, or whose model it has released."""
        rows = self._db.execute(
            "SELECT manifest FROM run WHERE run IN (SELECT run FROM stopped) "
            "OR run IN (SELECT run FROM reply WHERE step = 'release')"
        )
        return [manifest for (manifest,) in rows]

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        finally:
            # A simulation has many sites open at once: none keeps manifest and model in its cache.
            self._db.execute("PRAGMA shrink_memory")


def _key(place: Address) -> tuple[str, int, int, str, int]:
    return place.run, place.key_epoch, place.round, place.step, place.attempt


def _control_context(run: str, round_: int) -> bytes:
    return f"confide/1/control/{run}/{round_}".encode()


def _context(run: str, round_: int) -> bytes:
    return f"confide/1/model/{run}/{round_}".encode()
