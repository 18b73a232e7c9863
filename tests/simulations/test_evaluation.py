"""Exact metrics, and released ones of the same model on the same people without noise: only binning is between them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, r2_score, roc_auc_score

from confide import simulate
from confide.clients.data.records import SiteRecords
from confide.clients.training.models import build_model, flatten
from confide.clients.training.trainer import LocalTrainer, TrainingPlan, predict
from confide.config import ModelConfig, TrainingConfig
from confide.privacy.dp import SecureRandom
from confide.privacy.dp.metrics import PROBABILITY_LIMITS, Task, read
from confide.simulations.evaluation import ExactEvaluator
from tests.support import experiment_tree, write_people

INPUTS, PEOPLE = 3, 600
CPU = torch.device("cpu")
MODEL = ModelConfig(kind="mlp", hidden=(5,))
TASKS: tuple[Task, ...] = ("binary", "multiclass", "regression")
#: How far binning may move each metric; those not named are not binned.
BOUNDS = {"auc": 0.03, "ece": 0.05, "clipped_loss": math.log(2)}


def site(task: Task, seed: int, scale: float = 3.0) -> tuple[torch.nn.Module, SiteRecords]:
    """A random model, and people with one record each; their labels follow no model."""
    rng, outputs = np.random.default_rng(seed), 3 if task == "multiclass" else 1
    torch.manual_seed(seed)
    model = build_model(MODEL, INPUTS, outputs)
    with torch.no_grad():
        for p in model.parameters():
            p *= scale  # the default spreads probabilities
    x = rng.uniform(-2, 2, (PEOPLE, INPUTS)).astype(np.float32)
    y = (
        rng.uniform(0.25, 0.75, PEOPLE)
        if task == "regression"
        else rng.integers(0, outputs + (task == "binary"), PEOPLE)
    )
    everybody = np.arange(PEOPLE)
    return model, SiteRecords(x, y.astype(np.float32), everybody, everybody, [f"p{i}" for i in everybody])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_released_metrics_without_noise_are_the_exact_ones_but_for_binning(task: Task, seed: int) -> None:
    # Errors above 1 are clipped in the released metric alone.
    model, records = site(task, seed, scale=0.1 if task == "regression" else 3.0)
    weights = flatten(model)
    exact = ExactEvaluator(model, task, {"one": records}).evaluate(weights, {"one": np.ones(PEOPLE, dtype=bool)})
    plan = TrainingPlan(
        training=TrainingConfig(), task=task, noise_multiplier=0.0, sample_rate=1.0, max_grad_norm=1.0,
        population=PEOPLE,
    )  # fmt: skip
    trainer = LocalTrainer(build_model(MODEL, INPUTS, 3 if task == "multiclass" else 1), records, plan, CPU,
                           SecureRandom())  # fmt: skip
    total = trainer.metric_sum(weights, np.arange(PEOPLE))
    noise = 1e-4
    released = read(task, total + np.random.default_rng(seed).normal(0, noise, len(total)), noise)
    assert set(exact) - set(released) <= {"r2"}
    for name, value in released.items():
        bound = BOUNDS.get(name, 0.0) if task != "regression" else 0.0
        assert value == pytest.approx(exact[name], abs=bound + 1e-5), name


def test_exact_metrics_are_those_of_the_textbook() -> None:
    everybody = {"one": np.ones(PEOPLE, dtype=bool)}
    model, records = site("binary", 1)
    batch = records.gather(np.arange(PEOPLE))
    found = ExactEvaluator(model, "binary", {"one": records}).evaluate(flatten(model), everybody)
    p, y = predict(model, batch.x, "binary", CPU), batch.y.double().numpy()
    assert list(found) == ["auc", "accuracy", "ece", "clipped_loss"]
    assert found["auc"] == roc_auc_score(y, p)
    assert found["clipped_loss"] == pytest.approx(log_loss(y, np.clip(p, *PROBABILITY_LIMITS)))
    bins = [p // 0.1 == i for i in range(10)]
    gaps = [here.mean() * abs(y[here].mean() - p[here].mean()) for here in bins if here.any()]
    assert found["ece"] == pytest.approx(sum(gaps))
    assert found["ece"] > 0.05  # a random model is not calibrated

    model, records = site("regression", 1)
    batch = records.gather(np.arange(PEOPLE))
    found = ExactEvaluator(model, "regression", {"one": records}).evaluate(flatten(model), everybody)
    value, y = predict(model, batch.x, "regression", CPU), batch.y.double().numpy()
    assert list(found) == ["mean_absolute_error_scaled", "r2", "clipped_loss"]
    assert found["r2"] == pytest.approx(r2_score(y, value))
    assert found["clipped_loss"] == pytest.approx(np.mean(np.minimum(np.abs(value - y), 1) ** 2))
    assert np.abs(value - y).max() > 1  # so that clipping has an effect


def test_where_all_labels_are_alike_there_is_no_auc() -> None:
    model, records = site("binary", 2)
    positive = records.gather(np.arange(PEOPLE)).y.numpy() > 0.5
    found = ExactEvaluator(model, "binary", {"one": records}).evaluate(flatten(model), {"one": positive})
    assert list(found) == ["accuracy", "ece", "clipped_loss"]
    assert ExactEvaluator(model, "binary", {"one": records}).evaluate(flatten(model), {"one": ~positive | True})["auc"]


def test_where_nobody_is_held_out_a_run_ends_without_exact_metrics(tmp_path: Path) -> None:
    tree = experiment_tree(str(write_people(tmp_path)), run={"rounds": 1}, privacy={"epsilon": float("inf")})
    tree["data"]["held_out"] = 1e-9
    result = simulate(tree, out=tmp_path / "out")
    assert result.metrics is None
    assert json.loads((tmp_path / "out" / "result.json").read_text())["metrics"] is None
    assert "Quality by round" not in (tmp_path / "out" / "index.html").read_text()
    tree["data"]["held_out"] = 0.3  # control
    assert simulate(tree, out=tmp_path / "control").metrics
    assert "Quality by round" in (tmp_path / "control" / "index.html").read_text()


def test_whom_another_site_trains_on_does_not_count_as_unseen() -> None:
    """The same persons at two sites; half of them are held out at both."""
    model, one = site("binary", 3)
    other, strangers = site("binary", 4)[1], site("binary", 4)[1]
    strangers.persons = [f"q{i}" for i in range(PEOPLE)]
    everybody, half = np.ones(PEOPLE, dtype=bool), np.arange(PEOPLE) % 2 == 0
    alone = {"one": one, "other": strangers}
    found = ExactEvaluator(model, "binary", {"one": one, "other": other}).evaluate(
        flatten(model), {"one": everybody, "other": half}
    )
    assert found == ExactEvaluator(model, "binary", alone).evaluate(flatten(model), {"one": half, "other": half})
    # The control: people of whom nobody lies at both sites count wherever they are held out.
    assert found != ExactEvaluator(model, "binary", alone).evaluate(flatten(model), {"one": everybody, "other": half})
