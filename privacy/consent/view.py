"""Who may participate for one purpose now: read once from the projection, then moved on by what has changed.

Invariants:
1. What a view says is what `decide` says of the same events, at every instant it was moved to.
2. A view only moves forward, in time and in sequence numbers. Other questions are answered from the events.
3. A person whose events do not all count yet is answered from the events.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from sqlalchemy import BigInteger, ColumnElement, Connection, and_, bindparam, false, func, not_, or_, select

from confide.privacy.consent.bulk import BATCH
from confide.privacy.consent.events import ConsentEvent
from confide.privacy.consent.notices import Notice, lineage
from confide.privacy.consent.projection import Found, load
from confide.privacy.consent.state import Standing, Summary, decide, standing
from confide.privacy.consent.statements import Query
from confide.privacy.consent.tables import CONTENT, CURRENT, EVENTS, event_from_row

__all__ = ["Snapshot", "View", "participants_of_events", "standing_of"]

_BYTES = 32
#: Statements differ by how many purposes and notices they name.
_SHAPES = 64


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Who may participate for a purpose, as of (instant, registry sequence). Never leaves the site."""

    purpose: str
    as_of: int
    sequence: int
    #: Pseudonym → the personal ε limit (None: the site's). Only people whose consent stands.
    participants: Mapping[bytes, float | None]


class View:
    """Participants of one purpose as of (instant, sequence number).

    Args:
        connection: Reads one state of the registry.
        purpose: The purpose.
        at: Microseconds UTC.
        sequence: The registry's latest sequence number.
        notices: The notices that are registered.
    """

    def __init__(
        self, connection: Connection, purpose: str, at: int, sequence: int, notices: Mapping[str, Notice]
    ) -> None:
        self.purpose, self.at, self.sequence, self.notices = purpose, at, sequence, notices
        #: Pseudonym → personal ε limit, of all whose consent stands.
        self.participants: dict[bytes, float | None] = {}
        #: Persons whose standing may change by itself, in the order of the instants at which it may.
        self._ends = array("q")
        self._ending = bytearray()
        self._next = 0
        self._due: list[tuple[int, bytes]] = []
        self._lineage = lineage(purpose)
        self._read_all(connection)

    def move_on(self, connection: Connection, at: int, sequence: int) -> None:
        """To a later instant and sequence number; only persons for whom something changed are looked at."""
        learnt = self._learnt(connection, sequence) if sequence > self.sequence else ()
        changed = set(learnt) | set(self._fallen_due(at))
        self.at, self.sequence = at, sequence
        self._look_at(connection, changed)

    def _read_all(self, connection: Connection) -> None:
        """The purpose of the lineage that most persons decided on is read as a whole, by a query that decides; whoever
        decided on another one too is looked at singly."""
        found = {name: size for name, size in _sizes(len(self._lineage)).rows(connection, **_named(self._lineage))}
        if not found:
            return
        largest = max(found, key=lambda name: found[name])
        of = {"purpose": largest, "at": self.at}
        own, notices = largest == self.purpose, self._notices(largest)
        for pseudonym, limit, until in _standing(own, len(notices)).stream(connection, **of, **_named(notices)):
            self.participants[pseudonym] = limit
            if until is not None:
                self._ends.append(until)
                self._ending += pseudonym
        self._sort_ends()
        others = [name for name in found if name != largest]
        singly = _singly(len(others)).stream(connection, **of, **_named(others))
        self._look_at(connection, [pseudonym for (pseudonym,) in singly])

    def _notices(self, name: str) -> list[str]:
        """Those with which a grant of the run's own purpose does not count, or one of a purpose above it does."""
        if name == self.purpose:
            return [digest for digest, n in self.notices.items() if not n.covers(name)]
        return [digest for digest, n in self.notices.items() if n.covers_beneath and n.covers(name)]

    def _sort_ends(self) -> None:
        ends = np.frombuffer(self._ends, dtype=np.int64)
        order = np.argsort(ends, kind="stable")
        names = np.frombuffer(self._ending, dtype=np.uint8).reshape(-1, _BYTES)[order]
        self._ends, self._ending = array("q", ends[order].tobytes()), bytearray(names.tobytes())

    def _learnt(self, connection: Connection, sequence: int) -> Iterator[bytes]:
        span = {"after": self.sequence, "to": sequence}
        rows = _learning(len(self._lineage)).stream(connection, **span, **_named(self._lineage))
        return (bytes(pseudonym) for (pseudonym,) in rows)

    def _fallen_due(self, at: int) -> Iterator[bytes]:
        while self._next < len(self._ends) and self._ends[self._next] <= at:
            place = self._next * _BYTES
            yield bytes(self._ending[place : place + _BYTES])
            self._next += 1
        while self._due and self._due[0][0] <= at:
            yield heapq.heappop(self._due)[1]

    def _look_at(self, connection: Connection, pseudonyms: Iterable[bytes]) -> None:
        for pseudonym, found, events in _known(connection, self._lineage, pseudonyms, self.at):
            now, change = _answer(self.purpose, found, events, self.at, self.notices)
            if now.may_participate:
                self.participants[pseudonym] = now.max_epsilon
            else:
                self.participants.pop(pseudonym, None)
            if change is not None:
                heapq.heappush(self._due, (change, pseudonym))


def standing_of(
    connection: Connection, pseudonym: bytes, purpose: str, at: int, notices: Mapping[str, Notice]
) -> Standing:
    """One person's standing as of the latest event."""
    for _, found, events in _known(connection, lineage(purpose), [pseudonym], at):
        return _answer(purpose, found, events, at, notices)[0]
    return decide([], at)


def participants_of_events(
    connection: Connection, purpose: str, at: int, sequence: int, notices: Mapping[str, Notice]
) -> dict[bytes, float | None]:
    """The same from the events alone, as of any sequence number."""
    query = select(*CONTENT).where(
        EVENTS.c.purpose.in_(lineage(purpose)), EVENTS.c.seq <= sequence, EVENTS.c.effective_at <= at
    )
    everybody: dict[bytes, Found] = {}
    for _, *values in connection.execute(
        query.order_by(EVENTS.c.seq).execution_options(stream_results=True, yield_per=BATCH)
    ):
        event = event_from_row(values)
        found = everybody.setdefault(event.pseudonym, {})
        if event.purpose not in found:
            found[event.purpose] = Summary(event.effective_at)
        found[event.purpose].add(event)
    decided = ((person, standing(purpose, found, at, notices)) for person, found in everybody.items())
    return {person: s.max_epsilon for person, s in decided if s.may_participate}


def _answer(
    purpose: str, found: Found, events: list[ConsentEvent] | None, at: int, notices: Mapping[str, Notice]
) -> tuple[Standing, int | None]:
    """The standing, and the next instant at which it may change by itself."""
    if events is None:
        changes = [s.valid_until for s in found.values() if s.valid_until is not None]
        now = standing(purpose, found, at, notices)
    else:
        changes = [when for e in events for when in (e.effective_at, e.valid_until) if when is not None]
        now = decide(events, at, purpose, notices)
    return now, min((when for when in changes if when > at), default=None)


def _known(
    connection: Connection, purposes: tuple[str, ...], pseudonyms: Iterable[bytes], at: int
) -> Iterator[tuple[bytes, Found, list[ConsentEvent] | None]]:
    """Of each person the summaries, and the events where the summaries do not hold at this instant yet."""
    persons = iter(load(connection, purposes, pseudonyms))
    while part := list(islice(persons, BATCH)):
        unsettled = [p for p, found in part if any(s.settled_at > at for s in found.values())]
        events: dict[bytes, list[ConsentEvent]] = {p: [] for p in unsettled}
        if unsettled:
            query = select(*CONTENT).where(EVENTS.c.pseudonym.in_(unsettled), EVENTS.c.purpose.in_(purposes))
            for _, *values in connection.execute(query.order_by(EVENTS.c.seq)):
                event = event_from_row(values)
                events[event.pseudonym].append(event)
        for pseudonym, found in part:
            yield pseudonym, found, events.get(pseudonym)


def _named(values: Sequence[str]) -> dict[str, object]:
    """The values of `_among`, by their names."""
    return {f"v{number}": value for number, value in enumerate(values)}


def _among(column: ColumnElement[str], count: int) -> ColumnElement[bool]:
    return column.in_([bindparam(f"v{number}") for number in range(count)]) if count else false()


@lru_cache(_SHAPES)
def _sizes(purposes: int) -> Query:
    """Of each of these purposes how many persons decided on it."""
    query = select(CURRENT.c.purpose, func.count()).where(_among(CURRENT.c.purpose, purposes))
    return Query(query.group_by(CURRENT.c.purpose))


@lru_cache(_SHAPES)
def _standing(own: bool, notices: int) -> Query:
    """`standing`, for persons who decided on one purpose only; tested against it."""
    c, at = CURRENT.c, bindparam("at", type_=BigInteger)
    named = _among(c.notice, notices)
    return Query(
        select(c.pseudonym, c.max_epsilon, c.valid_until).where(
            c.purpose == bindparam("purpose"),
            c.settled_at <= at, c.more_notices.is_(None), c.erased_at.is_(None), c.restricted.is_(False),
            c.granted_at.is_not(None), or_(c.denied_at.is_(None), c.denied_at < c.granted_at),
            or_(c.valid_until.is_(None), c.valid_until > at),
            not_(named) if own else named,
        )
    )  # fmt: skip


@lru_cache(_SHAPES)
def _singly(others: int) -> Query:
    """Whoever decided on one of the other purposes, or is not answered by `_standing`."""
    c = CURRENT.c
    odd = and_(c.purpose == bindparam("purpose"), or_(c.settled_at > bindparam("at"), c.more_notices.is_not(None)))
    return Query(select(c.pseudonym).where(or_(odd, _among(c.purpose, others))))


@lru_cache(_SHAPES)
def _learning(purposes: int) -> Query:
    """Of whom events of these purposes tell."""
    seq = EVENTS.c.seq
    return Query(
        select(EVENTS.c.pseudonym).where(
            seq > bindparam("after"), seq <= bindparam("to"), _among(EVENTS.c.purpose, purposes)
        )
    )
