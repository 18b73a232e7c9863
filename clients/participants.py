"""Whose records a round may use: consent, role and personal limit, per person.

Invariant: a person's participation depends on that person's own consent events and on public parameters only. What
is decided here for one person never depends on another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.clients.data.records import SiteRecords
from confide.errors import AuditError, ConfideError
from confide.privacy.audit.log import CLOCK_STEP
from confide.privacy.consent import Registry, SiteKey, Snapshot
from confide.privacy.dp import Ledger, PrivacyEvent, Role
from confide.privacy.dp.personal import PersonalLosses

__all__ = ["ParticipantSource", "Participants", "Read"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Participants:
    """Marks over the site's persons; shape [persons] each. Never leaves the site."""

    train: Mask
    held_out: Mask

    def still_covers(self, later: Participants) -> bool:
        """Does everybody who was used may still be used?"""
        lost = (self.train & ~later.train) | (self.held_out & ~later.held_out)
        return not bool(lost.any())


@dataclass(frozen=True, slots=True)
class Read:
    """The registry was asked: as of which instant, up to which event (0: it did not say), and with what outcome."""

    as_of: int
    sequence: int
    outcome: str


class ParticipantSource:
    """Takes snapshots for one run's purpose and maps them to the site's persons.

    Args:
        registry: The site's consent registry.
        key: The site's key; it fixes each person's role for ever.
        records: The site's data.
        personal: What each person has been exposed to.
        purpose: The run's purpose.
        held_out: Share of persons whose role is held-out.
        clock: Microseconds since 1970; never goes back.
    """

    def __init__(
        self,
        registry: Registry,
        key: SiteKey,
        records: SiteRecords,
        personal: PersonalLosses,
        purpose: str,
        held_out: float,
        clock: Callable[[], int],
    ) -> None:
        self._clock, self._latest, self._reads = clock, 0, list[Read]()
        self._asked = 0  # the instant of the latest question; 0 where it did not come to one
        self._names: dict[str, bytes] = {}
        self._registry, self._persons, self._purpose, self._personal = registry, records.persons, purpose, personal
        self._held_out: Mask = np.array([key.role_share(p) < held_out for p in records.persons], dtype=np.bool_)
        # Everybody in the table gets a pseudonym, whether or not she was ever asked: so that it can be shown of anybody
        # that she was in no snapshot.
        self._roll = registry.roll(records.persons)
        erased = registry.enrol_roll(self._roll)
        locator_of = {person: locator for locator, person in self._roll.locators.items()}
        personal.forget_erased([locator_of[p] for p in erased])  # where the ledger was not at hand, it is now
        locators = [locator_of[p] for p in records.persons]
        # New ones in no order: no place tells between whom a person stood in the table, should she be forgotten.
        personal.enrol(random.SystemRandom().sample(locators, len(locators)))
        self._places = personal.enrol(locators)

    def take(self, ledger: Ledger | None, upcoming: Sequence[PrivacyEvent] = ()) -> Participants:
        """The snapshot of this instant.

        Args:
            ledger: The site's charges; None for ε = ∞ on public data.
            upcoming: What is about to be released and not charged yet. A person whose own limit it, or what is charged
                already, would exceed is left out.

        Raises:
            ConsentError: The registry cannot be read; the site then abstains.
            AuditError: The clock was set back.
        """
        self._asked = 0
        try:
            snapshot, names = self._registry.take(self._purpose, self._instant, self._roll)
        except ConfideError as error:
            self._reads.append(Read(self._asked, 0, error.kind))
            raise
        self._reads.append(Read(snapshot.as_of, snapshot.sequence, "answered"))
        self._names = names
        consenting = np.array([names.get(p) in snapshot.participants for p in self._persons], dtype=np.bool_)
        if ledger is not None:
            consenting &= self._within_personal_limit(snapshot, names, ledger, upcoming)
        return Participants(train=consenting & ~self._held_out, held_out=consenting & self._held_out)

    def reads(self) -> list[Read]:
        """How the registry was asked since the last call of this."""
        found, self._reads = self._reads, []
        return found

    def _instant(self, recorded: int) -> int:
        """The present, neither before the site's log, nor before the latest decision on record or the latest snapshot:
        else what has been decided would not count yet."""
        now, recorded = self._clock(), max(recorded, self._latest)
        if now < recorded - CLOCK_STEP:
            raise AuditError(
                f"the clock is {(recorded - now) / 1e6:,.0f} s behind the latest event of the consent registry, or the "
                "latest snapshot", where="clock", hint="set the clock right (NTP) and start again",
            )  # fmt: skip
        self._latest = self._asked = max(now, recorded)
        return self._latest

    def hold(self, used: Participants, charges: Mapping[Role, str]) -> None:
        """Note, durably, whom a round's charges hold, before anything computed under them leaves."""
        for role, charge in charges.items():
            mask = used.train if role is Role.TRAIN else used.held_out
            self._personal.hold(charge, self._places[mask])

    def members(self, used: Participants) -> dict[Role, list[bytes]]:
        """Pseudonyms of those who take part, by role; `used` is covered by the latest snapshot."""
        # As of the latest snapshot: who is erased after the cut-off was in this round, and counts from the next.
        names, masks = self._names, {Role.TRAIN: used.train, Role.HELD_OUT: used.held_out}
        return {role: [names[self._persons[i]] for i in np.flatnonzero(mask)] for role, mask in masks.items()}

    def _within_personal_limit(
        self, snapshot: Snapshot, names: dict[str, bytes], ledger: Ledger, upcoming: Sequence[PrivacyEvent]
    ) -> Mask:
        """A person's own loss decides, and nobody else's."""
        found = [snapshot.participants.get(names.get(p, b"")) for p in self._persons]
        if all(limit is None for limit in found):
            return np.ones(len(self._persons), dtype=np.bool_)
        limits = np.array([np.inf if limit is None else limit for limit in found], dtype=np.float64)
        charges, mask = ledger.charges(), np.zeros(len(self._persons), dtype=np.bool_)
        for role, here in ((Role.TRAIN, ~self._held_out), (Role.HELD_OUT, self._held_out)):
            delta = ledger.budget.delta
            mask[here] = self._personal.admits(self._places[here], limits[here], role, charges, upcoming, delta)
        return mask
