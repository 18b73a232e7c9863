"""JSONL: one object a line, with the fields of the CSV. Null and a missing field are the same: not given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from confide.privacy.consent.imports.event import COLUMNS, EventBuilder, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.source import Lines, UnreadableError, parse_json

__all__ = ["read_jsonl"]

#: Where a number may stand for its text.
_NUMBERS = {"subject": (int,), "event_id": (int,), "max_epsilon": (int, float)}


def read_jsonl(stream: BinaryIO, options: Options) -> Iterator[ImportedEvent | Rejection]:
    """One event a line; empty lines are nothing."""
    builder, lines = EventBuilder(options), Lines(stream)
    try:
        for text in lines:
            lines.pending = 0
            if not text.strip():
                continue
            try:
                fields = _fields(parse_json(text), lines.number)
            except UnreadableError as error:
                yield Rejection(lines.number, "line", error.reason)
                continue
            built = fields if isinstance(fields, list) else builder.build(lines.number, fields)
            if isinstance(built, list):
                yield from built
            else:
                yield built
    except UnreadableError as error:
        yield Rejection(max(1, lines.number), "file", error.reason)
    yield from builder.repetitions()


def _fields(tree: Any, line: int) -> dict[str, str] | list[Rejection]:
    if not isinstance(tree, dict):
        return [Rejection(line, "line", "is not a JSON object")]
    fields, bad = {}, []
    for name, value in tree.items():
        if name not in COLUMNS:
            shown = name[:40] if name.isprintable() and name else repr(name[:40])
            bad.append(Rejection(line, shown, f"unknown field; known: {', '.join(COLUMNS)}"))
        elif isinstance(value, str):
            fields[name] = value.strip()
        elif type(value) in _NUMBERS.get(name, ()):  # not bool, which is an int to isinstance
            fields[name] = repr(value)
        elif value is not None:
            bad.append(Rejection(line, name, "is not text"))
    return bad or fields
