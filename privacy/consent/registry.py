"""The consent registry: an append-only table of events, and snapshots of who may participate.

Invariants:
1. Events are only ever added: the database refuses UPDATE and DELETE.
2. A snapshot depends on (purpose, instant, sequence number) alone, so it can be reproduced.
3. An import is applied whole or not at all; an event id that is already known adds nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    select,
    text,
)
from sqlalchemy.exc import SQLAlchemyError

from confide.errors import ConsentError
from confide.privacy.consent.events import ConsentEvent, EventType, now_micros
from confide.privacy.consent.pseudonyms import KEY_BYTES, SiteKey
from confide.privacy.consent.state import Standing, decide

__all__ = ["Registry", "Snapshot"]

SCHEMA_VERSION = 2

_metadata = MetaData()
_events = Table(
    "consent_event",
    _metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("event_id", String(200), nullable=False, unique=True),
    Column("pseudonym", LargeBinary(32), nullable=False),
    Column("purpose", String(200), nullable=False),
    Column("type", String(20), nullable=False),
    Column("effective_at", BigInteger, nullable=False),
    Column("valid_until", BigInteger),
    Column("notice_digest", String(200), nullable=False),
    Column("lawful_basis", String(200), nullable=False),
    Column("jurisdiction", String(50), nullable=False),
    Column("evidence_ref", String(500), nullable=False),
    Column("max_epsilon", Float),
    Column("recorded_at", BigInteger, nullable=False),
    Index("consent_event_purpose", "purpose", "pseudonym", "seq"),
)
#: One key per person, found by locator. Erasure will delete a row here and nowhere else.
_subjects = Table(
    "consent_subject",
    _metadata,
    Column("locator", LargeBinary(32), primary_key=True),
    Column("personal_key", LargeBinary(32), nullable=False),
)
#: The event's own columns, after `seq`, in the order of its fields.
_CONTENT = [column for column in _events.c if column.name != "recorded_at"]
_schema = Table("consent_schema", _metadata, Column("version", Integer, primary_key=True))

_TRIGGERS = (
    *(
        f"CREATE TRIGGER IF NOT EXISTS consent_event_no_{verb.lower()} BEFORE {verb} ON consent_event "
        "BEGIN SELECT RAISE(ABORT, 'consent events are append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ),
    # REPLACE removes the row in its way without asking a DELETE trigger; BEFORE INSERT still sees it.
    "CREATE TRIGGER IF NOT EXISTS consent_event_no_replace BEFORE INSERT ON consent_event "
    "WHEN EXISTS (SELECT 1 FROM consent_event WHERE seq = NEW.seq OR event_id = NEW.event_id) "
    "BEGIN SELECT RAISE(ABORT, 'consent events are append-only'); END",
)
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Who may participate for a purpose, as of (instant, registry sequence). Never leaves the site."""

    purpose: str
    as_of: int
    sequence: int
    #: Pseudonym → the personal ε limit (None: the site's). Only people whose consent stands.
    participants: Mapping[bytes, float | None]


class Registry:
    """One site's registry, in one SQLite file.

    Args:
        path: The file; made where it does not exist.
        key: The site's key.
    """

    def __init__(self, path: Path, key: SiteKey) -> None:
        self._path, self._key = path, key
        self._engine = _open(path)
        self._locators: dict[str, bytes] = {}
        self._read: dict[str, tuple[int, dict[bytes, list[tuple[int, ConsentEvent]]]]] = {}

    def enrol(self, subjects: Iterable[str]) -> dict[str, bytes]:
        """Pseudonyms of these identifiers, making personal keys for new ones."""
        by_locator = {self._locator(s): s for s in subjects}
        known = self._personal_keys(list(by_locator))
        new = {loc: secrets.token_bytes(KEY_BYTES) for loc in by_locator if loc not in known}
        if new:
            with self._engine.begin() as connection:
                connection.execute(
                    _subjects.insert(), [{"locator": loc, "personal_key": key} for loc, key in new.items()]
                )
        keys = {**known, **new}
        return {s: self._key.pseudonym(s, keys[loc]) for loc, s in by_locator.items()}

    def pseudonyms(self, subjects: Iterable[str]) -> dict[str, bytes]:
        """Pseudonyms of those identifiers that the registry knows; an unknown person has none."""
        keys = self._personal_keys(None)
        found = {}
        for subject in subjects:
            key = keys.get(self._locator(subject))
            if key is not None:
                found[subject] = self._key.pseudonym(subject, key)
        return found

    def append(self, events: Sequence[ConsentEvent]) -> int:
        """Add events in one transaction; known event ids are skipped.

        Returns:
            How many were new.

        Raises:
            ConsentError: The database refused, or an id is known with another content; nothing was added.
        """
        fresh: dict[str, ConsentEvent] = {}
        for item in events:
            if fresh.setdefault(item.event_id, item) != item:
                raise _reused(item, self._path)
        try:
            with self._engine.begin() as connection:
                ids = list(fresh)
                for start in range(0, len(ids), _CHUNK):
                    query = select(*_CONTENT).where(_events.c.event_id.in_(ids[start : start + _CHUNK]))
                    for _, *values in connection.execute(query):
                        known = _event(values)
                        if fresh.pop(known.event_id) != known:
                            raise _reused(known, self._path)
                if fresh:
                    connection.execute(_events.insert(), [_row(e) for e in fresh.values()])
        except SQLAlchemyError as error:
            raise ConsentError(
                f"cannot be written ({type(error).__name__})",
                where=str(self._path),
                hint="nothing was added; check the disk and the file's permissions",
            ) from None
        return len(fresh)

    def head(self) -> int:
        """The sequence number of the latest event; 0 where there is none."""
        with self._reading() as connection:
            return int(connection.scalar(select(func.max(_events.c.seq))) or 0)

    def latest_recorded(self) -> int:
        """When the latest event was put on record (microseconds UTC); 0 where there is none. No honest clock is behind
        it."""
        with self._reading() as connection:
            return int(connection.scalar(select(func.max(_events.c.recorded_at))) or 0)

    def snapshot(self, purpose: str, as_of: int, sequence: int | None = None) -> Snapshot:
        """Who may participate for exactly this purpose.

        Args:
            purpose: The run's purpose.
            as_of: Microseconds UTC.
            sequence: Consider events up to this number; None is the latest.

        Raises:
            ConsentError: The registry cannot be read. The site then abstains.
        """
        latest = self.head()
        head = latest if sequence is None else sequence
        by_person = self._events_of(purpose, min(head, latest))
        standings: dict[bytes, Standing] = {
            p: decide((e for seq, e in events if seq <= head), as_of) for p, events in by_person.items()
        }
        participants = {p: s.max_epsilon for p, s in standings.items() if s.may_participate}
        return Snapshot(purpose, as_of, head, participants)

    def history(self, subject: str) -> list[tuple[int, ConsentEvent]]:
        """(sequence number, event) of everything that is on record of a person, oldest first.

        Raises:
            ConsentError: The registry cannot be read.
        """
        pseudonym = self.pseudonyms([subject]).get(subject)
        if pseudonym is None:
            return []
        query = select(*_CONTENT).where(_events.c.pseudonym == pseudonym).order_by(_events.c.seq)
        with self._reading() as connection:
            return [(seq, _event(values)) for seq, *values in connection.execute(query)]

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    def _locator(self, subject: str) -> bytes:
        found = self._locators.get(subject)
        if found is None:
            found = self._locators[subject] = self._key.locator(subject)
        return found

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A connection; what cannot be read or understood is one error, after which the site abstains."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except (SQLAlchemyError, ValueError) as error:
            raise ConsentError(
                f"cannot be read ({type(error).__name__})",
                where=str(self._path),
                hint="without the registry nobody may take part; restore it from the site's backup",
            ) from None

    def _events_of(self, purpose: str, head: int) -> dict[bytes, list[tuple[int, ConsentEvent]]]:
        """A purpose's events by person. What was read once is kept: events never change, so only new ones are read."""
        read_to, by_person = self._read.get(purpose, (0, {}))
        if head > read_to:
            query = select(*_CONTENT).where(
                _events.c.purpose == purpose, _events.c.seq > read_to, _events.c.seq <= head
            )
            with self._reading() as connection:
                new = [(seq, _event(values)) for seq, *values in connection.execute(query.order_by(_events.c.seq))]
            for seq, event_ in new:  # only once all of them could be read
                by_person.setdefault(event_.pseudonym, []).append((seq, event_))
            self._read[purpose] = (head, by_person)
        return by_person

    def _personal_keys(self, locators: Sequence[bytes] | None) -> dict[bytes, bytes]:
        """Personal keys by locator; None asks for all."""
        query = select(_subjects.c.locator, _subjects.c.personal_key)
        with self._reading() as connection:
            if locators is None:
                return {loc: key for loc, key in connection.execute(query)}
            found: dict[bytes, bytes] = {}
            for start in range(0, len(locators), _CHUNK):
                part = query.where(_subjects.c.locator.in_(locators[start : start + _CHUNK]))
                found.update({loc: key for loc, key in connection.execute(part)})
        return found


def _open(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def _durable(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]  # the DB-API connection is untyped
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    try:
        with engine.begin() as connection:
            _metadata.create_all(connection)
            for trigger in _TRIGGERS:
                connection.execute(text(trigger))
            version = connection.scalar(select(_schema.c.version))
            if version is None:
                connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
    except SQLAlchemyError as error:
        raise ConsentError(
            f"is not a consent registry ({type(error).__name__})",
            where=str(path),
            hint="check the path, or restore the file from the site's backup",
        ) from None
    if version not in (None, SCHEMA_VERSION):
        raise ConsentError(
            f"has schema version {version}; this program writes {SCHEMA_VERSION}",
            where=str(path),
            hint="use the version of confide that made it, or a newer one",
        )
    return engine


def _reused(item: ConsentEvent, path: Path) -> ConsentError:
    """Skipping it silently could lose a withdrawal."""
    return ConsentError(f"event {item.event_id!r} is known with another content", where=str(path),
                        hint="give every event an id of its own; nothing was added")  # fmt: skip


def _row(item: ConsentEvent) -> dict[str, object]:
    content = {name: getattr(item, name) for name in ConsentEvent.__slots__}
    return content | {"type": item.type.value, "recorded_at": now_micros()}


def _event(values: Sequence[Any]) -> ConsentEvent:
    """From a row's columns after `seq`, which stand in the order of the event's fields."""
    event_id, pseudonym, purpose, kind, *rest = values
    effective_at, valid_until, notice_digest, lawful_basis, jurisdiction, evidence_ref, max_epsilon = rest
    return ConsentEvent(
        event_id=event_id, pseudonym=pseudonym, purpose=purpose, type=EventType(kind), effective_at=effective_at,
        valid_until=valid_until, notice_digest=notice_digest, lawful_basis=lawful_basis, jurisdiction=jurisdiction,
        evidence_ref=evidence_ref, max_epsilon=max_epsilon,
    )  # fmt: skip
