"""A sweep beside itself: cells in processes of their own, what ends them, and what a later process keeps of it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import confide
from confide.errors import ConfigError, DataError, PeerError, PolicyError
from confide.simulations.place import finished_result
from confide.simulations.sweeps.memory import available_bytes, peak_bytes, workers_within
from tests.simulations.test_sweep import SHORT
from tests.support import experiment_tree, write_people

CHAOS = bool(os.environ.get("CONFIDE_CHAOS"))
SEEDED = ["privacy.unsafe_noise_seed=7", "training.local_steps=2"]


def tree_of(folder: Path, rounds: int = 1) -> dict[str, Any]:
    tree = experiment_tree(str(write_people(folder)))
    tree["run"] |= SHORT | {"rounds": rounds}
    return tree


def state_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


def test_a_killed_worker_is_named_the_others_stop_and_what_finished_is_as_it_would_have_been_alone(
    tmp_path: Path,
) -> None:
    out, tree = tmp_path / "o", tree_of(tmp_path, rounds=4)
    folders = {number: out / "cells" / f"00{number}-seed-{number}" for number in (1, 2, 3)}
    states: dict[int, set[str]] = {}
    beside: set[int] = set()

    def kill(progress: confide.SweepProgress) -> None:
        states.setdefault(progress.cell, set()).add("round" if progress.round is not None else progress.state)
        ended = {cell for cell, seen in states.items() if "finished" in seen}
        under_way = {cell for cell, seen in states.items() if "round" in seen} - ended
        if not ended:
            beside.update(cell for cell, seen in states.items() if "running" in seen)
        elif under_way:  # one has ended, another has something to lose
            multiprocessing.active_children()[0].kill()

    over = ["run.seed=1,2,3"]
    with pytest.raises(PeerError, match=r"its process was killed \(SIGKILL\)") as lost:
        confide.sweep(tree, over=over, overrides=SEEDED, out=out, workers=2, progress=kill)
    assert beside == {1, 2}
    assert lost.value.where in {f"cell run.seed={number}" for number in folders}
    assert "--resume" in lost.value.hint
    assert multiprocessing.active_children() == []
    ended = {number for number, folder in folders.items() if finished_result(folder) is not None}
    assert 1 <= len(ended) < 3
    assert (state_of(out)["status"], state_of(out)["finished"]) == ("failed", len(ended))
    killed = int(lost.value.where[-1])
    for number, folder in folders.items():
        if (folder / "status.json").exists() and number not in ended | {killed}:
            assert state_of(folder)["status"] == "interrupted"
    begun = {n: state_of(f)["run_id"] for n, f in folders.items() if (f / "resume" / "manifest.json").exists()}

    seen: list[confide.SweepProgress] = []
    found = confide.sweep(resume=True, out=out, progress=seen.append)
    assert {p.cell for p in seen if p.state == "kept"} == ended
    assert (state_of(out)["status"], state_of(out)["finished"]) == ("finished", 3)
    results = {cell.number: cell.result for cell in found.cells}
    assert {number: results[number].run_id for number in begun} == begun  # gone on with, not begun again
    number = min(ended)
    alone = confide.simulate(tree, overrides=[*SEEDED, f"run.seed={number}"], out=tmp_path / "alone")
    kept = results.pop(number)
    assert (kept.metrics, kept.curve, kept.released_metrics) == (alone.metrics, alone.curve, alone.released_metrics)
    assert all(other.curve != alone.curve for other in results.values())  # the seed matters: equal ones say something
    with pytest.raises(ConfigError, match="is finished: there is nothing to resume"):
        confide.sweep(resume=True, out=out)


@pytest.mark.skipif(not CHAOS, reason="CONFIDE_CHAOS=1: ends all processes as the killed worker above does")
def test_a_failing_cell_stops_those_beside_it(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, rounds=500)
    other = write_people(tmp_path, "other.csv")

    def take_away(progress: confide.SweepProgress) -> None:
        if progress.cell == 2 and progress.state == "running":
            other.unlink(missing_ok=True)

    over = [f"data.file='{tmp_path / 'people.csv'}','{other}'"]
    with pytest.raises(DataError) as failed:
        confide.sweep(tree, over=over, out=tmp_path / "o", workers=2, progress=take_away)
    assert failed.value.where.startswith(f"cell data.file='{other}': ")
    assert multiprocessing.active_children() == []
    assert (state_of(tmp_path / "o")["status"], state_of(tmp_path / "o")["finished"]) == ("failed", 0)


# --- resumed --------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """Two cells, of which the first is finished and the second was never begun."""
    tree, out = tree_of(tmp_path), tmp_path / "o"

    def stop(progress: confide.SweepProgress) -> None:
        if progress.result is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        confide.sweep(tree, over=["run.seed=1,2"], overrides=SEEDED, out=out, progress=stop)
    return tree, out


def test_a_finished_cell_is_kept_only_by_those_whom_it_belongs_to(
    interrupted: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    tree, out = interrupted
    before = (out / "cells" / "001-seed-1" / "result.json").read_bytes()
    over = ["run.seed=1,2"]

    def refused(told: str, **changes: Any) -> None:
        asked = {"experiment": tree, "over": over, "overrides": SEEDED, "out": out, "resume": True} | changes
        with pytest.raises(ConfigError, match=told):
            confide.sweep(asked.pop("experiment"), **asked)

    refused("another experiment .*run.* differs in cell run.seed=1", overrides=[*SEEDED, "run.rounds=2"])
    refused(r"other axes \(run.seed differs\)", over=["run.seed=1,3"])
    refused(r"other axes \(training.learning_rate differs\)", over=[*over, "training.learning_rate=1"])
    refused("needs the folder", out=None)
    refused("holds no sweep that can be resumed", out=tmp_path)
    table = Path(tree["data"]["file"])
    content = table.read_bytes()
    table.write_bytes(content + b"\n")
    refused("are not those that the sweep was begun with")
    table.write_bytes(content)
    record = out / "cells" / "001-seed-1" / "experiment.json"
    kept = record.read_bytes()
    record.write_bytes(kept.replace(b'"rounds": 1', b'"rounds": 2'))
    assert record.read_bytes() != kept
    refused("is not the run of this cell")
    record.write_bytes(kept)

    seen: list[confide.SweepProgress] = []
    found = confide.sweep(tree, over=over, overrides=SEEDED, out=out, resume=True, progress=seen.append)
    assert [p.cell for p in seen if p.state == "kept"] == [1]
    assert [p.cell for p in seen if p.state == "finished"] == [2]
    assert (out / "cells" / "001-seed-1" / "result.json").read_bytes() == before
    # A cell that was kept says as much as one that has just run.
    assert len(found.cells[0].result.curve) == len(found.cells[1].result.curve) == 2
    results, rounds = (pd.read_parquet(out / f"{name}.parquet") for name in ("results", "rounds"))
    assert list(results["run.seed"]) == [1, 2]
    assert list(results["setting"]) == [1, 1]
    assert list(results["exact.auc"]) == [cell.result.metrics["auc"] for cell in found.cells if cell.result.metrics]
    assert list(zip(rounds["cell"], rounds["round"], strict=True)) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert list(rounds["exact.auc"]) == [point["auc"] for cell in found.cells for point in cell.result.curve]
    for name, table_ in (("results", results), ("rounds", rounds)):
        pd.testing.assert_frame_equal(pd.read_csv(out / f"{name}.csv"), table_, check_dtype=False)


def test_a_sweep_that_was_edited_to_private_data_is_not_resumed(interrupted: tuple[dict[str, Any], Path]) -> None:
    _, out = interrupted
    record = json.loads((out / "made_from.json").read_text())
    record["cells"][1]["experiment"]["data"]["public"] = False
    record["cells"][1]["experiment"]["sealing"]["profile"] = "sealed"
    record["cells"][1]["experiment"]["privacy"]["unsafe_noise_seed"] = None
    (out / "made_from.json").write_text(json.dumps(record))
    with pytest.raises(PolicyError, match="a release of all its cells"):
        confide.sweep(resume=True, out=out)


# --- how many -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 256), st.integers(0, 2**45), st.integers(1, 2**40))
def test_workers_fit_into_memory_and_there_is_always_one(cores: int, available: int, peak: int) -> None:
    found = workers_within(cores, available, peak)
    assert 1 <= found <= cores
    assert found == 1 or found * peak <= available
    assert found == cores or (found + 1) * peak > 0.8 * available - 1


def test_what_is_free_is_the_lesser_of_machine_and_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:  64 kB\n")
    assert available_bytes(meminfo, tmp_path) == 64 * 1024
    (tmp_path / "memory.max").write_text("40000\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 5000\n")
    assert available_bytes(meminfo, tmp_path) == 15000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 64 * 1024
    assert available_bytes(tmp_path / "none", tmp_path / "none") is None
    assert 10**7 < peak_bytes() < 10**12


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_is_not_a_number_of_processes(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path, workers: int
) -> None:
    with pytest.raises(ConfigError, match="is not a number of processes"):
        confide.sweep(make_experiment(), over=["run.seed=1"], out=tmp_path / "o", workers=workers)
