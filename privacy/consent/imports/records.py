"""JSON documents that hold consent records: what the formats with structure have in common."""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, BinaryIO

from confide.privacy.consent.events import from_micros, to_micros
from confide.privacy.consent.imports.event import EventBuilder, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.source import UnreadableError, documents

__all__ = ["DoubtError", "Draft", "end_of", "only_keys", "read_records", "text_of"]

#: One record may be about several purposes and several moments, not about a bomb of them.
_MAX_EVENTS = 1_000
_DURATION = re.compile(
    r"P(?:(\d{1,4})Y)?(?:(\d{1,4})M)?(?:(\d{1,4})W)?(?:(\d{1,5})D)?(?:T(?:(\d{1,5})H)?(?:(\d{1,5})M)?(?:(\d{1,5})S)?)?",
    re.ASCII,
)


class DoubtError(Exception):
    """A record leaves a doubt; becomes a rejection, never leaves this package."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a record says, before it is checked.

    Attributes:
        fields: Text by column of the CSV.
        record: The record's own name; the event's id is derived from it where `fields` has none.
        effective, until: Instants known already (microseconds UTC).
    """

    fields: Mapping[str, str]
    record: str = ""
    effective: int | None = None
    until: int | None = None


Find = Callable[[Any], Iterable[tuple[str, Any]]]
Interpret = Callable[[Any, EventBuilder, Options], Iterable[Draft]]


def read_records(
    stream: BinaryIO, options: Options, name: str, find: Find, interpret: Interpret
) -> Iterator[ImportedEvent | Rejection]:
    """Every record of every document.

    Args:
        name: The format.
        find: (pointer, record) of each record in a document; the pointer of the document itself is empty.
        interpret: The events that a record speaks of.
    """
    builder, number, line = EventBuilder(options), 0, 1
    try:
        for line, tree in documents(stream):
            if isinstance(tree, UnreadableError):
                yield Rejection(line, "file", tree.reason)
                continue
            place = ""
            try:
                for place, record in find(tree):
                    number += 1
                    at = number if place else line
                    yield from _events(record, at, place, name, builder, options, interpret)
            except DoubtError as doubt:
                yield Rejection(line, doubt.name, doubt.reason)
    except UnreadableError as error:
        yield Rejection(line, "file", error.reason)
    yield from builder.repetitions()


def _events(
    record: Any, at: int, pointer: str, name: str, builder: EventBuilder, options: Options, interpret: Interpret
) -> Iterator[ImportedEvent | Rejection]:
    try:
        drafts = list(islice(interpret(record, builder, options), _MAX_EVENTS + 1))
        if len(drafts) > _MAX_EVENTS:
            raise DoubtError("record", f"speaks of more than {_MAX_EVENTS:,} events")
    except DoubtError as doubt:
        yield Rejection(at, doubt.name, doubt.reason, pointer)
        return
    for draft in drafts:
        built = builder.build(at, draft.fields, pointer, derive_from=f"{name}\n{draft.record}",
                              effective=draft.effective, until=draft.until)  # fmt: skip
        if isinstance(built, list):
            yield from built
        else:
            yield built


def only_keys(node: Any, known: Iterable[str], what: str) -> dict[str, Any]:
    """The node, if it is an object that holds nothing but these keys.

    Raises:
        DoubtError: It is not: a key that is not understood may change what all others mean.
    """
    if not isinstance(node, dict):
        raise DoubtError(what, "is not an object")
    for key in node:
        if key not in known:
            raise DoubtError(f"{what}.{key[:60]}" if key.isprintable() else f"{what}.{key[:60]!r}",
                             "cannot be evaluated, and might change what the record means")  # fmt: skip
    return node


def text_of(value: Any, what: str) -> str:
    """Text that is not empty.

    Raises:
        DoubtError: It is something else.
    """
    if not isinstance(value, str) or not value.strip():
        raise DoubtError(what, "is missing" if value is None else "is not text, or empty")
    return value.strip()


def end_of(text: str, start: int, builder: EventBuilder, what: str) -> int | None:
    """When a validity ends (microseconds UTC).

    Args:
        text: An instant, an ISO 8601 duration from `start`, or `none`.
        start: Microseconds UTC.

    Raises:
        DoubtError: It is none of these.
    """
    if text == "none":
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        read = builder.instant(text)
        if isinstance(read, str):
            raise DoubtError(what, f"{read}, and no ISO 8601 duration either")
        return read
    years, months, weeks, days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    if not any((years, months, weeks, days, hours, minutes, seconds)):
        raise DoubtError(what, f"{text[:40]!r} is no duration")
    try:
        end = _months_later(from_micros(start), 12 * years + months)
        end += timedelta(weeks=weeks, days=days, hours=hours, minutes=minutes, seconds=seconds)
        return to_micros(end)
    except (ValueError, OverflowError):
        raise DoubtError(what, "ends after the year 9999") from None


def _months_later(moment: datetime, months: int) -> datetime:
    """The same day so many months later, or that month's last."""
    year, month = divmod(moment.year * 12 + moment.month - 1 + months, 12)
    if year > 9999:
        raise OverflowError
    return moment.replace(year=year, month=month + 1, day=min(moment.day, calendar.monthrange(year, month + 1)[1]))
