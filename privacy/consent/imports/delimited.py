"""CSV: one event a row, columns by name. The reader of both our own CSV and mapped ones."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from confide.privacy.consent.imports.event import COLUMNS, REQUIRED, EventBuilder, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.source import Lines, UnreadableError

__all__ = ["read_csv_events", "read_rows"]

_KNOWN = frozenset(COLUMNS)


def read_csv_events(stream: BinaryIO, options: Options) -> Iterator[ImportedEvent | Rejection]:
    """Our own columns, see `COLUMNS`; those not in `REQUIRED` may be missing."""
    builder = EventBuilder(options)

    def interpret(header: Sequence[str]) -> Callable[[int, list[str]], ImportedEvent | list[Rejection]]:
        build = builder.build

        def row(line: int, cells: list[str]) -> ImportedEvent | list[Rejection]:
            return build(line, dict(zip(header, cells, strict=True)))

        return row

    yield from read_rows(stream, ",", _check_header, interpret)
    yield from builder.repetitions()


def read_rows(
    stream: BinaryIO,
    delimiter: str,
    check_header: Callable[[list[str]], Iterator[Rejection]],
    interpret: Callable[[Sequence[str]], Callable[[int, list[str]], ImportedEvent | list[Rejection]]],
) -> Iterator[ImportedEvent | Rejection]:
    """Rows of a CSV stream, stripped, each as long as the header.

    Args:
        check_header: What is wrong with a header; the rows are only read where nothing is.
        interpret: From the header, what makes an event of a row.
    """
    lines = Lines(stream)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        faults = list(check_header(header))
        yield from faults
        if faults:
            return
        width, row = len(header), interpret(header)
        for cells in reader:
            lines.pending = 0
            if not cells:
                continue
            if len(cells) != width:
                what = f"has {len(cells)} fields, the header has {width}"
                yield Rejection(reader.line_num, "row", what)
                continue
            found = row(reader.line_num, [cell.strip() for cell in cells])
            if found.__class__ is list:
                yield from found
            else:
                yield found  # type: ignore[misc]  # an event: mypy does not follow __class__
    except csv.Error as error:
        yield Rejection(reader.line_num, "row", f"is not CSV: {error}")
    except UnreadableError as error:
        yield Rejection(max(1, lines.number), "file", error.reason)


def _check_header(header: list[str]) -> Iterator[Rejection]:
    for name in REQUIRED:
        if name not in header:
            yield Rejection(1, name, "the header does not name this column")
    for place, name in enumerate(header):
        if name not in _KNOWN:
            shown = name[:40] if name.isprintable() else repr(name[:40])
            yield Rejection(1, shown or "(empty)", f"unknown column; known: {', '.join(COLUMNS)}")
        elif name in header[:place]:
            yield Rejection(1, name, "named twice")
