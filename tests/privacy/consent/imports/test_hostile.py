"""Hostile bytes, in every format: a rejection, never a traceback, and never more memory than a bound."""

from __future__ import annotations

import gzip
import io
import tracemalloc
from collections.abc import Iterator

import pytest

from confide.privacy.consent.imports import FORMATS, Options
from confide.privacy.consent.imports import event as event_module
from confide.privacy.consent.imports import source as source_module
from confide.privacy.consent.imports.formats import reader_of
from confide.privacy.consent.imports.source import UnreadableError, parse_json
from tests.privacy.consent.imports.reading import read
from tests.privacy.consent.imports.samples import FILES, MAPPING

DEEP = 100_000
JSON_FORMATS = ("jsonl", "fhir", "kantara", "27560")


@pytest.mark.parametrize("form", sorted(FILES))
@pytest.mark.parametrize(
    "data",
    [b"\0", b"\xff\xfe{\0}\0", b"\xc3", "ü".encode("latin-1"), b"\xed\xa0\x80", gzip.compress(b"{}" * 1000),
     b"{" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP, b'"' * DEEP, b"," * DEEP, b"\n" * DEEP, b"\r" * 10,
     b"x" * 3_000_000],
    ids=["nul", "utf-16", "cut", "latin", "surrogate", "gzip", "braces", "brackets", "objects", "quotes", "commas",
         "empty", "cr", "long"],
)  # fmt: skip
def test_bytes_that_are_no_record_are_a_rejection(form: str, data: bytes) -> None:
    _, rejections = read(form, FILES[form] + data, mapping=MAPPING)
    if data.strip():
        assert rejections
        assert all(r.reason and len(str(r)) < 500 for r in rejections[:20])
    alone, why = read(form, data, mapping=MAPPING)
    assert alone == []
    assert why or not data.strip()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":1,"a":2}', "names 'a' twice"), ('{"b":{"a":1,"c":0,"a":1}}', "names 'a' twice"),
        ("NaN", "not JSON"), ("[-Infinity]", "not JSON"), ("1e999", "not finite"), ("-1e999", "not finite"),
        ("9" * 5_000, "absurd length"), ("0." + "1" * 5_000, "absurd length"), ('"\\ud800"', "half a character"),
        ('{"\\udfff":1}', "half a character"), ('"\x01"', "is not JSON"), ("{'a':1}", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 65 + "]" * 65, "more than 64 levels"), ("[" * DEEP, "more than 64 levels"), ("[1,]", "is not JSON"),
        ("\0", "NUL"), ("01", "is not JSON"), ("1 2", "is not JSON"),
    ],
)  # fmt: skip
def test_json_is_read_strictly(text: str, reason: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        parse_json(text)
    assert reason in caught.value.reason


def test_json_that_is_only_deep_enough_or_whole_is_read() -> None:
    assert parse_json("[" * 60 + "]" * 60)
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    assert parse_json("9" * 40) == int("9" * 40)


@pytest.mark.parametrize("form", ["fhir", "kantara", "27560"])
def test_a_document_is_bounded_and_lines_are_not(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "MAX_DOCUMENT", 10_000)
    large = FILES[form] + b" " * 10_000
    _, (found,) = read(form, large)
    assert "MiB" in found.reason
    line = FILES[form].replace(b"\n", b"") + b"\n"
    events, rejections = read(form, line * 5)
    assert rejections == []
    assert len(events) == 5 * len(read(form, FILES[form])[0])


class _Endless(io.RawIOBase):
    """A first part, then the same bytes for ever: up to a hundred megabytes."""

    def __init__(self, first: bytes, again: bytes) -> None:
        self._data, self._again, self.given = first, again, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the buffer is what BufferedReader gives
        if self.given > 100_000_000:
            return 0
        while len(self._data) < len(buffer):
            self._data += self._again
        count = len(buffer)
        buffer[:], self._data = self._data[:count], self._data[count:]
        self.given += count
        return count


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


HEADER = b"event_id,subject,purpose,type,effective_at\n"


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("form", "first", "again"),
    [("csv", HEADER, b"x" * 4096), ("csv", HEADER + b'"', b"x\n" * 2048), ("csv", HEADER, b'"a\n",' * 800),
     ("csv", b"", b"a," * 2048), ("jsonl", b'{"a":"', b"x" * 4096)],
    ids=["one line", "one field", "one row", "one header", "one object"],
)  # fmt: skip
def test_a_record_without_an_end_is_given_up_early(form: str, first: bytes, again: bytes) -> None:
    stream = _Endless(first, again)
    items = list(reader_of(FORMATS[form], None)(io.BufferedReader(stream), Options()))
    assert len(items) >= 1
    assert stream.given < 8_000_000
    assert tracemalloc.get_traced_memory()[1] < 64_000_000


@pytest.mark.usefixtures("traced")
def test_memory_does_not_grow_with_the_rows_but_for_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_module, "_REMEMBERED", 1_000)

    def rows(count: int) -> Iterator[bytes]:
        yield HEADER
        for n in range(count):
            yield f"e{n},p{n},research,given,2026-01-01T00:00:00.{n:06}Z\n".encode()

    peaks = []
    for count in (3_000, 30_000):
        stream = io.BufferedReader(_Rows(rows(count)))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert sum(1 for _ in reader_of(FORMATS["csv"], None)(stream, Options())) == count
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    # An id takes 16 bytes, and as much again while they are sorted and their place grows.
    assert peaks[1] - peaks[0] < 27_000 * 40


class _Rows(io.RawIOBase):
    def __init__(self, rows: Iterator[bytes]) -> None:
        self._rows, self._data = rows, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the buffer is what BufferedReader gives
        while len(self._data) < len(buffer) and (row := next(self._rows, None)) is not None:
            self._data += row
        count = min(len(buffer), len(self._data))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count
