"""What is asked of the registry's database in several places; each in one statement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, func, select

from confide.privacy.consent.bulk import BATCH, rows_with
from confide.privacy.consent.events import ConsentEvent
from confide.privacy.consent.notices import EVERYTHING, Notice, spellings
from confide.privacy.consent.statements import Query
from confide.privacy.consent.tables import (
    CLOCK,
    CONTENT,
    CURRENT,
    EVENTS,
    NOTICES,
    PROJECTION,
    SUBJECTS,
    TOMBSTONES,
    event_from_row,
)

__all__ = ["Heads", "all_events", "erased_among", "events_of", "heads", "keys_of", "notices_at", "purposes_of"]

#: All that says how far a registry is, in one statement.
_HEADS = Query(
    select(
        select(func.max(EVENTS.c.seq)).scalar_subquery(),
        select(func.max(NOTICES.c.seq)).scalar_subquery(),
        select(EVENTS.c.recorded_at).order_by(EVENTS.c.seq.desc()).limit(1).scalar_subquery(),
        select(CLOCK.c.latest).scalar_subquery(),
        select(PROJECTION.c.seq).scalar_subquery(),
        select(PROJECTION.c.damaged).scalar_subquery(),
    )
)
_NOTICES = select(NOTICES).order_by(NOTICES.c.seq)
_ALL_NOTICES, _NOTICES_TO = Query(_NOTICES), Query(_NOTICES.where(NOTICES.c.seq <= bindparam("sequence")))


@dataclass(frozen=True, slots=True)
class Heads:
    """The latest sequence number, that of the latest notice, the latest instant on record, whether the projection was
    brought up to the latest event, and whether it was found to differ from the events."""

    sequence: int
    notice: int
    recorded: int
    projected: bool
    damaged: bool


def heads(connection: Connection) -> Heads:
    """How far the registry is."""
    event, notice, recorded, taken, projected, damaged = _HEADS.rows(connection)[0]
    event = event or 0
    return Heads(max(event, notice or 0), notice or 0, max(recorded or 0, taken), projected == event, bool(damaged))


def notices_at(connection: Connection, sequence: int | None = None) -> dict[str, Notice]:
    """The notices on record, by every spelling of their digest, as of a sequence number; None is the latest."""
    found: dict[str, Notice] = {}
    for seq, digest, purposes, beneath, at in (
        _ALL_NOTICES.rows(connection) if sequence is None else _NOTICES_TO.rows(connection, sequence=sequence)
    ):
        notice = Notice(
            digest=digest, purposes=frozenset(json.loads(purposes)), covers_beneath=bool(beneath), sequence=seq,
            registered_at=at,
        )  # fmt: skip
        for spelling in spellings(digest):
            found.setdefault(spelling, notice)  # earlier versions registered each notice under two spellings
    return found


def events_of(
    connection: Connection, pseudonym: bytes, sequence: int | None = None
) -> Iterator[tuple[int, ConsentEvent]]:
    """A person's events and their sequence numbers, in order."""
    query = select(*CONTENT).where(EVENTS.c.pseudonym == pseudonym).order_by(EVENTS.c.seq)
    if sequence is not None:
        query = query.where(EVENTS.c.seq <= sequence)
    return ((seq, event_from_row(values)) for seq, *values in connection.execute(query))


def all_events(connection: Connection) -> Iterator[tuple[int, ConsentEvent]]:
    """Everybody's events and their sequence numbers, in order; memory holds a portion at a time."""
    query = select(*CONTENT).order_by(EVENTS.c.seq).execution_options(stream_results=True, yield_per=BATCH)
    return ((seq, event_from_row(values)) for seq, *values in connection.execute(query))


def purposes_of(connection: Connection) -> Iterator[str]:
    """Every purpose that an event names, in order: one look into the index of the projection each."""
    found: str | None = EVERYTHING
    while (
        found := connection.scalar(select(func.min(CURRENT.c.purpose)).where(CURRENT.c.purpose > found))
    ) is not None:
        yield found


def keys_of(connection: Connection, locators: Iterable[bytes]) -> dict[bytes, bytes]:
    """The personal keys on record, by locator."""
    return dict(rows_with(connection, SUBJECTS, ["locator", "personal_key"], "locator", locators))


def erased_among(connection: Connection, locators: Iterable[bytes]) -> set[bytes]:
    """Those of the locators that have a tombstone."""
    return {locator for (locator,) in rows_with(connection, TOMBSTONES, ["locator"], "locator", locators)}
