"""Erasing a person: what is destroyed, what stays, and why.

Destroyed is her personal key, without which nobody, the site included, can compute the pseudonym that her events are
filed under. Her events stay under it, closed by an erasure of everything. Of herself only a *tombstone* stays: her
locator, so that the same identifier is not enrolled again, for which her spent privacy loss would be forgotten, and the
ground for keeping that. It holds no time, and tombstones lie in the order of locators: neither leads to her events.

It is complete when backups and replicas have expired. What stays for ever: whoever has the site key, her identifier and
this registry can tell that she was erased; while few are erased, he may guess by elimination which of the closed
histories was hers. `event_id` and `evidence_ref` stay with the events: they must not name a person.
"""

from __future__ import annotations

import secrets
import time

from sqlalchemy import delete, select

from confide.errors import ConsentError
from confide.privacy.consent.events import ConsentEvent, EventType
from confide.privacy.consent.notices import EVERYTHING
from confide.privacy.consent.storage import Storage
from confide.privacy.consent.tables import EVENTS, SUBJECTS, TOMBSTONES

__all__ = ["DEFAULT_GROUND", "closing_events", "destroy_key", "forget_bytes"]

#: Why the tombstone is kept: the record of what a person's data were used for must not start anew.
DEFAULT_GROUND = "GDPR-17-3-b, GDPR-5-2"
_PATIENCE = 30.0


def closing_events(storage: Storage, pseudonym: bytes, at: int) -> list[ConsentEvent]:
    """An erasure of each purpose on record, and of everything."""
    with storage.reading() as connection:
        query = select(EVENTS.c.purpose).where(EVENTS.c.pseudonym == pseudonym).distinct()
        purposes = {*connection.scalars(query), EVERYTHING}
    return [
        ConsentEvent(
            event_id=f"erased-{secrets.token_hex(16)}", pseudonym=pseudonym, purpose=purpose, type=EventType.ERASED,
            effective_at=at,
        )
        for purpose in sorted(purposes)
    ]  # fmt: skip


def destroy_key(storage: Storage, locator: bytes, ground: str) -> None:
    """Put the tombstone, which alone allows it, and delete the personal key."""
    with storage.writing() as connection:
        connection.execute(TOMBSTONES.insert().values(locator=locator, ground=ground))
        connection.execute(delete(SUBJECTS).where(SUBJECTS.c.locator == locator))


def forget_bytes(storage: Storage) -> None:
    """What a database keeps of a deleted row: SQLite overwrites it in the file (`secure_delete`) and is made to empty
    its write-ahead log; PostgreSQL is made to drop dead rows (`VACUUM`), and keeps its own log until that is recycled.

    Raises:
        ConsentError: Another program is in the way. The erasure stands; asking again finishes it.
    """
    deadline = time.monotonic() + _PATIENCE
    while not storage.tidy():
        if time.monotonic() > deadline:
            raise ConsentError("the person is erased, but a copy of her key may still lie in the write-ahead log",
                               where=storage.where,
                               hint="stop the programs that read the registry, and erase again to finish")  # fmt: skip
        time.sleep(0.05)
