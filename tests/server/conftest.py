"""The program that kills coordinators: started once for all tests that need it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.conftest import Stage, staged


@pytest.fixture(scope="session")
def coordinators() -> Iterator[Stage]:
    with staged("tests.server.killing") as stage:
        yield stage


@pytest.fixture
def stage(coordinators: Stage) -> Iterator[Stage]:
    """The same, tidied up after each test."""
    yield coordinators
    coordinators.clear()
