"""Consent events: what was decided, when it takes effect, and on what ground. Facts, never changed.

Times are microseconds since 1970-01-01 UTC. `effective_at` is when a decision holds in the world; the registry's
sequence number is when it was learnt (bitemporal).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

__all__ = ["ConsentEvent", "EventType", "from_micros", "now_micros", "to_micros"]


class EventType(StrEnum):
    """Kinds of events. All but `requested`, `restricted` and `unrestricted` are decisions."""

    REQUESTED = "requested"
    GIVEN = "given"
    RENEWED = "renewed"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"
    REVOKED = "revoked"
    INVALIDATED = "invalidated"
    RESTRICTED = "restricted"
    UNRESTRICTED = "unrestricted"
    OBJECTED = "objected"
    ERASED = "erased"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsentEvent:
    """One event about one subject and one purpose.

    Attributes:
        event_id: Unique in the registry; importing it again adds nothing.
        pseudonym: 32 bytes, see `confide.privacy.consent.pseudonyms`.
        purpose: What the decision is about, e.g. `research/cardiology`. Matched exactly.
        type: Kind of event.
        effective_at: Microseconds UTC from which it holds.
        valid_until: Microseconds UTC at which a grant ends (exclusive), or None.
        notice_digest: Digest of the notice shown to the person.
        lawful_basis: For example `GDPR-6-1-a`.
        jurisdiction: For example `DE`.
        evidence_ref: Where the signed form lies.
        max_epsilon: The most this person allows in total, at the ledger's δ; None is the site's limit.
    """

    event_id: str
    pseudonym: bytes
    purpose: str
    type: EventType
    effective_at: int
    valid_until: int | None = None
    notice_digest: str = ""
    lawful_basis: str = ""
    jurisdiction: str = ""
    evidence_ref: str = ""
    max_epsilon: float | None = None


def to_micros(moment: datetime) -> int:
    """Microseconds UTC of an aware datetime.

    Raises:
        ValueError: It has no offset, so it names no instant.
    """
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise ValueError("has no time zone")
    delta = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_micros(micros: int) -> datetime:
    """The aware datetime of microseconds UTC."""
    return datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)


def now_micros() -> int:
    """The present instant."""
    return to_micros(datetime.now(UTC))
