"""Pseudonyms of the same persons, asked for again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sqlalchemy import Connection

from confide.privacy.consent.pseudonyms import SiteKey
from confide.privacy.consent.queries import keys_of

__all__ = ["Roll"]


class Roll:
    """A list of persons, whose personal keys are read anew whenever their names are asked for. A name is computed once
    for as long as her key is there; with the key it is forgotten.

    Args:
        key: The site's key.
        subjects: Their identifiers.
        read: The personal keys on record, by locator.
    """

    def __init__(
        self, key: SiteKey, subjects: Iterable[str], read: Callable[[Iterable[bytes]], Mapping[bytes, bytes]]
    ) -> None:
        self._key, self._read = key, read
        self._by_locator = {key.locator(s): s for s in subjects}
        #: Personal keys by locator, and the pseudonyms that follow from them by identifier.
        self._known: tuple[Mapping[bytes, bytes], dict[str, bytes]] = ({}, {})

    @property
    def locators(self) -> Mapping[bytes, str]:
        """The identifiers, by locator, in their order."""
        return self._by_locator

    def pseudonyms(self, connection: Connection | None = None) -> dict[str, bytes]:
        """Pseudonyms of those of them that the registry knows; an unknown person has none.

        Args:
            connection: Reads one state of the registry; None: the latest.
        """
        keys = self._read(self._by_locator) if connection is None else keys_of(connection, self._by_locator)
        before, names = self._known
        if keys != before:
            names = {
                subject: names[subject] if before.get(locator) == personal else self._key.pseudonym(subject, personal)
                for locator, subject in self._by_locator.items()
                if (personal := keys.get(locator)) is not None
            }
            self._known = keys, names
        return dict(names)
