"""From a file to checked events: the format is seen, a second reading sees the same bytes, one fault stops all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from confide.errors import ConfigError, ConsentError
from confide.privacy.consent.imports import Options, check_file, read_checked
from tests.privacy.consent.imports.samples import FILES, MAPPING, csv_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "consent"
    path.write_bytes(csv_file())
    return path


@pytest.mark.parametrize("form", sorted(FILES))
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_a_format_is_told_from_its_content(form: str, mark: bytes, file: Path) -> None:
    if mark.isspace() and form in ("csv", "mapped"):
        return  # a CSV begins with its header
    file.write_bytes(mark + FILES[form])
    checked = check_file(file, mapping=MAPPING if form == "mapped" else None)
    assert (checked.format.name, checked.rejections) == (form, ())


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"resourceType": 1, "event_id": 2}', b"{"])
def test_a_content_that_shows_no_format_or_two_must_be_named(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ConsentError, match=r"does not show which format(.|\n)*--format"):
        check_file(file)


def test_a_named_format_is_taken_at_its_word(file: Path) -> None:
    assert check_file(file, name="fhir").rejected == 1
    with pytest.raises(ConfigError, match="did you mean 'fhir'"):
        check_file(file, name="fhri")
    with pytest.raises(ConfigError, match="mapping"):
        check_file(file, name="mapped")


def test_progress_tells_bytes_and_records(file: Path) -> None:
    header, *rows = csv_file().decode().splitlines()
    file.write_text("\n".join([header, *(f"x{n}{rows[1]}" for n in range(20_000))]))
    told: list[tuple[int, int, int]] = []
    checked = check_file(file, progress=lambda *a: told.append(a))
    size = file.stat().st_size
    assert checked.events == 20_000
    assert told[-1] == (size, size, 20_000)
    assert told == sorted(told)
    assert 0 < told[0][0] < size


def test_unknown_purposes_are_rejected_where_the_known_ones_are_given(file: Path) -> None:
    checked = check_file(file, Options(purposes=frozenset({"research"})))
    assert {r.line for r in checked.rejections} == {3, 6}
    assert "'care' is not a known purpose" in checked.rejections[0].reason


def test_a_file_that_changes_between_its_readings_is_not_taken(file: Path) -> None:
    checked = check_file(file)
    file.write_bytes(csv_file().replace(b"refused", b"given"))
    taken = read_checked(checked)
    with pytest.raises(ConsentError, match="changed while"):
        list(taken)


def test_a_file_that_becomes_faulty_between_its_readings_is_not_taken(file: Path) -> None:
    checked = check_file(file)
    file.write_bytes(csv_file() + b"x\n")
    with pytest.raises(ConsentError, match="changed while"):
        list(read_checked(checked))


def test_of_a_file_with_a_fault_no_event_is_given_out(file: Path) -> None:
    file.write_bytes(csv_file() + b"x\n")
    checked = check_file(file)
    assert (checked.events, checked.rejected) == (6, 1)
    with pytest.raises(ConsentError, match="line 8, row: has 1 fields"):
        next(read_checked(checked))


def test_faults_are_counted_and_the_first_are_kept_and_shown(file: Path) -> None:
    file.write_bytes(csv_file() + b"x\n" * 12_000)
    checked = check_file(file)
    assert (checked.rejected, len(checked.rejections)) == (12_000, 10_000)
    refusal = checked.refusal()
    assert refusal is not None
    assert "line 17, row" in refusal.what
    assert "line 18" not in refusal.what
    assert "and 11,990 more" in refusal.what


def test_repetitions_far_apart_are_found(file: Path) -> None:
    header, row, *_ = csv_file().decode().splitlines()
    rows = [row.replace("e0", f"e{n}", 1) for n in range(50_000)]
    file.write_text("\n".join([header, *rows, rows[7], rows[49_999], rows[7]]))
    checked = check_file(file)
    assert [(r.line, r.reason) for r in checked.rejections] == [
        (50_002, "repeats line 9"), (50_003, "repeats line 50001"), (50_004, "repeats line 9")
    ]  # fmt: skip


def test_what_is_no_file_is_a_consent_error(tmp_path: Path) -> None:
    with pytest.raises(ConsentError, match="no such file"):
        check_file(tmp_path / "absent")
    with pytest.raises(ConsentError, match="cannot be read"):
        check_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConsentError, match="not a file"):
        check_file(tmp_path / "pipe")
