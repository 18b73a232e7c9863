"""The coordinator's run store: where runs lie (SQLite, or another database by URL), and who may write one.

Invariants:
1. A run is written by one process: whoever opens it takes it over, and nothing that an earlier one still wants to write
   is taken. As requests are stored before they are sent, an earlier one sends nothing new either.
2. A run is opened with the manifest that it was made with, and with a log that still holds what it held.

What a run's rows mean, and when they go, is `server/journal.py`'s.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, and_, create_engine, event, exists, make_url, select
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from confide.errors import AuditError, ConfigError, StorageError
from confide.privacy.audit.log import Log
from confide.privacy.flushing import durability
from confide.server import tables as t
from confide.server.journal import Journal

__all__ = ["MEMORY", "RunStore"]

#: Nothing outlives the process.
MEMORY = "sqlite://"
_PATIENCE = 30.0
#: Names our lock among PostgreSQL's: the first eight bytes of SHA-256("confide/runs"), as a signed number.
_LOCK = int.from_bytes(hashlib.sha256(b"confide/runs").digest()[:8], signed=True)
_SCHEMES = ("sqlite", "postgresql")


class RunStore:
    """All runs of one coordinator.

    Args:
        url: SQLAlchemy's, e.g. `sqlite:////var/lib/confide/runs.db` or `postgresql://user@host/database`.

    Raises:
        ConfigError: The URL names no database that can be used here.
        StorageError: The database does not open, or is of another version.
    """

    def __init__(self, url: str = MEMORY) -> None:
        self._engine, self._where = _engine(url), _shown(url)
        try:
            with self._errors():
                version = self._made()
        except StorageError:
            self.close()
            raise
        if version not in (None, t.SCHEMA_VERSION):
            self.close()
            raise StorageError(f"has schema version {version}; this program writes {t.SCHEMA_VERSION}",
                               where=self._where, hint="use the version of confide that made it")  # fmt: skip

    def _made(self) -> int | None:
        """The version of the tables that were there; new ones are made, by one process if several open at once."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                with self._engine.begin() as db:
                    alone = (
                        "BEGIN IMMEDIATE" if db.dialect.name == "sqlite" else f"SELECT pg_advisory_xact_lock({_LOCK})"
                    )
                    db.exec_driver_sql(alone)
                    t.metadata.create_all(db)
                    version: int | None = db.scalar(select(t.schema.c.version))
                    if version is None:
                        db.execute(t.schema.insert().values(version=t.SCHEMA_VERSION))
                    return version
            except OperationalError as error:
                # Where several processes make the file at once SQLite does not wait for the journal's change of mode.
                if "locked" not in str(error.orig) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def runs(self) -> dict[str, str]:
        """Every run and its status, in the order in which they were put here: `waiting`, `running`, `finished`,
        `stopping` (somebody wants it stopped), `stopped`, `failed`."""
        query = select(t.run.c.run, t.run.c.status).order_by(t.run.c.submitted, t.run.c.run)
        with self._errors(), self._engine.connect() as db:
            return {run: status for run, status in db.execute(query)}

    def invited(self, run: str) -> bool:
        """Was any site asked to take part in a run? Only then its log tells of it."""
        return self._asked(run, "join")

    def releasing(self, run: str) -> bool:
        """Was any site asked for a run's model? From then on it is too late to stop it."""
        return self._asked(run, "release")

    def _asked(self, run: str, step: str) -> bool:
        query = select(t.message.c.site).where(t.message.c.run == run, t.message.c.step == step).limit(1)
        with self._errors(), self._engine.connect() as db:
            return db.scalar(query) is not None

    def untold(self) -> list[str]:
        """Runs that ended without a release, and members of which have not answered that they know it."""
        joined, answered = t.message.alias(), t.message.alias()
        answer = exists().where(
            answered.c.run == joined.c.run, answered.c.site == joined.c.site, answered.c.step == "end",
            answered.c.kind == "reply",
        )  # fmt: skip
        query = (
            select(t.run.c.run).distinct().join(joined, joined.c.run == t.run.c.run)
            .where(t.run.c.status.in_(("stopped", "failed")), ~answer)
            .where(joined.c.step == "join", joined.c.kind == "reply")
            .order_by(t.run.c.run)
        )  # fmt: skip
        with self._errors(), self._engine.connect() as db:
            return list(db.scalars(query))

    def submit(self, run: str, manifest: bytes, initial: bytes) -> None:
        """Put a run here, for the coordinator to take it.

        Raises:
            ConfigError: There is one of this name.
        """
        with self._errors():
            try:
                with self._engine.begin() as db:
                    self._insert(db, run, manifest, initial, owner="", status="waiting", position="")
            except IntegrityError:
                raise ConfigError("there is a run of this name", where=f"run {run}") from None

    def status(self, run: str) -> str | None:
        """A run's status; None where there is no such run."""
        with self._errors(), self._engine.connect() as db:
            found: str | None = db.scalar(select(t.run.c.status).where(t.run.c.run == run))
            return found

    def next_round(self, run: str) -> int:
        """The round that a run is in; 1 before the first."""
        with self._errors(), self._engine.connect() as db:
            return int(db.scalar(select(t.run.c.next).where(t.run.c.run == run)) or 1)

    def mark(self, run: str, status: str, *, only: Collection[str]) -> bool:
        """Change a run's status where it is one of `only`; was it?"""
        here = and_(t.run.c.run == run, t.run.c.status.in_(only))
        with self._errors(), self._engine.begin() as db:
            return bool(db.execute(t.run.update().where(here).values(status=status)).rowcount)

    def load(self, run: str) -> tuple[bytes, bytes] | None:
        """(manifest, initial model) of a run, with which it is resumed; None where it is not here."""
        with self._errors(), self._engine.connect() as db:
            row = db.execute(select(t.run.c.manifest, t.run.c.initial).where(t.run.c.run == run)).first()
            if row is None:
                return None
            query = select(t.blob.c.data).where(t.blob.c.run == run, t.blob.c.digest == row.initial)
            return row.manifest, db.scalar(query) or b""

    def open(self, run: str, manifest: bytes, initial: bytes, log: Log) -> Journal:
        """Begin a run, or take it over from a process that is gone.

        Args:
            run: Its name.
            manifest: The manifest's bytes.
            initial: The first weights' bytes.
            log: The coordinator's log of the run.

        Raises:
            ConfigError: The run was made with another manifest or model.
            AuditError: The log does not hold what it held when the run was stored.
        """
        owner, first = secrets.token_hex(16), hashlib.sha256(initial).hexdigest()
        with self._errors(), self._engine.begin() as db:
            row = db.execute(select(t.run).where(t.run.c.run == run).with_for_update()).mappings().first()
            if row is None:
                position = log.checkpoint().short
                self._insert(db, run, manifest, initial, owner=owner, status="running", position=position)
            elif row["status"] == "waiting":
                self._same_run(row, manifest, first)
                begun = {"owner": owner, "status": "running", "position": log.checkpoint().short}
                db.execute(t.run.update().where(t.run.c.run == run).values(**begun))
            else:
                self._same(row, manifest, first, log)
                db.execute(t.run.update().where(t.run.c.run == run).values(owner=owner))
        return Journal(self.transaction, run, owner, log)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Everything in it is durable when it ends, or nothing.

        Raises:
            StorageError: The database does not take it.
        """
        with self._errors(), self._engine.begin() as db:
            yield db

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def _insert(self, db: Connection, run: str, manifest: bytes, initial: bytes, **begun: str) -> None:
        first = hashlib.sha256(initial).hexdigest()
        values = {
            "run": run, "manifest": manifest, "initial": first, "epoch": 0, "members": None, "next": 1, "model": "",
            "submitted": time.time_ns() // 1000, **begun,
        }  # fmt: skip
        db.execute(t.run.insert().values(**values))
        db.execute(t.blob.insert().values(run=run, digest=first, data=initial))

    def _same(self, row: Any, manifest: bytes, initial: str, log: Log) -> None:
        where = f"run {row['run']} in {self._where}"
        self._same_run(row, manifest, initial)
        size, _, root = row["position"].partition(":")
        if not log.held(int(size), bytes.fromhex(root)):
            raise AuditError("the coordinator's log does not hold what it held when the run was stored", where=where,
                             hint="restore log and run store from one backup")  # fmt: skip

    def _same_run(self, row: Any, manifest: bytes, initial: str) -> None:
        where = f"run {row['run']} in {self._where}"
        if row["manifest"] != manifest or (row["initial"] != initial and row["status"] != "finished"):
            raise ConfigError("was made with another manifest or first model", where=where,
                              hint="a run is resumed as it was begun; a changed one needs a new name")  # fmt: skip

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise StorageError(f"does not take the coordinator's state ({type(error).__name__})", where=self._where,
                               hint="free space, or check that the database is there; then resume: what was durable "
                               "is kept") from None  # fmt: skip


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in _SCHEMES:
            raise NoSuchModuleError
        if parsed.get_backend_name() == "postgresql":
            driver = parsed.set(drivername="postgresql+psycopg")
            return create_engine(driver, connect_args={"connect_timeout": 10}, pool_pre_ping=True)
        if parsed.database in (None, "", ":memory:"):
            engine = create_engine(parsed, poolclass=StaticPool, connect_args={"check_same_thread": False})
        else:
            engine = create_engine(parsed)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(f"names no database that can be used here ({type(error).__name__})", where=_shown(url),
                          hint="e.g. sqlite:////path/runs.db, or postgresql://user@host/database with the "
                          "extra confide[postgres] installed") from None  # fmt: skip
    event.listen(engine, "connect", _durable(durability(parsed.database) if parsed.database else "FULL"))
    return engine


def _durable(synchronous: str) -> Callable[[Any, object], None]:
    def prepare(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        # Replies are whole models: larger pages take fewer calls.
        for pragma in ("page_size=16384", "busy_timeout=30000", "journal_mode=WAL", f"synchronous={synchronous}"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return prepare


def _shown(url: str) -> str:
    """A database's URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "run store"
