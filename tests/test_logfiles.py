"""Log files: bounded, private, and nothing of what a process says at its end is lost."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from confide.logfiles import PrivateLog, drain


@pytest.fixture
def log(tmp_path: Path) -> Iterator[PrivateLog]:
    """Three files of a kilobyte."""
    made = PrivateLog(tmp_path / "site.log", 1000, 2)
    yield made
    made.close()


def run(code: str, log: PrivateLog) -> None:
    """A process that says something on both streams, as an agent's do."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = drain(process.stdout, log)
    assert process.wait(60) == 0
    said.join(60)
    assert not said.is_alive()
    assert process.stdout.closed


def test_what_a_process_says_is_bounded_and_the_latest_is_kept(log: PrivateLog, tmp_path: Path) -> None:
    run("import sys\nfor i in range(500): print('line', i, flush=True)\nprint('the end', file=sys.stderr)", log)
    files = sorted(tmp_path.iterdir())
    assert [p.name for p in files] == ["site.log", "site.log.1", "site.log.2"]
    assert all(p.stat().st_size <= 1000 for p in files)
    assert {p.stat().st_mode & 0o777 for p in files} == {0o600}
    whole = "".join(p.read_text() for p in reversed(files)).splitlines()
    assert whole[-1] == "the end"
    assert whole[:-1] == [f"line {i}" for i in range(501 - len(whole), 500)], "nothing in between is missing"


def test_without_a_bound_it_would_grow(tmp_path: Path) -> None:
    """The control."""
    log = PrivateLog(tmp_path / "site.log", 0, 0)
    run("for i in range(500): print('line', i)", log)
    log.close()
    assert (tmp_path / "site.log").stat().st_size > 4000


def test_bytes_that_are_no_text_and_lines_without_end_keep_nobody_waiting(log: PrivateLog, tmp_path: Path) -> None:
    run("import os\nos.write(1, b'\\xff\\xfe' * 100 + b'x' * 300000)\nos.write(1, b'\\nlast')", log)
    assert (tmp_path / "site.log").read_text().endswith("last\n")


def test_a_process_started_again_goes_on_in_the_same_file(log: PrivateLog, tmp_path: Path) -> None:
    for number in range(3):
        run(f"print('life', {number})", log)
    assert (tmp_path / "site.log").read_text() == "life 0\nlife 1\nlife 2\n"


def test_a_file_that_others_could_read_is_the_owners_from_now_on(tmp_path: Path) -> None:
    (tmp_path / "server.log").touch(0o644)
    log = PrivateLog(tmp_path / "server.log")
    log.handle(logging.LogRecord("x", logging.INFO, "", 0, "there", None, None))
    log.close()
    assert ((tmp_path / "server.log").stat().st_mode & 0o777, (tmp_path / "server.log").read_text()) == (
        0o600, "there\n",
    )  # fmt: skip
