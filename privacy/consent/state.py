"""Whose consent stands: a pure function of one person's events and of the notices that are registered.

What *concerns* a purpose: every decision about the purpose itself; every denial (refused, withdrawn, revoked, objected,
invalidated, erased) and every restriction of a purpose above it; and a grant of a purpose above it, if its notice
covers what lies beneath. Denials of what lies beneath a purpose do not concern it.

Invariants:
1. Default deny: no decision, no consent.
2. Of all decisions that concern a purpose the latest effective one wins, so consent can be given again after a
   withdrawal; learning of a grant later never lets it override a later decision.
3. Among decisions effective at the same instant the most protective wins: a denial, then a grant whose notice was
   written for something else, then an expired grant; of grants of several purposes the smallest limit. Only two grants
   of one purpose that differ in nothing but their limit go by which was learnt last.
4. A denial or a restriction takes everything beneath its purpose with it. A restriction holds whatever was decided,
   until it is lifted at the purpose it was laid on. An erasure is final.
5. A grant whose validity has ended is not consent.
6. A grant reaches beneath its purpose only if the notice that it names is registered, was written for its purpose and
   says so. A grant that names a registered notice written for another purpose is not consent. A later grant of a
   purpose replaces the earlier one, also in what its notice covers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from confide.privacy.consent.events import ConsentEvent, EventType
from confide.privacy.consent.notices import Notice, lineage

__all__ = ["DENIALS", "GRANTS", "Standing", "Status", "Summary", "decide", "standing"]

GRANTS = frozenset({EventType.GIVEN, EventType.RENEWED})
DENIALS = frozenset(
    {EventType.REFUSED, EventType.WITHDRAWN, EventType.REVOKED, EventType.OBJECTED, EventType.INVALIDATED}
)


class Status(StrEnum):
    """What the events amount to."""

    UNKNOWN = "unknown"
    GIVEN = "given"
    EXPIRED = "expired"
    RESTRICTED = "restricted"
    #: The last grant's notice was written for another purpose.
    NOT_COVERED = "not-covered"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Standing:
    """A person's standing for one purpose: status, and the personal limit of a grant."""

    status: Status
    max_epsilon: float | None = None

    @property
    def may_participate(self) -> bool:
        """True only while consent stands."""
        return self.status is Status.GIVEN


class Fact(Protocol):
    """What a summary takes of an event."""

    @property
    def type(self) -> EventType: ...
    @property
    def effective_at(self) -> int: ...
    @property
    def valid_until(self) -> int | None: ...
    @property
    def notice_digest(self) -> str: ...
    @property
    def max_epsilon(self) -> float | None: ...


@dataclass(slots=True)
class Summary:
    """All that matters of one person's events for one purpose, at any instant from `settled_at` on.

    Instants in microseconds UTC; None: there is no such event.

    Attributes:
        settled_at: The latest instant at which one of the events takes effect.
        denied_at: When the latest denial took effect.
        granted_at: When the latest grant took effect.
        valid_until: The earliest end among the grants of that instant.
        max_epsilon: The limit of the one of them that was learnt last.
        notices: The notices that they name.
        flagged_at: When the latest restriction or lifting took effect.
        restricted: Which of both it was; on a tie the restriction.
        erased_at: When the earliest erasure took effect.
    """

    settled_at: int
    denied_at: int | None = None
    granted_at: int | None = None
    valid_until: int | None = None
    max_epsilon: float | None = None
    notices: frozenset[str] = frozenset()
    flagged_at: int | None = None
    restricted: bool = False
    erased_at: int | None = None

    def add(self, event: Fact) -> None:
        """Take in an event that was learnt after those before; it may take effect before them."""
        self.take(event.type, event.effective_at, event.valid_until, event.notice_digest, event.max_epsilon)

    def take(self, kind: EventType, at: int, until: int | None, notice: str, limit: float | None) -> None:
        """`add`, of what matters of an event."""
        if at > self.settled_at:
            self.settled_at = at
        if kind in GRANTS:
            self._grant(at, until, notice, limit)
        elif kind in DENIALS:
            if self.denied_at is None or at > self.denied_at:
                self.denied_at = at
        elif kind is EventType.ERASED:
            if self.erased_at is None or at < self.erased_at:
                self.erased_at = at
        elif kind is not EventType.REQUESTED:
            restricts = kind is EventType.RESTRICTED
            if self.flagged_at is None or at > self.flagged_at:
                self.flagged_at, self.restricted = at, restricts
            elif at == self.flagged_at:
                self.restricted = self.restricted or restricts

    def _grant(self, at: int, until: int | None, notice: str, limit: float | None) -> None:
        if self.granted_at is None or at > self.granted_at:
            self.granted_at, self.valid_until = at, until
            self.notices = frozenset((notice,))
        elif at == self.granted_at:
            if self.valid_until is None or (until is not None and until < self.valid_until):
                self.valid_until = until
            self.notices |= {notice}
        else:
            return
        self.max_epsilon = limit


def decide(
    events: Iterable[ConsentEvent], at: int, purpose: str | None = None, notices: Mapping[str, Notice] | None = None
) -> Standing:
    """The standing at an instant.

    Args:
        events: Events of one subject, in registry order.
        at: Microseconds UTC; events effective later do not count yet.
        purpose: What the standing is asked for; None: the events are all about one purpose, and it is that.
        notices: The notices that are registered, by digest.
    """
    found: dict[str, Summary] = {}
    wanted = None if purpose is None else lineage(purpose)
    for event in events:
        if event.effective_at > at or (wanted is not None and event.purpose not in wanted):
            continue
        purpose = event.purpose if purpose is None else purpose
        summary = found.get(event.purpose)
        if summary is None:
            summary = found[event.purpose] = Summary(event.effective_at)
        summary.add(event)
    return standing(purpose or "", found, at, notices or {})


def standing(purpose: str, found: Mapping[str, Summary], at: int, notices: Mapping[str, Notice]) -> Standing:
    """The standing at an instant from which on all of the summaries are settled.

    Args:
        purpose: What the standing is asked for.
        found: Summaries of one subject's events, by purpose: this one and those above it.
        at: Microseconds UTC.
        notices: The notices that are registered, by digest.
    """
    if any(s.erased_at is not None and s.erased_at <= at for s in found.values()):
        return Standing(Status.REFUSED)
    denials = [s.denied_at for s in found.values() if s.denied_at is not None]
    grants = [
        (s.granted_at, name, s)
        for name, s in found.items()
        if s.granted_at is not None and (name == purpose or _reaches_beneath(name, s, notices))
    ]
    latest = max((when for when, _, _ in grants), default=None)
    if denials and (latest is None or max(denials) >= latest):
        return Standing(Status.REFUSED)
    if latest is None:
        return Standing(Status.UNKNOWN)
    deciding = [(name, s) for when, name, s in grants if when == latest]
    if any(name == purpose and _written_for_another(purpose, s, notices) for name, s in deciding):
        return Standing(Status.NOT_COVERED)
    if any(s.valid_until is not None and at >= s.valid_until for _, s in deciding):
        return Standing(Status.EXPIRED)
    if any(s.restricted for s in found.values()):
        return Standing(Status.RESTRICTED)
    limits = [s.max_epsilon for _, s in deciding if s.max_epsilon is not None]
    return Standing(Status.GIVEN, min(limits, default=None))


def _reaches_beneath(name: str, summary: Summary, notices: Mapping[str, Notice]) -> bool:
    named = [notices.get(digest) for digest in summary.notices]
    return all(notice is not None and notice.covers_beneath and notice.covers(name) for notice in named)


def _written_for_another(purpose: str, summary: Summary, notices: Mapping[str, Notice]) -> bool:
    named = [notices[digest] for digest in summary.notices if digest in notices]
    return not all(notice.covers(purpose) for notice in named)
