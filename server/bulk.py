"""A run's bulk in the store: each chunk once, by its digest, however many messages and sums carry it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from sqlalchemy import Connection, and_, bindparam, delete, insert, select

from confide.server import tables as t

__all__ = ["Bulk", "slices"]

_AT_ONCE = 400
_IN_RUN = t.blob.c.run == bindparam("of_run")
_NAMED = and_(_IN_RUN, t.blob.c.digest.in_(bindparam("names", expanding=True)))
_KNOWN, _GET = select(t.blob.c.digest).where(_NAMED), select(t.blob).where(_NAMED)
_PUT = insert(t.blob)


class Bulk:
    """The chunks of one run. Rows of messages and sums name theirs in JSON.

    Args:
        run: The run.
    """

    def __init__(self, run: str) -> None:
        self._run = run

    def put(self, db: Connection, many: Sequence[tuple[bytes, ...]]) -> list[str]:
        """Names of the chunks of each message, in JSON; what several carry is hashed and stored once."""
        data = {id(chunk): chunk for chunks in many for chunk in chunks}
        names = {place: hashlib.sha256(chunk).hexdigest() for place, chunk in data.items()}
        new = {names[place]: chunk for place, chunk in data.items()}
        for part in slices(list(new)):
            for digest in db.scalars(_KNOWN, {"of_run": self._run, "names": part}).all():
                del new[digest]
        for digest, chunk in new.items():
            db.execute(_PUT, {"run": self._run, "digest": digest, "data": chunk})
        return [json.dumps([names[id(chunk)] for chunk in chunks]) for chunks in many]

    def get(self, db: Connection, many: Sequence[str]) -> list[tuple[bytes, ...]]:
        """The chunks that these lists name, each in memory once."""
        lists = [json.loads(text) for text in many]
        found: dict[str, bytes] = {}
        for part in slices(sorted({digest for names in lists for digest in names})):
            rows = db.execute(_GET, {"of_run": self._run, "names": part})
            found.update((row.digest, row.data) for row in rows)
        return [tuple(found[digest] for digest in names) for names in lists]

    def forget(self, db: Connection) -> None:
        """Let go of what no message, no sum and no first model names."""
        named = {db.scalar(select(t.run.c.initial).where(t.run.c.run == self._run))}
        for table in (t.message, t.total):
            for (text,) in db.execute(select(table.c.chunks).where(table.c.run == self._run)):
                named.update(json.loads(text))
        held = db.scalars(select(t.blob.c.digest).where(t.blob.c.run == self._run)).all()
        for part in slices([digest for digest in held if digest not in named]):
            db.execute(delete(t.blob).where(t.blob.c.run == self._run, t.blob.c.digest.in_(part)))


def slices(items: list[str]) -> Iterator[list[str]]:
    """As many at a time as one statement takes."""
    return (items[i : i + _AT_ONCE] for i in range(0, len(items), _AT_ONCE))
