"""What follows from the events, kept for speed: a `Summary` of each person and purpose, changed with the events.

Invariants:
1. It is changed in the transaction that adds the events, and says up to which one it has been brought.
2. It holds nothing that the events do not say: it can be rebuilt from them, and compared with them.
3. Where it was found to differ from the events nothing is answered from it until it has been rebuilt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from sqlalchemy import Connection, bindparam, delete, func, select, update

from confide.privacy.consent.bulk import BATCH, rows_of, rows_with, upsert_rows
from confide.privacy.consent.events import ConsentEvent, EventType
from confide.privacy.consent.state import Summary
from confide.privacy.consent.statements import Change
from confide.privacy.consent.tables import CURRENT, EVENTS, PERSON_INDEX, PROJECTION

__all__ = ["Difference", "apply", "differences", "load", "put_off", "rebuild", "summary_from_row"]

_BROUGHT_UP = Change(update(PROJECTION).values(seq=bindparam("latest")))
_COLUMNS = [column.name for column in CURRENT.c if column.name != "purpose"]
_KINDS = {kind.value: kind for kind in EventType}
Found = dict[str, Summary]
#: Purpose and pseudonym.
_Place = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Difference:
    """A place where the projection does not say what the events say. Never leaves the site."""

    purpose: str
    pseudonym: bytes
    kind: Literal["missing", "unfounded", "different"]


def apply(connection: Connection, events: Sequence[tuple[int, ConsentEvent]]) -> None:
    """Take in new events, in their order."""
    by_purpose: dict[str, list[ConsentEvent]] = {}
    for _, event in events:
        by_purpose.setdefault(event.purpose, []).append(event)
    for purpose, concerning in by_purpose.items():
        persons = sorted(
            {event.pseudonym for event in concerning}
        )  # in the order of the table: fewer pages are touched
        known = {pseudonym: found[purpose] for pseudonym, found in load(connection, [purpose], persons)}
        for event in concerning:
            summary = known.get(event.pseudonym)
            if summary is None:
                summary = known[event.pseudonym] = Summary(event.effective_at)
            summary.add(event)
        upsert_rows(connection, CURRENT, [_row(purpose, person, known[person]) for person in persons])
    if events:
        _BROUGHT_UP.apply(connection, latest=events[-1][0])


def put_off(connection: Connection) -> None:
    """Before a first import that is long: `rebuild` follows it, and costs less than to change every place at random."""
    if connection.dialect.name == "sqlite":  # in PostgreSQL it would keep readers waiting
        PERSON_INDEX.drop(connection, checkfirst=True)


def load(connection: Connection, purposes: Sequence[str], pseudonyms: Iterable[bytes]) -> Iterator[tuple[bytes, Found]]:
    """Summaries of these persons by purpose; of whom nothing is known, nothing."""
    remaining = iter(pseudonyms)
    while part := list(islice(remaining, BATCH)):
        by_person: dict[bytes, Found] = {}
        for purpose in purposes:
            for pseudonym, *values in rows_with(connection, CURRENT, _COLUMNS, "pseudonym", part, purpose=purpose):
                by_person.setdefault(pseudonym, {})[purpose] = summary_from_row(values)
        yield from by_person.items()


def summary_from_row(values: Sequence[Any]) -> Summary:
    """From a row's columns after the key."""
    settled_at, denied_at, granted_at, valid_until, max_epsilon, notice, more, flagged_at, restricted, erased_at = (
        values
    )
    notices = frozenset() if granted_at is None else frozenset((notice, *(json.loads(more) if more else ())))
    return Summary(
        settled_at, denied_at, granted_at, valid_until, max_epsilon, notices, flagged_at, bool(restricted), erased_at
    )


def rebuild(connection: Connection) -> None:
    """Make all of it anew from the events."""
    connection.execute(delete(CURRENT))
    PERSON_INDEX.create(connection, checkfirst=True)
    folds = _from_events(connection)
    while part := list(islice(folds, BATCH)):
        upsert_rows(connection, CURRENT, [_row(*place, summary) for place, summary in part])
    latest = connection.scalar(select(func.max(EVENTS.c.seq))) or 0
    connection.execute(update(PROJECTION).values(seq=latest, damaged=False))


def differences(connection: Connection) -> Iterator[Difference]:
    """Compare all of it with the events; memory does not grow with their number."""
    query = select(CURRENT).order_by(CURRENT.c.purpose.collate(_collation(connection)), CURRENT.c.pseudonym)
    rows = connection.execute(query.execution_options(stream_results=True, yield_per=BATCH))
    there = (((purpose, bytes(pseudonym)), summary_from_row(values)) for purpose, pseudonym, *values in rows)
    yield from _compare(_from_events(connection), there)


def _compare(
    expected: Iterator[tuple[_Place, Summary]], there: Iterator[tuple[_Place, Summary]]
) -> Iterator[Difference]:
    """Both in the order of purposes and pseudonyms."""
    right, found = next(expected, None), next(there, None)
    while right is not None or found is not None:
        if found is None or (right is not None and right[0] < found[0]):
            assert right is not None  # noqa: S101  # one of both is there
            yield Difference(*right[0], "missing")
            right = next(expected, None)
        elif right is None or found[0] < right[0]:
            yield Difference(*found[0], "unfounded")
            found = next(there, None)
        else:
            if right[1] != found[1]:
                yield Difference(*right[0], "different")
            right, found = next(expected, None), next(there, None)


def _from_events(connection: Connection) -> Iterator[tuple[_Place, Summary]]:
    """In the order of purposes and pseudonyms. The database sorts whole rows: to look them up one by one, in the order
    of an index, costs several times as much as soon as they are more than its cache holds."""
    query = (
        "SELECT purpose, pseudonym, type, effective_at, valid_until, notice_digest, max_epsilon FROM consent_event "  # noqa: S608  # names of ours
        f'ORDER BY purpose COLLATE "{_collation(connection)}", pseudonym, seq'
    )
    place, summary = ("", b""), None
    for purpose, person, kind, at, until, notice, limit in rows_of(connection, query):
        if summary is None or place != (purpose, person):
            if summary is not None:
                yield place, summary
            place, summary = (purpose, person), Summary(at)
        summary.take(_KINDS.get(kind) or _kind(kind), at, until, notice, limit)
    if summary is not None:
        yield place, summary


def _collation(connection: Connection) -> str:
    """The order of code points, which is Python's."""
    return "BINARY" if connection.dialect.name == "sqlite" else "C"


def _row(purpose: str, person: bytes, s: Summary) -> tuple[object, ...]:
    return (
        purpose, person, s.settled_at, s.denied_at, s.granted_at, s.valid_until, s.max_epsilon, *_notices(s.notices),
        s.flagged_at, s.restricted, s.erased_at,
    )  # fmt: skip


def _kind(name: str) -> EventType:
    found = _KINDS.get(name)
    if found is None:
        raise ValueError("an event is of a kind that this version does not know")
    return found


def _notices(notices: frozenset[str]) -> tuple[str, str | None]:
    if len(notices) <= 1:
        return next(iter(notices), ""), None
    first, *more = sorted(notices)
    return first, json.dumps(more)
