"""Import consent events from CSV: everything is validated first, then applied in one transaction.

Whatever cannot be read without doubt is rejected with its line, and then nothing at all is applied: a half-read
list of consents is worse than none.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from confide.errors import ConsentError
from confide.privacy.consent.events import EventType, to_micros
from confide.privacy.consent.pseudonyms import canonical_subject

__all__ = ["COLUMNS", "ImportedEvent", "Rejection", "parse_csv", "read_csv"]

COLUMNS = (
    "event_id", "subject", "purpose", "type", "effective_at", "valid_until",
    "notice_digest", "lawful_basis", "jurisdiction", "evidence_ref", "max_epsilon",
)  # fmt: skip
_REQUIRED = ("event_id", "subject", "purpose", "type", "effective_at")
_MAX_FIELD = 200


@dataclass(frozen=True, slots=True)
class ImportedEvent:
    """A valid row, still naming the person; the registry replaces `subject` by a pseudonym."""

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


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a line cannot be taken."""

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.field}: {self.reason}"


def read_csv(path: Path) -> list[ImportedEvent]:
    """Read a file of events.

    Raises:
        ConsentError: It cannot be read, or any line is rejected; every rejected line is named.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConsentError("there is no such file", where=str(path), hint="give the path of a consent CSV") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConsentError(f"cannot be read: {error}", where=str(path), hint="give a readable UTF-8 CSV") from None
    events, rejections = parse_csv(content)
    if rejections:
        shown = "; ".join(map(str, rejections[:10]))
        more = f"; and {len(rejections) - 10} more" if len(rejections) > 10 else ""
        raise ConsentError(
            shown + more, where=str(path), hint="nothing was imported; mend these lines and import again"
        )
    return events


def parse_csv(content: str) -> tuple[list[ImportedEvent], list[Rejection]]:
    """Validate rows. Pure: the same text gives the same answer."""
    if "\0" in content:
        return [], [Rejection(1, "file", "holds a NUL byte, so it is not text")]
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    events: list[ImportedEvent] = []
    rejections: list[Rejection] = []
    try:
        header = next(reader, [])
        rejections += _check_header(header)
        if rejections:
            return [], rejections
        seen: dict[str, int] = {}
        for cells in reader:
            if not cells:
                continue
            line = reader.line_num
            if len(cells) != len(header):
                rejections.append(Rejection(line, "row", f"has {len(cells)} fields, the header has {len(header)}"))
                continue
            row = dict.fromkeys(COLUMNS, "") | {k: v.strip() for k, v in zip(header, cells, strict=True)}
            found, bad = _parse_row(row, line)
            if found is not None and found.event_id in seen:
                bad.append(Rejection(line, "event_id", f"repeats line {seen[found.event_id]}"))
            rejections += bad
            if found is not None and not bad:
                seen[found.event_id] = line
                events.append(found)
    except csv.Error as error:
        rejections.append(Rejection(reader.line_num, "row", f"is not CSV: {error}"))
    return ([], rejections) if rejections else (events, [])


def _check_header(header: list[str]) -> Iterable[Rejection]:
    for name in _REQUIRED:
        if name not in header:
            yield Rejection(1, name, "the header does not name this column")
    for name in header:
        if name not in COLUMNS:
            yield Rejection(1, name or "(empty)", f"unknown column; known: {', '.join(COLUMNS)}")
        elif header.count(name) > 1:
            yield Rejection(1, name, "named twice")


def _parse_row(row: dict[str, str], line: int) -> tuple[ImportedEvent | None, list[Rejection]]:
    bad: list[Rejection] = []

    def reject(field: str, reason: str) -> None:
        bad.append(Rejection(line, field, reason))

    def instant(field: str) -> int | None:
        if not row[field]:
            return None
        try:
            return to_micros(datetime.fromisoformat(row[field]))
        except (ValueError, OverflowError) as error:
            zone = "has no time zone" in str(error)
            reject(
                field,
                "has no time zone (write an offset, e.g. 2026-01-31T09:00:00+01:00)"
                if zone
                else f"{row[field][:40]!r} is not an ISO 8601 instant",
            )
            return None

    for field in _REQUIRED:
        if not row[field]:
            reject(field, "is empty")
    for field in COLUMNS:
        if len(row[field]) > _MAX_FIELD:
            reject(field, f"is longer than {_MAX_FIELD} characters")
    kind = None
    if row["type"]:
        try:
            kind = EventType(row["type"])
        except ValueError:
            reject("type", f"{row['type'][:40]!r} is none of {', '.join(EventType)}")
    effective, until = instant("effective_at"), instant("valid_until")
    if effective is not None and until is not None and until <= effective:
        reject("valid_until", "is not after effective_at")
    limit = _limit(row["max_epsilon"], reject)
    if kind not in (None, EventType.GIVEN, EventType.RENEWED) and (until is not None or limit is not None):
        reject("type", "only given and renewed carry valid_until or max_epsilon")
    if bad or kind is None or effective is None:
        return None, bad
    return (
        ImportedEvent(
            event_id=row["event_id"], subject=canonical_subject(row["subject"]), purpose=row["purpose"], type=kind,
            effective_at=effective, valid_until=until, notice_digest=row["notice_digest"],
            lawful_basis=row["lawful_basis"], jurisdiction=row["jurisdiction"], evidence_ref=row["evidence_ref"],
            max_epsilon=limit,
        ),
        bad,
    )  # fmt: skip


def _limit(text: str, reject: object) -> float | None:
    if not text:
        return None
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        reject("max_epsilon", f"{text[:40]!r} is not a positive number")  # type: ignore[operator]  # the local function
        return None
    return value
