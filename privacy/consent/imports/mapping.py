"""A mapping file: what an operator declares about the CSV export of a consent platform (TOML).

    [format]
    delimiter = ";"                        # default ","
    time_zone = "+01:00"                   # for instants without an offset; a fixed one, never a place's
    time_format = "%d.%m.%Y %H:%M:%S"      # or "unix", "unix_ms"; default: ISO 8601
    ignore = ["ip_address"]                # columns that say nothing about consent

    [columns]                              # our name = the file's
    subject = "customer"
    type = "action"
    effective_at = "time"

    [constants]                            # what the file does not say
    purpose = "research/cardiology"

    [values.type]                          # the file's value = ours; what is not listed is rejected
    "opted in" = "given"
    "opted out" = "withdrawn"

Every column must be mapped or ignored: one that is not known might say that a consent ended. `[values.purpose]` serves
every format, `[values.termination]` consent receipts; those formats need no other section.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from confide.errors import ConfigError
from confide.privacy.consent.events import EventType
from confide.privacy.consent.imports.delimited import Row, read_rows
from confide.privacy.consent.imports.event import COLUMNS, REQUIRED, EventBuilder, ImportedEvent, Options, Rejection

__all__ = ["ColumnMapping", "load_mapping", "read_mapped"]

_KEYS: dict[str, tuple[str, ...]] = {
    "": ("format", "columns", "constants", "values"),
    "format": ("delimiter", "time_zone", "time_format", "ignore"),
    "columns": COLUMNS,
    "constants": tuple(name for name in COLUMNS if name not in ("event_id", "subject", "effective_at")),
    "values": ("type", "purpose", "termination"),
}
#: Its minute must come back: a format that leaves out a part would make an instant up.
_PROBE = datetime(2026, 11, 23, 14, 5, tzinfo=UTC)
_OFFSET = re.compile(r"(Z)|([+-])(\d\d):(\d\d)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnMapping:
    """A mapping file's content. `columns` is our name → the file's."""

    delimiter: str = ","
    time_zone: timezone | None = None
    time_format: str = ""
    ignore: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def load_mapping(path: Path) -> ColumnMapping:
    """Read a mapping file.

    Raises:
        ConfigError: It cannot be read, or is not what the module says.
    """
    try:
        tree = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path), hint="name a mapping file (TOML)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"is not TOML: {error}", where=str(path), hint="mend the mapping file") from None
    return _Parser(str(path)).parse(tree)


@dataclass(frozen=True, slots=True)
class _Parser:
    where: str

    def parse(self, tree: dict[str, Any]) -> ColumnMapping:
        top = self._table(tree, "")
        form = self._table(top.get("format", {}), "format")
        ignore = form.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise self._wrong("format.ignore", "is not a list of column names")
        delimiter = self._text(form.get("delimiter", ","), "format.delimiter")
        if len(delimiter) != 1 or delimiter in '"\r\n\0':
            raise self._wrong("format.delimiter", "is not one character")
        values = self._table(top.get("values", {}), "values")
        found = ColumnMapping(
            delimiter=delimiter,
            time_zone=self._zone(form["time_zone"]) if "time_zone" in form else None,
            time_format=self._time_format(form["time_format"]) if "time_format" in form else "",
            ignore=tuple(ignore),
            columns=self._texts(self._table(top.get("columns", {}), "columns"), "columns"),
            constants=self._texts(self._table(top.get("constants", {}), "constants"), "constants"),
            values={name: self._texts(table, f"values.{name}") for name, table in values.items()},
        )
        self._check(found)
        return found

    def _check(self, found: ColumnMapping) -> None:
        for name in found.constants:
            if name in found.columns:
                raise self._wrong(f"constants.{name}", "is mapped to a column as well")
        named = [*found.columns.values(), *found.ignore]
        for column in named:
            if named.count(column) > 1:
                raise self._wrong("columns", f"uses {column!r} twice")
        for kind in found.values.get("type", {}).values():
            if kind not in list(EventType):
                raise self._wrong("values.type", f"{kind!r} is none of {', '.join(EventType)}")

    def _table(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(name, "is not a table")
        for key in value:
            if key not in _KEYS[name]:
                near = get_close_matches(key, _KEYS[name], n=1)
                raise self._wrong(
                    f"{name}.{key}".strip("."), "is not known" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        return value

    def _texts(self, value: Any, name: str) -> dict[str, str]:
        if not isinstance(value, dict):
            raise self._wrong(name, "is not a table")
        return {key: self._text(text, f"{name}.{key}") for key, text in value.items()}

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not value:
            raise self._wrong(name, "is not text, or empty")
        return value

    def _zone(self, value: Any) -> timezone:
        match = _OFFSET.fullmatch(self._text(value, "format.time_zone"))
        if match is None or int(match[3] or 0) > 14 or int(match[4] or 0) > 59:
            raise self._wrong("format.time_zone", "is not a fixed offset such as +01:00 (a place's offset changes)")
        minutes = 60 * int(match[3] or 0) + int(match[4] or 0)
        return timezone(timedelta(minutes=-minutes if match[2] == "-" else minutes))

    def _time_format(self, value: Any) -> str:
        text = self._text(value, "format.time_format")
        if text in ("unix", "unix_ms"):
            return text
        try:
            whole = "%Z" not in text and datetime.strptime(_PROBE.strftime(text), text).replace(tzinfo=UTC) == _PROBE
        except (ValueError, re.error):
            whole = False
        if not whole:
            raise self._wrong(
                "format.time_format", "does not write a whole date and time, with numbers only for a zone"
            )
        return text

    def _wrong(self, name: str, what: str) -> ConfigError:
        return ConfigError(what, where=f"{self.where}: {name}", hint="see the mapping file's format in docs/consent.md")


def read_mapped(stream: BinaryIO, options: Options, mapping: ColumnMapping) -> Iterator[ImportedEvent | Rejection]:
    """Rows of a CSV whose columns the mapping names."""
    builder = EventBuilder(options, mapping.time_zone, mapping.time_format)
    kinds = mapping.values.get("type")

    def check(header: list[str]) -> Iterator[Rejection]:
        for ours in REQUIRED:
            if ours not in mapping.columns and ours not in mapping.constants and ours != "event_id":
                yield Rejection(1, ours, "the mapping names no column and no constant for it")
        for ours, theirs in mapping.columns.items():
            if header.count(theirs) != 1:
                yield Rejection(1, ours, f"its column {theirs!r} stands {header.count(theirs)} times in the header")
        for theirs in header:
            if theirs not in mapping.columns.values() and theirs not in mapping.ignore:
                yield Rejection(1, repr(theirs[:40]), "is neither mapped nor ignored")

    def interpret(header: Sequence[str]) -> Row:
        places = [(ours, header.index(theirs)) for ours, theirs in mapping.columns.items()]
        derive_from = "" if "event_id" in mapping.columns else "mapped"

        def row(line: int, cells: list[str], _plain: bool) -> ImportedEvent | list[Rejection]:
            fields = {**mapping.constants, **{ours: cells[place] for ours, place in places}}
            if kinds is not None and "type" in mapping.columns:
                kind = kinds.get(fields["type"])
                if kind is None:
                    return [Rejection(line, "type", f"{fields['type'][:40]!r} is not in the mapping's values.type")]
                fields["type"] = kind
            return builder.build(line, fields, derive_from=derive_from)

        return row

    yield from read_rows(stream, mapping.delimiter, check, interpret)
    yield from builder.repetitions()
