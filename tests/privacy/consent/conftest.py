"""Registries to test on: in an SQLite file, and on a real PostgreSQL server."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from confide.privacy.consent import Registry, SiteKey
from tests.privacy import postgres

KEY = SiteKey(b"k" * 32)
_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_folder() -> Iterator[str]:
    """One server for the tests of this process; several processes have several."""
    with postgres.server() as folder:
        yield folder


@pytest.fixture(params=["sqlite", "postgresql"])
def new_address(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Path | str]:
    """Makes addresses at which there is no registry yet."""
    if request.param == "sqlite":
        return lambda: tmp_path / f"consent-{next(_numbers)}.db"
    folder = request.getfixturevalue("postgres_folder")
    return lambda: postgres.new_database(folder, f"consent_{next(_numbers)}")


@pytest.fixture
def address(new_address: Callable[[], Path | str]) -> Path | str:
    """Of a registry in each kind of database."""
    return new_address()


@pytest.fixture
def registry(address: Path | str) -> Iterator[Registry]:
    """An empty one."""
    with closing(Registry(address, KEY)) as found:
        yield found


def raw(address: Path | str) -> AbstractContextManager[Any]:
    """The database, past the registry: `execute` and `commit`."""
    if isinstance(address, Path):
        return closing(sqlite3.connect(address))
    url = make_url(address)
    return closing(psycopg.connect(host=str(url.query["host"]), user=url.username, dbname=url.database))


#: What a database says that refuses.
REFUSED = (sqlite3.IntegrityError, psycopg.errors.IntegrityError)
