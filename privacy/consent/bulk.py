"""Many rows at once, in each database's own fastest way: SQLAlchemy's would cost several times the rest of an import.

Table and column names are this package's own; values are always bound.
"""

from __future__ import annotations

import gc
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from sqlalchemy import Connection, Table

__all__ = ["BATCH", "collector_paused", "driver", "insert_rows", "rows_of", "rows_with", "upsert_rows"]

#: Values looked for, or rows fetched, at once.
BATCH = 10_000


def driver(connection: Connection) -> sqlite3.Connection | None:
    """SQLite's own connection; None: it is another database."""
    found = connection.connection.driver_connection
    return found if isinstance(found, sqlite3.Connection) else None


@contextmanager
def collector_paused() -> Iterator[None]:
    """Millions of rows are made and dropped here, none of which refers to itself: looking through them for cycles again
    and again costs a fifth of an import."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def rows_with(
    connection: Connection,
    table: Table,
    columns: Sequence[str],
    key: str,
    wanted: Iterable[object],
    **equal: object,
) -> Iterator[tuple[Any, ...]]:
    """The rows whose `key` is among the wanted values, in no order; of `equal`, columns hold exactly these values."""
    return chain.from_iterable(_portions_with(connection, table, columns, key, iter(wanted), equal))


def _portions_with(
    connection: Connection,
    table: Table,
    columns: Sequence[str],
    key: str,
    remaining: Iterator[object],
    equal: Mapping[str, object],
) -> Iterator[Sequence[tuple[Any, ...]]]:
    sqlite = driver(connection) is not None
    mark = "?" if sqlite else "%s"
    start = f"SELECT {', '.join(columns)} FROM {table.name} WHERE " + "".join(f"{n} = {mark} AND " for n in equal)  # noqa: S608
    while part := list(islice(remaining, BATCH)):
        among = f"{key} IN ({', '.join('?' * len(part))})" if sqlite else f"{key} = ANY(%s)"
        values = (*equal.values(), *part) if sqlite else (*equal.values(), part)
        raw: Any = connection.connection.cursor()
        try:
            yield raw.execute(start + among, values).fetchall()
        finally:
            raw.close()


def rows_of(connection: Connection, query: str) -> Iterator[Sequence[Any]]:
    """The rows of a query, as the driver gives them; memory holds a portion at a time."""
    name = {} if connection.dialect.name == "sqlite" else {"name": "confide_rows"}  # the server then keeps the rest
    raw: Any = connection.connection.cursor(**name)
    try:
        raw.execute(query)
        while part := raw.fetchmany(BATCH):
            yield from part
    finally:
        raw.close()


def insert_rows(connection: Connection, table: Table, rows: Sequence[tuple[object, ...]]) -> None:
    """Add rows, values in the order of the table's columns."""
    if not rows:
        return
    names = ", ".join(table.c.keys())
    if (lite := driver(connection)) is not None:
        marks = ", ".join("?" * len(table.c))
        lite.executemany(f"INSERT INTO {table.name} ({names}) VALUES ({marks})", rows)  # noqa: S608
        return
    raw: Any = connection.connection.cursor()
    with raw, raw.copy(f"COPY {table.name} ({names}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def upsert_rows(connection: Connection, table: Table, rows: Sequence[tuple[object, ...]]) -> None:
    """Add rows, values in the order of the table's columns; a row of the same primary key is changed."""
    if not rows:
        return
    names, keys = table.c.keys(), table.primary_key.columns.keys()
    lite = driver(connection)
    marks = ", ".join(["%s" if lite is None else "?"] * len(names))
    change = ", ".join(f"{name} = excluded.{name}" for name in names if name not in keys)
    upsert = (
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks}) "  # noqa: S608
        f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {change}"
    )
    if lite is None:
        connection.exec_driver_sql(upsert, list(rows))
    else:
        lite.executemany(upsert, rows)
