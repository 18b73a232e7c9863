"""What a coordinator knows when a run has ended: what was released, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from confide.errors import DataError
from confide.privacy.dp import metrics, person_epsilon
from confide.privacy.dp.statistics import RELEASES
from confide.protocol.bounds import learned_bounds
from confide.protocol.manifest import Manifest
from confide.protocol.messages import Refusal
from confide.server.coordinator import Released

__all__ = ["failed", "finished", "run_loss"]


def run_loss(manifest: Manifest) -> float | None:
    """ε of this run for the more exposed role, its parameters fixed beforehand; None: no protection (public data)."""
    if not manifest.privacy.protects:
        return None
    return person_epsilon(manifest.all_charges(), manifest.privacy.delta)


def finished(manifest: Manifest, released: Released) -> dict[str, Any]:
    """`result.json` of a run that released its model. `released_metrics` are the last ones: noised, charged, a sum over
    the cohort."""
    if manifest.statistics:
        return _learned(manifest, released)
    cohorts = {o.round: o.cohort for o in released.outcomes}
    last, total = released.metrics_round, released.metrics
    for outcome in reversed(released.outcomes):
        if total is None and outcome.metrics is not None:
            last, total = outcome.metrics_round, outcome.metrics
    found: dict[str, float | None] | None = None
    intervals: dict[str, list[float] | None] | None = None
    if last is not None and total is not None:
        noise = metrics.noise_deviation(
            manifest.metrics_noise_multiplier, sites=len(cohorts[last]),
            population=max(m.population for m in manifest.members), bits=manifest.sealing.bits,
        )  # fmt: skip
        found = metrics.read(manifest.label.task, total, noise)
        wide = metrics.interval(manifest.label.task, total, noise)
        intervals = {name: None if pair is None else list(pair) for name, pair in wide.items()}
    return {
        **_head(manifest, "finished"),
        "sites_in_last_cohort": list(released.outcomes[-1].cohort) if released.outcomes else [],
        "rounds_abandoned": sum(o.abandoned for o in released.outcomes), "released_metrics": found,
        "released_intervals": intervals, "metrics_round": None if last is None else last - 1,
        "model": released.model, "bytes_per_parameter": round(released.bytes_per_parameter, 3),
    }  # fmt: skip


def _learned(manifest: Manifest, released: Released) -> dict[str, Any]:
    """`result.json` of a run that learned bounds: nothing was trained. `bounds` is null where noise hides them."""
    first = next((o.metrics for o in released.outcomes if o.metrics_round == 1), None)
    second = released.metrics if released.metrics_round == RELEASES else None
    bounds, reason = None, "a release of the statistics was abandoned"
    if first is not None and second is not None:
        try:
            bounds = {name: list(pair) for name, pair in learned_bounds(manifest, first, second).items()}
        except DataError as error:
            reason = f"{error.what}; {error.hint}"
    return {
        **_head(manifest, "finished"), "bounds": bounds, **({"reason": reason} if bounds is None else {}),
        "rounds_abandoned": sum(o.abandoned for o in released.outcomes), "released_metrics": None,
    }  # fmt: skip


def failed(manifest: Manifest, status: str, reason: str, refusals: Mapping[str, Refusal]) -> dict[str, Any]:
    """`result.json` of a run that released nothing, with what sites said (public reasons only)."""
    said = {site: refusal.reason for site, refusal in sorted(refusals.items())}
    return {**_head(manifest, status), "reason": reason, "refusals": said}


def _head(manifest: Manifest, status: str) -> dict[str, Any]:
    return {
        "run_id": manifest.run, "status": status, "purpose": manifest.purpose, "rounds": manifest.rounds,
        "sites": [m.site for m in manifest.members], "min_sites": manifest.min_sites,
        "profile": manifest.sealing.profile, "epsilon": run_loss(manifest), "delta": manifest.privacy.delta,
        "unit": manifest.privacy.unit, "max_sites_per_subject": manifest.privacy.max_sites_per_subject,
        **({} if manifest.begins_after is None else {"begins_after": manifest.begins_after}),
    }  # fmt: skip
