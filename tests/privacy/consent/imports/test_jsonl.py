"""JSONL: the CSV's fields, one object a line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from confide.privacy.consent.imports import Rejection
from tests.privacy.consent.imports.reading import read, refused
from tests.privacy.consent.imports.samples import csv_file, jsonl_file

LINE = {"event_id": "1", "subject": "ann", "purpose": "research", "type": "given", "effective_at": "2026-01-31T09:00Z"}


def test_it_says_what_the_csv_says() -> None:
    by_line, rejections = read("jsonl", jsonl_file())
    by_row, _ = read("csv", csv_file())
    assert rejections == []
    assert [(e.subject, e.type, e.effective_at, e.valid_until, e.max_epsilon) for e in by_line] == [
        (e.subject, e.type, e.effective_at, e.valid_until, e.max_epsilon) for e in by_row
    ]


def test_null_is_not_given_and_a_whole_number_is_an_identifier() -> None:
    (event,), _ = read("jsonl", LINE | {"subject": 7, "valid_until": None, "max_epsilon": 2})
    assert (event.subject, event.valid_until, event.max_epsilon) == ("7", None, 2.0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"subject": 7.5}, "subject"), ({"subject": True}, "subject"), ({"subject": ["ann"]}, "subject"),
     ({"effective_at": 1769846400}, "effective_at"), ({"type": None}, "type"), ({"max_epsilon": True}, "max_epsilon"),
     ({"max_epsilon": 0}, "max_epsilon"), ({"max_epsilon": -1.5}, "max_epsilon"), ({"colour": "red"}, "colour"),
     ({"purpose": "a\tb"}, "purpose"), ({"evidence_ref": "\u0000"}, "evidence_ref"),
     ({"event_id": "\u202e1"}, "event_id")],
)  # fmt: skip
def test_a_value_that_is_not_plain_text_is_rejected(changes: dict[str, Any], field: str) -> None:
    assert refused("jsonl", LINE | changes).field == field


@pytest.mark.parametrize("line", [b"[]", b"7", b'"x"', b"{", b"", b"null"])
def test_a_line_that_is_no_object_is_rejected_with_its_number(line: bytes) -> None:
    good = json.dumps(LINE).encode()
    events, rejections = read("jsonl", good + b"\n\n" + line + b"\n" + good.replace(b'"1"', b'"2"'))
    assert [e.event_id for e in events] == ["1", "2"]
    assert [r.line for r in rejections] == ([3] if line else [])


def test_an_id_may_not_come_twice() -> None:
    good = json.dumps(LINE).encode() + b"\n"
    _, rejections = read("jsonl", good * 3)
    assert rejections == [Rejection(2, "event_id", "repeats line 1"), Rejection(3, "event_id", "repeats line 1")]
