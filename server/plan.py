"""From an experiment to a manifest: σ and every other parameter of a run, from public inputs only."""

from __future__ import annotations

import secrets
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from confide.config import Experiment, SchemaConfig
from confide.config.run import DeployedRun
from confide.errors import ConfigError
from confide.privacy.digest import digest
from confide.privacy.dp import PrivacyEvent, RenyiBudget, Role, calibrate_run
from confide.privacy.dp.metrics import SENSITIVITY
from confide.privacy.dp.statistics import RELEASES
from confide.privacy.sealing import make_profile
from confide.protocol.manifest import Layout, Manifest, Member
from confide.protocol.roster import Roster
from confide.strategies import Strategy, admit_strategy, make_strategy

__all__ = ["make_manifest"]

#: A sum of fewer hides nobody.
_FEWEST_SITES = 3


def make_manifest(
    experiment: Experiment | DeployedRun,
    *,
    roster: Roster,
    schema: SchemaConfig,
    initial_model: NDArray[np.float32],
    layout: Layout,
    statistics: bool = False,
    sites: Collection[str] | None = None,
    begins_after: str | None = None,
) -> Manifest:
    """Fix a run.

    Args:
        experiment: What is asked.
        roster: The federation's complete roster, frozen for the run.
        schema: The experiment's schema with its patterns expanded.
        initial_model: The first weights.
        layout: How they lie in the vector.
        statistics: Fix the run that learns the schema's unknown bounds, not the training.
        sites: Who takes part; None: the whole roster.
        begins_after: The earlier run that `initial_model` is of; None: it is new.

    Raises:
        ConfigError: Too few sites, one that is not in the roster, or a strategy that this run cannot have.
        BudgetError: No noise is enough for the ε asked.
    """
    members = _members(roster, sites)
    min_sites = experiment.sites.min_sites or max(_FEWEST_SITES, -(-2 * len(members) // 3))
    if len(members) < min_sites:
        where, who = ("data.site", "the data have") if isinstance(experiment, Experiment) else ("sites", "the run has")
        raise ConfigError(
            f"{who} {len(members)} sites, fewer than sites.min_sites = {min_sites}",
            where=where,
            hint="a sum over fewer than three sites hides nobody",
        )
    make_profile(experiment.sealing, len(members))  # impossible parameters are refused before anything runs
    strategy = make_strategy(experiment.strategy)
    privacy = experiment.privacy
    sigma, metrics_sigma = _noise(experiment)
    manifest = Manifest(
        run=_run_name(experiment, statistics),
        federation=roster.federation,
        roster_version=roster.version,
        roster=roster.digest,
        purpose=experiment.run.purpose,
        coordinator_key=roster.coordinator_key,
        members=members,
        min_sites=min_sites,
        min_subjects=experiment.sites.min_subjects,
        rounds=1 if statistics else experiment.run.rounds,
        metric_rounds=(1, RELEASES) if statistics else experiment.metric_rounds,
        held_out=experiment.data.held_out,
        label=experiment.data.label,
        schema_=schema,
        model=experiment.model,
        layout=layout,
        initial_model=digest("model", initial_model.astype("<f4").tobytes()).hex(),
        training=experiment.training,
        strategy=experiment.strategy,
        privacy=privacy,
        noise_multiplier=sigma,
        metrics_noise_multiplier=metrics_sigma,
        sealing=experiment.sealing,
        statistics=statistics,
        single_updates=strategy.single_updates,
        control_variates=strategy.control_variates,
        begins_after=begins_after,
        sites_per_round=_per_round(experiment, strategy, members),
        wait_seconds=experiment.sites.wait_seconds if isinstance(experiment, DeployedRun) else None,
    )
    admit_strategy(strategy, manifest)
    return manifest


def _per_round(experiment: Experiment | DeployedRun, strategy: Strategy, members: Collection[Member]) -> int | None:
    asked = experiment.sites.per_round if isinstance(experiment, Experiment) else None
    if asked is None:
        return None
    if strategy.single_updates or strategy.control_variates:
        raise ConfigError(f"{experiment.strategy.kind} keeps something of every site from round to round",
                          where="sites.per_round", hint="leave it out, or choose another strategy")  # fmt: skip
    if asked > len(members):
        raise ConfigError(f"{asked} is more than the run's {len(members)} sites", where="sites.per_round",
                          hint="leave it out: every round is then everybody's")  # fmt: skip
    return asked


def _members(roster: Roster, sites: Collection[str] | None) -> tuple[Member, ...]:
    """Those of the roster that take part, as the manifest names them; sorted by name, as the roster is."""
    unknown = sorted(set(sites or ()) - {m.site for m in roster.members})
    if unknown:
        raise ConfigError(f"no site {unknown[0]!r} stands in {roster.where}", where="sites",
                          hint=f"known: {', '.join(m.site for m in roster.members)}")  # fmt: skip
    return tuple(
        Member(site=m.site, public_key=m.signing_key, population=m.population)
        for m in roster.members
        if sites is None or m.site in sites
    )


def _run_name(experiment: Experiment | DeployedRun, statistics: bool) -> str:
    """Charges are called after their run: so a ledger, too, tells which of them protected nobody."""
    parts = ["UNSAFE"] if experiment.privacy.unsafe_noise_seed is not None else []
    parts += [experiment.run.name, *(["statistics"] if statistics else []), secrets.token_hex(4)]
    return "-".join(parts)


def _noise(experiment: Experiment | DeployedRun) -> tuple[float, float]:
    """σ of training and of metrics: each role pays the run's whole ε, because a person holds one role only at a site;
    at several she may hold both, and that must not cost more either. Learned bounds are paid for like metrics, by the
    held-out persons at the same σ: they and the metrics together cost ε."""
    privacy = experiment.privacy
    if not privacy.is_private:
        return 0.0, 0.0
    budget = RenyiBudget.for_limit(privacy.site_epsilon_limit, privacy.delta)
    train = PrivacyEvent(
        role=Role.TRAIN, unit=privacy.unit, noise_multiplier=1.0, sample_rate=privacy.sample_rate,
        steps=experiment.run.rounds * experiment.training.local_steps, max_grad_norm=privacy.max_grad_norm,
        sites=privacy.composed_sites,
    )  # fmt: skip
    metrics = PrivacyEvent(
        role=Role.HELD_OUT, unit=privacy.unit, noise_multiplier=1.0, sample_rate=1.0,
        steps=len(experiment.metric_rounds) + (RELEASES if experiment.schema_.unknown_bounds else 0),
        max_grad_norm=SENSITIVITY, sites=privacy.composed_sites,
    )  # fmt: skip
    return calibrate_run(train, metrics, privacy.epsilon, budget)
