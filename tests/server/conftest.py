"""The program that kills coordinators: started once for all tests that need it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import MEMORY, Stage


@pytest.fixture(scope="session")
def coordinators() -> Iterator[Stage]:
    """A kill loses nothing that was written, synced or not: memory will do where there is such a folder."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        stage = Stage(Path(folder), "tests.server.killing")
        yield stage
        stage.close()


@pytest.fixture
def stage(coordinators: Stage) -> Iterator[Stage]:
    """The same, tidied up after each test."""
    yield coordinators
    coordinators.clear()
