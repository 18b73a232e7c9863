"""The built-in example: six cities, thousands of people, one command without arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

import confide
from confide.privacy.dp import Ledger, RenyiBudget, Role

CITIES = ["1", "2", "3", "4", "5", "6"]
SUBJECTS = {"1": 1164, "2": 1232, "3": 735, "4": 905, "5": 786, "6": 1090}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run's results go."""
    return tmp_path_factory.mktemp("rand") / "out"


@pytest.fixture(scope="module")
def result(folder: Path) -> confide.Result:
    """Two rounds of the built-in experiment."""
    return confide.simulate(overrides=["run.rounds=2"], out=folder)


def test_all_six_cities_take_part_and_are_charged(result: confide.Result, folder: Path) -> None:
    assert result.sites == CITIES
    assert (result.rounds, result.rounds_abandoned) == (2, 0)
    assert dict.fromkeys(CITIES, result.epsilon.max) == result.epsilon.per_site
    assert 0 < result.epsilon.max <= 2.0
    for city in CITIES:
        ledger = Ledger(folder / "ledgers" / city / "ledger.db", RenyiBudget.for_limit(8.0, 1e-5))
        assert sum(event.steps for event in ledger.events(Role.TRAIN)) == 2 * 10
        ledger.close()


def test_two_rounds_learn_something_about_people_never_trained_on(result: confide.Result) -> None:
    assert result.metrics is not None
    assert result.metrics["auc"] > 0.56  # 0.5 is chance; twenty rounds reach about 0.67
    assert len(result.curve) == 3
    assert result.curve[-1]["auc"] == result.metrics["auc"]


def test_the_noised_metrics_are_near_the_exact_ones(result: confide.Result) -> None:
    assert result.released_metrics is not None
    assert result.metrics is not None
    for name in ("auc", "accuracy"):
        assert result.released_metrics[name] == pytest.approx(result.metrics[name], abs=0.1)


def test_the_plan_counts_everybody_in_the_table() -> None:
    plan = confide.plan()
    assert {site.site: site.subjects for site in plan.sites} == SUBJECTS
    assert (plan.parameters, plan.rounds, plan.admitted) == (31, 20, True)
    assert 1.9 < plan.epsilon <= 2.0
