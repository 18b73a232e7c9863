"""`confide sweep` as a person at a terminal, or a script, meets it."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from confide.cli import sweep_display
from confide.simulations import Progress, SweepProgress
from confide.simulations.sweeps.frontier import WATERMARK
from tests.cli.command import Answer, confide, files_under, spawn, to_toml

SHORT = ("--set", "run.rounds=1", "--set", "training.local_steps=2")
KEYS = ["name", "axes", "quality", "best", "watermark", "warnings", "settings", "cells", "seconds", "out"]


@pytest.fixture
def folder(make_experiment: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `experiment.toml` over four clinics."""
    (tmp_path / "experiment.toml").write_text(to_toml(make_experiment()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sweep_ends_in_a_table_whose_best_row_bears_the_watermark(folder: Path) -> None:
    answer = confide("sweep", "experiment.toml", "--over", "privacy.epsilon=2,inf", *SHORT, "--out", "out")
    assert answer.code == 0
    assert "Sweep of tiny" in answer.words
    assert "cell epsilon ε (PRV) auc accuracy seconds" in answer.words
    told = next(line for line in answer.out.splitlines() if line.startswith("best "))
    assert told.startswith("best  privacy.epsilon=2: AUC 0.")
    assert told.endswith(WATERMARK)
    assert "ε per subject (δ = 1e-05): what that run alone would cost" in answer.words
    assert answer.out.endswith("written to out\n")
    assert [line[:8] for line in answer.err.splitlines()] == ["cell 1/2", "cell 2/2"]
    assert {"sweep.json", "index.html", "figures", "cells"} <= {p.name for p in (folder / "out").iterdir()}
    again = confide("sweep", "--resume", "--out", "out")
    assert (again.code, again.out) == (0, "out: this sweep is finished already\n")


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own
def test_json_is_the_last_line_and_the_watermark_stands_beside_the_best(folder: Path) -> None:
    options = ("--out", "out", "--tensorboard", "events", "--json")
    answer = confide("sweep", "experiment.toml", "--over", "privacy.epsilon=2,4", *SHORT, *options)
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    found = answer.last_line
    assert list(found) == KEYS
    assert found["watermark"] == WATERMARK
    assert set(found["best"]) == {"values", "epsilon", "auc", "cells"}
    assert found == json.loads((folder / "out" / "sweep.json").read_text())
    events = {path.parent.relative_to(folder) for path in folder.rglob("events.out.*")}
    assert events == {Path("events", "tiny", "001-epsilon-2"), Path("events", "tiny", "002-epsilon-4")}


@pytest.mark.parametrize("command", [("simulate",), ("sweep", "--over", "run.seed=1")])
def test_a_missing_extra_is_named_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)  # as if it were not there
    before = files_under(folder)
    answer = confide(command[0], "experiment.toml", *command[1:], "--out", "out", "--mlflow", "runs")
    assert (answer.code, answer.out) == (2, "")
    assert "pip install 'confide[mlflow]'" in answer.err
    assert files_under(folder) == before


def test_private_data_are_refused_with_what_to_do_before_anything_is_written(folder: Path) -> None:
    before = files_under(folder)
    private = ("--set", "data.public=false", "--set", "sealing.profile=sealed")
    answer = confide("sweep", "experiment.toml", "--over", "privacy.epsilon=1,2", *private, "--out", "out", "--json")
    assert (answer.code, answer.last_line["error"]["kind"]) == (9, "policy")
    assert "a sweep is a release of all its cells" in answer.last_line["error"]["what"]
    assert "set data.public = true if anybody may see every row" in answer.err
    assert "confide simulate --ledger DIR" in answer.err
    assert files_under(folder) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "names no axis"),
        (("--over", "privacy.epsilonn=1"), "did you mean privacy.epsilon?"),
        (("--over", "privacy.epsilon=1,"), "holds an empty value"),
        (("--over", "privacy.epsilon=1,zero"), "cell privacy.epsilon=zero: "),
        (("--over", "privacy.epsilon=1", "--workers", "0"), "'0' is not a number of processes"),
        (("--over", "privacy.epsilon=1", "--workers", "many"), "'many' is not a number of processes"),
        (("--resume",), "holds no sweep that can be resumed"),
    ],
)
def test_a_wrong_axis_is_a_usage_error(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    before = files_under(folder)
    answer = confide("sweep", "experiment.toml", *arguments, "--out", "out")
    assert (answer.code, answer.out) == (2, "")
    assert told in answer.err
    assert files_under(folder) == before


def test_interrupted_it_says_so_and_finished_cells_stay(folder: Path) -> None:
    arguments = ("--over", "run.rounds=1,2000", "--set", "run.report_metrics_every=1000")
    process = spawn("sweep", "experiment.toml", *arguments, "--out", "out", cwd=folder)
    assert process.stderr is not None
    first = process.stderr.readline()
    limit = time.monotonic() + 120
    while not (folder / "out" / "cells" / "002-rounds-2000" / "rounds.jsonl").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    answer = Answer(process.returncode, out, first + err)
    assert (answer.code, answer.out) == (130, "")
    assert answer.err.startswith("cell 1/2")
    assert "confide sweep --resume --out FOLDER goes on with this sweep" in answer.err
    assert "interrupted finished cells stay; the folder says so" in answer.err
    assert "Traceback" not in answer.err
    status = json.loads((folder / "out" / "status.json").read_text())
    assert status == {"status": "interrupted", "cells": 2, "finished": 1, "cell": "run.rounds=2000"}
    assert (folder / "out" / "cells" / "001-rounds-1" / "result.json").exists()
    other = confide("sweep", "experiment.toml", "--resume", "--out", "out", "--set", "run.seed=9", "--json")
    assert (other.code, other.last_line["error"]["kind"]) == (2, "configuration")
    assert "holds a sweep of another experiment ([run] differs in cell run.rounds=1)" in other.err


def test_a_terminal_shows_a_table_of_the_cells_that_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(sweep_display, "err", Console(file=text, width=80, height=10, force_terminal=True))
    display = sweep_display.CellDisplay()
    for number in range(1, 31):
        display.update(SweepProgress(number, 30, f"run.seed={number}", state="waiting"))
    now = Progress(
        round=3, rounds=4, epsilon=1.0, metrics={"auc": 0.75}, released=None, released_intervals=None,
        released_round=None, abandoned=False, saturated=0.0,
    )  # fmt: skip
    display.update(SweepProgress(20, 30, "run.seed=20", round=now, state="running"))
    Console(file=text, width=80).print(display.table())
    shown = " ".join(text.getvalue().split())
    assert "0 of 30 cells" in shown
    assert "20 run.seed=20 running 3/4 auc 0.750 0" in shown
    assert shown.count("waiting") == 3  # ten lines, of which the rest are for what stands around
