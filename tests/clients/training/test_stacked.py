"""Clients that train together get what each gets alone, and a chain what Opacus gives for the same layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from confide.clients.data.records import SiteRecords
from confide.clients.training.models import build_model
from confide.clients.training.stacked import Chain, Work, train_stacked
from confide.clients.training.trainer import LocalTrainer, TrainingPlan
from confide.config import ModelConfig, TrainingConfig
from confide.privacy.dp import SecureRandom
from confide.privacy.dp.metrics import Task
from tests.clients.training.test_trainer import (
    CPU,
    INPUTS,
    KEY,
    LOGISTIC,
    MLP,
    TASKS,
    make_plan,
    make_records,
    outputs,
    weights_for,
)


class Wrapped(nn.Module):
    """The same layers, in a module that is no chain: it is trained through Opacus."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.inner(x)
        assert isinstance(found, torch.Tensor)
        return found


def stream(number: int) -> SecureRandom:
    return SecureRandom(unsafe_key=KEY[:-1] + bytes([number]))


def work(number: int, task: Task, model: ModelConfig, plan: TrainingPlan, unit: str = "subject") -> Work:
    records = make_records(task, persons=6 + number, seed=number, unit=unit)
    return Work(records, plan, stream(number), weights_for(model, task), np.arange(len(records.person_of)))


@settings(max_examples=30, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    model=st.sampled_from([LOGISTIC, MLP, ModelConfig(kind="mlp", hidden=(7,))]),
    unit=st.sampled_from(["subject", "record"]),
    training=st.sampled_from([
        TrainingConfig(local_steps=4, learning_rate=0.3),
        TrainingConfig(local_steps=3, learning_rate=0.3, momentum=0.9),
        TrainingConfig(local_steps=3, learning_rate=0.01, optimizer="adam"),
    ]),
    clip=st.sampled_from([0.05, 1.0, 1e6]),
    sigma=st.sampled_from([0.0, 0.7]),
    proximal=st.sampled_from([0.0, 0.1]),
    corrected=st.booleans(),
)  # fmt: skip
def test_a_chain_moves_as_the_same_layers_do_through_opacus(
    task: Task, model: ModelConfig, unit: str, training: TrainingConfig, clip: float, sigma: float, proximal: float,
    corrected: bool,
) -> None:  # fmt: skip
    records, weights = make_records(task, unit=unit), weights_for(model, task)
    plan = TrainingPlan(
        training=training, task=task, noise_multiplier=sigma if clip <= 1 else 0.0, sample_rate=0.5,
        max_grad_norm=clip, population=20,
        proximal=proximal,
    )  # fmt: skip
    correction = np.random.default_rng(0).normal(size=len(weights)) * 0.01 if corrected else None
    moved = []
    for wrap in (lambda m: m, Wrapped):
        built = wrap(build_model(model, INPUTS, outputs(task)))
        trainer = LocalTrainer(built, records, plan, CPU, stream(0))
        moved.append(trainer.train(weights, np.arange(len(records.person_of)), correction))
    np.testing.assert_allclose(*moved, rtol=0, atol=1e-5)
    assert np.abs(moved[0]).max() > 1e-4


@settings(max_examples=20, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    units=st.lists(st.sampled_from(["subject", "record"]), min_size=2, max_size=6),
    populations=st.lists(st.integers(5, 500), min_size=6, max_size=6),
    sigma=st.sampled_from([0.0, 0.5]),
    rate=st.sampled_from([0.1, 0.6, 1.0]),
)
def test_clients_that_train_together_get_what_each_gets_alone(
    task: Task, units: list[str], populations: list[int], sigma: float, rate: float
) -> None:
    chain = Chain.of(build_model(MLP, INPUTS, outputs(task)))
    assert chain is not None
    plan = make_plan(task, local_steps=3, noise_multiplier=sigma, sample_rate=rate, max_grad_norm=0.4)

    def works() -> list[Work]:
        plans = [replace(plan, population=population) for population in populations]
        return [work(i, task, MLP, plans[i], unit) for i, unit in enumerate(units)]

    together = train_stacked(chain, works(), CPU)
    alone = [train_stacked(chain, [one], CPU)[0] for one in works()]
    np.testing.assert_allclose(np.stack(together), np.stack(alone), rtol=0, atol=1e-5)
    assert all(not np.allclose(one, other) for one, other in pairwise(alone) if sigma)


def test_clients_of_several_kinds_keep_their_places() -> None:
    chain = Chain.of(build_model(LOGISTIC, INPUTS, 1))
    assert chain is not None
    plans = [make_plan(local_steps=steps, max_grad_norm=0.4) for steps in (1, 5, 1, 5, 3)]
    together = train_stacked(chain, [work(i, "binary", LOGISTIC, p) for i, p in enumerate(plans)], CPU)
    for i, plan in enumerate(plans):
        (alone,) = train_stacked(chain, [work(i, "binary", LOGISTIC, plan)], CPU)
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=1e-5)


def test_what_is_not_a_number_at_one_client_stays_there() -> None:
    x = np.array([[1, 1, 1], [-1, -1, -1]], dtype=np.float32)
    model, plan = ModelConfig(kind="mlp", hidden=(2,)), make_plan()
    weights = np.array([3e38] * 6 + [0, 0] + [1, -1] + [0], dtype=np.float32)
    chain = Chain.of(build_model(model, INPUTS, 1))
    assert chain is not None

    def at(row: int) -> Work:
        records = SiteRecords(x[row : row + 1], np.ones(1, np.float32), np.arange(1), np.arange(1), ["p"])
        return Work(records, plan, stream(row), weights, np.arange(1))

    victim, other = train_stacked(chain, [at(0), at(1)], CPU)
    assert np.all(victim == 0)  # she contributes nothing
    assert np.all(np.isfinite(other))
    np.testing.assert_array_equal(other, train_stacked(chain, [at(1)], CPU)[0])


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_records_of_one_person_that_cancel_are_clipped_by_what_is_left(scale: float) -> None:
    """The product of norms bounds nothing here: her gradient itself must be what is clipped."""
    x = np.array([[1, 1, 1], [1, 1, 1 + 1e-4]], dtype=np.float32) * np.float32(scale)
    weights, clip = np.array([1, 1, 1, 0], dtype=np.float32), 0.5
    total = float(x[0] @ weights[:3])
    y = np.array([total - 1, total + 1], dtype=np.float32)  # errors of opposite sign
    records = SiteRecords(x, y, np.zeros(2, dtype=np.int64), np.zeros(1, dtype=np.int64), ["p"])
    plan = make_plan("regression", max_grad_norm=clip, population=1)
    chain = Chain.of(build_model(LOGISTIC, INPUTS, 1))
    assert chain is not None
    (moved,) = train_stacked(chain, [Work(records, plan, stream(0), weights, np.arange(1))], CPU)
    assert np.linalg.norm(moved) <= clip + 1e-4


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1)),
        nn.Linear(3, 1).double(),
        Wrapped(nn.Linear(3, 1)),
    ],
)
def test_what_is_not_a_chain_is_trained_by_itself(model: nn.Module) -> None:
    assert Chain.of(model) is None


def test_a_chain_is_known_by_its_layers() -> None:
    found = Chain.of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)))
    assert found is not None
    assert (found.layers, found.size) == (((4, 3, True), (2, 4, False)), 24)
