"""Results in MLflow, and as TensorBoard's event files: a run's rounds as they end, the rest of it and a sweep at the
end; always from what lies in the folder.

Invariants:
1. Exact metrics and times go only where the run's own experiment says that its data are public. Of other runs: the
   experiment, ε, the noised metrics that were released, the model, its figures and its page.
2. Nothing else is told to anybody: MLflow's telemetry is switched off (`confide.environment`), and no user, machine or
   source is recorded.
3. A store that fails while a run is under way does not end the run: what it has not taken is told again at the end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confide.errors import ConfigError, StorageError
from confide.simulations.result import Result
from confide.simulations.sweeps.result import Cell, Sweep

__all__ = ["Tracker", "open_tracker"]

#: What goes along with a run, and with a sweep; where there.
_RUN_FILES = ("model.safetensors", "index.html", "result.json", "figures")
_SWEEP_FILES = ("index.html", "sweep.json", "results.csv", "results.parquet", "rounds.csv", "rounds.parquet", "figures")
#: MLflow takes this many at once, and this many characters.
_BATCH, _LONGEST = 100, 6000


_Metric = tuple[str, float, int]


@dataclass(slots=True)
class _Begun:
    """A run that was told of before it ended: MLflow's id of it, TensorBoard's writer, and what they know."""

    run: str | None = None
    writer: Any = None
    told: set[_Metric] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Tracker:
    """Where results go; made by `open_tracker`."""

    mlflow: Any = None
    artifacts: str | None = None
    tensorboard: Path | None = None
    _begun: dict[Path, _Begun] = field(default_factory=dict)
    _later: set[Path] = field(default_factory=set)

    def round(self, folder: Path | None) -> None:
        """A round of the run in this folder has ended. A store that does not take it is asked again at the end."""
        if folder is None or folder in self._later or (self.mlflow is None and self.tensorboard is None):
            return
        try:
            with _stored(folder):
                experiment = _experiment(folder)
                if folder not in self._begun:
                    run = str(json.loads((folder / "status.json").read_text())["run_id"])
                    self._begun[folder] = self._begin(experiment, str(experiment["run"]["name"]), run, None)
                self._tell(self._begun[folder], _rounds(folder, experiment))
        except StorageError:
            self._later.add(folder)

    def ended(self) -> None:
        """Whatever was begun and is still open has failed; of a run that has been told of whole, nothing is."""
        for begun in self._begun.values():
            with suppress(StorageError), _stored(None):
                if begun.writer is not None:
                    begun.writer.close()
                if begun.run is not None:
                    self.mlflow.set_terminated(begun.run, "FAILED")
        self._begun.clear()

    def run(self, result: Result) -> None:
        """A finished run.

        Raises:
            StorageError: The store does not take it. The run is in its folder all the same.
        """
        with _stored(result.out):
            self._run(result, _experiment(result.out)["run"]["name"], result.run_id, None)

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
        tree = _experiment(result.out)
        begun = self._begun.pop(result.out, None) or self._begin(tree, experiment, name, above)
        self._tell(begun, _whole(result, tree))
        if begun.writer is not None:
            begun.writer.close()
        if begun.run is not None:
            self._mlflow_files(begun.run, result.out, _RUN_FILES)
            self.mlflow.set_terminated(begun.run)

    def _begin(self, tree: Mapping[str, Any], experiment: str, name: str, above: str | None) -> _Begun:
        begun, parameters = _Begun(), dict(_flat(tree))
        if self.mlflow is not None:
            begun.run = self._mlflow_run(experiment, name, above)
            _log(self.mlflow, begun.run, parameters, [])
        if self.tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            begun.writer = SummaryWriter(str(self.tensorboard / _safe(experiment) / _safe(name)))
            told = "\n".join(f"    {key} = {text}" for key, text in parameters.items())
            begun.writer.add_text("experiment", told)
        return begun

    def _tell(self, begun: _Begun, metrics: Iterable[_Metric]) -> None:
        """What is not told yet."""
        new = [metric for metric in metrics if metric not in begun.told]
        if begun.run is not None:
            _log(self.mlflow, begun.run, {}, new)
        if begun.writer is not None:
            for name, value, round_ in new:
                begun.writer.add_scalar(name.replace(".", "/"), value, round_)
            begun.writer.flush()
        begun.told.update(new)

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


def _whole(result: Result, experiment: Mapping[str, Any]) -> list[_Metric]:
    """What may be said of a finished run."""
    found = [("bytes_per_parameter", result.bytes_per_parameter, result.rounds)]
    if experiment["data"]["public"] is True:
        found.append(("seconds", result.seconds, result.rounds))
    return found + _rounds(result.out, experiment)


def _rounds(folder: Path, experiment: Mapping[str, Any]) -> list[_Metric]:
    """What may be said of the rounds so far, as (name, value, round)."""
    public, found = experiment["data"]["public"] is True, list[_Metric]()
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        tree = json.loads(line)
        said = {"epsilon": float(tree["epsilon"])}
        said |= {f"released.{name}": value for name, value in (tree["released_metrics"] or {}).items()}
        if public:
            said |= {f"exact.{name}": value for name, value in (tree["metrics"] or {}).items()}
        found += [(name, value, tree["round"]) for name, value in said.items() if _finite(value)]
    return found


def _experiment(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "experiment.json").read_text())
    return found


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """`section.key` → text; what is not set is left out."""
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield _safe(name), (value if isinstance(value, str) else json.dumps(value))[:_LONGEST]


def _log(client: Any, run: str, parameters: Mapping[str, str], metrics: Sequence[_Metric]) -> None:
    from mlflow.entities import Metric, Param

    values = [Metric(_safe(name), value, 0, round_) for name, value, round_ in metrics]
    texts = [Param(name, text) for name, text in parameters.items()]
    for first in range(0, max(len(values), len(texts)), _BATCH):
        part = slice(first, first + _BATCH)
        client.log_batch(run, metrics=values[part], params=texts[part])


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
