"""What a site's own files tell of the runs that it took part in: their manifests, and which models left."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from confide.clients.store import SiteStore
from confide.privacy.audit.log import stored_entries
from confide.privacy.audit.records import ModelReleased
from confide.privacy.consent import from_micros
from confide.privacy.dp import Role
from confide.protocol.manifest import Manifest

__all__ = ["manifests_of", "released_models", "was_used"]


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


def was_used(manifest: Manifest, round_: int, role: Role) -> bool:
    """Does a round compute anything with persons of this role? A snapshot holds both roles in every round."""
    return manifest.trains_in(round_) if role is Role.TRAIN else manifest.metric_width(round_) > 0
