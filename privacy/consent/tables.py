"""The registry's tables, as the newest migration leaves them, and the rows that events become.

| table | holds | may change |
|---|---|---|
| `consent_event` | events | no |
| `consent_notice` | notices | no |
| `consent_subject` | a personal key per locator | a key may be deleted once its locator has a tombstone |
| `consent_tombstone` | locators of erased persons | no |
| `consent_clock` | the latest instant as of which a snapshot was taken | upwards |
| `consent_current`, `consent_projection` | what follows from the events, for speed | yes: it can be rebuilt |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

from confide.errors import ConsentError
from confide.privacy.consent.events import ConsentEvent, EventType
from confide.privacy.consent.notices import EVERYTHING
from confide.privacy.consent.pseudonyms import KEY_BYTES

__all__ = ["CLOCK", "CONTENT", "CURRENT", "EVENTS", "NOTICES", "PERSON_INDEX", "PROJECTION", "SCHEMA", "SUBJECTS",
           "TOMBSTONES", "event_from_row", "event_row", "refuse_odd_values"]  # fmt: skip

METADATA = MetaData()
_FARTHEST = 1 << 62
_NUMBER = BigInteger().with_variant(Integer, "sqlite")

EVENTS = Table(
    "consent_event",
    METADATA,
    Column("seq", _NUMBER, primary_key=True, autoincrement=False),
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
    Column("max_epsilon", Float(53)),
    Column("recorded_at", BigInteger, nullable=False),
)
#: Finds a person's events, in order.
PERSON_INDEX = Index("consent_event_person", EVENTS.c.pseudonym, EVENTS.c.seq)
NOTICES = Table(
    "consent_notice",
    METADATA,
    Column("seq", _NUMBER, primary_key=True, autoincrement=False),
    Column("digest", String(200), nullable=False, unique=True),
    Column("purposes", Text, nullable=False),  # a sorted JSON list
    Column("covers_beneath", Boolean, nullable=False),
    Column("registered_at", BigInteger, nullable=False),
)
SUBJECTS = Table(
    "consent_subject",
    METADATA,
    Column("locator", LargeBinary(32), primary_key=True),
    Column("personal_key", LargeBinary(32), nullable=False),
)
#: In the order of locators and without a time: neither may lead to the events of the erased.
TOMBSTONES = Table(
    "consent_tombstone",
    METADATA,
    Column("locator", LargeBinary(32), primary_key=True),
    Column("ground", String(200), nullable=False),
    sqlite_with_rowid=False,
)
CLOCK = Table(
    "consent_clock",
    METADATA,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("latest", BigInteger, nullable=False),
)
#: `Summary` of each (purpose, pseudonym).
CURRENT = Table(
    "consent_current",
    METADATA,
    Column("purpose", String(200), primary_key=True),
    Column("pseudonym", LargeBinary(32), primary_key=True),
    Column("settled_at", BigInteger, nullable=False),
    Column("denied_at", BigInteger),
    Column("granted_at", BigInteger),
    Column("valid_until", BigInteger),
    Column("max_epsilon", Float(53)),
    Column("notice", String(200), nullable=False),
    Column("more_notices", Text),  # a JSON list, where grants of one instant name several notices
    Column("flagged_at", BigInteger),
    Column("restricted", Boolean, nullable=False),
    Column("erased_at", BigInteger),
    sqlite_with_rowid=False,
)
PROJECTION = Table(
    "consent_projection",
    METADATA,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, nullable=False),  # up to which event `consent_current` has been brought
    Column("damaged", Boolean, nullable=False),
)
SCHEMA = Table("consent_schema", METADATA, Column("version", Integer, primary_key=True))

#: The event's own columns and before them `seq`, in the order of its fields.
CONTENT = [column for column in EVENTS.c if column.name != "recorded_at"]


def event_row(seq: int, event: ConsentEvent, recorded_at: int) -> tuple[object, ...]:
    """In the order of the table's columns."""
    return (
        seq, event.event_id, event.pseudonym, event.purpose, event.type._value_, event.effective_at, event.valid_until,
        event.notice_digest, event.lawful_basis, event.jurisdiction, event.evidence_ref, event.max_epsilon, recorded_at,
    )  # fmt: skip


def event_from_row(values: Sequence[Any]) -> ConsentEvent:
    """From a row's columns after `seq`, which stand in the order of the event's fields.

    Raises:
        ValueError: It is of a kind that this version does not know.
    """
    event_id, pseudonym, purpose, kind, *rest = values
    effective_at, valid_until, notice_digest, lawful_basis, jurisdiction, evidence_ref, max_epsilon = rest
    return ConsentEvent(
        event_id=event_id, pseudonym=bytes(pseudonym), purpose=purpose, type=EventType(kind),
        effective_at=effective_at, valid_until=valid_until, notice_digest=notice_digest, lawful_basis=lawful_basis,
        jurisdiction=jurisdiction, evidence_ref=evidence_ref, max_epsilon=max_epsilon,
    )  # fmt: skip


def refuse_odd_values(events: Iterable[ConsentEvent], where: str) -> None:
    """A database would make something else of some values: SQLite makes no limit at all of one that is not a number.

    Raises:
        ConsentError: An event holds such a value.
    """
    for event in events:
        if reason := _refusal(event):
            raise ConsentError(f"event {event.event_id!r} {reason}", where=where, hint="nothing was added")


def _refusal(event: ConsentEvent) -> str:
    if event.purpose == EVERYTHING or len(event.pseudonym) != KEY_BYTES:
        return "is for no purpose or no pseudonym"
    if event.max_epsilon is not None and not 0 < event.max_epsilon < math.inf:
        return "has a limit that is not a positive number"
    if not -_FARTHEST < event.effective_at < _FARTHEST or not -_FARTHEST < (event.valid_until or 0) < _FARTHEST:
        return "lies beyond all instants"
    return ""
