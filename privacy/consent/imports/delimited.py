"""CSV: one event a row, columns by name. The reader of both our own CSV and mapped ones.

Millions of rows pass here, so what machines write is read on a shorter way: where a block of lines holds neither quotes
nor anything that does not print, a row is what stands between the delimiters. From the first block on that is not so
everything is read by `csv`. Both ways say the same of the same bytes, which a test compares.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import BinaryIO

from confide.privacy.consent.imports.event import COLUMNS, REQUIRED, EventBuilder, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.source import Lines, PlainLines, UnreadableError

__all__ = ["Row", "read_csv_events", "read_rows"]

_KNOWN = frozenset(COLUMNS)
#: What makes an event of a line's number, its stripped cells, and whether they are known to print.
Row = Callable[[int, list[str], bool], ImportedEvent | list[Rejection]]


def read_csv_events(stream: BinaryIO, options: Options) -> Iterator[ImportedEvent | Rejection]:
    """Our own columns, see `COLUMNS`; those not in `REQUIRED` may be missing."""
    builder = EventBuilder(options)

    def interpret(header: Sequence[str]) -> Row:
        build, quick = builder.build, builder.quick
        # Every column in its place; one that is missing is the empty cell put at the end.
        ordered = itemgetter(*(header.index(name) if name in header else len(header) for name in COLUMNS))

        def row(line: int, cells: list[str], plain: bool) -> ImportedEvent | list[Rejection]:
            found = quick(line, *ordered([*cells, ""])) if plain else None
            return build(line, dict(zip(header, cells, strict=True))) if found is None else found

        return row

    yield from read_rows(stream, ",", _check_header, interpret)
    yield from builder.repetitions()


def read_rows(
    stream: BinaryIO,
    delimiter: str,
    check_header: Callable[[list[str]], Iterator[Rejection]],
    interpret: Callable[[Sequence[str]], Row],
) -> Iterator[ImportedEvent | Rejection]:
    """Rows of a CSV stream, stripped, each as long as the header.

    Args:
        check_header: What is wrong with a header; the rows are only read where nothing is.
        interpret: From the header, what makes an event of a row.
    """
    plain = PlainLines(stream, delimiter)
    header = plain.header()
    row = None
    if header is not None:
        faults = list(check_header(header))
        yield from faults
        if faults:
            return
        row = interpret(header)
        for number, block in plain:
            yield from _plain_rows(block, number, delimiter, len(header), row)
    yield from _other_rows(Lines(plain.rest(), plain.number), delimiter, check_header, interpret, header, row)


def _plain_rows(
    block: list[str], number: int, delimiter: str, width: int, row: Row
) -> Iterator[ImportedEvent | Rejection]:
    for line, text in enumerate(block, number + 1):
        cells = text.split(delimiter)
        if len(cells) != width or not text:
            if text:
                yield _misfit(line, cells, width)
            continue
        found = row(line, [cell.strip() for cell in cells] if " " in text else cells, True)
        if found.__class__ is list:
            yield from found
        else:
            yield found  # type: ignore[misc]  # an event: mypy does not follow __class__


def _other_rows(
    lines: Lines,
    delimiter: str,
    check_header: Callable[[list[str]], Iterator[Rejection]],
    interpret: Callable[[Sequence[str]], Row],
    header: list[str] | None,
    row: Row | None,
) -> Iterator[ImportedEvent | Rejection]:
    """The same by `csv`; without a header the first row is it."""
    reader, before = csv.reader(iter(lines), delimiter=delimiter, strict=True), lines.number
    try:
        if header is None or row is None:
            header = next(reader, [])
            faults = list(check_header(header))
            yield from faults
            if faults:
                return
            row = interpret(header)
        width = len(header)
        for cells in reader:
            lines.pending = 0
            if len(cells) != width:
                if cells:
                    yield _misfit(before + reader.line_num, cells, width)
                continue
            found = row(before + reader.line_num, [cell.strip() for cell in cells], False)
            if found.__class__ is list:
                yield from found
            else:
                yield found  # type: ignore[misc]  # an event: mypy does not follow __class__
    except csv.Error as error:
        yield Rejection(before + reader.line_num, "row", f"is not CSV: {error}")
    except UnreadableError as error:
        yield Rejection(max(1, lines.number), "file", error.reason)


def _misfit(line: int, cells: list[str], width: int) -> Rejection:
    return Rejection(line, "row", f"has {len(cells)} fields, the header has {width}")


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
