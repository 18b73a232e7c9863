"""What withdrawals touch: released models, and the rounds whose snapshots held whoever has left. For the site only.

Invariants:
1. Nothing is written to the files that it is made from.
2. Whoever is asked for by instant is found by pseudonym: also the erased, whom nobody can name any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass

from confide.clients.past import manifests_of, released_models, was_used
from confide.clients.sitefiles import SiteFiles
from confide.clients.snapshots import SnapshotStore
from confide.errors import ConsentError
from confide.privacy.consent import EventType, Registry, canonical_subject, lineage
from confide.privacy.consent.state import DENIALS
from confide.privacy.dp import person_epsilon
from confide.protocol.manifest import Manifest

__all__ = ["TouchedRun", "left_since", "named", "touched_runs"]

_LEAVING = DENIALS | {EventType.ERASED}


@dataclass(frozen=True, kw_only=True, slots=True)
class TouchedRun:
    """A run at one site that computed with somebody who has left.

    Attributes:
        rounds: The rounds that did.
        persons: How many of those who have left.
        epsilon: What the whole run costs a person at most, PRV, at `delta`; infinity where nothing protects her.
        model: Digest of the released model; None where none was released.
        released: When, ISO 8601.
    """

    site: str
    run: str
    purpose: str
    rounds: list[int]
    persons: int
    epsilon: float
    delta: float
    model: str | None
    released: str | None


def named(subjects: Iterable[str], registry: Registry) -> dict[bytes, None]:
    """Pseudonyms of these persons, as far as this site knows them: whatever they withdraw, every purpose counts.

    Raises:
        ConsentError: One of them was erased: she cannot be found by name any more.
    """
    people = {canonical_subject(subject) for subject in subjects}
    if registry.erased(people):
        raise ConsentError("one of these persons was erased, and cannot be found by name", where="impact",
                           hint="leave her out; --since finds what the erased took part in")  # fmt: skip
    return dict.fromkeys(registry.pseudonyms(people).values())


def left_since(registry: Registry, since: int) -> dict[bytes, frozenset[str]]:
    """Pseudonym → purposes that were withdrawn, refused or erased from an instant (microseconds UTC) on."""
    found: dict[bytes, set[str]] = {}
    for _, event in registry.events():
        if event.type in _LEAVING and event.effective_at >= since:
            found.setdefault(event.pseudonym, set()).add(event.purpose)
    return {pseudonym: frozenset(purposes) for pseudonym, purposes in found.items()}


def touched_runs(files: SiteFiles, subjects: Iterable[str], since: int | None) -> tuple[int, list[TouchedRun]]:
    """What this site's past runs computed with certain persons.

    Args:
        files: The site's files.
        subjects: Persons by identifier; used where `since` is None.
        since: Everybody who has left from this instant on, and has not consented again.

    Returns:
        How many such persons this site knows, and the runs, in the order of their first snapshot.

    Raises:
        ConsentError: The registry or the site key cannot be read, or a person was erased.
    """
    with closing(files.open_registry()[0]) as registry:
        gone: Mapping[bytes, frozenset[str] | None]
        gone = named(subjects, registry) if since is None else left_since(registry, since)
        if not gone or not files.snapshots.is_file():
            return len(gone), []
        with closing(SnapshotStore(files.snapshots, read_only=True)) as store:
            held = [(pseudonym, *place) for pseudonym in gone for place in store.rounds_of(pseudonym)]
        manifests = manifests_of(files.state, dict.fromkeys(run for _, run, _, _ in held))
        back = _consenting_again(registry, manifests) if since is not None else {}
    rounds: dict[str, set[int]] = {}
    persons: dict[str, set[bytes]] = {}
    for pseudonym, run, round_, role in held:
        manifest, purposes = manifests.get(run), gone[pseudonym]
        if manifest is None or not was_used(manifest, round_, role) or pseudonym in back.get(manifest.purpose, ()):
            continue
        if purposes is None or purposes.intersection(lineage(manifest.purpose)):
            rounds.setdefault(run, set()).add(round_)
            persons.setdefault(run, set()).add(pseudonym)
    released = released_models(files.log)
    return len(gone), [
        TouchedRun(
            site=files.site, run=run, purpose=manifests[run].purpose, rounds=sorted(found), persons=len(persons[run]),
            epsilon=_epsilon(manifests[run]), delta=manifests[run].privacy.delta,
            model=released.get(run, (None, None))[0], released=released.get(run, (None, None))[1],
        )
        for run, found in rounds.items()
    ]  # fmt: skip


def _consenting_again(registry: Registry, manifests: Mapping[str, Manifest]) -> dict[str, set[bytes]]:
    """By purpose: whose consent stands now. As of a number, so that asking leaves no mark on the registry's clock."""
    purposes, now, head = {m.purpose for m in manifests.values()}, registry.now(), registry.head()
    return {purpose: set(registry.snapshot(purpose, now, head).participants) for purpose in purposes}


def _epsilon(manifest: Manifest) -> float:
    if not manifest.privacy.protects:
        return math.inf
    return person_epsilon(manifest.all_charges(), manifest.privacy.delta)
