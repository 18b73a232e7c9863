"""What MLflow and TensorBoard are told of a run: of private data never more than a deployment would see."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import confide
from confide.errors import ConfigError, StorageError
from confide.simulations import Result, open_tracker
from tests.support import experiment_tree, write_people

FILES = {"model.safetensors", "index.html", "result.json", "figures"}
PRIVATE = {"data.public": "false", "sealing.profile": "masked"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Result]:
    """The same run on data that are public, and on data that are not; each made once."""
    folder = tmp_path_factory.mktemp("runs")
    made: dict[bool, Result] = {}

    def run(public: bool) -> Result:
        if public not in made:
            tree = experiment_tree(str(write_people(folder)))
            tree["run"] |= {"rounds": 1, "report_metrics_every": 1}
            chosen = [] if public else [f"{key}={value}" for key, value in PRIVATE.items()]
            made[public] = confide.simulate(tree, overrides=chosen, out=folder / str(public))
        return made[public]

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MLflow's: its tables take a while to make."""
    pytest.importorskip("mlflow.tracking")
    return tmp_path_factory.mktemp("mlflow")


def told_to_mlflow(store: Path, name: str, experiment_name: str = "tiny") -> tuple[Any, set[str], set[str]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(experiment_name)
    run = next(r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == name)
    return run, set(run.data.metrics), {file.path for file in client.list_artifacts(run.info.run_id)}


def told_to_tensorboard(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


@pytest.mark.filterwarnings("ignore")  # of MLflow's and TensorBoard's own
@pytest.mark.parametrize("public", [True, False])
def test_exact_metrics_are_told_of_public_data_only(
    runs: Callable[[bool], Result], store: Path, tmp_path: Path, public: bool
) -> None:
    pytest.importorskip("tensorboard")
    result = runs(public)
    open_tracker(mlflow=str(store), tensorboard=tmp_path / "tb").run(result)
    run, metrics, files = told_to_mlflow(store, result.run_id)
    scalars = told_to_tensorboard(tmp_path / "tb" / "tiny" / result.run_id)
    for told in (metrics, {name.replace("/", ".") for name in scalars}):
        assert {"epsilon", "released.auc", "released.accuracy", "bytes_per_parameter"} <= told
        exact = {f"exact.{name}" for name in result.metrics or {}}
        assert {name for name in told if name.startswith("exact.")} == exact
        assert bool(exact) is public
        assert ("seconds" in told) is public
    assert files == FILES
    assert run.data.metrics["epsilon"] == pytest.approx(result.epsilon.max)
    assert run.data.params["privacy.epsilon"] == "4.0"
    assert run.info.status == "FINISHED"
    # Nobody's name and no machine's.
    assert set(run.data.tags) <= {"mlflow.runName"}


@pytest.mark.filterwarnings("ignore")
def test_metrics_that_lie_in_a_private_runs_folder_are_not_told_either(
    runs: Callable[[bool], Result], store: Path, tmp_path: Path
) -> None:
    """The folder is not believed: whatever wrote exact metrics there, they stay."""
    kept = runs(False)
    folder = tmp_path / "copy"
    shutil.copytree(kept.out, folder)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line["metrics"] = {"auc": 0.987654}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    forged = replace(kept, out=folder, run_id="forged")
    open_tracker(mlflow=str(store)).run(forged)
    _, metrics, _ = told_to_mlflow(store, "forged")
    assert not any(name.startswith("exact.") for name in metrics)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("public", [True, False])
def test_rounds_are_told_as_they_end_and_the_rest_at_the_end(store: Path, tmp_path: Path, public: bool) -> None:
    pytest.importorskip("tensorboard")
    tree = experiment_tree(str(write_people(tmp_path)), run={"name": f"live-{public}", "report_metrics_every": 1})
    chosen = [] if public else [f"{key}={value}" for key, value in PRIVATE.items()]
    tracker, seen = open_tracker(mlflow=str(store), tensorboard=tmp_path / "tb"), list[tuple[int, set[str], str]]()

    def told(progress: confide.Progress) -> None:
        tracker.round(progress.folder)
        run, metrics, _ = told_to_mlflow(store, run_of(progress.folder), tree["run"]["name"])
        seen.append((len(history(store, run, "epsilon")), metrics, run.info.status))

    def run_of(folder: Path | None) -> str:
        return str(json.loads(((folder or tmp_path) / "status.json").read_text())["run_id"])

    result = confide.simulate(tree, overrides=chosen, out=tmp_path / "out", progress=told)
    assert [count for count, _, _ in seen] == [1, 2, 3, 4]
    assert {status for _, _, status in seen} == {"RUNNING"}
    assert all(any(name.startswith("exact.") for name in metrics) is public for _, metrics, _ in seen)
    tracker.run(result)
    tracker.ended()
    run, metrics, files = told_to_mlflow(store, result.run_id, tree["run"]["name"])
    assert run.info.status == "FINISHED"
    assert {"bytes_per_parameter", "released.auc"} <= metrics
    assert ("seconds" in metrics) is public
    assert files >= FILES
    assert [v for v, _ in history(store, run, "epsilon")] == result.epsilon_curve  # each round once
    assert "epsilon" in told_to_tensorboard(tmp_path / "tb" / tree["run"]["name"] / result.run_id)


@pytest.mark.filterwarnings("ignore")
def test_a_store_that_fails_under_way_ends_no_run_and_a_run_that_fails_is_told_so(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = experiment_tree(str(write_people(tmp_path)), run={"name": "broken"})
    tracker = open_tracker(mlflow=str(store))
    client = tracker.mlflow

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(client, "log_batch", full)
        result = confide.simulate(tree, out=tmp_path / "out", progress=lambda p: tracker.round(p.folder))
    tracker.run(result)
    runs = client.search_runs([client.get_experiment_by_name("broken").experiment_id])
    whole = next(run for run in runs if run.info.status == "FINISHED")
    assert [v for v, _ in history(store, whole, "epsilon")] == result.epsilon_curve

    def stop(progress: confide.Progress) -> None:
        tracker.round(progress.folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        confide.simulate(tree, out=tmp_path / "stopped", progress=stop)
    tracker.ended()
    name = json.loads((tmp_path / "stopped" / "status.json").read_text())["run_id"]
    run, metrics, _ = told_to_mlflow(store, name, "broken")
    assert (run.info.status, "epsilon" in metrics) == ("FAILED", True)


def history(store: Path, run: Any, name: str) -> list[tuple[float, int]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    return [(m.value, m.step) for m in sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.step)]


def test_telemetry_is_off() -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "true"


@pytest.mark.parametrize(
    ("option", "module"), [("mlflow", "mlflow.tracking"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_an_extra_that_is_not_installed_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    with pytest.raises(ConfigError, match="is not installed") as refused:
        open_tracker(**{option: tmp_path / "x" if option == "tensorboard" else str(tmp_path / "x")})  # type: ignore[arg-type]
    assert refused.value.hint == f"pip install 'confide[{option}]'"
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="does not take it"):
        open_tracker(tensorboard=tmp_path / "file" / "tb")
