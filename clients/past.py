"""What a site's own files tell of the runs that it took part in: their manifests, which models left, and how long
rounds took."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from confide.clients.store import SiteStore
from confide.privacy.audit.log import stored_entries
from confide.privacy.audit.records import LocalReply, ModelReleased
from confide.privacy.consent import from_micros
from confide.privacy.dp import Role
from confide.protocol.manifest import Manifest

__all__ = ["manifests_of", "released_models", "replies", "shortest_wait", "was_used"]


def manifests_of(state: Path, runs: Iterable[str]) -> dict[str, Manifest]:
    """Manifests by run, of those runs that this site's state knows."""
    if not state.is_file():
        return {}
    store = SiteStore(state)
    try:
        found = {run: store.manifest(run) for run in runs}
    finally:
        store.close()
    return {run: Manifest.from_bytes(data) for run, data in found.items() if data is not None}


def released_models(log: Path) -> dict[str, tuple[str, str]]:
    """(model digest, time in ISO 8601) by run, from the site's federated log."""
    if not log.is_file():
        return {}
    found = ((entry, at) for entry, at in stored_entries(log) if isinstance(entry, ModelReleased))
    return {entry.run: (entry.model, from_micros(at).isoformat(timespec="seconds")) for entry, at in found}


def replies(log: Path, latest: int) -> list[LocalReply]:
    """When the latest rounds were answered, oldest first, from the site's local log."""
    if not log.is_file():
        return []
    return list(deque((entry for entry, _ in stored_entries(log) if isinstance(entry, LocalReply)), latest))


def shortest_wait(state: Path) -> int | None:
    """The fewest seconds that any run of this site waits for replies; None where none says."""
    if not state.is_file():
        return None
    with closing(SiteStore(state)) as store:
        known = [store.manifest(run) for run in store.runs()]
    waits = (Manifest.from_bytes(data).wait_seconds for data in known if data is not None)
    return min((wait for wait in waits if wait is not None), default=None)


def was_used(manifest: Manifest, round_: int, role: Role) -> bool:
    """Does a round compute anything with persons of this role? A snapshot holds both roles in every round."""
    return manifest.trains_in(round_) if role is Role.TRAIN else manifest.metric_width(round_) > 0
