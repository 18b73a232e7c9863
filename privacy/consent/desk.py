"""What imports, exports, receipts and commands ask of a registry: the only place that calls it for them.

Invariants:
1. Nothing that names a person is stored: an identifier becomes a pseudonym here, a derived event id a keyed one.
2. A file of events is applied in one transaction with the persons whom it names first, or not at all.
3. A withdrawal ends every consent to its purpose, also one that was to begin later.
4. What is missing is never made, but by `create`: a mistyped address is no new and empty registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from confide.errors import ConfideError, ConfigError, ConsentError
from confide.privacy.consent.erasure import DEFAULT_GROUND
from confide.privacy.consent.events import ConsentEvent
from confide.privacy.consent.imports.event import ImportedEvent
from confide.privacy.consent.notices import Notice, lineage
from confide.privacy.consent.projection import Difference
from confide.privacy.consent.pseudonyms import KeyBox, SiteKey, canonical_subject
from confide.privacy.consent.registry import Registry
from confide.privacy.consent.state import GRANTS, Standing, Status
from confide.privacy.consent.storage import holds_registry, is_url, shown_address
from confide.privacy.digest import keyed_digest

__all__ = ["KEY", "REGISTRY", "ConsentDesk", "Count", "filed"]

REGISTRY, KEY = "consent.db", "site.key"
#: Events whose persons are looked up at once.
_PORTION = 20_000


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
        address: The folder that holds `consent.db`; or `postgresql://user@host/database`.
        key: The site key's file; None: `site.key` in the folder.
        box: Opens that file, where it is encrypted.

    Raises:
        ConsentError: One of them is missing, or is not what it should be. Nothing is made.
        ConfigError: An address of a database comes without a key.
    """

    def __init__(self, address: Path | str, key: Path | None = None, box: KeyBox | None = None) -> None:
        place, key = _where(address, key)
        # A server may be out of reach; a file that is missing is told first.
        if not key.is_file():
            raise _missing(str(key))
        if not holds_registry(place):
            raise _missing(shown_address(place))
        self._open(place, _load_key(key, box))

    @classmethod
    def create(cls, address: Path | str, key: Path | None = None, box: KeyBox | None = None) -> ConsentDesk:
        """A new registry. In a folder it gets a key of its own, readable by the owner only; in a database it takes the
        site's key where there is one.

        Raises:
            ConsentError: There is one already, or it cannot be written.
            ConfigError: An address of a database comes without a key.
        """
        place, key = _where(address, key)
        in_folder = isinstance(place, Path)
        taken = [str(p) for p in (place, key) if isinstance(p, Path) and p.exists() and (p is place or in_folder)]
        if not taken and not in_folder and holds_registry(place):
            taken = [shown_address(place)]
        if taken:
            raise ConsentError("is there already", where=taken[0], hint="name a new place; nothing was changed")
        try:
            for path in (place, key):
                if isinstance(path, Path):
                    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if isinstance(place, Path):
                place.touch(mode=0o600)
            SiteKey.load_or_create(key, box=box)
        except OSError as error:
            raise ConsentError(f"cannot be written: {error.strerror}", where=str(key.parent),
                               hint="name a folder that you may write to") from None  # fmt: skip
        desk = cls.__new__(cls)
        desk._open(place, _load_key(key, box))
        return desk

    def _open(self, place: Path | str, key: SiteKey) -> None:
        self._key, self._registry = key, Registry(place, key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._registry.close()

    @property
    def key_fingerprint(self) -> str:
        """Names the site's key, and tells nothing of it."""
        return self._key.fingerprint

    # --- what is put on record ---

    def apply(
        self,
        events: Iterable[ImportedEvent],
        progress: Callable[[int], None] | None = None,
        *,
        on_erased: Callable[[int], None] | None = None,
    ) -> int:
        """Add events in one transaction, in bounded memory, whatever their number.

        Args:
            events: May raise; then nothing was added.
            progress: Told how many events have been taken in so far.
            on_erased: Told, now and then, how many more events of erased persons were passed over. None: one of them
                refuses all.

        Returns:
            How many were new.

        Raises:
            ConsentError: The events end in an error, the database refused, an event id is known with another content,
                or a person was erased. Nothing was added, and nobody enrolled.
        """
        return self._registry.append_all(self._filed(iter(events), on_erased), progress)

    def _filed(
        self, events: Iterator[ImportedEvent], on_erased: Callable[[int], None] | None
    ) -> Iterator[ConsentEvent]:
        while part := list(islice(events, _PORTION)):
            subjects = {event.subject for event in part}
            if on_erased is not None and (gone := self._registry.erased(subjects)):
                kept = [event for event in part if event.subject not in gone]
                on_erased(len(part) - len(kept))
                part, subjects = kept, subjects - gone
            pseudonyms = self._registry.enrol(subjects)
            for event in part:
                yield filed(event, pseudonyms[event.subject], self._key)

    def withdrawals(self, event: ImportedEvent) -> list[ImportedEvent]:
        """The withdrawal, and one more at the beginning of each consent that is still to begin."""
        later = sorted({
            e.effective_at for _, e in self.history(event.subject)
            if e.purpose == event.purpose and e.type in GRANTS and e.effective_at > event.effective_at
        })  # fmt: skip
        return [event, *(_at(event, number, start) for number, start in enumerate(later, 1))]

    def erase(self, subject: str, ground: str = DEFAULT_GROUND) -> int:
        """Erase a person, for ever; see `confide.privacy.consent.erasure`.

        Returns:
            How many events were added; 0 where she was erased before.

        Raises:
            ConsentError: Nobody of this identifier is on record, or it could not be finished.
        """
        return self._registry.erase(canonical_subject(subject), ground)

    def add_notice(self, digest: str, purposes: Iterable[str], *, covers_beneath: bool = False) -> Notice:
        """Put on record what a notice was written for.

        Args:
            digest: `sha256:` and 64 hexadecimal digits. Grants that spell it otherwise name the same notice.
            purposes: What it was written for.
            covers_beneath: It says that consent includes every purpose beneath these.

        Raises:
            ConsentError: It is on record with another content, or cannot be written.
        """
        return self._registry.register_notice(digest, purposes, covers_beneath)

    def rebuild(self) -> None:
        """Make what is kept for speed anew from the events."""
        self._registry.rebuild()

    # --- what is asked ---

    def check(self) -> list[Difference]:
        """Where what is kept for speed does not say what the events say."""
        return self._registry.check()

    def notices(self) -> list[Notice]:
        """The notices on record, oldest first; each once, however grants spell its digest."""
        return sorted(self._registry.notices().values(), key=lambda notice: notice.sequence)

    def history(self, subject: str) -> list[tuple[int, ConsentEvent]]:
        """(sequence number, event) of one person, oldest first; empty where nothing is held, or can be found."""
        return self._registry.history(canonical_subject(subject))

    def is_erased(self, subject: str) -> bool:
        """Was this person erased?"""
        return bool(self._registry.erased([canonical_subject(subject)]))

    def standings(self, subject: str, at: int, *, beneath: bool = True) -> dict[str, Standing]:
        """What the person's events amount to, by purpose.

        Args:
            subject: Her identifier.
            at: Microseconds UTC.
            beneath: Also of purposes that none of her events names, where what she decided above reaches them.
        """
        person = canonical_subject(subject)
        own = {event.purpose for _, event in self._registry.history(person)}
        known = set(self.purposes()) if own and beneath else set()
        reached = {p for p in known - own if own.intersection(lineage(p))}
        found = {p: self._registry.state(person, p, at) for p in sorted(own | reached)}
        return {p: s for p, s in found.items() if p in own or s.status is not Status.UNKNOWN}

    def pseudonym(self, subject: str) -> bytes | None:
        """The name under which the person's events are filed."""
        person = canonical_subject(subject)
        return self._registry.pseudonyms([person]).get(person)

    def locator(self, subject: str) -> bytes:
        """The name under which the site's ledger knows the person."""
        return self._key.locator(canonical_subject(subject))

    def names(self, subjects: Iterable[str]) -> dict[bytes, str]:
        """Pseudonym → identifier, for those identifiers that the registry knows."""
        found = self._registry.pseudonyms({canonical_subject(subject) for subject in subjects})
        return {pseudonym: subject for subject, pseudonym in found.items()}

    def sequence(self) -> int:
        """The number of the latest event or notice."""
        return self._registry.head()

    def now(self) -> int:
        """The present, as the registry answers about it: never before what is on record."""
        return self._registry.now()

    def count(self, purpose: str, at: int, threshold: int) -> Count:
        """How many may participate in a purpose at an instant."""
        snapshot = self._registry.snapshot(purpose, at)
        people = len(snapshot.participants)
        return Count(purpose, at, snapshot.sequence, threshold, people if people >= threshold else None)

    def purposes(self) -> list[str]:
        """Every purpose that an event or a notice names."""
        noticed = {purpose for notice in self._registry.notices().values() for purpose in notice.purposes}
        return sorted({*self._registry.purposes(), *noticed})

    def events(self) -> Iterator[tuple[int, ConsentEvent]]:
        """(sequence number, event) of everything on record, oldest first.

        Raises:
            ConsentError: The registry cannot be read.
        """
        return self._registry.events()


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


def _at(event: ImportedEvent, number: int, start: int) -> ImportedEvent:
    return replace(event, event_id=f"{event.event_id}/{number}", effective_at=start)


def _where(address: Path | str, key: Path | None) -> tuple[Path | str, Path]:
    """The registry's own address, and the key's file."""
    if not is_url(address):
        return Path(address) / REGISTRY, key or Path(address) / KEY
    if key is None:
        raise ConfigError("a registry in a database needs the site's key", where="--registry",
                          hint="name its file with --key; it lies at the site, never in the database")  # fmt: skip
    return str(address), key


def _load_key(path: Path, box: KeyBox | None) -> SiteKey:
    try:
        return SiteKey.load_or_create(path, box=box)
    except OSError as error:
        raise ConsentError(f"cannot be read: {error.strerror}", where=str(path),
                           hint="only who runs the site may read its key") from None  # fmt: skip


def _missing(where: str) -> ConfideError:
    return ConsentError("is missing", where=where, hint="confide consent init makes registry and key; "
                        "--key names another key")  # fmt: skip
