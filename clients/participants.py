"""Whose records a round may use: consent, role and personal limit, per person.

Invariant: a person's participation depends on that person's own consent events and on public parameters only. What
is decided here for one person never depends on another.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.clients.data.records import SiteRecords
from confide.privacy.consent import Registry, SiteKey, Snapshot, now_micros
from confide.privacy.digest import digest
from confide.privacy.dp import Ledger, Role

__all__ = ["ParticipantSource", "Participants"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Participants:
    """Marks over the site's persons; shape [persons] each. Never leaves the site."""

    train: Mask
    held_out: Mask

    def commitment(self) -> str:
        """A salted digest of constant size; tells nothing of anybody."""
        marks = np.packbits(np.concatenate([self.train, self.held_out])).tobytes()
        return digest("snapshot", secrets.token_bytes(32), marks).hex()

    def still_covers(self, later: Participants) -> bool:
        """Does everybody who was used may still be used?"""
        lost = (self.train & ~later.train) | (self.held_out & ~later.held_out)
        return not bool(lost.any())


class ParticipantSource:
    """Takes snapshots for one run's purpose and maps them to the site's persons.

    Args:
        registry: The site's consent registry.
        key: The site's key; it fixes each person's role for ever.
        records: The site's data.
        purpose: The run's purpose.
        held_out: Share of persons whose role is held-out.
    """

    def __init__(self, registry: Registry, key: SiteKey, records: SiteRecords, purpose: str, held_out: float) -> None:
        self._registry, self._persons, self._purpose = registry, records.persons, purpose
        self._held_out: Mask = np.array([key.role_share(p) < held_out for p in records.persons], dtype=np.bool_)

    def take(self, ledger: Ledger | None) -> Participants:
        """The snapshot of this instant.

        Args:
            ledger: Holds this round's charges already, for personal limits; None for ε = ∞ on public data.

        Raises:
            ConsentError: The registry cannot be read; the site then abstains.
        """
        snapshot = self._registry.snapshot(self._purpose, now_micros())
        names = self._registry.pseudonyms(self._persons)
        consenting = np.array([names.get(p) in snapshot.participants for p in self._persons], dtype=np.bool_)
        if ledger is not None:
            consenting &= self._within_personal_limit(snapshot, names, ledger)
        return Participants(train=consenting & ~self._held_out, held_out=consenting & self._held_out)

    def _within_personal_limit(self, snapshot: Snapshot, names: dict[str, bytes], ledger: Ledger) -> Mask:
        """A person's own loss is at most her role's total, so comparing with the total is safe (and public)."""
        if all(limit is None for limit in snapshot.participants.values()):
            return np.ones(len(self._persons), dtype=np.bool_)
        cost = {role: ledger.epsilon(role) for role in Role}
        mask = np.ones(len(self._persons), dtype=np.bool_)
        for i, person in enumerate(self._persons):
            limit = snapshot.participants.get(names.get(person, b""))
            role = Role.HELD_OUT if self._held_out[i] else Role.TRAIN
            mask[i] = limit is None or cost[role] <= limit
        return mask
