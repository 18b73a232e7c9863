"""What every import format has in common: the events and rejections that come out, and the check between.

Invariants:
1. A record becomes an event only if nothing in it leaves a doubt; otherwise every fault is named.
2. Nothing is made up: an event carries what the record says and what the operator declared, never a default that
   grants.
3. The text of a record is checked without exceptions on the way of a good one: millions of rows pass here.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from difflib import get_close_matches

import numpy as np

from confide.privacy.consent.events import EventType
from confide.privacy.consent.pseudonyms import canonical_subject
from confide.privacy.digest import digest

__all__ = ["COLUMNS", "PSEUDONYM", "REQUIRED", "EventBuilder", "ImportedEvent", "Options", "Rejection"]

COLUMNS = (
    "event_id", "subject", "purpose", "type", "effective_at", "valid_until",
    "notice_digest", "lawful_basis", "jurisdiction", "evidence_ref", "max_epsilon",
)  # fmt: skip
REQUIRED = ("event_id", "subject", "purpose", "type", "effective_at")
#: How an export names a person whose identifier it does not know. No import takes it: it is nobody's identifier.
PSEUDONYM = "urn:confide:pseudonym:"
_MAX_FIELD, _MAX_JURISDICTION = 200, 50
_KINDS = {str(kind): kind for kind in EventType}
_GRANTS = (EventType.GIVEN, EventType.RENEWED)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = -62_135_596_800_000_000, 253_402_300_799_999_999  # the years 1 to 9999
_REMEMBERED = 100_000
_NO_ZONE = "has no time zone (write an offset, e.g. 2026-01-31T09:00:00+01:00)"


@dataclass(frozen=True, slots=True)
class ImportedEvent:
    """A valid record, still naming the person; the registry replaces `subject` by a pseudonym.

    `derived` says that the source names no event, so that `event_id` is a digest of what it says. It could be guessed
    from an identifier, and is therefore replaced by a keyed one before it is stored.
    """

    event_id: str
    subject: str
    purpose: str
    type: EventType
    effective_at: int
    valid_until: int | None
    notice_digest: str
    lawful_basis: str
    jurisdiction: str
    evidence_ref: str
    max_epsilon: float | None
    derived: bool = False


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a record cannot be taken.

    Attributes:
        line: Its line; where the file is one JSON document, its number, counted from 1.
        field: What is wrong in it.
        reason: What is wrong with that.
        pointer: Its JSON pointer, where the file is one JSON document.
    """

    line: int
    field: str
    reason: str
    pointer: str = ""

    def __str__(self) -> str:
        place = f"record {self.line} at {self.pointer}" if self.pointer else f"line {self.line}"
        return f"{place}, {self.field}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the operator declares about a file.

    Attributes:
        purposes: The purposes there are; None where any may be new.
        values: Field → its value in the file → what it means here. For `purpose`, and for `type` in mapped CSV; for
            `termination` in consent receipts: `none`, a duration or an instant.
    """

    purposes: frozenset[str] | None = None
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class EventBuilder:
    """Turns the text fields of records into events, or says what is wrong with them.

    Args:
        options: What the operator declared.
        zone: The zone of instants that name none; None refuses them.
        time_format: A `strptime` format, `unix` or `unix_ms`; empty is ISO 8601.
    """

    def __init__(self, options: Options, zone: tzinfo | None = None, time_format: str = "") -> None:
        self._purposes = options.purposes
        self._purpose_names = options.values.get("purpose")
        self._zone, self._time_format = zone, time_format
        self._declares = bool(zone or time_format or self._purpose_names) or self._purposes is not None
        self._instants: dict[str, int | str] = {}
        # Only what it takes to find a repetition is kept: 16 bytes an event. Two ids of n have the same hash with
        # probability n² / 2⁶⁵; that is a false alarm, which the next reading, with other hashes, does not repeat.
        self._ids, self._lines = array("q"), array("Q")

    def build(
        self, line: int, fields: Mapping[str, str], pointer: str = "", *, derive_from: str = "",
        effective: int | None = None, until: int | None = None,
    ) -> ImportedEvent | list[Rejection]:  # fmt: skip
        """Check one record.

        Args:
            line: See `Rejection.line`.
            fields: Stripped text by column; what is not there is empty.
            pointer: See `Rejection.pointer`.
            derive_from: Format and record name that the event's id is derived from; empty where the record has one.
            effective, until: Instants that the format has read already (microseconds UTC).
        """
        bad: list[Rejection] = []
        get = fields.get
        for name in REQUIRED:
            if not get(name) and not (
                (derive_from and name == "event_id") or (effective is not None and name == "effective_at")
            ):
                bad.append(Rejection(line, name, "is empty", pointer))
        jurisdiction = get("jurisdiction", "")
        joined = "".join(fields.values())
        too_long = len(joined) > _MAX_FIELD and max(map(len, fields.values())) > _MAX_FIELD
        if too_long or len(jurisdiction) > _MAX_JURISDICTION or not joined.isprintable():
            bad += _unfit(line, fields, pointer)
        kind = _KINDS.get(get("type", ""))
        if kind is None and get("type"):
            bad.append(Rejection(line, "type", f"{fields['type'][:40]!r} is none of {', '.join(EventType)}", pointer))
        if effective is None:
            effective = self._read(line, "effective_at", fields, pointer, bad)
        if until is None:
            until = self._read(line, "valid_until", fields, pointer, bad)
        if effective is not None and until is not None and until <= effective:
            bad.append(Rejection(line, "valid_until", "is not after effective_at", pointer))
        limit = None
        if get("max_epsilon"):
            limit = _positive(fields["max_epsilon"])
            if limit is None:
                what = f"{fields['max_epsilon'][:40]!r} is not a positive number"
                bad.append(Rejection(line, "max_epsilon", what, pointer))
        if (until is not None or limit is not None) and kind is not None and kind not in _GRANTS:
            what = "only given and renewed carry valid_until or max_epsilon"
            bad.append(Rejection(line, "type", what, pointer))
        purpose = self.purpose(get("purpose", ""))
        if self._purposes is not None and purpose and purpose not in self._purposes:
            bad.append(Rejection(line, "purpose", self._unknown(purpose), pointer))
        subject = canonical_subject(get("subject", ""))
        if subject.startswith(PSEUDONYM):
            bad.append(Rejection(line, "subject", _BY_PSEUDONYM, pointer))
        if bad or kind is None or effective is None:
            return bad
        event_id = get("event_id", "")
        if event_id:
            self._ids.append(hash(event_id))
            self._lines.append(line)
        event = ImportedEvent(
            event_id, subject, purpose, kind, effective, until, get("notice_digest", ""), get("lawful_basis", ""),
            jurisdiction, get("evidence_ref", ""), limit, not event_id,
        )  # fmt: skip
        return event if event_id else replace(event, event_id=_derive(derive_from, event))

    def quick(
        self, line: int, event_id: str, subject: str, purpose: str, kind: str, effective_at: str, valid_until: str,
        notice: str, basis: str, jurisdiction: str, evidence: str, limit: str,
    ) -> ImportedEvent | None:  # fmt: skip
        """What `build` makes of the same stripped text, known to print, where there is nothing to look at closely: by
        far most rows. None: ask `build`, also for what is wrong."""
        found = _KINDS.get(kind)
        if found is None or limit or not (event_id and subject and purpose) or self._declares:
            return None
        if len(jurisdiction) > _MAX_JURISDICTION or "." in subject or subject.startswith(PSEUDONYM):
            return None
        longest = max(len(event_id), len(subject), len(purpose), len(notice), len(basis), len(evidence))
        if longest > _MAX_FIELD:
            return None
        try:
            begins = _iso(effective_at) - _EPOCH
            ends = _iso(valid_until) - _EPOCH if valid_until else None
        except (ValueError, TypeError, OverflowError):  # a TypeError: it has no offset
            return None
        effective, until = _micros(begins), None if ends is None else _micros(ends)
        if until is not None and (found not in _GRANTS or not effective < until <= _LAST):
            return None
        if not _FIRST <= effective <= _LAST:
            return None
        self._ids.append(hash(event_id))
        self._lines.append(line)
        return ImportedEvent(
            event_id, subject, purpose, found, effective, until, notice, basis, jurisdiction, evidence, None
        )

    def purpose(self, text: str) -> str:
        """The purpose by our name, where the operator declared one."""
        return text if self._purpose_names is None else self._purpose_names.get(text, text)

    def repetitions(self) -> Iterator[Rejection]:
        """Events whose id an earlier one has. Ask when the file is at its end."""
        ids = np.frombuffer(self._ids, dtype=np.int64)
        in_order = np.sort(ids)
        if not (in_order[1:] == in_order[:-1]).any():
            return
        first: dict[int, int] = {}
        repeated = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
        for place in np.flatnonzero(np.isin(ids, list(repeated))).tolist():
            known, line = self._ids[place], self._lines[place]
            if known in first:
                yield Rejection(line, "event_id", f"repeats line {first[known]}")
            first.setdefault(known, line)

    def _read(self, line: int, name: str, fields: Mapping[str, str], pointer: str, bad: list[Rejection]) -> int | None:
        text = fields.get(name)
        if not text:
            return None
        found = self._instants.get(text)
        if found is None:
            if len(self._instants) >= _REMEMBERED:
                self._instants.clear()
            found = self._instants[text] = self.instant(text)
        if isinstance(found, str):
            bad.append(Rejection(line, name, found, pointer))
            return None
        return found

    def instant(self, text: str) -> int | str:
        """Microseconds UTC of a text, or what is wrong with it."""
        try:
            if self._time_format in ("unix", "unix_ms"):
                if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) <= 16):
                    return f"{text[:40]!r} is not a whole number"
                micros = int(text) * (1_000_000 if self._time_format == "unix" else 1_000)
            else:
                read = datetime.strptime(text, self._time_format) if self._time_format else _iso(text)
                if read.tzinfo is None:
                    if self._zone is None:
                        return _NO_ZONE
                    if not self._time_format and len(text) <= len("2026-01-31"):
                        return f"{text!r} is a day without a time"
                    read = read.replace(tzinfo=self._zone)
                micros = _micros(read - _EPOCH)
        except (ValueError, OverflowError):
            micros = _LAST + 1
        if not _FIRST <= micros <= _LAST:
            what = f"an instant as {self._time_format!r} writes it" if self._time_format else "an ISO 8601 instant"
            return f"{text[:40]!r} is not {what}"
        return micros

    def _unknown(self, purpose: str) -> str:
        near = get_close_matches(purpose, self._purposes or (), n=1)
        return f"{purpose[:80]!r} is not a known purpose" + (f"; did you mean {near[0]!r}?" if near else "")


def _micros(delta: timedelta) -> int:
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


_iso = datetime.fromisoformat
_BY_PSEUDONYM = "names a person by pseudonym, which only the registry it comes from knows; export it with identifiers"


def _derive(source: str, event: ImportedEvent) -> str:
    """SHA-256 over the format, the record's own name and what the event says, so that a second import adds nothing."""
    said = (
        source, event.subject, event.purpose, event.type, str(event.effective_at), str(event.valid_until),
        event.notice_digest, event.lawful_basis, event.jurisdiction, event.evidence_ref, str(event.max_epsilon),
    )  # fmt: skip
    return "sha256:" + digest("consent-import", *(part.encode() for part in said)).hex()


def _unfit(line: int, fields: Mapping[str, str], pointer: str) -> Iterator[Rejection]:
    for name, text in fields.items():
        most = _MAX_JURISDICTION if name == "jurisdiction" else _MAX_FIELD
        if len(text) > most:
            yield Rejection(line, name, f"is longer than {most} characters", pointer)
        elif not text.isprintable():
            yield Rejection(line, name, "holds a character that does not print (a line break, a tab, a no-break space)",
                            pointer)  # fmt: skip


def _positive(text: str) -> float | None:
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
