"""One federation for all tests of a module that leave it whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.staged import Staged


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Staged]]:
    """The federation of this module, once there is one."""
    made: list[Staged] = []
    yield made
    for one in made:
        one.stop()


@pytest.fixture
def federation(kept: list[Staged], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Staged]:
    """A federation that listens: the one that the test before it left whole, or a new one."""
    made = kept.pop() if kept else Staged.started(tmp_path_factory.mktemp("federation"))
    yield made
    if made not in kept:
        made.stop()
