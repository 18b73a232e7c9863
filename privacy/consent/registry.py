"""The consent registry: an append-only table of events, and answers about who may participate.

Invariants:
1. Events are only ever added: the database refuses UPDATE and DELETE.
2. A snapshot depends on (purpose, instant, sequence number) alone, so it can be reproduced.
3. An import is applied whole or not at all; an event id that is already known adds nothing.
4. The present never lies before the latest event's record or the latest snapshot, however the clock is set: what has
   expired or was withdrawn does not stand again.
5. What was erased is denied, and the same identifier is not enrolled again.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from sqlalchemy import Connection, bindparam, update

from confide.errors import ConsentError
from confide.privacy.consent import projection
from confide.privacy.consent.adding import add_events
from confide.privacy.consent.bulk import collector_paused, insert_rows
from confide.privacy.consent.erasure import DEFAULT_GROUND, closing_events, destroy_key, forget_bytes
from confide.privacy.consent.events import ConsentEvent, now_micros
from confide.privacy.consent.notices import EVERYTHING, Notice
from confide.privacy.consent.present import Present
from confide.privacy.consent.projection import Difference
from confide.privacy.consent.pseudonyms import KEY_BYTES, SiteKey
from confide.privacy.consent.queries import (
    all_events,
    erased_among,
    events_of,
    heads,
    keys_of,
    notices_at,
    purposes_of,
)
from confide.privacy.consent.roll import Roll
from confide.privacy.consent.state import Standing, Status, decide
from confide.privacy.consent.statements import Change
from confide.privacy.consent.storage import Storage
from confide.privacy.consent.tables import (
    CLOCK,
    NOTICES,
    PROJECTION,
    SUBJECTS,
    refuse_odd_values,
)
from confide.privacy.consent.view import Snapshot, standing_of

__all__ = ["Registry", "Snapshot"]

_BATCH = 50_000
_TAKEN = Change(update(CLOCK).where(CLOCK.c.latest < bindparam("at")).values(latest=bindparam("at")))
#: Microseconds: an instant so long ago is asked about, not lived in.
_PAST = 60_000_000


class Registry:
    """One site's registry, in one SQLite file or one PostgreSQL database.

    Args:
        path: The file, made where it does not exist; or `postgresql://user@host/database`.
        key: The site's key.

    Raises:
        ConsentError: It cannot be opened, or is of a version that this program does not know.
    """

    def __init__(self, path: Path | str, key: SiteKey) -> None:
        self._key = key
        self._storage = Storage(path)
        self._present = Present(self._storage.where)
        self._one_asks = threading.Lock()

    # --- persons ---

    def enrol(self, subjects: Iterable[str]) -> dict[str, bytes]:
        """Pseudonyms of these identifiers, making personal keys for new ones.

        Raises:
            ConsentError: One of them was erased; nobody was enrolled. `erased` says which.
        """
        locator = self._key.locator
        by_locator = dict(sorted((locator(subject), subject) for subject in subjects))
        known = self._personal_keys(by_locator)
        if len(known) < len(by_locator):
            with self._storage.writing() as connection:
                missing = [locator for locator in by_locator if locator not in known]
                if erased_among(connection, missing):
                    raise ConsentError(
                        "a person who is to be enrolled was erased, and stays so", where=self._storage.where,
                        hint="leave her out (an import: --leave-out-erased); nothing can be recorded of her",
                    )  # fmt: skip
                known |= _keys_made(connection, missing)
        pseudonym = self._key.pseudonym
        return {subject: pseudonym(subject, known[loc]) for loc, subject in by_locator.items()}

    def enrol_roll(self, roll: Roll) -> set[str]:
        """Make personal keys for whoever of a roll has none; who was erased is left out.

        Returns:
            Those of them who were erased.
        """
        by_locator = roll.locators
        with self._storage.reading() as connection:
            known, gone = keys_of(connection, by_locator), erased_among(connection, by_locator)
        if len(known.keys() | gone) < len(by_locator):
            with self._storage.writing() as connection:
                gone = erased_among(connection, by_locator)
                _keys_made(connection, [loc for loc in by_locator if loc not in known and loc not in gone])
        return {by_locator[locator] for locator in gone}

    def pseudonyms(self, subjects: Iterable[str]) -> dict[str, bytes]:
        """Pseudonyms of those identifiers that the registry knows; an unknown person has none."""
        return self.roll(subjects).pseudonyms()

    def roll(self, subjects: Iterable[str]) -> Roll:
        """For whoever asks for the pseudonyms of the same identifiers again and again."""
        return Roll(self._key, subjects, self._personal_keys)

    def erased(self, subjects: Iterable[str]) -> set[str]:
        """Those of these identifiers that were erased and are not enrolled again."""
        by_locator = {self._key.locator(s): s for s in subjects}
        with self._storage.reading() as connection:
            return {by_locator[loc] for loc in erased_among(connection, by_locator)}

    def erase(self, subject: str, ground: str = DEFAULT_GROUND) -> int:
        """Close everything that is on record of a person and destroy the key to it; see `erasure`. Asked again, it only
        finishes what another program was in the way of.

        Args:
            subject: Her identifier.
            ground: Why a tombstone is kept.

        Returns:
            How many events were added.

        Raises:
            ConsentError: Nobody of this identifier is on record; or it cannot be written; or the last copy of the key
                could not be overwritten yet.
        """
        locator, added = self._key.locator(subject), 0
        with self._storage.writing() as connection:
            if not erased_among(connection, [locator]):
                personal_key = keys_of(connection, [locator]).get(locator)
                if personal_key is None:
                    raise ConsentError("nobody of this identifier is on record", where=self._storage.where,
                                       hint="check how the registry's imports spell it")  # fmt: skip
                pseudonym = self._key.pseudonym(subject, personal_key)
                added = add_events(connection, self._storage, closing_events(self._storage, pseudonym, self.now()))
                destroy_key(self._storage, locator, ground)
        forget_bytes(self._storage)
        return added

    # --- events and notices ---

    def append(self, events: Sequence[ConsentEvent]) -> int:
        """Add events in one transaction; known event ids are skipped. See `append_all`."""
        return self.append_all(events)

    def append_all(self, events: Iterable[ConsentEvent], progress: Callable[[int], None] | None = None) -> int:
        """Add any number of events in one transaction, in bounded memory. While it runs others wait to write. The
        iterable may enrol persons: they are part of the transaction.

        Args:
            events: May raise; then nothing was added.
            progress: Told how many events have been taken in so far.

        Returns:
            How many were new.

        Raises:
            ConsentError: The database refused, or an id is known with another content; nothing was added.
        """
        added = taken = 0
        with collector_paused(), self._storage.writing() as connection:
            remaining, put_off = iter(events), False
            while part := list(islice(remaining, _BATCH)):
                refuse_odd_values(part, self._storage.where)
                if len(part) == _BATCH and heads(connection).sequence == 0:
                    put_off = True
                    projection.put_off(connection)
                added += add_events(connection, self._storage, part, project=not put_off)
                taken += len(part)
                if progress is not None:
                    progress(taken)
            if put_off:
                projection.rebuild(connection)
        return added

    def register_notice(self, digest: str, purposes: Iterable[str], covers_beneath: bool = False) -> Notice:
        """Put on record what a version of a notice was written for; see `notice_digest`. Known already: adds nothing.

        Raises:
            ConsentError: It is empty, is on record with another content, or cannot be written.
        """
        notice = Notice(digest=digest, purposes=frozenset(purposes), covers_beneath=covers_beneath)
        if not digest or not notice.purposes or EVERYTHING in notice.purposes:
            raise ConsentError("a notice has a digest and was written for a purpose", where=self._storage.where,
                               hint="name both")  # fmt: skip
        with self._storage.writing() as connection:
            known = notices_at(connection).get(digest)
            if known is not None:
                if replace(known, sequence=0, registered_at=0, digest=digest) != notice:
                    raise ConsentError(
                        f"notice {digest[:80]!r} is known as written for something else", where=self._storage.where,
                        hint="a new version of a notice has a digest of its own",
                    )  # fmt: skip
                return known
            fresh = replace(notice, sequence=heads(connection).sequence + 1, registered_at=self.now())
            row = (fresh.sequence, digest, json.dumps(sorted(fresh.purposes)), covers_beneath, fresh.registered_at)
            insert_rows(connection, NOTICES, [row])
            return fresh

    def notices(self, sequence: int | None = None) -> dict[str, Notice]:
        """The notices on record, each once, by the digest that it was registered under, as of a sequence number; None
        is the latest."""
        with self._storage.reading() as connection:
            return {notice.digest: notice for notice in notices_at(connection, sequence).values()}

    def head(self) -> int:
        """The sequence number of the latest event or notice; 0 where there is none."""
        with self._storage.reading() as connection:
            return heads(connection).sequence

    # --- the present ---

    def latest_recorded(self) -> int:
        """When the latest event was put on record, or as of when the latest snapshot was taken (microseconds UTC); 0
        where there is neither. No honest clock is behind it."""
        with self._storage.reading() as connection:
            return heads(connection).recorded

    def now(self) -> int:
        """The present as answers about it are given: the clock, or `latest_recorded` where the clock is behind."""
        return max(now_micros(), self.latest_recorded())

    # --- answers ---

    def snapshot(self, purpose: str, as_of: int, sequence: int | None = None) -> Snapshot:
        """Who may participate for this purpose.

        As of the latest sequence number it is a snapshot of the present: that it was taken is on record before it is
        returned (instants that are still to come are not).

        Args:
            purpose: The run's purpose.
            as_of: Microseconds UTC.
            sequence: Consider events up to this number; None is the latest.

        Raises:
            ConsentError: The registry cannot be read. The site then abstains.
        """
        if sequence is None and not self._is_on_record(as_of):
            self._put_forward(lambda _: as_of)
        with self._one_asks, self._storage.reading() as connection:
            return self._present.snapshot(connection, purpose, as_of, sequence)

    def take(self, purpose: str, instant: Callable[[int], int], roll: Roll) -> tuple[Snapshot, dict[str, bytes]]:
        """A snapshot of the present, and the pseudonyms of a roll as of the same state of the registry. That it was
        taken is on record before it is returned.

        Args:
            purpose: The run's purpose.
            instant: Told `latest_recorded`, says as of when (microseconds UTC), or raises: then nothing is taken.
                Nobody writes meanwhile.
            roll: Whose pseudonyms.

        Raises:
            ConsentError: The registry cannot be read, or not be written. The site then abstains.
        """
        at = self._put_forward(instant)
        with self._one_asks, self._storage.reading() as connection:
            return self._present.snapshot(connection, purpose, at, None), roll.pseudonyms(connection)

    def state(self, subject: str, purpose: str, at: int | None = None, sequence: int | None = None) -> Standing:
        """One person's standing for a purpose.

        Args:
            subject: Her identifier; somebody unknown has consented to nothing.
            purpose: The purpose.
            at: Microseconds UTC; None is the present.
            sequence: Consider events up to this number; None is the latest.

        Raises:
            ConsentError: The registry cannot be read.
        """
        locator = self._key.locator(subject)
        with self._storage.reading() as connection:
            latest = heads(connection)
            at = max(now_micros(), latest.recorded) if at is None else at
            personal_key = keys_of(connection, [locator]).get(locator)
            if personal_key is None:
                gone = erased_among(connection, [locator])
                return Standing(Status.REFUSED if gone else Status.UNKNOWN)
            pseudonym = self._key.pseudonym(subject, personal_key)
            if latest.projected and (sequence is None or sequence >= latest.sequence):
                self._present.check(latest)
                return standing_of(connection, pseudonym, purpose, at, self._present.notices(connection, latest))
            notices = notices_at(connection, sequence)
            return decide((e for _, e in events_of(connection, pseudonym, sequence)), at, purpose, notices)

    def history(self, subject: str) -> list[tuple[int, ConsentEvent]]:
        """(sequence number, event) of everything that is on record of a person, oldest first.

        Raises:
            ConsentError: The registry cannot be read.
        """
        pseudonym = self.pseudonyms([subject]).get(subject)
        if pseudonym is None:
            return []
        with self._storage.reading() as connection:
            return list(events_of(connection, pseudonym))

    def events(self) -> Iterator[tuple[int, ConsentEvent]]:
        """(sequence number, event) of everything on record, oldest first.

        Raises:
            ConsentError: The registry cannot be read.
        """
        with self._storage.reading() as connection:
            yield from all_events(connection)

    def purposes(self) -> list[str]:
        """Every purpose that an event names, in order."""
        with self._storage.reading() as connection:
            self._present.check(heads(connection))
            return list(purposes_of(connection))

    # --- the projection ---

    def check(self) -> list[Difference]:
        """Compare what is kept for speed with the events. Where they differ nothing is answered until `rebuild`.

        Raises:
            ConsentError: The registry cannot be read.
        """
        with self._storage.reading() as connection:
            found = list(projection.differences(connection))
        if found:
            with self._storage.writing() as connection:
                connection.execute(update(PROJECTION).values(damaged=True))
        return found

    def rebuild(self) -> None:
        """Make what is kept for speed anew from the events."""
        with self._one_asks, self._storage.writing() as connection:
            self._present.forget()
            projection.rebuild(connection)

    def close(self) -> None:
        """Release the file or the connections."""
        self._storage.close()

    def _is_on_record(self, at: int) -> bool:
        """Is it long past, and on record? Whoever asks about that need not be able to write."""
        if at >= now_micros() - _PAST:
            return False
        with self._storage.reading() as connection:
            return heads(connection).recorded >= at

    def _put_forward(self, instant: Callable[[int], int]) -> int:
        """Note durably that a snapshot was taken as of this instant, or of the present where it is still to come. The
        instant follows from `latest_recorded`."""
        with self._storage.writing() as connection:
            at = instant(heads(connection).recorded)
            _TAKEN.apply(connection, at=min(at, now_micros()))
        return at

    def _personal_keys(self, locators: Iterable[bytes]) -> dict[bytes, bytes]:
        with self._storage.reading() as connection:
            return keys_of(connection, locators)


def _keys_made(connection: Connection, locators: Iterable[bytes]) -> dict[bytes, bytes]:
    """Personal keys of persons none of whom was erased, made where there is none; in the transaction of `writing`."""
    # In the order of the table's index, so that fewer of its pages are touched.
    wanted = sorted(locators)
    known = keys_of(connection, wanted)  # another process may have been faster
    new = {locator: secrets.token_bytes(KEY_BYTES) for locator in wanted if locator not in known}
    insert_rows(connection, SUBJECTS, list(new.items()))
    return known | new
