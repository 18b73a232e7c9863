"""The main job on a tiny table, through the whole path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import confide

RESULT_KEYS = [
    "run_id", "rounds", "sites", "profile", "metrics", "released_metrics", "released_intervals", "epsilon", "delta",
    "unit", "neighbours", "placement", "bytes_per_parameter", "rounds_abandoned", "seconds", "out", "warnings",
]  # fmt: skip


def test_a_run_trains_releases_and_writes_its_results(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    seen = []
    result = confide.simulate(make_experiment(), out=tmp_path / "out", progress=seen.append)
    assert list(result.to_json()) == RESULT_KEYS
    assert result.epsilon.max <= 4.0
    assert result.metrics is not None
    assert result.metrics["auc"] > 0.5
    assert result.released_metrics is not None
    assert [p.round for p in seen] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result.to_json()
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "finished"
    assert (tmp_path / "out" / "figures" / "quality.svg").read_text().startswith("<?xml")
