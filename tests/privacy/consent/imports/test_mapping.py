"""Mapped CSV: every column and every value is declared, and so is a time zone that the file leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from confide.errors import ConfigError
from confide.privacy.consent import EventType
from confide.privacy.consent.imports import ColumnMapping, load_mapping
from tests.privacy.consent.imports.reading import read, refused
from tests.privacy.consent.imports.samples import MAPPING

TOML = """
[format]
delimiter = ";"
time_zone = "+01:00"
time_format = "%d.%m.%Y %H:%M:%S"
ignore = ["ip"]
[columns]
subject = "customer"
purpose = "topic"
type = "action"
effective_at = "time"
valid_until = "end"
[constants]
lawful_basis = "GDPR-6-1-a"
[values.type]
"opt in" = "given"
"opt out" = "withdrawn"
no = "refused"
asked = "requested"
[values.purpose]
R = "research"
C = "care"
"""
HEADER = "customer;topic;action;time;end;ip"
ROW = "ann;R;opt in;31.01.2026 09:00:00;;1.2.3.4"


def rows(*lines: str, header: str = HEADER) -> bytes:
    return "\n".join([header, *lines, ""]).encode()


def load(tmp_path: Path, text: str) -> ColumnMapping:
    path = tmp_path / "map.toml"
    path.write_text(text)
    return load_mapping(path)


def test_a_file_is_read_as_declared(tmp_path: Path) -> None:
    mapping = load(tmp_path, TOML)
    assert mapping == MAPPING
    (event,), rejections = read("mapped", rows(ROW), mapping=mapping)
    assert rejections == []
    assert (event.subject, event.purpose, event.type) == ("ann", "research", EventType.GIVEN)
    assert (event.effective_at, event.lawful_basis, event.derived) == (1769846400_000000, "GDPR-6-1-a", True)


@pytest.mark.parametrize(
    ("row", "field"),
    [("ann;R;Opt in;31.01.2026 09:00:00;;", "type"), ("ann;R;;31.01.2026 09:00:00;;", "type"),
     ("ann;R;given;31.01.2026 09:00:00;;", "type"), (";R;opt in;31.01.2026 09:00:00;;", "subject"),
     ("ann;R;opt in;2026-01-31T09:00:00Z;;", "effective_at"), ("ann;R;opt in;31.02.2026 09:00:00;;", "effective_at"),
     ("ann;R;opt in;31.01.2026;;", "effective_at"), ("ann;R;opt in;31.01.2026 09:00:00;30.01.2026 09:00:00;",
     "valid_until"), ("ann;R;opt out;31.01.2026 09:00:00;31.01.2027 09:00:00;", "type"), ("ann;R;opt in", "row")],
)  # fmt: skip
def test_a_row_that_was_not_declared_is_rejected(row: str, field: str) -> None:
    assert refused("mapped", rows(row), mapping=MAPPING).field == field


@pytest.mark.parametrize(
    ("header", "field"),
    [(HEADER + ";revoked_at", "'revoked_at'"), (HEADER.replace("end;", ""), "valid_until"),
     (HEADER + ";time", "effective_at")],
)  # fmt: skip
def test_a_header_that_was_not_declared_is_rejected(header: str, field: str) -> None:
    _, rejections = read("mapped", rows(header=header), mapping=MAPPING)
    assert field in [r.field for r in rejections]


def test_what_nothing_is_declared_for_is_rejected() -> None:
    columns = {k: v for k, v in MAPPING.columns.items() if k != "purpose"}
    mapping = replace(MAPPING, columns=columns, ignore=("ip", "topic"))
    assert refused("mapped", rows(ROW), mapping=mapping).field == "purpose"
    (event,), _ = read("mapped", rows(ROW), mapping=replace(mapping, constants={"purpose": "x"}))
    assert event.purpose == "x"


@pytest.mark.parametrize(
    ("time_format", "text", "micros"),
    [("unix", "1769846400", 1769846400_000000), ("unix_ms", "1769846400123", 1769846400_123000),
     ("", "2026-01-31T09:00:00", 1769846400_000000), ("", "2026-01-31T09:00:00Z", 1769850000_000000),
     ("%Y%m%d%H%M%z", "202601310900-0500", 1769868000_000000)],
)  # fmt: skip
def test_times_are_read_as_declared(time_format: str, text: str, micros: int) -> None:
    (event,), _ = read("mapped", rows(f"ann;R;opt in;{text};;"), mapping=replace(MAPPING, time_format=time_format))
    assert event.effective_at == micros


@pytest.mark.parametrize(
    ("time_format", "text"),
    [("unix", "1.5e9"), ("unix", "٣"), ("unix", "9" * 17), ("unix", "-"), ("unix_ms", ""), ("", "2026-01-31"),
     ("", "20260131")],
)  # fmt: skip
def test_a_time_that_names_no_instant_is_rejected(time_format: str, text: str) -> None:
    mapping = replace(MAPPING, time_format=time_format)
    assert refused("mapped", rows(f"ann;R;opt in;{text};;"), mapping=mapping).field == "effective_at"


def test_without_a_declared_zone_a_time_without_one_is_rejected() -> None:
    found = refused("mapped", rows(ROW), mapping=replace(MAPPING, time_zone=None))
    assert "has no time zone" in found.reason


def test_a_row_that_comes_twice_is_one_event() -> None:
    events, rejections = read("mapped", rows(ROW, ROW), mapping=MAPPING)
    assert rejections == []
    assert len({e.event_id for e in events}) == 1


@pytest.mark.parametrize(
    ("text", "where"),
    [("[colums]", "colums"), ("[columns]\nsubjekt='x'", "columns.subjekt"), ("x", "TOML"), ("columns=1", "columns"),
     ("[format]\ntime_zone='Europe/Berlin'", "time_zone"), ("[format]\ntime_zone='+15:00'", "time_zone"),
     ("[format]\ntime_zone='+01:61'", "time_zone"), ("[format]\ntime_format='%d.%m.%Y'", "time_format"),
     ("[format]\ntime_format='%d.%m. %H:%M'", "time_format"), ("[format]\ntime_format='%Y-%m-%d %I:%M'", "time_format"),
     ("[format]\ntime_format='%Y-%m-%d %H:%M %Z'", "time_format"), ("[format]\ntime_format='%Q'", "time_format"),
     ("[format]\ndelimiter=';;'", "delimiter"), ("[format]\nignore='x'", "ignore"),
     ("[values.type]\n'yes'='gven'", "values.type"), ("[values.subject]\na='b'", "values.subject"),
     ("[columns]\nsubject='a'\npurpose='a'", "columns"),
     ("[columns]\ntype='a'\n[constants]\ntype='given'", "constants"),
     ("[constants]\neffective_at='2026-01-01T00:00Z'", "constants"), ("[columns]\nsubject=''", "columns.subject")],
)  # fmt: skip
def test_a_mapping_with_a_mistake_is_refused(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert where in str(caught.value)


def test_a_mistyped_key_is_answered_with_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'subject'"):
        load(tmp_path, "[columns]\nsubjekt = 'x'")


def test_a_mapping_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_mapping(tmp_path / "absent.toml")


def test_a_declared_zone_is_a_fixed_offset(tmp_path: Path) -> None:
    offsets: dict[str, Any] = {"Z": 0, "-05:30": -19800, "+14:00": 50400}
    for text, seconds in offsets.items():
        zone = load(tmp_path, f"[format]\ntime_zone = '{text}'").time_zone
        assert zone is not None
        assert zone.utcoffset(None).total_seconds() == seconds
