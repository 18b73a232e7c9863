"""Where a registry lies: an SQLite file, or a PostgreSQL database by URL; opening, migrating, reading, writing.

Invariants:
1. Writers take turns: whoever assigns sequence numbers holds the lock until they are committed. So who has seen an
   event never later finds a new one with a smaller number.
2. A reading sees one state of the whole database.
3. A commit is on the disk before it is answered.
4. A registry is used only in the newest schema, which opening it brings about, in one transaction.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, text, update
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from confide.errors import ConfideError, ConsentError
from confide.privacy.consent import projection, triggers
from confide.privacy.consent.bulk import driver
from confide.privacy.consent.statements import Query
from confide.privacy.consent.tables import PROJECTION, SCHEMA
from confide.privacy.database import full_disk
from confide.privacy.flushing import begins_as_copy, durability

__all__ = ["SCHEMA_VERSION", "Storage", "holds_registry", "is_url", "shown_address"]

SCHEMA_VERSION = 3
_VERSION = Query(select(SCHEMA.c.version))
_REVISIONS = {1: "0001", 2: "0002"}
_MIGRATIONS = Path(__file__).with_name("migrations")
_PATIENCE = 30.0
_MOST_COMPILED = 500
#: Any number; it names the lock under which a PostgreSQL schema is changed.
_MIGRATING = 0x636F6E66


class _Compiled(dict[Any, Any]):
    """What SQLAlchemy compiles, whichever engine asks. Its own key names the engine's dialect object first; those of
    all SQLite registries of a process are made in one way, and a simulation opens thousands."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key[1:], default)

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= _MOST_COMPILED:  # lists of changing length are part of a statement
            self.clear()
        super().__setitem__(key[1:], value)


#: Statements of all SQLite registries of this process, compiled once.
_COMPILED = _Compiled()
_NOT_ONE = "check the path, or restore the registry from the site's backup"


class Storage:
    """One registry's database.

    Args:
        address: A path, or a URL: `postgresql://user@host/database`, `sqlite:////path`.

    Raises:
        ConsentError: It is no registry, or of a version that this program does not know.
    """

    def __init__(self, address: Path | str) -> None:
        url = _url(address)
        self.where = _shown(url)
        self._engine = _engine(url, self.where)
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        #: The driver's own errors come through where rows are copied.
        self._errors = (SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error)
        #: What a row that is there already is refused with.
        self.clashes = (IntegrityError, self._engine.dialect.loaded_dbapi.IntegrityError)
        #: Connections to an SQLite file that nobody is using: each transaction takes one, and puts it back.
        self._idle: list[Connection] = []
        self._closed = False
        self._turn = threading.RLock()
        self._open: Connection | None = None
        self._owner = 0
        try:
            file = Path(url.database or "") if self.is_sqlite else None
            if file is None or not begins_as_copy(f"consent {SCHEMA_VERSION}", file, lambda at: Storage(at).close()):
                self._prepare()
        except BaseException:
            self._engine.dispose()
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection on one state; what cannot be read or understood is one error, after which the site abstains.
        Inside `writing` it is that one, and sees what it has written."""
        if self._open is not None and self._owner == threading.get_ident():
            yield self._open
            return
        try:
            with self._transaction() as connection:
                yield connection
        except (*self._errors, ValueError) as error:
            raise ConsentError(
                f"cannot be read ({type(error).__name__})",
                where=self.where,
                hint="without the registry nobody may take part; restore it from the site's backup",
            ) from None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A connection that alone may write; all of it is durable at the end, or nothing. Inside itself it is the same
        one."""
        with self._turn:
            if self._open is not None:
                yield self._open
                return
            try:
                with self._transaction(writes=True) as connection:
                    if not self.is_sqlite:
                        connection.execute(text(f"SET LOCAL lock_timeout = '{int(_PATIENCE)}s'"))
                        connection.execute(text("LOCK TABLE consent_event IN SHARE ROW EXCLUSIVE MODE"))
                    self._open, self._owner = connection, threading.get_ident()
                    try:
                        yield connection
                    finally:
                        self._open, self._owner = None, 0
            except self._errors as error:
                raise ConsentError(
                    f"cannot be written ({type(error).__name__})",
                    where=self.where,
                    hint="nothing was added; check the disk, the permissions, and that no other program is importing",
                ) from None

    def tidy(self) -> bool:
        """Drop what the database keeps of deleted rows: empty SQLite's write-ahead log, or vacuum PostgreSQL's table of
        personal keys. False: another program is in the way.

        Raises:
            ConsentError: The database refused.
        """
        try:
            if not self.is_sqlite:
                with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    connection.execute(text("VACUUM consent_subject"))
                return True
            raw = self._engine.raw_connection()  # outside any transaction
            try:
                busy, _, _ = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                raw.close()
            return not busy
        except self._errors as error:
            raise ConsentError(
                f"cannot be tidied ({type(error).__name__})", where=self.where,
                hint="erase again to finish when no other program uses the registry",
            ) from None  # fmt: skip

    def close(self) -> None:
        """Release the file or the connections."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
        self._engine.dispose()

    @contextmanager
    def _transaction(self, writes: bool = False) -> Iterator[Connection]:
        """A connection in a transaction, which is committed at the end; undone whatever comes instead."""
        if not self.is_sqlite:
            with self._engine.connect() as connection:
                if not writes:
                    connection = connection.execution_options(isolation_level="REPEATABLE READ")
                with connection.begin():
                    yield connection
            return
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._engine.connect()
        try:
            raw: Any = driver(connection)
            raw.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            yield connection
            raw.execute("COMMIT")
            if connection.in_transaction():  # SQLAlchemy notes one with its own first statement
                connection.commit()
        except BaseException:
            connection.close()  # which undoes what is not committed
            raise
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)

    def _prepare(self) -> None:
        """Bring it to the newest schema; where it is, nothing is written."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                with self._transaction() as connection:
                    ready = self._is_ready(connection)
                if not ready:
                    with self._transaction(writes=True) as connection:
                        if not self.is_sqlite:
                            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATING})"))
                        if not self._is_ready(connection):  # whoever was first has done it
                            self._migrate(connection)
                return
            except (*self._errors, ValueError) as error:
                # Where several processes make the file at once SQLite does not wait for the journal's change of mode.
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise self._unusable(error) from None
                time.sleep(0.01)

    def _unusable(self, error: Exception) -> ConfideError:
        if not self.is_sqlite and isinstance(error, OperationalError):
            return ConsentError("cannot be reached", where=self.where,
                                hint="check the address, and that the server runs and lets this user in")  # fmt: skip
        if (full := full_disk(error, self.where)) is not None:
            return full
        return ConsentError(f"is not a consent registry ({type(error).__name__})", where=self.where, hint=_NOT_ONE)

    def _is_ready(self, connection: Connection) -> bool:
        version = _version(connection)
        if version not in (None, *range(1, SCHEMA_VERSION + 1)):
            raise ConsentError(
                f"has schema version {version}; this program writes {SCHEMA_VERSION}",
                where=self.where,
                hint="use the version of confide that made it, or a newer one",
            )
        return version == SCHEMA_VERSION and not triggers.missing(connection)

    def _migrate(self, connection: Connection) -> None:
        version = _version(connection)
        if not connection.in_transaction():
            connection.begin()  # SQLAlchemy's note of ours: without it Alembic would begin, and end, one of its own
        if version != SCHEMA_VERSION:
            _to_newest(connection, _REVISIONS.get(version or 0))
            if version is None:
                connection.execute(SCHEMA.insert().values(version=SCHEMA_VERSION))
            else:
                connection.execute(update(SCHEMA).values(version=SCHEMA_VERSION))
            if connection.scalar(select(PROJECTION.c.seq)) == -1:
                projection.rebuild(connection)
        triggers.install(connection)


def is_url(address: Path | str) -> bool:
    """Is it a database's address, and no path?"""
    return isinstance(address, str) and "://" in address


def holds_registry(address: Path | str) -> bool:
    """Is there a registry, of whatever version? Nothing is made.

    Raises:
        ConsentError: The address is none, or its server cannot be reached.
    """
    url = _url(address)
    if url.drivername == "sqlite" and not Path(url.database or "").is_file():
        return False
    engine = _engine(url, where := _shown(url))
    try:
        with engine.connect() as connection:
            return _version(connection) is not None
    except (SQLAlchemyError, sqlite3.Error, ValueError) as error:
        raise ConsentError(
            f"cannot be read ({type(error).__name__})", where=where,
            hint="check the address, and that the server runs and lets this user in",
        ) from None  # fmt: skip
    finally:
        engine.dispose()


def shown_address(address: Path | str) -> str:
    """An address as messages name it: without a password."""
    return _shown(_url(address))


def _shown(url: URL) -> str:
    if url.drivername == "sqlite":
        return url.database or ""
    return url.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)


def _url(address: Path | str) -> URL:
    if is_url(address):
        address = str(address)
        try:
            url = make_url(address)
        except ArgumentError:
            url = URL.create("none")
        if url.get_backend_name() == "postgresql":
            return url.set(drivername="postgresql+psycopg")
        if url.drivername == "sqlite" and url.database:
            return url
        raise ConsentError("is no address of a registry", where=address.partition(":")[0],
                           hint="give a path, or postgresql://user@host/database")  # fmt: skip
    return URL.create("sqlite", database=str(address))


def _engine(url: URL, where: str) -> Engine:
    if url.drivername != "sqlite":
        try:
            return create_engine(url, connect_args={"connect_timeout": 10}, pool_pre_ping=True)
        except ImportError:
            raise ConsentError("PostgreSQL needs a driver that is not installed", where=where,
                               hint="pip install 'confide[postgres]'") from None  # fmt: skip
    shared = {"compiled_cache": _COMPILED}
    # Connections are kept by whoever runs transactions: however many there are at once, none waits for another's.
    engine = create_engine(url, connect_args={"timeout": _PATIENCE}, execution_options=shared, poolclass=NullPool)
    mode = durability(url.database or "")

    @event.listens_for(engine, "connect")
    def _durable(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # we say ourselves when a transaction begins
        pragmas = ("journal_mode=WAL", f"synchronous={mode}", "secure_delete=ON", "cache_size=-131072")
        connection.executescript("".join(f"PRAGMA {pragma};" for pragma in pragmas))

    return engine


def _is_busy(error: Exception) -> bool:
    original = getattr(error, "orig", error)
    return isinstance(original, sqlite3.OperationalError) and original.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


def _version(connection: Connection) -> int | None:
    """The schema's version; None where there are no tables of ours."""
    if (lite := driver(connection)) is not None:
        there = lite.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (SCHEMA.name,)).fetchone()
    else:
        there = inspect(connection).has_table(SCHEMA.name) or None
    if there is None:
        return None
    rows = _VERSION.rows(connection)
    return rows[0][0] if rows else None


def _to_newest(connection: Connection, known: str | None) -> None:
    """Alembic is slow to import and seldom needed."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    if known is not None and not inspect(connection).has_table("consent_revision"):
        command.stamp(config, known)
    command.upgrade(config, "head")
