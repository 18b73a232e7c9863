"""What goes wrong in a simulated world, and what the real coordinator and sites make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import confide
from confide.config import LabelConfig, load_experiment
from confide.errors import ConfigError
from confide.privacy.audit import records as r
from confide.privacy.audit.log import parse_line
from confide.privacy.audit.verify import verify
from confide.simulations.result import Result
from confide.simulations.scenario import false_label
from confide.simulations.sources import load_sources
from tests.support import experiment_tree, write_people

Run = Callable[..., Result]
SITES = ("ash", "birch", "cedar", "doum")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(rounds=4, **scenario)`."""
    path, number = str(write_people(tmp_path, people=80)), iter(range(100))

    def make(rounds: int = 4, epsilon: float = 4.0, profile: str = "open", **scenario: Any) -> Result:
        tree = experiment_tree(
            path, run={"rounds": rounds, "report_metrics_every": rounds}, scenario=scenario,
            sites={"min_sites": 3, "population": {"default": 80}}, privacy={"epsilon": epsilon},
            sealing={"profile": profile}, training={"local_steps": 8, "learning_rate": 2.0},
        )  # fmt: skip
        return confide.simulate(tree, out=tmp_path / f"out{next(number)}")

    return make


def cohorts(result: Result) -> dict[int, list[str]]:
    evidence = verify(result.out)
    assert evidence.findings == []
    return {e.round: e.cohort for _, e in evidence.coordinator.of(r.Cohort)}


def test_a_dropout_is_in_no_cohort_from_its_round_on(run: Run) -> None:
    result = run(profile="sealed", dropouts=[{"site": "ash", "round": 3}])
    found = cohorts(result)
    assert [("ash" in found[n]) for n in range(1, 6)] == [True, True, False, False, False]
    assert result.rounds_abandoned == 0
    assert len(result.curve) == 5
    assert len({json.dumps(metrics) for metrics in result.curve}) == 5  # not the model of the one that has left


def test_a_latecomer_is_in_cohorts_from_its_round_on(run: Run) -> None:
    found = cohorts(run(profile="sealed", latecomers=[{"site": "birch", "round": 3}]))
    assert [("birch" in found[n]) for n in range(1, 6)] == [False, False, True, True, True]


def test_stragglers_miss_some_rounds_and_the_same_ones_again(run: Run) -> None:
    found, again = cohorts(run(stragglers=0.2)), cohorts(run(stragglers=0.2))
    assert found == again
    assert {len(members) for members in found.values()} - {4}
    assert all(set(members) <= set(SITES) for members in found.values())
    assert all(len(members) == 4 for members in cohorts(run()).values())  # the control


def _eligible(result: Result, site: str) -> list[int]:
    path = result.out / "sites" / site / "local.log"
    records = [parse_line(line)[1] for line in path.read_bytes().splitlines()]
    return [e.training + e.held_out for e in records if isinstance(e, r.LocalSnapshot)]


def test_churn_changes_who_takes_part_round_by_round(run: Run) -> None:
    leaving = _eligible(run(churn={"withdraw": 0.2}), "ash")
    assert all(later < before for before, later in pairwise(leaving))
    coming = _eligible(run(churn={"give": 0.9}), "ash")
    assert coming[-1] > coming[0] - 1
    assert coming[-1] == 80 > _eligible(run(), "ash")[0]


def test_a_poisoned_site_teaches_its_labels_and_more_so_when_it_shouts(run: Run) -> None:
    far = {"rounds": 8, "epsilon": float("inf")}
    quiet = run(**far, poisoned=[{"site": "cedar"}]).metrics
    loud = run(**far, poisoned=[{"site": "cedar", "factor": 50.0}]).metrics
    clean = run(**far).metrics
    assert quiet is not None
    assert loud is not None
    assert clean is not None
    assert "attack_success" not in clean
    assert quiet["attack_success"] == pytest.approx(1 - quiet["accuracy"])  # of two labels, the false one
    assert loud["attack_success"] > max(0.5, quiet["attack_success"])
    assert clean["accuracy"] > loud["accuracy"]


def test_labels_of_several_classes_become_the_next_ones() -> None:
    three = LabelConfig(column="ward", classes=("a", "b", "c"))
    assert false_label(torch.tensor([0.0, 1.0, 2.0]), three).tolist() == [1.0, 2.0, 0.0]
    two = LabelConfig(column="sick", classes=(0, 1))
    assert false_label(torch.tensor([0.0, 1.0]), two).tolist() == [1.0, 0.0]


def test_a_drifted_sites_numbers_are_shifted_and_stay_in_their_bounds(tmp_path: Path) -> None:
    tree = experiment_tree(str(write_people(tmp_path)))
    plain = load_sources(load_experiment(tree), tmp_path).records
    tree["scenario"] = {"drifted": [{"site": "ash", "shift": 0.5}]}
    moved = load_sources(load_experiment(tree), tmp_path).records
    units = np.arange(len(plain["ash"].persons))
    before, after = plain["ash"].gather(units).x.numpy(), moved["ash"].gather(units).x.numpy()
    assert np.allclose(after[:, 0], np.clip(before[:, 0] + 0.5, -1, 1))
    assert np.array_equal(after[:, 1:], before[:, 1:])  # categories have no direction
    assert np.array_equal(plain["birch"].gather(units).x.numpy(), moved["birch"].gather(units).x.numpy())


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ({"dropouts": [{"site": "elm", "round": 2}]}, "'elm', which is not there"),
        ({"poisoned": [{"site": "ash"}, {"site": "ash"}]}, "names a site twice"),
        ({"straglers": 0.1}, r"unknown key scenario\.straglers"),
        ({"poisoned": [{"site": "ash", "factor": 0.5}]}, "factor"),
        ({"stragglers": 2}, "stragglers"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(tmp_path: Path, scenario: dict[str, Any], what: str) -> None:
    tree = experiment_tree(str(write_people(tmp_path)), scenario=scenario)
    with pytest.raises(ConfigError, match=what):
        confide.simulate(tree, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_number_has_no_false_label(tmp_path: Path) -> None:
    tree = experiment_tree(str(write_people(tmp_path)), scenario={"poisoned": [{"site": "ash"}]})
    tree["data"]["label"] = {"column": "cost", "bounds": [0, 10]}
    with pytest.raises(ConfigError, match="needs classes"):
        confide.simulate(tree, out=tmp_path / "out")
