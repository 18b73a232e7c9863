"""Where the sites of a run live changes nothing of it: one experiment on every engine, and what an engine refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.clients.training.artifact import load_model
from confide.config import load_experiment
from confide.errors import ConfigError, StorageError
from confide.protocol.keyfiles import is_encrypted
from confide.protocol.roster import verify_chain
from confide.simulations import Progress, simulate
from confide.simulations.engines import apart
from confide.simulations.engines.apart import SitesApart
from confide.simulations.engines.deployment import MOST_SITES, DeploymentEngine
from confide.simulations.engines.provisioning import found_parties, provision
from confide.simulations.keeping import KEPT, Keeping
from tests.cli.command import confide, to_toml
from tests.integration.deployed import ROOT, rand_tree

SEED = 7
PATIENCE = 600.0
#: Only where nothing is measured may a developer do without it; where tests count it is installed (extra: test).
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and not os.environ.get("CONFIDE_CI"), reason="pip install 'confide[ray]'"
)


def tree(folder: Path, seed: int = SEED, **sections: dict[str, Any]) -> dict[str, Any]:
    """Three sites, two rounds, noise off, everything else at a seed; and people who leave during the run."""
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "run": {"rounds": 2, "report_metrics_every": 2},
        "privacy": {"epsilon": float("inf"), "unsafe_noise_seed": seed},
        "consent": {"withdrawals": [{"round": 2, "fraction": 0.1}]},
    }
    return rand_tree(folder, 3, 40, **{**given, **sections})


def run_apart(folder: Path, engine: str) -> tuple[dict[str, Any], list[str]]:
    """The command as a process of its own; what it printed, and what of its processes is still there."""
    (folder / "experiment.toml").write_text(to_toml(tree(folder)))
    mark = f"engine-{engine}-{time.monotonic_ns()}"
    done = subprocess.run(
        [sys.executable, "-m", "confide.cli.main", "simulate", str(folder / "experiment.toml"), "--engine", engine,
         "--out", str(folder / engine), "--json"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "CONFIDE_TEST_MARK": mark},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), processes_with(mark)


def processes_with(mark: str) -> list[str]:
    """Processes that were started, however indirectly, by one with this mark in its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def weights(folder: Path) -> np.ndarray:
    module = load_model(folder / "model.safetensors").module
    return np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("local")
    simulate(tree(folder), out=folder / "local")
    return folder / "local"


def told(folder: Path) -> dict[str, Any]:
    """A run's result, without what is every run's own."""
    found = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in found.items() if key not in ("run_id", "seconds", "out")}


@pytest.mark.parametrize(
    "engine", [pytest.param("ray", marks=needs_ray), pytest.param("deployment", marks=pytest.mark.long)]
)
def test_the_engine_changes_nothing_of_a_run(engine: str, local: Path, tmp_path: Path) -> None:
    line, left = run_apart(tmp_path, engine)
    out = tmp_path / engine
    assert weights(out).tobytes() == weights(local).tobytes(), "the same model, bit by bit"
    assert told(out) == told(local)
    assert line["metrics"]["auc"] == told(local)["metrics"]["auc"]
    assert (out / "rounds.jsonl").read_text() == (local / "rounds.jsonl").read_text(), "and round by round"
    assert {path.name for path in (out / "logs").iterdir()} == {path.name for path in (local / "logs").iterdir()}
    assert confide("audit", "verify", out).code == 0
    assert left == [], "what was started has ended"
    assert not (out / KEPT).exists(), "and its keys are gone"
    assert not list(out.rglob("shown.npz")), "and what the simulator was shown"


def test_another_seed_gives_another_model(local: Path, tmp_path: Path) -> None:
    """The control of the one above."""
    simulate(tree(tmp_path, seed=SEED + 1), out=tmp_path / "out")
    assert weights(tmp_path / "out").tobytes() != weights(local).tobytes()


# --- interrupted -----------------------------------------------------------------------------------------------------


def stop_after_first_round(progress: Progress) -> None:
    """Ctrl-C."""
    if progress.round == 1:
        raise KeyboardInterrupt


@pytest.mark.parametrize("engine", ["ray", "deployment"])
def test_a_run_goes_on_with_its_own_engine_only(engine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        simulate(tree(tmp_path), out=out, progress=stop_after_first_round)
    answer = confide("simulate", "--resume", "--out", out, "--engine", engine)
    assert answer.code == 2
    assert "begun with --engine local" in " ".join(answer.err.split())
    assert simulate(out=out, resume=True, engine="local").rounds == 2, "the control"


@pytest.mark.long
def test_an_interrupted_deployment_leaves_no_process_and_goes_on(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFIDE_TEST_MARK", mark := f"interrupted-{time.monotonic_ns()}")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        simulate(tree(tmp_path), out=out, engine="deployment", progress=stop_after_first_round)
    assert processes_with(mark) == []
    assert json.loads((out / "status.json").read_text())["status"] == "interrupted"
    with pytest.raises(ConfigError, match="begun with --engine deployment"):
        simulate(out=out, resume=True, engine="local")
    simulate(out=out, resume=True)
    assert weights(out).tobytes() == weights(local).tobytes()
    assert processes_with(mark) == []


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_an_engine_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="is none"):
        simulate(engine="spark")


def test_an_address_of_ray_is_for_ray(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text(to_toml(tree(tmp_path)))
    answer = confide(
        "simulate", tmp_path / "experiment.toml", "--ray-address", "127.0.0.1:1", "--out", tmp_path / "out"
    )
    assert answer.code == 2
    assert "--engine ray" in answer.err
    assert not (tmp_path / "out").exists()


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:70000", "nowhere", "ray://127.0.0.1:x"])
def test_a_cluster_that_does_not_answer_is_said_before_anything_is_written(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        simulate(tree(tmp_path), out=tmp_path / "out", engine="ray", ray_address=address)
    assert not (tmp_path / "out").exists()


def test_without_ray_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a))
    (tmp_path / "experiment.toml").write_text(to_toml(tree(tmp_path)))
    answer = confide("simulate", tmp_path / "experiment.toml", "--engine", "ray", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "pip install 'confide[ray]'" in answer.err
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_too_many_sites_for_real_processes_are_refused(make_experiment: Callable[..., dict[str, Any]]) -> None:
    experiment = load_experiment(make_experiment(), ())
    DeploymentEngine().check(experiment, MOST_SITES)
    with pytest.raises(ConfigError, match=f"{MOST_SITES} sites at most"):
        DeploymentEngine().check(experiment, MOST_SITES + 1)


@pytest.mark.parametrize("scenario", [{"stragglers": 0.3}, {"dropouts": [{"site": "2", "round": 2}]},
                                      {"latecomers": [{"site": "2", "round": 2}]}])  # fmt: skip
def test_messages_that_get_lost_are_not_for_real_processes(scenario: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loses no messages"):
        simulate(tree(tmp_path, scenario=scenario), out=tmp_path / "out", engine="deployment")
    assert not (tmp_path / "out").exists(), "nothing was begun"


# --- a site in one process at a time ---------------------------------------------------------------------------------


def test_a_site_is_open_in_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_PATIENCE", 0.2)
    with pytest.raises(KeyboardInterrupt):
        simulate(tree(tmp_path), out=tmp_path / "out", progress=stop_after_first_round)
    one, other = SitesApart(tmp_path / "out"), SitesApart(tmp_path / "out")
    name = one.names[0]
    assert one.site(name) is one.site(name)
    with pytest.raises(StorageError, match="open in another process"):
        other.site(name)
    one.close()
    assert other.site(name).name == name, "the control"
    other.close()


def test_a_deployed_simulation_has_a_federation_that_everybody_has_signed(tmp_path: Path) -> None:
    """As operators found one: keys of every party's own, in its own folder, under a passphrase."""
    keeping = Keeping(tmp_path / KEPT)
    assert found_parties(keeping) is None
    made = provision(keeping, {"ash": 40, "birch": 40, "cedar": 40})
    found = found_parties(keeping)
    assert found is not None
    verify_chain(found.chain)
    assert found.chain == made.chain
    for member in found.chain[-1].roster.members:
        assert member.signing_key == found.identity(member.site).public_key.hex()
        assert found.member(member.site).standing.roster == found.chain[-1].roster, "accepted"
    keys = list(found.folder.rglob("*.key"))
    assert [path.name for path in keys if not is_encrypted(path)] == ["server.key"], "TLS reads its own by itself"
    keeping.close()
