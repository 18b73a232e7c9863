"""The program that forks and kills: started once for all tests that need processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_SHARED = Path("/dev/shm")  # noqa: S108  # a folder of one's own is made in it
#: Where folders are made that need not outlive the machine; None: where the system makes them.
MEMORY = _SHARED if _SHARED.is_dir() and os.access(_SHARED, os.W_OK) else None


class Stage:
    """Jobs are forked from a process that has imported and tried everything already."""

    def __init__(self, folder: Path, program: str = "tests.clients.killing") -> None:
        self._folder, self._count = folder, 0
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._program = subprocess.Popen(
            [sys.executable, "-m", program, str(folder / "warm"), "2"],
            cwd=ROOT, env={**os.environ, **threads}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def play(self, *jobs: dict[str, Any]) -> list[Path]:
        """Do these jobs, two at a time; the folder of each."""
        folders = [self._folder / f"{self._count + i}" for i in range(len(jobs))]
        self._count += len(jobs)
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        lines = [{**job, "folder": str(folder)} for job, folder in zip(jobs, folders, strict=True)]
        self._program.stdin.write(json.dumps(lines) + "\n")
        self._program.stdin.flush()
        codes = json.loads(self._program.stdout.readline())
        for job, folder, code in zip(jobs, folders, codes, strict=True):
            assert code == 0, f"{job} ended with {code}: {(folder / 'errors.txt').read_text()[-2000:]}"
        return folders

    def clear(self) -> None:
        """Forget what earlier jobs left."""
        for folder in self._folder.glob("[0-9]*"):
            shutil.rmtree(folder)

    def close(self) -> None:
        """End the program."""
        with self._program as program:
            assert program.stdin is not None
            program.stdin.close()


@contextmanager
def staged(program: str = "tests.clients.killing") -> Iterator[Stage]:
    """A kill loses nothing that was written, synced or not: memory will do where there is such a folder."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        stage = Stage(Path(folder), program)
        yield stage
        stage.close()


@pytest.fixture(scope="session")
def program() -> Iterator[Stage]:
    with staged() as stage:
        yield stage


@pytest.fixture
def stage(program: Stage) -> Iterator[Stage]:
    """The same, tidied up after each test."""
    yield program
    program.clear()
