"""Imports: each reason to reject, with its line; all or nothing; and no text that grants more than it says."""

from __future__ import annotations

import csv
import io
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from confide.errors import ConsentError
from confide.privacy.consent import EventType, ImportedEvent, Rejection, parse_csv, read_csv, to_micros
from confide.privacy.consent.imports import source
from confide.privacy.consent.imports.event import EventBuilder
from tests.privacy.consent.imports.reading import read

HEADER = "event_id,subject,purpose,type,effective_at,valid_until,lawful_basis,max_epsilon"
GOOD = "1,ann,research,given,2026-01-31T09:00:00+01:00,2027-01-31T09:00:00Z,GDPR-6-1-a,2.5"
MICROS = to_micros(datetime(2026, 1, 31, 8, tzinfo=UTC))


def rejected(*rows: str, header: str = HEADER) -> list[Rejection]:
    events, rejections = parse_csv("\n".join([header, *rows]) + "\n")
    assert events == []
    return rejections


def test_a_good_row_is_read_to_the_letter() -> None:
    events, rejections = parse_csv(f"{HEADER}\n{GOOD}\n")
    assert rejections == []
    assert events == [
        ImportedEvent(
            event_id="1", subject="ann", purpose="research", type=EventType.GIVEN, effective_at=MICROS,
            valid_until=to_micros(datetime(2027, 1, 31, 9, tzinfo=UTC)), notice_digest="", lawful_basis="GDPR-6-1-a",
            jurisdiction="", evidence_ref="", max_epsilon=2.5,
        )
    ]  # fmt: skip


def test_columns_may_stand_in_any_order_and_optional_ones_may_be_absent() -> None:
    events, rejections = parse_csv(
        "type,effective_at,purpose,subject,event_id\r\nwithdrawn,2026-01-31T09:00+01:00,research,ann,1\r\n\r\n"
    )
    assert rejections == []
    assert [(e.type, e.effective_at, e.valid_until) for e in events] == [(EventType.WITHDRAWN, MICROS, None)]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (",ann,research,given,2026-01-31T09:00Z,,,", "event_id", "is empty"),
        ("2, ,research,given,2026-01-31T09:00Z,,,", "subject", "is empty"),
        ("2,ann,,given,2026-01-31T09:00Z,,,", "purpose", "is empty"),
        ("2,ann,research,,2026-01-31T09:00Z,,,", "type", "is empty"),
        ("2,ann,research,given,,,,", "effective_at", "is empty"),
        ("2,ann,research,Given,2026-01-31T09:00Z,,,", "type", "'Given' is none of"),
        ("2,ann,research,yes,2026-01-31T09:00Z,,,", "type", "'yes' is none of"),
        ("2,ann,research,given,2026-01-31T09:00,,,", "effective_at", "has no time zone"),
        ("2,ann,research,given,2026-01-31,,,", "effective_at", "has no time zone"),
        ("2,ann,research,given,2026-01-31T09:00Z,2027-01-31T09:00,,", "valid_until", "has no time zone"),
        ("2,ann,research,given,31.01.2026,,,", "effective_at", "is not an ISO 8601 instant"),
        ("2,ann,research,given,2026-02-30T09:00Z,,,", "effective_at", "is not an ISO 8601 instant"),
        ("2,ann,research,given,0001-01-01T00:00+14:00,,,", "effective_at", "is not an ISO 8601 instant"),
        ("2,ann,research,given,2026-01-31T09:00Z,soon,,", "valid_until", "is not an ISO 8601 instant"),
        ("2,ann,research,given,2026-01-31T09:00Z,2026-01-31T09:00Z,,", "valid_until", "is not after effective_at"),
        ("2,ann,research,given,2026-01-31T09:00Z,2026-01-31T09:59+01:00,,", "valid_until", "is not after"),
        ("2,ann,research,given,2026-01-31T09:00Z,,,0", "max_epsilon", "is not a positive number"),
        ("2,ann,research,given,2026-01-31T09:00Z,,,-1", "max_epsilon", "is not a positive number"),
        ("2,ann,research,given,2026-01-31T09:00Z,,,inf", "max_epsilon", "is not a positive number"),
        ("2,ann,research,given,2026-01-31T09:00Z,,,nan", "max_epsilon", "is not a positive number"),
        ("2,ann,research,given,2026-01-31T09:00Z,,,two", "max_epsilon", "is not a positive number"),
        ("2,ann,research,withdrawn,2026-01-31T09:00Z,,,1", "type", "only given and renewed carry"),
        ("2,ann,research,withdrawn,2026-01-31T09:00Z,2027-01-31T09:00Z,,", "type", "only given and renewed carry"),
        (f"2,{'a' * 201},research,given,2026-01-31T09:00Z,,,", "subject", "is longer than 200 characters"),
        ("2,ann,research,given,2026-01-31T09:00Z,,", "row", "has 7 fields, the header has 8"),
        ("2,ann,research,given,2026-01-31T09:00Z,,,,", "row", "has 9 fields, the header has 8"),
        ("1,bob,research,given,2026-01-31T09:00Z,,,", "event_id", "repeats line 2"),
        ('2,"ann,research,given,2026-01-31T09:00Z,,,', "row", "is not CSV"),
        ('2,"ann"x,research,given,2026-01-31T09:00Z,,,', "row", "is not CSV"),
    ],
)
def test_a_row_that_leaves_a_doubt_is_rejected_with_its_line(row: str, field: str, reason: str) -> None:
    (found,) = rejected(GOOD, "", row)
    assert (found.line, found.field) == (4, field)
    assert reason in found.reason
    assert str(found).startswith(f"line 4, {field}: ")


def test_every_bad_line_is_named_not_just_the_first() -> None:
    found = rejected(
        "1,,research,given,2026-01-31T09:00Z,,,", GOOD, "3,cem,research,given,2026-01-31T09:00,,,zero", "4"
    )
    assert [(r.line, r.field) for r in found] == [(2, "subject"), (4, "effective_at"), (4, "max_epsilon"), (5, "row")]


@pytest.mark.parametrize(
    ("header", "field", "reason"),
    [
        ("event_id,subject,purpose,type", "effective_at", "the header does not name this column"),
        (HEADER + ",colour", "colour", "unknown column"),
        (HEADER + ",", "(empty)", "unknown column"),
        (HEADER + ",purpose", "purpose", "named twice"),
        (HEADER.replace("subject", "Subject"), "subject", "the header does not name this column"),
    ],
)
def test_a_header_that_is_not_the_format_is_rejected_on_line_1(header: str, field: str, reason: str) -> None:
    found = rejected(GOOD, header=header)
    assert any((r.line, r.field) == (1, field) and reason in r.reason for r in found)


def test_an_empty_file_and_a_binary_one_are_rejected() -> None:
    assert {r.field for r in parse_csv("")[1]} == {"event_id", "subject", "purpose", "type", "effective_at"}
    assert parse_csv(f"{HEADER}\n{GOOD}\0\n") == ([], [Rejection(1, "file", "holds a NUL byte, so it is not text")])


def test_one_bad_line_among_many_good_ones_imports_nothing(tmp_path: Path) -> None:
    path = tmp_path / "consent.csv"
    rows = [GOOD.replace("1,ann", f"{i},p{i}", 1) for i in range(50)]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    assert len(read_csv(path)) == 50
    path.write_text("\n".join([HEADER, *rows, "51,x,research,given,2026-01-31T09:00,,,"]) + "\n")
    with pytest.raises(ConsentError, match=r"line 52, effective_at: has no time zone(.|\n)*nothing was imported"):
        read_csv(path)


def test_a_long_list_of_faults_is_shortened_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "consent.csv"
    path.write_text("\n".join([HEADER, *["x"] * 13]) + "\n")
    with pytest.raises(ConsentError, match=r"line 11, row: .*; and 3 more"):
        read_csv(path)


def test_a_file_that_cannot_be_read_is_a_consent_error(tmp_path: Path) -> None:
    with pytest.raises(ConsentError, match="no such file"):
        read_csv(tmp_path / "absent.csv")
    (tmp_path / "latin.csv").write_bytes(f"{HEADER}\n".encode() + b"\xe9\n")
    with pytest.raises(ConsentError, match="cannot be read"):
        read_csv(tmp_path / "latin.csv")
    with pytest.raises(ConsentError, match="cannot be read"):
        read_csv(tmp_path)


def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-8-sig")
    assert [e.event_id for e in read_csv(path)] == ["1"]


KINDS = ["given", "renewed", "withdrawn", "restricted", "requested", "erased"]
BITS = st.one_of(
    st.text(max_size=3),
    st.sampled_from([",", '"', "\n", "\r", "\r\n", "\0", "given", "Z", "+01:00", "2026", "1e3", "nan", "-", HEADER]),
)  # fmt: skip


@st.composite
def mutated_csv(draw: st.DrawFn) -> str:
    """A sound file with some characters replaced, inserted or cut."""
    rows = [
        f"{i},p{draw(st.integers(0, 3))},research,{draw(st.sampled_from(KINDS))},2026-01-31T09:00:00+01:00,,,"
        + draw(st.sampled_from(["", "2.5", "0.1"]))
        for i in range(draw(st.integers(0, 4)))
    ]
    text = "\n".join([HEADER, *rows]) + "\n"
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(BITS) + text[start + draw(st.integers(0, 3)) :]
    return text


@settings(max_examples=400, deadline=None)
@given(mutated_csv() | st.text(max_size=60))
@example(HEADER + "\n" + '"' + "a" * 140_000 + '",b,c,given,2026-01-31T09:00Z,,,\n')
def test_no_text_raises_anything_or_grants_more_than_it_says(text: str) -> None:
    events, rejections = parse_csv(text)
    assert not (events and rejections)
    if rejections:
        assert all(isinstance(r, Rejection) and r.line >= 0 and r.reason for r in rejections)
        return
    said = [row for row in csv.DictReader(io.StringIO(text, newline="")) if row]
    assert len(events) == len(said)
    assert len({e.event_id for e in events}) == len(events)
    for event, row in zip(events, said, strict=True):
        assert (event.event_id, event.subject) == (row["event_id"].strip(), row["subject"].strip())
        assert (event.purpose, event.type) == (row["purpose"].strip(), row["type"].strip())
        until, limit = (row.get("valid_until") or "").strip(), (row.get("max_epsilon") or "").strip()
        assert (event.valid_until is None) == (not until)
        assert event.max_epsilon == (float(limit) if limit else None)
        if event.max_epsilon is not None:
            assert 0 < event.max_epsilon < math.inf
            assert event.type in (EventType.GIVEN, EventType.RENEWED)


# --- the shorter way says what `csv` says -----------------------------------------------------------------------------

CELLS = st.one_of(
    st.sampled_from(["", "1", "7.0", " ann ", "research", "given", "withdrawn", "renewed", "2026-01-31T09:00:00Z",
                     "2027-01-31T09:00:00+01:00", "2026-01-31T09:00:00", "2026-01-31", "2.5", "-1", "DE", "x" * 201,
                     "x" * 60, "Zoë", "a\tb", "a\u00a0b", '"a"', '"', "urn:confide:pseudonym:00", "given,", "\r"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)  # fmt: skip
GOOD_CELLS = st.tuples(
    st.integers(0, 50).map(str), st.sampled_from(["ann", " bob", "7.0"]), st.just("research"),
    st.sampled_from(["given", "withdrawn", "renewed", "objected"]), st.sampled_from(["2026-01-31T09:00:00Z", "x"]),
    st.sampled_from(["", "2027-01-31T09:00:00+01:00", "2025-01-31T09:00:00Z"]), st.just("GDPR"), st.just(""),
)  # fmt: skip


@settings(max_examples=400)
@given(
    rows=st.lists(GOOD_CELLS.map(list) | st.lists(CELLS, min_size=7, max_size=9), max_size=12),
    ends=st.lists(st.sampled_from(["\n", "\n", "\n", "\r\n", "\n\n"]), min_size=13, max_size=13),
    last=st.booleans(), block=st.sampled_from([40, 300, 1 << 16]),
)  # fmt: skip
def test_both_ways_of_reading_say_the_same(rows: list[list[str]], ends: list[str], last: bool, block: int) -> None:
    lines = [HEADER, *map(",".join, rows)]
    data = "".join(line + end for line, end in zip(lines, ends, strict=False)).encode()
    data = data if last else data.rstrip(b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_BLOCK", block)
        quickly = read("csv", data)
        patch.setattr(source.PlainLines, "_plain", lambda _self, _data: None)
        assert read("csv", data) == quickly


def test_what_needs_no_care_goes_the_shorter_way_and_what_does_goes_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    quick = EventBuilder.quick
    monkeypatch.setattr(EventBuilder, "quick", lambda *a: used.append(True) or quick(*a))  # type: ignore[func-returns-value]
    monkeypatch.setattr(source, "_BLOCK", 64)
    row = "{},ann,research,given,2026-01-31T09:00:00Z,,,\n"
    data = HEADER + "\n" + "".join(map(row.format, range(4))) + '"4",ann,research,given,2026-01-31T09:00:00Z,,,\n'
    events, rejections = read("csv", (data + row.format(4)).encode())
    assert len(used) == 4
    assert [e.event_id for e in events] == ["0", "1", "2", "3", "4", "4"]
    assert rejections == [Rejection(7, "event_id", "repeats line 6")]
