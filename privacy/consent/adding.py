"""Adding events: each gets the next sequence number, an id that is known with the same content adds nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

from sqlalchemy import Connection

from confide.errors import ConsentError
from confide.privacy.consent import projection
from confide.privacy.consent.bulk import insert_rows, rows_with
from confide.privacy.consent.events import ConsentEvent, now_micros
from confide.privacy.consent.queries import heads
from confide.privacy.consent.storage import Storage
from confide.privacy.consent.tables import CONTENT, EVENTS, event_from_row, event_row

__all__ = ["add_events"]


def add_events(
    connection: Connection, storage: Storage, events: Sequence[ConsentEvent], *, project: bool = True
) -> int:
    """Add events in a transaction that is open.

    Args:
        connection: The one of `storage.writing`.
        project: Bring the projection up to them; else it is rebuilt later, in the same transaction.

    Returns:
        How many were new.

    Raises:
        ConsentError: An id is known with another content, or the database refuses a row: undo the transaction.
    """
    fresh: dict[str, ConsentEvent] = {}
    for item in events:
        if (same := fresh.setdefault(item.event_id, item)) is not item and same != item:
            raise _reused(item, storage)
    numbered = list[tuple[int, ConsentEvent]]()
    ends = [item.event_id for item in (*events[:1], *events[-1:])]
    if not any(True for _ in rows_with(connection, EVENTS, ["event_id"], "event_id", ends)):
        # Most likely none is known: to look all of them up first would cost more than to insert them.
        numbered = _insert(connection, storage, fresh.values())
    if len(numbered) < len(fresh):
        for _, event in numbered:
            del fresh[event.event_id]
        for _, *values in rows_with(connection, EVENTS, [c.name for c in CONTENT], "event_id", list(fresh)):
            known = event_from_row(values)
            if fresh.pop(known.event_id) != known:
                raise _reused(known, storage)
        unknown = _insert(connection, storage, fresh.values())
        if len(unknown) < len(fresh):
            raise ConsentError("cannot be written: an event was refused", where=storage.where, hint="nothing was added")
        numbered += unknown
    if numbered and project:
        projection.apply(connection, numbered)
    return len(numbered)


def _insert(
    connection: Connection, storage: Storage, events: Collection[ConsentEvent]
) -> list[tuple[int, ConsentEvent]]:
    """Number and insert events until one is refused; those that were inserted."""
    latest = heads(connection)
    recorded_at, numbered = max(now_micros(), latest.recorded), list(enumerate(events, latest.sequence + 1))
    try:
        with _undone_together(connection):
            insert_rows(connection, EVENTS, [event_row(seq, event, recorded_at) for seq, event in numbered])
    except storage.clashes:
        return numbered[: heads(connection).sequence - latest.sequence]
    return numbered


def _undone_together(connection: Connection) -> AbstractContextManager[object]:
    """After a refused row the transaction can go on. In PostgreSQL none of the rows is there then; in SQLite those
    before it are: to be able to take them back would cost as much again as to insert them."""
    return nullcontext() if connection.dialect.name == "sqlite" else connection.begin_nested()


def _reused(item: ConsentEvent, storage: Storage) -> ConsentError:
    """Skipping it silently could lose a withdrawal."""
    return ConsentError(f"event {item.event_id!r} is known with another content", where=storage.where,
                        hint="give every event an id of its own; nothing was added")  # fmt: skip
