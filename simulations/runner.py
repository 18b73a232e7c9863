"""`confide.simulate`: from an experiment to a trained model, through the deployed code.

Everything that can be wrong with the input is found before the output folder is made. Interrupted, the folder says so,
everything charged stays charged, and the run can be resumed from there: a new run and a resumed one are executed alike.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid

from confide.clients.app import make_client_app
from confide.clients.data.preprocess import encoded_width
from confide.clients.training.artifact import save_model
from confide.clients.training.models import build_model
from confide.errors import ConfideError, ConfigError, PeerError, StorageError
from confide.privacy.dp import RUN_LABEL, Role
from confide.privacy.dp import metrics as dp_metrics
from confide.privacy.flushing import GroupCommit
from confide.privacy.sealing import make_profile
from confide.server.coordinator import Coordinator, Released, RoundOutcome
from confide.server.runs import RunStore
from confide.simulations import grouping as stacks
from confide.simulations.earlier import earlier_run, ledgers_of, retraining
from confide.simulations.engine import Drive, Engine, engine_of, find_engine, run_over, use_engine
from confide.simulations.evaluation import ExactEvaluator
from confide.simulations.figures import write_figures
from confide.simulations.folders import run_folders, write_json
from confide.simulations.grid import NODE_CONFIG_SITE, LocalGrid
from confide.simulations.keeping import KEPT
from confide.simulations.lines import RoundLines
from confide.simulations.looking import held_out_now, model_now
from confide.simulations.page import write_index
from confide.simulations.place import LOCAL, Place, new_place, resumed_place
from confide.simulations.planning import Source, any_bounds, load_source, schedule_epsilon
from confide.simulations.result import (
    NEIGHBOURS,
    Epsilon,
    Intervals,
    Progress,
    Result,
    intervals_from_json,
)
from confide.simulations.scenario import Unreachable, honest
from confide.simulations.sources import load_sources
from confide.simulations.statistics import STATISTICS, learn_bounds, read_learned
from confide.simulations.workers import WorkersEngine
from confide.simulations.world import World

__all__ = ["simulate"]

#: So many gain nothing from training at once.
_FEW_SITES = 12


def simulate(
    experiment: Source = None,
    *,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    ledger: str | Path | None = None,
    resume: bool = False,
    retrain_after: str | Path | None = None,
    engine: str | None = None,
    ray_address: str | None = None,
    workers: int | None = 1,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Run an experiment.

    Args:
        experiment: A TOML file, the same as nested mappings, an `Experiment`, or None for the built-in RAND example.
        overrides: `section.key=value` assignments that win over the file.
        out: Output folder; must not hold anything yet. Default: `runs/<run id>`.
        ledger: Folder of the sites' ledgers. Runs that name the same one compose; default: a new one in `out`.
        resume: Go on with the run in `out`, wherever its process came to its end; without an experiment, with the one
            that it was begun with.
        retrain_after: Output folder of a finished run: train anew from its initial model, with whom its registries hold
            now, charged to its ledgers. Without an experiment, with its own.
        engine: Where the sites run: `local` (this process), `ray` (Flower's simulation engine), or `deployment` (real
            processes over TLS on this machine). Default: `local`; a resumed run stays with its own.
        ray_address: Of a Ray cluster, for `ray`; default: processes of this machine.
        workers: With the engine `local`: processes that have the sites between them; None: as many as cores, where
            there are more than a few sites. It changes nothing but the time that a run takes.
        progress: Called as each round ends.

    Raises:
        ConfideError: Wrong input (nothing was written), or the run could not go on.
    """
    started = time.perf_counter()
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} is no number of processes", where="--workers", hint="1 or more")
    if resume:
        with GroupCommit(), resumed_place(experiment, list(overrides), out, ledger) as place, _one_thread():
            place.workers = workers
            return _execute(place, engine_of(place, engine, ray_address), progress, started)
    apart = find_engine(engine or LOCAL, ray_address)
    earlier = Path(retrain_after) if retrain_after is not None else None
    if earlier is not None:
        ledger = ledgers_of(earlier, earlier_run(earlier), ledger)
        loaded, base = retraining(experiment, overrides, earlier)
    else:
        loaded, base = load_source(experiment, overrides)
    sources = load_sources(loaded, base, bounds=any_bounds)
    if apart is not None:
        apart.check(loaded, len(sources.records))
    with (
        run_folders(loaded, out, ledger) as (folder, ledgers),
        _one_thread(),
        GroupCommit(),
        new_place(folder, ledgers, earlier) as place,
    ):
        use_engine(place, apart)
        place.workers = workers
        # Where bounds are learned first, this world is only asked whether the run may be.
        world = place.world(sources, kept=not sources.learned)
        with _told(folder, world):
            world.check()
            place.begin(loaded, base)
            write_json(folder / "status.json", {"status": "running", "run_id": world.manifest.run})
            if not sources.learned:
                return _run(place, world, apart, progress, started)
        return _execute(place, apart, progress, started)


def _execute(place: Place, engine: Engine | None, progress: Callable[[Progress], None], started: float) -> Result:
    """Run what was begun in a place, from wherever it has come to."""
    sources = place.sources(any_bounds)
    if sources.learned:
        sources = place.sources(_learned_bounds(place).__getitem__)
    world = place.world(sources)
    with _told(place.folder, world):
        write_json(place.folder / "status.json", {"status": "running", "run_id": world.manifest.run})
        return _run(place, world, engine, progress, started)


def _run(
    place: Place, world: World, engine: Engine | None, progress: Callable[[Progress], None], started: float
) -> Result:
    with closing(place.keeping.store()) as store:
        after = earlier_run(place.earlier) if place.earlier is not None else None
        result = _Run(world, place, engine, progress, started, store, after).execute()
    place.keeping.destroy()
    return result


def _learned_bounds(place: Place) -> dict[str, tuple[float, float]]:
    """The bounds that a statistics run learns, in a folder of its own; found there if it is over."""
    part = place.folder / STATISTICS
    if (found := read_learned(part)) is not None:
        if (part / KEPT).is_dir():
            with place.part(part) as inner:
                inner.keeping.destroy()
        return found
    with place.part(part) as inner:
        world = inner.world(place.sources())
        with _told(place.folder, world), closing(inner.keeping.store()) as store:
            bounds = learn_bounds(world, part, store)
        inner.keeping.destroy()
    return bounds


@contextmanager
def _told(folder: Path, world: World) -> Iterator[None]:
    """Where it ends before its time, the folder says so, and the logs so far lie there."""
    try:
        yield
    except BaseException as error:
        with suppress(ConfideError, sqlite3.Error):  # the first error is the one to tell
            world.export()
        if (folder / "status.json").exists():
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the first error is the one to tell
                write_json(folder / "status.json", {"status": status, "run_id": world.manifest.run})
        if isinstance(error, OSError):
            raise StorageError(f"cannot be written: {error.strerror}", where=str(error.filename or folder),
                               hint="free space and start again: what was durable is kept") from error  # fmt: skip
        lost = next(
            (s.last_refusal for s in world.sites.open.values() if isinstance(s.last_refusal, StorageError)), None
        )
        if isinstance(error, PeerError) and lost is not None:
            raise lost from error
        raise
    finally:
        world.close()


class _Run:
    """One execution: over the in-process grid, or by an engine that has the sites in other processes."""

    def __init__(
        self,
        world: World,
        place: Place,
        engine: Engine | None,
        progress: Callable[[Progress], None],
        started: float,
        store: RunStore,
        retrained_after: str | None = None,
    ) -> None:
        self._retrained_after = retrained_after
        self._world, self._folder, self._progress, self._started = world, place.folder, progress, started
        self._place, self._engine = place, engine
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
        alone = len(world.sites) <= _FEW_SITES or bool(
            world.experiment.scenario.poisoned
        )  # a liar has a program of its own
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
        return self._evaluator.evaluate(weights, held_out_now(self._world))

    def _epsilon_after(self, rounds: int) -> float:
        if not self._world.manifest.privacy.protects:
            return float("inf")
        # Metrics of the model after `rounds` rounds ride with the next one.
        manifest = self._world.manifest
        trained = [e for e in manifest.all_charges(rounds) if e.role is Role.TRAIN]
        evaluated = [e for e in manifest.all_charges(rounds + 1) if e.role is Role.HELD_OUT]
        return schedule_epsilon([*self._world.statistics_charges, *trained, *evaluated], manifest.privacy.delta)

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
            epsilon=Epsilon(epsilon, dict.fromkeys(world.sites, epsilon)),
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
        write_json(self._folder / "status.json", {"status": "finished", "run_id": manifest.run})
        return result


def _privacy_line(result: Result) -> str:
    if result.warnings:
        return ". ".join(result.warnings) + "."
    if result.epsilon.max == float("inf"):
        return "No differential privacy (epsilon = infinity): baseline on public data."
    return (
        f"({result.epsilon.max:.4g}, {result.delta:g})-differentially private per {result.unit} "
        f"({result.neighbours} {result.unit}). {RUN_LABEL}."
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small steps are faster without torch's thread pool; the caller's setting comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
