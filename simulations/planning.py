"""What a run would do and cost, before anything happens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confide.config import Experiment, load_experiment
from confide.privacy.dp import PrivacyEvent, Role, person_epsilon
from confide.privacy.dp.events import merge_events
from confide.privacy.sealing import make_profile
from confide.simulations.folders import copy_ledgers
from confide.simulations.result import NEIGHBOURS, Plan, SitePlan
from confide.simulations.sources import builtin_example, experiment_file, load_sources
from confide.simulations.world import World

__all__ = ["Rooted", "Source", "any_bounds", "load_source", "plan", "schedule_epsilon"]


@dataclass(frozen=True, slots=True)
class Rooted:
    """An experiment with the folder that its relative paths start from."""

    experiment: Experiment
    base: Path


Source = Experiment | Rooted | Mapping[str, Any] | str | Path | None


def plan(experiment: Source = None, *, overrides: Iterable[str] = (), ledger: str | Path | None = None) -> Plan:
    """What a run would do and cost; writes nothing.

    Raises:
        ConfideError: Wrong input.
    """
    loaded, base = load_source(experiment, overrides)
    sources = load_sources(loaded, base, bounds=any_bounds)
    with tempfile.TemporaryDirectory() as scratch:
        ledgers = Path(scratch) / "ledgers"
        if ledger is not None and Path(ledger).is_dir():
            copy_ledgers(Path(ledger), ledgers)
        world = World(sources, Path(scratch) / "sites", ledgers, Path(scratch) / "logs")
        try:
            for name in world.manifest.drawn(1):
                world.sites[name].policy.check(world.manifest, name)
            return _plan(world)
        finally:
            world.close()


def _plan(world: World) -> Plan:
    experiment, manifest = world.experiment, world.manifest
    charges = merge_events([*world.statistics_charges, *manifest.all_charges()])
    profile = make_profile(manifest.sealing, len(manifest.members), gather=manifest.single_updates)
    size = profile.size(manifest.vector_size(1))
    sites = [
        SitePlan(
            site=name,
            population=world.sources.population[name],
            subjects=len(site.records.persons) if experiment.data.public else None,
            epsilon_before=max(site.ledger.epsilon(r) for r in Role),
            epsilon_after=max(site.ledger.epsilon(r, charges) for r in Role),
            used_before=site.ledger.used(),
            used_after=site.ledger.used(charges),
        )
        for name, site in ((name, world.sites[name]) for name in manifest.drawn(1))
    ]
    return Plan(
        name=experiment.run.name,
        purpose=manifest.purpose,
        rounds=manifest.rounds,
        local_steps=manifest.training.local_steps,
        strategy=manifest.strategy.describe(),
        metric_rounds=[r - 1 for r in manifest.metric_rounds],
        learned=list(world.sources.learned),
        parameters=manifest.layout.size,
        profile=profile.name,
        sealing=profile.summary,
        uplink_bytes=size.uplink,
        downlink_bytes=size.downlink,
        padding=round(size.padding, 3),
        unit=manifest.privacy.unit,
        neighbours=NEIGHBOURS,
        placement=manifest.privacy.placement,
        epsilon=schedule_epsilon(charges, manifest.privacy.delta) if manifest.privacy.protects else float("inf"),
        delta=manifest.privacy.delta,
        composed_sites=manifest.privacy.composed_sites,
        sample_rate=manifest.privacy.sample_rate,
        noise_multiplier=manifest.noise_multiplier,
        metrics_noise_multiplier=manifest.metrics_noise_multiplier,
        max_grad_norm=manifest.privacy.max_grad_norm,
        site_epsilon_limit=manifest.privacy.site_epsilon_limit,
        admitted=all(s.used_after <= 1.0 for s in sites),
        sites=sites,
        warnings=list(manifest.warnings),
    )


def schedule_epsilon(charges: list[PrivacyEvent], delta: float) -> float:
    """ε of this run for whom it costs most, over all sites where she may lie: parameters were fixed beforehand."""
    return person_epsilon(merge_events(charges), delta)


def load_source(source: Source, overrides: Iterable[str]) -> tuple[Experiment, Path]:
    """The experiment, and the folder that its relative paths start from."""
    if isinstance(source, Rooted):
        given = list(overrides)
        return load_source(source.experiment, given)[0] if given else source.experiment, source.base
    if isinstance(source, Experiment):
        tree = source.model_dump(mode="python", by_alias=True, exclude_none=True)
        return load_experiment(tree, overrides), Path.cwd()
    if isinstance(source, Mapping):
        return load_experiment(source, overrides), Path.cwd()
    path = builtin_example() if source is None else experiment_file(source)
    return load_experiment(path, overrides), path.resolve().parent


def any_bounds(_: str) -> tuple[float, float]:
    """Stand in for bounds that are not learned yet: what a run costs does not depend on them."""
    return -1.0, 1.0
