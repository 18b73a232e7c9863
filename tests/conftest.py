"""Fixtures: a tiny federation's table and experiment, and a quiet environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import confide  # noqa: F401  # sets Flower's switches before anything imports it
from confide.privacy.sealing import vault
from tests.support import experiment_tree, write_people

# CI repeats the same examples, so that a landing does not depend on luck; elsewhere every run tries new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CONFIDE_CI") == "1" or os.environ.get("CI", "").lower() == "true":
    settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `long` runs under `make test-long`."""
    if os.environ.get("CONFIDE_LONG") != "1":
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.skip(reason="make test-long"))


@pytest.fixture(scope="session", autouse=True)
def cheap_passphrases() -> Iterator[None]:
    """The least that a passphrase may cost: a site is opened from its folder a thousand times here. What it costs an
    operator is in `tests/privacy/sealing/test_vault.py`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
            patch.setattr(vault, name, cheap)
        yield


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """A CSV of people at four clinics."""
    return write_people(tmp_path)


@pytest.fixture
def make_experiment(people: Path) -> Callable[..., dict[str, Any]]:
    """An experiment over `people`; keyword arguments override sections."""

    def make(**sections: dict[str, Any]) -> dict[str, Any]:
        return experiment_tree(str(people), **sections)

    return make
