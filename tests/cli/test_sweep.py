"""`confide sweep` as a person at a terminal, or a script, meets it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from confide.simulations.frontier import WATERMARK
from tests.cli.command import confide, files_under, spawn, to_toml

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


def test_json_is_the_last_line_and_the_watermark_stands_beside_the_best(folder: Path) -> None:
    answer = confide("sweep", "experiment.toml", "--over", "privacy.epsilon=2,4", *SHORT, "--out", "out", "--json")
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    found = answer.last_line
    assert list(found) == KEYS
    assert found["watermark"] == WATERMARK
    assert set(found["best"]) == {"values", "epsilon", "auc", "cells"}
    assert found == json.loads((folder / "out" / "sweep.json").read_text())


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
    assert process.stderr.readline().startswith("cell 1/2")
    limit = time.monotonic() + 120
    while not (folder / "out" / "cells" / "002-rounds-2000" / "rounds.jsonl").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert "interrupted finished cells stay; the folder says so" in err
    assert "Traceback" not in err
    status = json.loads((folder / "out" / "status.json").read_text())
    assert status == {"status": "interrupted", "cells": 2, "finished": 1, "cell": "run.rounds=2000"}
    assert (folder / "out" / "cells" / "001-rounds-1" / "result.json").exists()
