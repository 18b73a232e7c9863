"""Results in MLflow, and as TensorBoard's event files: after a run or a sweep has ended, from what lies in its folder.

Invariants:
1. Exact metrics and times go only where the run's own experiment says that its data are public. Of other runs: the
   experiment, ε, the noised metrics that were released, the model, its figures and its page.
2. Nothing else is told to anybody: MLflow's telemetry is switched off (`confide.environment`), and no user, machine or
   source is recorded.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confide.errors import ConfigError, StorageError
from confide.simulations.result import Result
from confide.simulations.sweep_result import Cell, Sweep

__all__ = ["Tracker", "open_tracker"]

#: What goes along with a run, and with a sweep; where there.
_RUN_FILES = ("model.safetensors", "index.html", "result.json", "figures")
_SWEEP_FILES = ("index.html", "sweep.json", "results.csv", "results.parquet", "rounds.csv", "rounds.parquet", "figures")
#: MLflow takes this many at once, and this many characters.
_BATCH, _LONGEST = 100, 6000


@dataclass(frozen=True, slots=True)
class _Facts:
    """What may be said of a run: parameters, and metrics as (name, value, round)."""

    parameters: Mapping[str, str]
    metrics: tuple[tuple[str, float, int], ...]


@dataclass(frozen=True, slots=True)
class Tracker:
    """Where results go; made by `open_tracker`."""

    mlflow: Any = None
    artifacts: str | None = None
    tensorboard: Path | None = None

    def run(self, result: Result) -> None:
        """A finished run.

        Raises:
            StorageError: The store does not take it. The run is in its folder all the same.
        """
        with _stored(result.out):
            self._run(result, _experiment(result)["run"]["name"], result.run_id, None)

    def sweep(self, sweep: Sweep) -> None:
        """A finished sweep: a run for all of it, and one below it for each cell.

        Raises:
            StorageError: The store does not take it. The sweep is in its folder all the same.
        """
        with _stored(sweep.out):
            above = None
            if self.mlflow is not None:
                above = self._mlflow_run(sweep.name, "sweep", None)
                self.mlflow.set_tag(above, "watermark", sweep.watermark)
                self._mlflow_files(above, sweep.out, _SWEEP_FILES)
                self.mlflow.set_terminated(above)
            for cell in sweep.cells:
                self._run(cell.result, sweep.name, _cell_name(cell), above)

    def _run(self, result: Result, experiment: str, name: str, above: str | None) -> None:
        facts = _facts(result)
        if self.mlflow is not None:
            run = self._mlflow_run(experiment, name, above)
            _log(self.mlflow, run, facts)
            self._mlflow_files(run, result.out, _RUN_FILES)
            self.mlflow.set_terminated(run)
        if self.tensorboard is not None:
            _write_events(self.tensorboard / _safe(experiment) / _safe(name), facts)

    def _mlflow_run(self, experiment: str, name: str, above: str | None) -> str:
        found = self.mlflow.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else self.mlflow.create_experiment(
            experiment, artifact_location=self.artifacts and f"{self.artifacts}/{_safe(experiment)}")  # fmt: skip
        tags = {} if above is None else {"mlflow.parentRunId": above}
        return str(self.mlflow.create_run(number, run_name=name, tags=tags).info.run_id)

    def _mlflow_files(self, run: str, folder: Path, names: tuple[str, ...]) -> None:
        for path in (folder / name for name in names):
            if path.is_dir():
                self.mlflow.log_artifacts(run, str(path), path.name)
            elif path.exists():
                self.mlflow.log_artifact(run, str(path))


def open_tracker(*, mlflow: str | None = None, tensorboard: Path | None = None) -> Tracker:
    """Find out, before anything runs, whether results can go there.

    Args:
        mlflow: A tracking server or database by URI, or a folder: `mlflow.db` and `artifacts/` in it.
        tensorboard: A folder: event files in `NAME/RUN/` below it.

    Raises:
        ConfigError: An extra is not installed.
        StorageError: The store does not answer, or the folder cannot be made.
    """
    artifacts = None
    client = None
    if tensorboard is not None:
        try:
            import torch.utils.tensorboard  # noqa: F401  # is it there?
        except ImportError:
            raise _missing("--tensorboard", "tensorboard") from None
        with _stored(tensorboard):
            tensorboard.mkdir(parents=True, exist_ok=True)
    if mlflow is not None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise _missing("--mlflow", "mlflow") from None
        for name in ("mlflow", "alembic"):  # says on stderr that it makes tables
            logging.getLogger(name).setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its own default says nothing for minutes
        with _stored(None):
            uri = mlflow
            if not re.match(r"[a-z+]{2,}:", mlflow):
                folder = Path(mlflow).absolute()
                folder.mkdir(parents=True, exist_ok=True)
                uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artifacts")
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    return Tracker(client, artifacts, tensorboard)


def _facts(result: Result) -> _Facts:
    experiment = _experiment(result)
    public = experiment["data"]["public"] is True
    metrics = [("bytes_per_parameter", result.bytes_per_parameter, result.rounds)]
    if public:
        metrics.append(("seconds", result.seconds, result.rounds))
    for line in (result.out / "rounds.jsonl").read_text().splitlines():
        tree = json.loads(line)
        said = {"epsilon": float(tree["epsilon"])}
        said |= {f"released.{name}": value for name, value in (tree["released_metrics"] or {}).items()}
        if public:
            said |= {f"exact.{name}": value for name, value in (tree["metrics"] or {}).items()}
        metrics += [(name, value, tree["round"]) for name, value in said.items() if _finite(value)]
    return _Facts(dict(_flat(experiment)), tuple(metrics))


def _experiment(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.out / "experiment.json").read_text())
    return found


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """`section.key` → text; what is not set is left out."""
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield _safe(name), (value if isinstance(value, str) else json.dumps(value))[:_LONGEST]


def _log(client: Any, run: str, facts: _Facts) -> None:
    from mlflow.entities import Metric, Param

    metrics = [Metric(_safe(name), value, 0, round_) for name, value, round_ in facts.metrics]
    parameters = [Param(name, text) for name, text in facts.parameters.items()]
    for first in range(0, max(len(metrics), len(parameters)), _BATCH):
        part = slice(first, first + _BATCH)
        client.log_batch(run, metrics=metrics[part], params=parameters[part])


def _write_events(folder: Path, facts: _Facts) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    try:
        told = "\n".join(f"    {name} = {text}" for name, text in facts.parameters.items())
        writer.add_text("experiment", told)
        for name, value, round_ in facts.metrics:
            writer.add_scalar(name.replace(".", "/"), value, round_)
    finally:
        writer.close()


@contextmanager
def _stored(folder: Path | None) -> Iterator[None]:
    """Whatever keeps a store from taking something, as an error of ours. An address is not said: it may hold a
    password."""
    try:
        yield
    except Exception as error:  # a store may be a database, a server, a disk: each has errors of its own
        ours = type(error).__module__.partition(".")[0] in ("mlflow", "sqlalchemy", "requests")
        if not ours and not isinstance(error, OSError):
            raise
        hint = "see that it runs and may be written to" + (f"; the results are in {folder}" if folder else "")
        raise StorageError(f"the tracking store does not take it ({type(error).__name__})",
                           where="--mlflow" if ours else "--mlflow, --tensorboard", hint=hint) from error  # fmt: skip


def _missing(option: str, extra: str) -> ConfigError:
    return ConfigError(f"needs the extra {extra!r}, which is not installed", where=option,
                       hint=f"pip install 'confide[{extra}]'")  # fmt: skip


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cell_name(cell: Cell) -> str:
    return cell.result.out.name


def _safe(name: str) -> str:
    """The characters that MLflow and file systems take."""
    return re.sub(r"[^\w.\- ]", "_", name)
