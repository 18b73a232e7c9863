"""A registry moved as it is, from one database into another: for backups, and from a file into PostgreSQL or back.

Everything on record goes, in the order in which it was recorded, with its sequence numbers and instants: events,
notices, personal keys, tombstones, the clock. What follows from the events is built anew at the other end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, insert, select, update

from confide.errors import ConsentError
from confide.privacy.consent import projection
from confide.privacy.consent.storage import Storage, holds_registry, shown_address
from confide.privacy.consent.tables import CLOCK, EVENTS, NOTICES, SUBJECTS, TOMBSTONES

__all__ = ["copy_registry"]

_AT_ONCE = 5_000
#: Personal keys before tombstones: whoever has one has no key, and no key is taken after it.
_ON_RECORD = (EVENTS, NOTICES, SUBJECTS, TOMBSTONES)


def copy_registry(source: Path | str, target: Path | str) -> None:
    """Copy a registry as of one moment.

    Args:
        source: Its path or URL.
        target: Of a new one, or of one that holds nothing.

    Raises:
        ConsentError: There is no registry, the other one holds something, or one of them refuses; nothing was added.
    """
    if not holds_registry(source):
        raise ConsentError("is missing", where=shown_address(source), hint="name the registry that is to be copied")
    if isinstance(target, Path):
        target.touch(mode=0o600)
    with (
        closing(Storage(source)) as old,
        closing(Storage(target)) as new,
        old.reading() as read,
        new.writing() as write,
    ):
        if any(write.scalar(select(*table.primary_key).limit(1)) is not None for table in _ON_RECORD):
            raise ConsentError("holds something already", where=new.where, hint="name a new place; nothing was changed")
        for table in _ON_RECORD:
            for rows in _rows(read, table):
                write.execute(insert(table), rows)
        latest = read.scalar(select(CLOCK.c.latest))
        write.execute(update(CLOCK).values(latest=latest))
        projection.rebuild(write)


def _rows(read: Connection, table: Table) -> Iterator[list[dict[str, Any]]]:
    found = read.execute(select(table).order_by(*table.primary_key)).mappings()
    for rows in found.partitions(_AT_ONCE):
        yield [{name: bytes(v) if isinstance(v, memoryview) else v for name, v in row.items()} for row in rows]
