"""The formats of consent files, and how one is told from its content."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import BinaryIO

from confide.errors import ConfigError, ConsentError
from confide.privacy.consent.imports.delimited import read_csv_events
from confide.privacy.consent.imports.dpv_27560 import read_27560
from confide.privacy.consent.imports.event import ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.fhir import read_fhir
from confide.privacy.consent.imports.jsonl import read_jsonl
from confide.privacy.consent.imports.kantara import read_kantara
from confide.privacy.consent.imports.mapping import ColumnMapping, read_mapped

__all__ = ["FORMATS", "Format", "Reader", "choose_format", "reader_of"]

#: The interface of a format: bytes in; valid events, or why a record is none, out.
Reader = Callable[[BinaryIO, Options], Iterator[ImportedEvent | Rejection]]
#: Bytes that are looked at to tell the format.
HEAD = 1 << 16


@dataclass(frozen=True, slots=True)
class Format:
    """A format: its name, what it is, what tells it in JSON text, and its reader."""

    name: str
    title: str
    mark: re.Pattern[bytes] | None
    read: Reader | None


FORMATS = {
    f.name: f
    for f in (
        Format("csv", "CSV, one event a row", None, read_csv_events),
        Format("jsonl", "JSON, one event a line", re.compile(rb'"(?:event_id|effective_at)"\s*:'), read_jsonl),
        Format("27560", "ISO/IEC TS 27560 consent records, DPV JSON-LD",
               re.compile(rb'dpv[:#]Consent|"@graph"\s*:|"@context"\s*:'), read_27560),
        Format("fhir", "FHIR R4 Consent resources", re.compile(rb'"resourceType"\s*:'), read_fhir),
        Format("kantara", "Kantara consent receipts 1.1",
               re.compile(rb'"consentReceiptID"\s*:|"piiPrincipalId"\s*:'), read_kantara),
        Format("mapped", "CSV with a mapping file", None, None),
    )
}  # fmt: skip


def choose_format(head: bytes, mapping: ColumnMapping | None, name: str | None = None) -> Format:
    """The format that is named, else the one that the file's first bytes show.

    Raises:
        ConfigError: There is no format of this name.
        ConsentError: The bytes show none, or several.
    """
    if name is not None:
        if name not in FORMATS:
            near = get_close_matches(name, FORMATS, n=1)
            raise ConfigError(
                f"{name!r} is no format" + (f"; did you mean {near[0]!r}?" if near else ""),
                where="--format", hint=f"one of {', '.join(FORMATS)}",
            )  # fmt: skip
        return FORMATS[name]
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith((b"{", b"[")):
        return FORMATS["mapped" if mapping is not None and mapping.columns else "csv"]
    shown = [f for f in FORMATS.values() if f.mark is not None and f.mark.search(text)]
    if len(shown) != 1:
        names = ", ".join(f.name for f in shown) or "none"
        raise ConsentError(f"the content does not show which format it is (signs of: {names})",
                           hint=f"name it with --format, one of {', '.join(FORMATS)}")  # fmt: skip
    return shown[0]


def reader_of(found: Format, mapping: ColumnMapping | None) -> Reader:
    """What reads a format.

    Raises:
        ConfigError: It needs a mapping, and there is none.
    """
    if found.read is not None:
        return found.read
    if mapping is None or not mapping.columns:
        raise ConfigError("needs a mapping file with [columns]", where="--format mapped", hint="add --mapping FILE")
    return partial(read_mapped, mapping=mapping)
