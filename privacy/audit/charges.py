"""What a site's log says was charged, held against what the run's manifest promises: step 6 of `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from confide.errors import ConfideError
from confide.privacy.audit import records as r
from confide.privacy.audit.evidence import Evidence, Finding, PartyLog, broken
from confide.privacy.dp.accounting import rdp_epsilon, run_epsilon
from confide.privacy.dp.events import PrivacyEvent, event_from_json, merge_events

__all__ = ["check_charges", "standing_charges"]


def check_charges(evidence: Evidence, site: str, log: PartyLog) -> Iterator[Finding]:
    """Findings about the charges that one site's log tells of."""
    privacy = evidence.manifest["privacy"]
    if privacy["epsilon"] in ("Infinity", "inf", None):
        return
    charged: dict[int, list[tuple[int, PrivacyEvent]]] = {}
    by_role: dict[str, list[PrivacyEvent]] = {}
    for number, entry in log.of(r.Charged):
        try:
            event = event_from_json(entry.event)
        except ConfideError:
            yield broken(site, number, "a charge that cannot be read")
            continue
        charged.setdefault(entry.round, []).append((number, event))
        if not _as_promised(event, evidence.manifest):
            yield broken(site, number, "a charge with other parameters than the manifest's")
    sealed_rounds = {e.round for _, e in log.of(r.Sealed)}
    rounds = {e.charge: e.round for _, e in log.of(r.Charged)}
    for number, entry in log.of(r.Settled):
        if entry.steps or rounds.get(entry.charge) in sealed_rounds or entry.charge not in rounds:
            yield broken(site, number, "a charge was taken back though what it paid for has left")
    for _, _, event in standing_charges(log):
        by_role.setdefault(event.role.value, []).append(event)
    snapshots = {e.round: n for n, e in reversed(list(log.of(r.SnapshotTaken)))}
    for number, entry in log.of(r.UpdateCommitted):
        if snapshots.get(entry.round, number) >= number:
            yield broken(site, number, f"an update of round {entry.round} without a snapshot of who consents")
        before = {e.role.value for n, e in charged.get(entry.round, []) if n < number}
        trains = entry.round <= evidence.manifest["rounds"] and not evidence.manifest.get("statistics")
        needed = {"train"} if trains else set()
        needed |= {"held_out"} if entry.round in evidence.manifest["metric_rounds"] else set()
        if not needed <= before:
            yield broken(site, number, f"an update of round {entry.round} that was not charged first")
    limit = float(privacy["epsilon"])
    for role, events in by_role.items():
        merged = merge_events(events)
        if len(merged) == 1 and run_epsilon(merged[0], privacy["delta"]) > limit * (1 + 1e-6):
            yield broken(site, None, f"the charges for {role} cost more than the run's ε = {limit:g}")
        if rdp_epsilon(merged, privacy["delta"]) > privacy["site_epsilon_limit"] * (1 + 1e-6):
            yield broken(site, None, f"the charges for {role} exceed the ledger's limit")


def standing_charges(log: PartyLog) -> list[tuple[int, int, PrivacyEvent]]:
    """(entry, round, event) of what a site's log says was spent. A charge counts as given back only if nothing was
    sealed in its round; what cannot be read is left out here, and is a finding."""
    sealed = {e.round for _, e in log.of(r.Sealed)}
    settled = {e.charge for _, e in log.of(r.Settled)}
    found = []
    for number, entry in log.of(r.Charged):
        if entry.charge in settled and entry.round not in sealed:
            continue
        try:
            found.append((number, entry.round, event_from_json(entry.event)))
        except ConfideError:
            continue
    return found


def _as_promised(event: PrivacyEvent, manifest: dict[str, Any]) -> bool:
    privacy = manifest["privacy"]
    if event.unit != privacy["unit"]:
        return False
    if event.role.value == "train":
        promised = (manifest["noise_multiplier"], privacy["sample_rate"], manifest["training"]["local_steps"])
    else:
        promised = (manifest["metrics_noise_multiplier"], 1.0, 1)
    sites = privacy.get("max_sites_per_subject", 1) if privacy["unit"] == "subject" else 1  # not said: an older run
    return (event.noise_multiplier, event.sample_rate, event.steps, event.sites) == (*promised, sites)
