"""A site's durable state of its runs, in one SQLite file: what was answered, what may be sealed, which model holds.

Invariants:
1. A request is answered at most one way: the same request gets the stored reply; the same (run, round, step) with
   another request is an equivocation and refused.
2. An update is sealed for at most one cohort, ever, across restarts.
3. The update of a round that has passed is destroyed.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.protocol.envelope import Envelope

__all__ = ["ModelState", "SiteStore", "Update"]

_SCHEMA = """
PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=ON;
CREATE TABLE IF NOT EXISTS run (run TEXT PRIMARY KEY, manifest BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS reply (
  run TEXT, round INTEGER, step TEXT, request TEXT NOT NULL, header BLOB NOT NULL, signature BLOB NOT NULL,
  body BLOB NOT NULL, PRIMARY KEY (run, round, step));
CREATE TABLE IF NOT EXISTS chunk (
  run TEXT, round INTEGER, step TEXT, number INTEGER, data BLOB NOT NULL, PRIMARY KEY (run, round, step, number));
CREATE TABLE IF NOT EXISTS pending (run TEXT, round INTEGER, vector BLOB NOT NULL, PRIMARY KEY (run, round));
CREATE TABLE IF NOT EXISTS sealed (run TEXT, round INTEGER, transcript TEXT NOT NULL, PRIMARY KEY (run, round));
CREATE TABLE IF NOT EXISTS stopped (run TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS model (
  run TEXT PRIMARY KEY, round INTEGER NOT NULL, weights BLOB NOT NULL, state BLOB NOT NULL, parts INTEGER NOT NULL,
  metrics BLOB);
"""


@dataclass(frozen=True, slots=True)
class Update:
    """An update that waits to be sealed."""

    round: int
    vector: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ModelState:
    """The replicated model: the last round whose sum was applied, weights, strategy memory, metrics just opened."""

    round: int
    weights: NDArray[np.float32]
    state: tuple[NDArray[np.float64], ...]
    metrics: NDArray[np.float64] | None

    @property
    def metric_chunks(self) -> tuple[bytes, ...]:
        """The opened metrics as they leave: float64, little endian; nothing where none are due."""
        return () if self.metrics is None else (self.metrics.astype("<f8").tobytes(),)


class SiteStore:
    """See the module. One writer: a site's agent is one process."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
        self._db.executescript(_SCHEMA)

    def add_run(self, run: str, manifest: bytes, model: ModelState) -> None:
        """Remember a run that was joined. Joining again changes nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        if not self._db.execute("SELECT 1 FROM run WHERE run = ?", (run,)).fetchone():
            self._db.execute("INSERT INTO run VALUES (?, ?)", (run, manifest))
            self._put_model(run, model)
        self._db.execute("COMMIT")

    def manifest(self, run: str) -> bytes | None:
        """The manifest of a joined run."""
        row = self._db.execute("SELECT manifest FROM run WHERE run = ?", (run,)).fetchone()
        return row[0] if row else None

    def stored_reply(self, run: str, round_: int, step: str, request: str) -> Envelope | None:
        """What was answered before, or None.

        Raises:
            SealingError: Another request was answered at this place.
        """
        key = (run, round_, step)
        row = self._db.execute(
            "SELECT request, header, signature, body FROM reply WHERE run = ? AND round = ? AND step = ?", key
        ).fetchone()
        if row is None:
            return None
        if row[0] != request:
            raise SealingError(
                f"another {step} request for round {round_} was answered already: the coordinator contradicts itself",
                where=f"run {run}",
            )
        chunks = self._db.execute(
            "SELECT data FROM chunk WHERE run = ? AND round = ? AND step = ? ORDER BY number", key
        ).fetchall()
        return Envelope(row[1], row[2], row[3], tuple(c for (c,) in chunks))

    def reply_digest(self, run: str, round_: int, step: str) -> str | None:
        """Digest of the reply given at a place, or None."""
        row = self._db.execute(
            "SELECT header, signature FROM reply WHERE run = ? AND round = ? AND step = ?",
            (run, round_, step),
        ).fetchone()
        return Envelope(row[0], row[1], b"").digest if row else None

    def latest_round(self, run: str) -> int:
        """The latest round that anything was answered for; 0 before the first."""
        row = self._db.execute("SELECT MAX(round) FROM reply WHERE run = ?", (run,)).fetchone()
        return int(row[0] or 0)

    def commit_reply(
        self,
        run: str,
        round_: int,
        step: str,
        request: str,
        reply: Envelope,
        *,
        update: Update | None = None,
        sealed: str | None = None,
    ) -> None:
        """Make a reply durable together with its effect, before it is sent.

        Args:
            run: The run.
            round_: The round.
            step: The step.
            request: Digest of the request.
            reply: The signed reply.
            update: The update that a `train` reply commits to.
            sealed: Transcript that a `seal` reply used the update for; the update is destroyed.

        Raises:
            SealingError: The round was sealed before.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if update is not None:
                self._db.execute("DELETE FROM pending WHERE run = ?", (run,))
                self._db.execute("INSERT INTO pending VALUES (?, ?, ?)", (run, update.round, update.vector.tobytes()))
            if sealed is not None:
                self._db.execute("INSERT INTO sealed VALUES (?, ?, ?)", (run, round_, sealed))
                self._db.execute("DELETE FROM pending WHERE run = ? AND round = ?", (run, round_))
            # Bulk of rounds long past need not be answered again.
            self._db.execute("DELETE FROM chunk WHERE run = ? AND round < ?", (run, round_ - 1))
            self._db.execute(
                "INSERT INTO reply VALUES (?, ?, ?, ?, ?, ?, ?)",
                (run, round_, step, request, reply.header, reply.signature, reply.body),
            )
            self._db.executemany(
                "INSERT INTO chunk VALUES (?, ?, ?, ?, ?)",
                [(run, round_, step, i, c) for i, c in enumerate(reply.chunks)],
            )
            self._db.execute("COMMIT")
        except sqlite3.IntegrityError:
            self._db.execute("ROLLBACK")
            raise SealingError(f"round {round_} was answered already", where=f"run {run}") from None
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def pending(self, run: str, round_: int) -> Update | None:
        """The update of a round, as long as it may be sealed."""
        row = self._db.execute("SELECT vector FROM pending WHERE run = ? AND round = ?", (run, round_)).fetchone()
        return Update(round_, np.frombuffer(row[0], dtype=np.float64)) if row else None

    def drop_pending(self, run: str, before: int) -> list[int]:
        """Destroy updates of earlier rounds; returns the rounds whose update never left."""
        rounds = [
            r for (r,) in self._db.execute("SELECT round FROM pending WHERE run = ? AND round < ?", (run, before))
        ]
        self._db.execute("DELETE FROM pending WHERE run = ? AND round < ?", (run, before))
        return rounds

    def sealed_transcript(self, run: str, round_: int) -> str | None:
        """The transcript under which this site sealed a round."""
        row = self._db.execute("SELECT transcript FROM sealed WHERE run = ? AND round = ?", (run, round_)).fetchone()
        return row[0] if row else None

    def model(self, run: str) -> ModelState:
        """The replicated model of a joined run."""
        row = self._db.execute(
            "SELECT round, weights, state, parts, metrics FROM model WHERE run = ?", (run,)
        ).fetchone()
        state = np.frombuffer(row[2], dtype=np.float64)
        return ModelState(
            round=row[0],
            weights=np.frombuffer(row[1], dtype=np.float32),
            state=tuple(np.split(state, row[3])) if row[3] else (),
            metrics=np.frombuffer(row[4], dtype=np.float64) if row[4] is not None else None,
        )

    def put_model(self, run: str, model: ModelState) -> None:
        """Replace the replicated model."""
        self._put_model(run, model)

    def stop_run(self, run: str, reason: str) -> None:
        """Never answer for this run again, also after a restart."""
        self._db.execute("INSERT OR IGNORE INTO stopped VALUES (?, ?)", (run, reason))
        self._db.execute("DELETE FROM pending WHERE run = ?", (run,))

    def stopped(self, run: str) -> str | None:
        """Why a run was stopped, or None."""
        row = self._db.execute("SELECT reason FROM stopped WHERE run = ?", (run,)).fetchone()
        return row[0] if row else None

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _put_model(self, run: str, model: ModelState) -> None:
        metrics = model.metrics.tobytes() if model.metrics is not None else None
        state = b"".join(part.tobytes() for part in model.state)
        self._db.execute(
            "INSERT OR REPLACE INTO model VALUES (?, ?, ?, ?, ?, ?)",
            (run, model.round, model.weights.tobytes(), state, len(model.state), metrics),
        )
