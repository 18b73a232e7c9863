"""What is told of a round belongs to that round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import confide
from tests.support import experiment_tree, people_table


@pytest.fixture
def rounds(tmp_path: Path) -> list[dict[str, Any]]:
    """`rounds.jsonl` of a run without noise over people with one record each: released metrics are then exact."""
    people_table(people=150).drop_duplicates("person").to_csv(tmp_path / "people.csv", index=False)
    tree = experiment_tree(
        str(tmp_path / "people.csv"),
        run={"rounds": 6, "report_metrics_every": 2},
        training={"learning_rate": 0.03},  # slowly, so that rounds differ whoever is drawn
        privacy={"epsilon": float("inf")},
    )
    confide.simulate(tree, out=tmp_path / "out")
    return [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]


def test_there_is_one_line_a_round_and_one_for_the_start(rounds: list[dict[str, Any]]) -> None:
    assert [line["round"] for line in rounds] == list(range(7))


def test_released_metrics_stand_beside_the_exact_ones_of_the_same_model(rounds: list[dict[str, Any]]) -> None:
    assert len({line["metrics"]["accuracy"] for line in rounds}) > 2  # so that another round's would be noticed
    told = [line for line in rounds if line["released_metrics"] is not None]
    assert told
    for line in told:
        assert line["released_metrics"]["accuracy"] == pytest.approx(line["metrics"]["accuracy"], abs=1e-6)
        assert line["released_metrics"]["ece"] == pytest.approx(line["metrics"]["ece"], abs=0.05)  # half a bin
        assert list(line["released_metrics"]) == list(line["metrics"]) == list(line["released_intervals"])
        for name, (low, high) in line["released_intervals"].items():
            assert low <= line["released_metrics"][name] <= high, name
    assert all(line["released_intervals"] is None for line in rounds if line not in told)
