"""`confide.simulate`: from an experiment to a trained model, through the deployed code.

Everything that can be wrong with the input is found before the output folder is made. Interrupted, the folder says so
and everything charged stays charged.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from confide.clients.app import make_client_app
from confide.clients.data.preprocess import encoded_width
from confide.clients.training.artifact import save_model
from confide.clients.training.models import build_model
from confide.config import Experiment, load_experiment
from confide.errors import ConfigError, PeerError, StorageError
from confide.privacy.dp import PrivacyEvent, Role, run_epsilon
from confide.privacy.dp import metrics as dp_metrics
from confide.privacy.files import write_atomically
from confide.privacy.sealing import make_profile
from confide.server.app import make_server_app
from confide.server.coordinator import Coordinator, Released, RoundOutcome
from confide.simulations.evaluation import ExactEvaluator
from confide.simulations.figures import write_figures
from confide.simulations.grid import NODE_CONFIG_SITE, LocalGrid
from confide.simulations.page import write_index
from confide.simulations.result import NEIGHBOURS, Epsilon, Plan, Progress, Result, SitePlan, json_number
from confide.simulations.world import World, builtin_example, load_sources

__all__ = ["Source", "fresh_folder", "load_source", "plan", "simulate", "write_json"]

Source = Experiment | Mapping[str, Any] | str | Path | None


def simulate(
    experiment: Source = None,
    *,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Run an experiment in this process.

    Args:
        experiment: A TOML file, the same as nested mappings, an `Experiment`, or None for the built-in RAND example.
        overrides: `section.key=value` assignments that win over the file.
        out: Output folder; must not hold anything yet. Default: `runs/<run id>`.
        ledger: Folder of the sites' ledgers. Runs that name the same one compose; default: a new one in `out`.
        progress: Called as each round ends.

    Raises:
        ConfideError: Wrong input (nothing was written), or the run could not go on.
    """
    started = time.perf_counter()
    loaded, base = load_source(experiment, overrides)
    sources = load_sources(loaded, base)
    with _folders(loaded, out, ledger) as (folder, ledgers), _one_thread():
        world = World(sources, folder / "sites", ledgers, folder / "logs")
        try:
            world.check()
            write_atomically(folder / "experiment.json", loaded.model_dump_json(by_alias=True, indent=2).encode())
            write_json(folder / "status.json", {"status": "running", "run_id": world.manifest.run})
            result = _Run(world, folder, progress, started).execute()
        except BaseException as error:
            if (folder / "status.json").exists():
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                with suppress(OSError):  # the first error is the one to tell
                    write_json(folder / "status.json", {"status": status, "run_id": world.manifest.run})
            if isinstance(error, OSError):
                raise StorageError(f"cannot be written: {error.strerror}", where=str(error.filename or folder),
                                   hint="free space and start again: what was durable is kept") from error  # fmt: skip
            lost = next(
                (s.last_refusal for s in world.sites.values() if isinstance(s.last_refusal, StorageError)), None
            )
            if isinstance(error, PeerError) and lost is not None:
                raise lost from error
            raise
        finally:
            world.close()
    return result


def plan(experiment: Source = None, *, overrides: Iterable[str] = (), ledger: str | Path | None = None) -> Plan:
    """What a run would do and cost; writes nothing.

    Raises:
        ConfideError: Wrong input.
    """
    loaded, base = load_source(experiment, overrides)
    sources = load_sources(loaded, base)
    with tempfile.TemporaryDirectory() as scratch:
        ledgers = Path(scratch) / "ledgers"
        if ledger is not None and Path(ledger).is_dir():
            shutil.copytree(ledger, ledgers)
        world = World(sources, Path(scratch) / "sites", ledgers, Path(scratch) / "logs")
        try:
            for site in world.sites.values():
                site.policy.check(world.manifest, site.name)
            return _plan(world)
        finally:
            world.close()


def _plan(world: World) -> Plan:
    experiment, manifest = world.experiment, world.manifest
    charges = manifest.all_charges()
    profile = make_profile(manifest.sealing, len(manifest.members))
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
        for name, site in world.sites.items()
    ]
    return Plan(
        name=experiment.run.name,
        purpose=manifest.purpose,
        rounds=manifest.rounds,
        local_steps=manifest.training.local_steps,
        metric_rounds=[r - 1 for r in manifest.metric_rounds],
        parameters=manifest.layout.size,
        profile=profile.name,
        sealing=profile.summary,
        uplink_bytes=size.uplink,
        downlink_bytes=size.downlink,
        padding=round(size.padding, 3),
        unit=manifest.privacy.unit,
        neighbours=NEIGHBOURS,
        placement=manifest.privacy.placement,
        epsilon=_epsilon(charges, manifest.privacy.delta) if charges else float("inf"),
        delta=manifest.privacy.delta,
        sample_rate=manifest.privacy.sample_rate,
        noise_multiplier=manifest.noise_multiplier,
        metrics_noise_multiplier=manifest.metrics_noise_multiplier,
        max_grad_norm=manifest.privacy.max_grad_norm,
        site_epsilon_limit=manifest.privacy.site_epsilon_limit,
        admitted=all(s.used_after <= 1.0 for s in sites),
        sites=sites,
    )


class _Run:
    """One execution over the in-process grid."""

    def __init__(self, world: World, folder: Path, progress: Callable[[Progress], None], started: float) -> None:
        self._world, self._folder, self._progress, self._started = world, folder, progress, started
        manifest = world.manifest
        self._task = manifest.label.task
        self._evaluator = None
        if world.experiment.data.public:
            model = build_model(manifest.model, encoded_width(manifest.schema_), manifest.label.outputs)
            self._evaluator = ExactEvaluator(model, self._task, world.sources.records)
        self._curve: list[dict[str, float]] = []
        self._released_metrics: dict[str, float | None] | None = None
        self._lines: list[dict[str, Any]] = []
        self._saturated = 0.0

    def execute(self) -> Result:
        world, released = self._world, list[Released]()
        grid = LocalGrid(make_client_app(self._site_of), world.sites)

        def start(flower_grid: Grid) -> Coordinator:
            return Coordinator(
                flower_grid,
                world.coordinator,
                world.manifest,
                world.initial,
                world.log,
                before_round=world.before_round,
                after_round=self._after_round,
            )

        app = make_server_app(start, released.append)
        app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
        return self._finish(released[0])

    def _site_of(self, context: Context) -> Any:
        return self._world.sites[str(context.node_config[NODE_CONFIG_SITE])]

    def _after_round(self, outcome: RoundOutcome) -> None:
        manifest = self._world.manifest
        trained = outcome.round - 1  # rounds whose sum the sites have applied by now
        model = next(iter(self._world.sites.values())).current_model(manifest.run)
        self._saturated = max(self._saturated, model.saturated)
        exact = self._exact(model.weights)
        if exact is not None:
            self._curve.append(exact)
        released = dp_metrics.read(self._task, outcome.metrics) if outcome.metrics is not None else None
        self._released_metrics = released or self._released_metrics
        progress = Progress(
            round=trained,
            rounds=manifest.rounds,
            epsilon=self._epsilon_after(trained),
            metrics=exact,
            released=released,
            released_round=None if outcome.metrics_round is None else outcome.metrics_round - 1,
            abandoned=outcome.abandoned,
            saturated=model.saturated,
        )
        self._record(progress)
        self._progress(progress)

    def _record(self, progress: Progress) -> None:
        self._lines.append({
            "round": progress.round,
            "epsilon": json_number(progress.epsilon),
            "metrics": progress.metrics,
            "released_metrics": None,
            "abandoned": progress.abandoned,
            "saturated": round(progress.saturated, 6),
        })  # fmt: skip
        self._write_lines(progress.released, progress.released_round)

    def _write_lines(self, released: dict[str, float | None] | None, round_: int | None) -> None:
        """Released metrics stand beside the round whose model they are about, though they arrive later."""
        if round_ is not None:
            self._lines[round_]["released_metrics"] = released
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self._lines)
        write_atomically(self._folder / "rounds.jsonl", text.encode())

    def _exact(self, weights: Any) -> dict[str, float] | None:
        if self._evaluator is None:
            return None
        manifest = self._world.manifest
        sites = self._world.sites.values()
        held_out = {s.name: s.participants(manifest).held_out for s in sites}
        return self._evaluator.evaluate(weights, held_out)

    def _epsilon_after(self, rounds: int) -> float:
        if not self._world.manifest.privacy.is_private:
            return float("inf")
        # Metrics of the model after `rounds` rounds ride with the next one.
        manifest = self._world.manifest
        trained = [e for e in manifest.all_charges(rounds) if e.role is Role.TRAIN]
        evaluated = [e for e in manifest.all_charges(rounds + 1) if e.role is Role.HELD_OUT]
        return _epsilon([*trained, *evaluated], manifest.privacy.delta)

    def _finish(self, released: Released) -> Result:
        world, manifest = self._world, self._world.manifest
        if released.metrics is not None:
            self._released_metrics = dp_metrics.read(self._task, released.metrics)
            self._write_lines(self._released_metrics, (released.metrics_round or 1) - 1)
        epsilon = self._epsilon_after(manifest.rounds)
        result = Result(
            run_id=manifest.run,
            rounds=manifest.rounds,
            sites=list(world.sites),
            profile=manifest.sealing.profile,
            metrics=self._exact(released.weights),
            released_metrics=self._released_metrics,
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
            if manifest.privacy.is_private
            else [],
            ledger={
                n: (max(s.ledger.epsilon(r) for r in Role), s.ledger.budget.epsilon_limit)
                for n, s in world.sites.items()
            },
            consent_is_simulated=world.sources.consent is None,
            saturated=self._saturated,
            exposure=make_profile(manifest.sealing, len(manifest.members)).describe_exposure(),
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
        write_json(self._folder / "result.json", result.to_json())
        write_json(self._folder / "status.json", {"status": "finished", "run_id": manifest.run})
        return result


def _privacy_line(result: Result) -> str:
    if result.epsilon.max == float("inf"):
        return "No differential privacy (epsilon = infinity): baseline on public data."
    return (
        f"({result.epsilon.max:.4g}, {result.delta:g})-differentially private per {result.unit} "
        f"({result.neighbours} {result.unit}), for this run alone."
    )


def _epsilon(charges: list[PrivacyEvent], delta: float) -> float:
    """ε of this run for the more exposed role: parameters were fixed beforehand, roles compose in parallel."""
    return max((run_epsilon(e, delta) for e in charges), default=0.0)


def load_source(source: Source, overrides: Iterable[str]) -> tuple[Experiment, Path]:
    """The experiment, and the folder that its relative paths start from."""
    if isinstance(source, Experiment):
        tree = source.model_dump(mode="python", by_alias=True, exclude_none=True)
        return load_experiment(tree, overrides), Path.cwd()
    if isinstance(source, Mapping):
        return load_experiment(source, overrides), Path.cwd()
    path = builtin_example() if source is None else Path(source)
    return load_experiment(path, overrides), path.resolve().parent


@contextmanager
def _folders(experiment: Experiment, out: str | Path | None, ledger: str | Path | None) -> Iterator[tuple[Path, Path]]:
    """The output and ledger folders; what was made for a run that never started is taken away again."""
    folder = Path(out) if out is not None else fresh_folder(Path("runs"), experiment.run.name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("is there already and is not an empty folder", where=f"--out {folder}",
                          hint="name a new folder: runs are never overwritten")  # fmt: skip
    ledgers = Path(ledger) if ledger is not None else folder / "ledgers"
    made = [_topmost_missing(path) for path in (folder, ledgers) if not path.exists()]
    before = set(ledgers.rglob("*")) if ledgers.is_dir() else set()
    try:
        for option, path in (("--out", folder), ("--ledger", ledgers)):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot be made: {error.strerror}", where=f"{option} {path}",
                                  hint="name a folder you may write to") from None  # fmt: skip
        yield folder, ledgers
    except BaseException:
        if not (folder / "status.json").exists():
            for part in ("sites", "logs"):
                shutil.rmtree(folder / part, ignore_errors=True)
            _remove_new(ledgers, before)
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
        raise


def _topmost_missing(path: Path) -> Path:
    path = path.absolute()
    while not path.parent.exists():
        path = path.parent
    return path


def _remove_new(folder: Path, before: set[Path]) -> None:
    """A ledger made for a run that was refused would fix its limits for ever."""
    for path in sorted(set(folder.rglob("*")) - before, reverse=True) if folder.is_dir() else ():
        path.rmdir() if path.is_dir() else path.unlink()


def fresh_folder(parent: Path, name: str) -> Path:
    """A path that does not exist, named after the moment."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(1, 1000))):
        path = parent / f"{name}-{stamp}{suffix}"
        if not path.exists():
            return path
    raise ConfigError("holds too many runs of this second", where=str(parent), hint="name a folder with --out")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small steps are faster without torch's thread pool; the caller's setting comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_json(path: Path, tree: Any) -> None:
    """Write atomically; infinities are an error, because JSON has none."""
    write_atomically(path, (json.dumps(tree, indent=2, allow_nan=False, default=str) + "\n").encode())
