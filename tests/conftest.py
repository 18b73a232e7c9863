"""Fixtures: a tiny federation's table and experiment, and a quiet environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import confide  # noqa: F401  # sets Flower's switches before anything imports it
from tests.support import experiment_tree, write_people


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
