"""What imports, exports, receipts and commands ask of a registry: the only place that calls it for them.

Invariants:
1. Nothing that names a person is stored: an identifier becomes a pseudonym here, a derived event id a keyed one.
2. A file of events is applied in one transaction, or not at all.
3. A withdrawal ends every consent to its purpose, also one that was to begin later.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from confide.errors import ConsentError
from confide.privacy.consent.events import ConsentEvent, EventType
from confide.privacy.consent.imports.event import ImportedEvent
from confide.privacy.consent.pseudonyms import SiteKey, canonical_subject
from confide.privacy.consent.registry import Registry
from confide.privacy.consent.state import Standing, decide
from confide.privacy.database import open_read_only
from confide.privacy.digest import keyed_digest

__all__ = ["KEY", "REGISTRY", "ConsentDesk", "Count", "filed"]

REGISTRY, KEY = "consent.db", "site.key"
_GRANTS = (EventType.GIVEN, EventType.RENEWED)
#: The columns of an event, in the order of `ConsentEvent`'s fields.
_QUERY = (
    "SELECT seq, event_id, pseudonym, purpose, type, effective_at, valid_until, notice_digest, lawful_basis, "
    "jurisdiction, evidence_ref, max_epsilon FROM consent_event ORDER BY seq"
)


@dataclass(frozen=True, slots=True)
class Count:
    """How many may participate, as far as it may be said: None where there are fewer than the threshold."""

    purpose: str
    as_of: int
    sequence: int
    threshold: int
    participants: int | None


class ConsentDesk:
    """One site's registry, for the people who keep it.

    Args:
        folder: Holds `consent.db`, and `site.key` where `key` does not say otherwise.
        key: The site key's file.

    Raises:
        ConsentError: One of them is missing, or is not what it should be. Nothing is made.
    """

    def __init__(self, folder: Path, key: Path | None = None) -> None:
        self._path = folder / REGISTRY
        for path in (self._path, key or folder / KEY):
            if not path.is_file():
                raise ConsentError("is missing", where=str(path),
                                   hint="confide consent init FOLDER makes both; --key names another key")  # fmt: skip
        try:
            self._key = SiteKey.load_or_create(key or folder / KEY)
        except OSError as error:
            raise ConsentError(f"cannot be read: {error.strerror}", where=str(key or folder / KEY),
                               hint="only who runs the site may read its key") from None  # fmt: skip
        self._registry = Registry(self._path, self._key)

    @classmethod
    def create(cls, folder: Path) -> ConsentDesk:
        """A new registry with a key of its own, readable by the owner only.

        Raises:
            ConsentError: There is one already, or the folder cannot be written.
        """
        for path in (folder / REGISTRY, folder / KEY):
            if path.exists():
                raise ConsentError("is there already", where=str(path), hint="name a new folder; nothing was changed")
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / REGISTRY).touch(mode=0o600)
            SiteKey.load_or_create(folder / KEY)
        except OSError as error:
            raise ConsentError(f"cannot be written: {error.strerror}", where=str(folder),
                               hint="name a folder that you may write to") from None  # fmt: skip
        return cls(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._registry.close()

    @property
    def key_fingerprint(self) -> str:
        """Names the site's key, and tells nothing of it."""
        return self._key.fingerprint

    def apply(self, events: Iterable[ImportedEvent]) -> int:
        """Add events in one transaction.

        Returns:
            How many were new.

        Raises:
            ConsentError: The events end in an error, the database refused, or an event id is known with another
                content. No event was added; a person may have got a pseudonym, under which nothing is filed.
        """
        held = list(events)
        pseudonyms = self._registry.enrol({event.subject for event in held})
        return self._registry.append([filed(e, pseudonyms[e.subject], self._key) for e in held])

    def withdrawals(self, event: ImportedEvent) -> list[ImportedEvent]:
        """The withdrawal, and one more at the beginning of each consent that is still to begin."""
        later = sorted({
            e.effective_at for _, e in self.history(event.subject)
            if e.purpose == event.purpose and e.type in _GRANTS and e.effective_at > event.effective_at
        })  # fmt: skip
        return [event, *(_at(event, number, start) for number, start in enumerate(later, 1))]

    def history(self, subject: str) -> list[tuple[int, ConsentEvent]]:
        """(sequence number, event) of one person, oldest first; empty where nothing is held."""
        return self._registry.history(canonical_subject(subject))

    def standings(self, subject: str, at: int) -> dict[str, Standing]:
        """What the person's events amount to, by purpose."""
        by_purpose: dict[str, list[ConsentEvent]] = {}
        for _, event in self.history(subject):
            by_purpose.setdefault(event.purpose, []).append(event)
        return {purpose: decide(events, at) for purpose, events in sorted(by_purpose.items())}

    def pseudonym(self, subject: str) -> bytes | None:
        """The name under which the person's events are filed."""
        person = canonical_subject(subject)
        return self._registry.pseudonyms([person]).get(person)

    def names(self, subjects: Iterable[str]) -> dict[bytes, str]:
        """Pseudonym → identifier, for those identifiers that the registry knows."""
        found = self._registry.pseudonyms({canonical_subject(subject) for subject in subjects})
        return {pseudonym: subject for subject, pseudonym in found.items()}

    def sequence(self) -> int:
        """The number of the latest event."""
        return self._registry.head()

    def count(self, purpose: str, at: int, threshold: int) -> Count:
        """How many may participate in a purpose at an instant."""
        snapshot = self._registry.snapshot(purpose, at)
        people = len(snapshot.participants)
        return Count(purpose, at, snapshot.sequence, threshold, people if people >= threshold else None)

    def purposes(self) -> list[str]:
        """Every purpose that an event names."""
        return sorted(purpose for (purpose,) in self._rows("SELECT DISTINCT purpose FROM consent_event"))

    def events(self) -> Iterator[tuple[int, ConsentEvent]]:
        """(sequence number, event) of everything on record, oldest first.

        Raises:
            ConsentError: The registry cannot be read.
        """
        for seq, event_id, pseudonym, purpose, kind, *rest in self._rows(_QUERY):
            if kind not in _KINDS:
                raise ConsentError(f"holds a kind of event that is not known: {kind!r}", where=str(self._path),
                                   hint="use the version of confide that wrote it")  # fmt: skip
            yield seq, ConsentEvent(
                event_id=event_id, pseudonym=pseudonym, purpose=purpose, type=EventType(kind),
                **dict(zip(_REST, rest, strict=True)),
            )  # fmt: skip

    def _rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        try:
            connection = open_read_only(self._path)
            try:
                yield from connection.execute(query)
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise ConsentError(f"cannot be read ({type(error).__name__})", where=str(self._path),
                               hint="restore the registry from the site's backup") from None  # fmt: skip


def filed(event: ImportedEvent, pseudonym: bytes, key: SiteKey) -> ConsentEvent:
    """An imported event as the registry keeps it. An id that was derived is a digest of what identifies a person: under
    the site's key nobody can try identifiers out."""
    identifier = event.event_id
    if event.derived:
        identifier = "keyed:" + keyed_digest(key.secret, "consent-event", identifier.encode()).hex()
    return ConsentEvent(
        event_id=identifier, pseudonym=pseudonym, purpose=event.purpose, type=event.type,
        effective_at=event.effective_at, valid_until=event.valid_until, notice_digest=event.notice_digest,
        lawful_basis=event.lawful_basis, jurisdiction=event.jurisdiction, evidence_ref=event.evidence_ref,
        max_epsilon=event.max_epsilon,
    )  # fmt: skip


_KINDS = frozenset(str(kind) for kind in EventType)
_REST = ("effective_at", "valid_until", "notice_digest", "lawful_basis", "jurisdiction", "evidence_ref", "max_epsilon")


def _at(event: ImportedEvent, number: int, start: int) -> ImportedEvent:
    return replace(event, event_id=f"{event.event_id}/{number}", effective_at=start)
