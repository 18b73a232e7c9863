"""Statements that are asked again and again: written once, for both databases, with SQLAlchemy; on SQLite the driver
itself runs them, as SQLAlchemy's own way costs some twenty times what such a statement costs the database.

A statement here holds no list of changing length, and its values are what the driver takes: numbers, text, bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

from sqlalchemy import Connection, Select
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.dml import UpdateBase

from confide.privacy.consent.bulk import BATCH, driver

__all__ = ["Change", "Query"]

_SQLITE = sqlite.dialect(paramstyle="qmark")


class _Prepared:
    """A statement, and what it is on SQLite: its text, and its values in their order."""

    def __init__(self, statement: Select[*tuple[Any, ...]] | UpdateBase) -> None:
        self._statement = statement

    @cached_property
    def _in_sqlite(self) -> tuple[str, tuple[str, ...], dict[str, Any]]:
        compiled = self._statement.compile(dialect=_SQLITE)
        return str(compiled), tuple(cast(Any, compiled).positiontup), dict(compiled.params)

    def _run(self, raw: sqlite3.Connection, values: dict[str, object]) -> sqlite3.Cursor:
        text, order, fixed = self._in_sqlite
        return raw.execute(text, [values[name] if name in values else fixed[name] for name in order])


class Query(_Prepared):
    """One that is answered with rows; booleans may come as 0 and 1."""

    def rows(self, connection: Connection, **values: object) -> Sequence[Sequence[Any]]:
        """All of them."""
        if (raw := driver(connection)) is not None:
            return self._run(raw, values).fetchall()
        return connection.execute(self._statement, values).fetchall()

    def stream(self, connection: Connection, **values: object) -> Iterator[Sequence[Any]]:
        """One after the other; memory holds a portion at a time."""
        if (raw := driver(connection)) is not None:
            yield from self._run(raw, values)
        else:
            portions = self._statement.execution_options(stream_results=True, yield_per=BATCH)
            yield from connection.execute(portions, values)


class Change(_Prepared):
    """One that changes rows."""

    def apply(self, connection: Connection, **values: object) -> None:
        """Make the change, in the connection's transaction."""
        if (raw := driver(connection)) is not None:
            self._run(raw, values)
        else:
            connection.execute(self._statement, values)
