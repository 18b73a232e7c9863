"""Whose consent stands: a pure function of the events.

Invariants:
1. Default deny: no decision, no consent.
2. The latest effective decision wins; learning of a grant later never lets it override a later decision.
3. Among decisions effective at the same instant the most protective wins.
4. A restriction holds whatever was decided, until it is lifted. An erasure is final.
5. A grant whose validity has ended is not consent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from confide.privacy.consent.events import ConsentEvent, EventType

__all__ = ["Standing", "Status", "decide"]

_PRECEDENCE = {
    EventType.ERASED: 4,
    EventType.INVALIDATED: 3,
    EventType.OBJECTED: 2,
    EventType.WITHDRAWN: 2,
    EventType.REVOKED: 2,
    EventType.REFUSED: 2,
    EventType.GIVEN: 1,
    EventType.RENEWED: 1,
}
_GRANTS = (EventType.GIVEN, EventType.RENEWED)


class Status(StrEnum):
    """What the events amount to."""

    UNKNOWN = "unknown"
    GIVEN = "given"
    EXPIRED = "expired"
    RESTRICTED = "restricted"
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


def decide(events: Iterable[ConsentEvent], at: int) -> Standing:
    """The standing at an instant.

    Args:
        events: Events of one subject and one purpose, in registry order.
        at: Microseconds UTC; events effective later do not count yet.
    """
    decision: ConsentEvent | None = None
    flag: ConsentEvent | None = None
    erased = False
    for event in events:
        if event.effective_at > at:
            continue
        erased = erased or event.type is EventType.ERASED
        if event.type in _PRECEDENCE:
            if decision is None or _rank(event, at) >= _rank(decision, at):
                decision = event
        elif event.type is not EventType.REQUESTED and (
            # On a tie the restriction stands: "restricted" sorts after nothing it could lose to.
            flag is None
            or (event.effective_at, event.type is EventType.RESTRICTED)
            >= (flag.effective_at, flag.type is EventType.RESTRICTED)
        ):
            flag = event
    if erased:
        return Standing(Status.REFUSED)
    if decision is None:
        return Standing(Status.UNKNOWN)
    if decision.type not in _GRANTS:
        return Standing(Status.REFUSED)
    if decision.valid_until is not None and at >= decision.valid_until:
        return Standing(Status.EXPIRED)
    if flag is not None and flag.type is EventType.RESTRICTED:
        return Standing(Status.RESTRICTED)
    return Standing(Status.GIVEN, decision.max_epsilon)


def _rank(event: ConsentEvent, at: int) -> tuple[int, int, bool]:
    """Later wins; at the same instant the more protective: an expired grant beats a standing one."""
    return event.effective_at, _PRECEDENCE[event.type], event.valid_until is not None and at >= event.valid_until
