"""One execution of a simulated run, from its start, or from wherever an earlier process has come to, to its result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid

from confide.clients.app import make_client_app
from confide.clients.data.preprocess import encoded_width
from confide.clients.training.artifact import save_model
from confide.clients.training.models import build_model
from confide.privacy.dp import Role, run_label
from confide.privacy.dp import metrics as dp_metrics
from confide.privacy.sealing import make_profile
from confide.server.coordinator import Coordinator, Released, RoundOutcome
from confide.server.runs import RunStore
from confide.simulations.engines import grouping as stacks
from confide.simulations.engines.engine import Drive, Engine, run_over
from confide.simulations.engines.grid import NODE_CONFIG_SITE, LocalGrid
from confide.simulations.engines.looking import held_out_now, model_now
from confide.simulations.engines.workers import WorkersEngine
from confide.simulations.evaluation import ExactEvaluator
from confide.simulations.figures import write_figures
from confide.simulations.folders import write_json
from confide.simulations.lines import RoundLines
from confide.simulations.page import write_index
from confide.simulations.place import Place
from confide.simulations.planning import schedule_epsilon
from confide.simulations.result import (
    NEIGHBOURS,
    Epsilon,
    Intervals,
    Progress,
    Result,
    intervals_from_json,
)
from confide.simulations.scenario import Unreachable, honest
from confide.simulations.world import World

__all__ = ["Ending", "Execution", "Told"]

Told = Callable[[Progress], None]
Ending = Callable[[Result], None]
#: So many gain nothing from training at once.
_FEW_SITES = 12


class Execution:
    """One execution: over the in-process grid, or by an engine that has the sites in other processes."""

    def __init__(
        self,
        world: World,
        place: Place,
        engine: Engine | None,
        progress: Told,
        ending: Ending,
        started: float,
        store: RunStore,
        retrained_after: str | None = None,
    ) -> None:
        self._retrained_after = retrained_after
        self._world, self._folder, self._progress, self._started = world, place.folder, progress, started
        self._place, self._engine, self._ending = place, engine, ending
        self._store = store
        manifest = world.manifest
        self._task = manifest.label.task
        self._evaluator = None
        if world.experiment.data.public:
            model = build_model(manifest.model, encoded_width(manifest.schema_), manifest.label.outputs)
            self._evaluator = ExactEvaluator(model, self._task, *honest(world.sources.records, world.experiment))
        self._curve: list[dict[str, float]] = []
        self._released_metrics: dict[str, float | None] | None = None
        self._released_intervals: Intervals | None = None
        self._cohort_sizes: dict[int, int] = {}
        self._lines = RoundLines(place.folder)
        self._saturated = 0.0
        self._latest = next(iter(world.sites))
        self._unreachable = Unreachable(world.experiment.scenario, world.experiment.run.seed)

    def execute(self) -> Result:
        world = self._world
        liars = world.experiment.scenario.poisoned  # who lies has a program of its own
        alone = len(world.sites) <= _FEW_SITES or bool(liars)
        grouping = stacks.Grouping.of_cohort(
            world.experiment.sites.per_round or len(world.sites), 1 if alone else stacks.TOGETHER
        )
        if self._engine is None and (count := self._count(grouping, alone=alone)) > 1:
            self._engine = WorkersEngine(count)
        sites = make_client_app(self._site_of)

        def start(flower_grid: Grid) -> Coordinator:
            coordinator = Coordinator(
                flower_grid,
                world.coordinator,
                world.manifest,
                world.initial,
                world.log,
                before_round=self._before_round,
                after_round=self._after_round,
                store=self._store,
            )
            self._recall(coordinator.outcomes)
            return coordinator

        if self._engine is None:
            grid = LocalGrid(sites, world.sites, drop=self._unreachable, grouping=grouping)
            return self._finish(run_over(grid, start))
        drive = Drive(
            folder=self._folder, keeping=self._place.keeping, world=world, start=start, recall=self._recall,
            after_round=self._after_round, unreachable=self._unreachable, grouping=grouping,
        )  # fmt: skip
        return self._finish(self._engine.drive(drive))

    def _count(self, grouping: stacks.Grouping, *, alone: bool) -> int:
        """How many processes have the sites."""
        if self._place.workers is not None:
            return min(self._place.workers, grouping.groups)
        return 1 if alone else min(len(os.sched_getaffinity(0)), grouping.groups)

    def _before_round(self, round_: int) -> None:
        self._unreachable.begin(round_)
        self._world.before_round(round_)

    def _site_of(self, context: Context) -> Any:
        return self._world.sites[str(context.node_config[NODE_CONFIG_SITE])]

    def _recall(self, outcomes: Iterable[RoundOutcome]) -> None:
        """What an earlier process of this run wrote down round by round."""
        self._cohort_sizes = {o.round: len(o.cohort) for o in outcomes}
        for tree in self._lines.recall():
            self._curve += [tree["metrics"]] if tree["metrics"] is not None else []
            self._saturated = max(self._saturated, tree["saturated"])
            if tree["released_metrics"] is not None:
                self._released_metrics = tree["released_metrics"]
                self._released_intervals = intervals_from_json(tree["released_intervals"])

    def _after_round(self, outcome: RoundOutcome) -> None:
        self._world.flush()  # before anything of the round is shown
        manifest = self._world.manifest
        if outcome.round <= len(self._lines):
            return  # an earlier process wrote it down
        trained = outcome.round - 1  # rounds whose sum the sites have applied by now
        # In a drawn round not everybody has the latest model, nor has who dropped out; who was in its cohort has.
        self._latest = next((site for site in manifest.drawn(outcome.round) if site in outcome.cohort), self._latest)
        saturated, weights = model_now(self._world, self._latest, apart=self._engine is not None)
        self._saturated = max(self._saturated, saturated)
        due = manifest.sites_per_round is None or outcome.round in manifest.metric_rounds
        exact = self._exact(weights) if due else None
        if exact is not None:
            self._curve.append(exact)
        self._cohort_sizes[outcome.round] = len(outcome.cohort)
        released, intervals = self._read(outcome.metrics_round, outcome.metrics)
        progress = Progress(
            round=trained,
            rounds=manifest.rounds,
            epsilon=self._epsilon_after(trained),
            metrics=exact,
            released=released,
            released_intervals=intervals,
            released_round=None if outcome.metrics_round is None else outcome.metrics_round - 1,
            abandoned=outcome.abandoned,
            saturated=saturated,
            folder=self._folder,
        )
        self._lines.add(progress)
        self._progress(progress)

    def _read(self, round_: int | None, total: Any) -> tuple[dict[str, float | None] | None, Intervals | None]:
        """Metrics and their intervals from the sum that was opened for `round_`; kept as the latest."""
        if round_ is None or total is None:
            return None, None
        manifest = self._world.manifest
        noise = dp_metrics.noise_deviation(
            manifest.metrics_noise_multiplier,
            sites=self._cohort_sizes[round_],
            population=max(m.population for m in manifest.members),
            bits=manifest.sealing.bits,
        )
        self._released_metrics = dp_metrics.read(self._task, total, noise)
        self._released_intervals = dp_metrics.interval(self._task, total, noise)
        return self._released_metrics, self._released_intervals

    def _exact(self, weights: Any) -> dict[str, float] | None:
        if self._evaluator is None or weights is None:
            return None
        return self._evaluator.evaluate(weights, held_out_now(self._world)) or None  # of nobody there is none

    def _epsilon_after(self, rounds: int, *, one_site: bool = False) -> float:
        """ε of this run so far, over all sites of a person or (what each adds to it) at one."""
        if not self._world.manifest.privacy.protects:
            return float("inf")
        # Metrics of the model after `rounds` rounds ride with the next one.
        manifest = self._world.manifest
        trained = [e for e in manifest.all_charges(rounds) if e.role is Role.TRAIN]
        evaluated = [e for e in manifest.all_charges(rounds + 1) if e.role is Role.HELD_OUT]
        charges = [*self._world.statistics_charges, *trained, *evaluated]
        if one_site:
            charges = [replace(charge, sites=1) for charge in charges]
        return schedule_epsilon(charges, manifest.privacy.delta)

    def _finish(self, released: Released) -> Result:
        world, manifest = self._world, self._world.manifest
        metrics, intervals = self._read(released.metrics_round, released.metrics)
        if released.metrics_round is not None:
            self._lines.release(released.metrics_round - 1, metrics, intervals)
        epsilon = self._epsilon_after(manifest.rounds)
        world.flush()
        result = Result(
            run_id=manifest.run,
            rounds=manifest.rounds,
            sites=list(world.sites),
            profile=manifest.sealing.profile,
            metrics=self._exact(released.weights),
            released_metrics=self._released_metrics,
            released_intervals=self._released_intervals,
            epsilon=Epsilon(epsilon, dict.fromkeys(world.sites, self._epsilon_after(manifest.rounds, one_site=True))),
            delta=manifest.privacy.delta,
            unit=manifest.privacy.unit,
            neighbours=NEIGHBOURS,
            placement=manifest.privacy.placement,
            bytes_per_parameter=round(released.bytes_per_parameter, 3),
            rounds_abandoned=sum(o.abandoned for o in released.outcomes),
            seconds=0.0,
            out=self._folder,
            curve=self._curve,
            epsilon_curve=[self._epsilon_after(r) for r in range(manifest.rounds + 1)]
            if manifest.privacy.protects
            else [],
            ledger=world.spent(),
            consent_is_simulated=world.sources.consent is None,
            saturated=self._saturated,
            exposure=make_profile(
                manifest.sealing, len(manifest.members), gather=manifest.single_updates
            ).describe_exposure(),
            learned={n: b for n in world.sources.learned if (b := manifest.bounds_of(n)) is not None},
            warnings=manifest.warnings,
            retrained_after=self._retrained_after,
            composed_sites=manifest.privacy.composed_sites,
        )
        save_model(
            self._folder / "model.safetensors",
            released.weights,
            manifest,
            released.model,
            _privacy_line(result),
        )
        write_figures(result, self._folder / "figures")
        result = replace(result, seconds=round(time.perf_counter() - self._started, 3))
        write_index(result, self._folder / "index.html")
        world.export()  # before anything says that it is finished
        write_json(self._folder / "result.json", result.to_json())
        self._ending(result)
        write_json(self._folder / "status.json", {"status": "finished", "run_id": manifest.run})
        return result


def _privacy_line(result: Result) -> str:
    if result.warnings:
        return ". ".join(result.warnings) + "."
    if result.epsilon.max == float("inf"):
        return "No differential privacy (epsilon = infinity): baseline on public data."
    return (
        f"({result.epsilon.max:.4g}, {result.delta:g})-differentially private per {result.unit} "
        f"({result.neighbours} {result.unit}). {run_label(result.composed_sites)}."
    )
