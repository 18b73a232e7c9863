"""One step of the trainer against a naive loop over persons, and each of its four invariants by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from confide.clients.data.records import SiteRecords
from confide.clients.training.models import build_model, flatten, load_flat
from confide.clients.training.trainer import LocalTrainer, TrainingPlan
from confide.config import ModelConfig, TrainingConfig
from confide.privacy.dp import SecureRandom
from confide.privacy.dp.metrics import BINS, Task

KEY = b"a key for tests, of thirty-two b"
CPU = torch.device("cpu")
LOGISTIC, MLP = ModelConfig(kind="logistic"), ModelConfig(kind="mlp", hidden=(5, 4))
INPUTS = 3
TASKS: tuple[Task, ...] = ("binary", "multiclass", "regression")
Vector = NDArray[np.float32]


def outputs(task: Task) -> int:
    return 3 if task == "multiclass" else 1


def make_records(task: Task, persons: int = 12, seed: int = 0, unit: str = "subject") -> SiteRecords:
    """One to five records a person."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(persons), rng.integers(1, 6, persons))
    x = rng.uniform(-1, 1, (len(owner), INPUTS)).astype(np.float32)
    y = rng.uniform(0, 1, len(owner)) if task == "regression" else rng.integers(0, outputs(task) + 1, len(owner))
    y = np.minimum(y, outputs(task) - 1) if task == "multiclass" else y
    names = [f"p{i}" for i in range(persons)]
    if unit == "record":
        return SiteRecords(x, y.astype(np.float32), np.arange(len(owner)), owner, names)
    return SiteRecords(x, y.astype(np.float32), owner, np.arange(persons), names)


def make_plan(task: Task = "binary", **changes: Any) -> TrainingPlan:
    training = TrainingConfig(
        local_steps=changes.pop("local_steps", 1), learning_rate=changes.pop("learning_rate", 1.0),
        optimizer=changes.pop("optimizer", "sgd"),
    )  # fmt: skip
    defaults: dict[str, Any] = {
        "noise_multiplier": 0.0, "sample_rate": 1.0, "max_grad_norm": 1.0, "population": 20,
    }  # fmt: skip
    return TrainingPlan(training=training, task=task, **(defaults | changes))


def weights_for(model: ModelConfig, task: Task, scale: float = 1.0) -> Vector:
    torch.manual_seed(3)
    return flatten(build_model(model, INPUTS, outputs(task))) * np.float32(scale)


def run(
    records: SiteRecords,
    plan: TrainingPlan,
    weights: Vector,
    eligible: NDArray[np.int64],
    *,
    model: ModelConfig = LOGISTIC,
    rng: SecureRandom | None = None,
) -> NDArray[np.float64]:
    built = build_model(model, INPUTS, outputs(plan.task))
    return LocalTrainer(built, records, plan, CPU, rng or SecureRandom(unsafe_key=KEY)).train(weights, eligible)


def naive_gradient(
    model: nn.Module, records: SiteRecords, plan: TrainingPlan, drawn: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Σ over persons of clip(mean gradient of the person's records), over q·N: one autograd call a person."""
    total = np.zeros(sum(p.numel() for p in model.parameters()))
    for unit in drawn:
        batch = records.gather(np.array([unit]))
        output = model(batch.x)
        if plan.task == "binary":
            p = torch.sigmoid(output[:, 0])
            losses = -(batch.y * torch.log(p) + (1 - batch.y) * torch.log(1 - p))
        elif plan.task == "multiclass":
            losses = -torch.log_softmax(output, dim=1)[torch.arange(len(batch.y)), batch.y.long()]
        else:
            losses = (output[:, 0] - batch.y) ** 2
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(losses.mean(), list(model.parameters()))])
        vector = gradient.double().numpy()
        total += vector * min(1.0, plan.max_grad_norm / np.linalg.norm(vector))
    return total / (plan.sample_rate * plan.population)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", [LOGISTIC, MLP], ids=["logistic", "mlp"])
@pytest.mark.parametrize(("clip", "rate"), [(0.1, 1.0), (100.0, 1.0), (0.3, 0.5)])
def test_without_noise_a_step_is_the_naive_loop_over_persons(
    task: Task, model: ModelConfig, clip: float, rate: float
) -> None:
    records, plan = make_records(task), make_plan(task, max_grad_norm=clip, sample_rate=rate, learning_rate=0.7)
    weights, eligible = weights_for(model, task), np.array([0, 2, 3, 4, 7, 8, 9, 11])
    drawn = SecureRandom(unsafe_key=KEY).poisson_sample(eligible, rate)
    assert 0 < len(drawn) <= len(eligible)
    reference = build_model(model, INPUTS, outputs(task))
    load_flat(reference, weights)
    expected = -0.7 * naive_gradient(reference, records, plan, drawn)
    found = run(records, plan, weights, eligible, model=model)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)
    assert np.abs(expected).max() > 1e-3


def test_several_steps_are_the_naive_loop_repeated_with_a_fresh_draw_each() -> None:
    records, plan = make_records("binary"), make_plan(local_steps=4, sample_rate=0.5, learning_rate=0.5)
    weights, eligible, rng = weights_for(MLP, "binary"), np.arange(12), SecureRandom(unsafe_key=KEY)
    reference, draws = build_model(MLP, INPUTS, 1), set()
    load_flat(reference, weights)
    for _ in range(4):
        drawn = rng.poisson_sample(eligible, 0.5)
        draws.add(tuple(drawn))
        load_flat(reference, (flatten(reference) - 0.5 * naive_gradient(reference, records, plan, drawn)).astype("f4"))
    assert len(draws) > 1
    found = run(records, plan, weights, eligible, model=MLP)
    np.testing.assert_allclose(found, flatten(reference).astype(float) - weights, rtol=1e-3, atol=1e-5)


def test_with_unit_record_each_record_is_clipped_by_itself() -> None:
    records, plan = make_records("binary", unit="record"), make_plan(max_grad_norm=0.2)
    weights = weights_for(LOGISTIC, "binary")
    reference = build_model(LOGISTIC, INPUTS, 1)
    load_flat(reference, weights)
    eligible = records.units_of(np.arange(12) < 6)
    expected = -naive_gradient(reference, records, plan, eligible)
    np.testing.assert_allclose(run(records, plan, weights, eligible), expected, rtol=2e-4, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(person=st.integers(0, 11), scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]), clip=st.sampled_from([0.01, 1.0, 5.0]))
def test_one_person_moves_a_step_by_at_most_the_clip(person: int, scale: float, clip: float) -> None:
    """The sensitivity that the noise is relative to, in units of C over q·N."""
    records, plan = make_records("regression"), make_plan("regression", max_grad_norm=clip)
    weights, everybody = weights_for(MLP, "regression", scale), np.arange(12)
    moved = np.linalg.norm(
        run(records, plan, weights, everybody, model=MLP)
        - run(records, plan, weights, everybody[everybody != person], model=MLP)
    )
    # The weights themselves are float32: their rounding is not the person's doing.
    assert moved * plan.population <= clip + np.abs(weights).max() * 1e-6 * plan.population * np.sqrt(len(weights))


def test_a_person_whose_gradient_is_not_finite_still_moves_a_step_by_at_most_the_clip() -> None:
    """The coordinator picks the first weights: they must not make one person's presence show as a nan."""
    x = np.array([[1, 1, 1], [-1, -1, -1], [-0.5, -1, -1]], dtype=np.float32)
    records = SiteRecords(x, np.ones(3, np.float32), np.arange(3), np.arange(3), ["victim", "b", "c"])
    model = ModelConfig(kind="mlp", hidden=(2,))
    # Hidden: relu(3e38 · Σx), infinite for the victim alone; output: h₁ − h₂ = ∞ − ∞.
    weights = np.array([3e38] * 6 + [0, 0] + [1, -1] + [0], dtype=np.float32)
    plan = make_plan()
    without = run(records, plan, weights, np.array([1, 2]), model=model)
    assert np.all(np.isfinite(without))  # control: nobody else is affected
    with_victim = run(records, plan, weights, np.array([0, 1, 2]), model=model)
    assert np.all(np.isfinite(with_victim))
    assert np.linalg.norm(with_victim - without) * plan.population <= plan.max_grad_norm + 1e-4


@pytest.mark.parametrize("model", [LOGISTIC, MLP], ids=["logistic", "mlp"])
def test_an_empty_draw_takes_a_noisy_step(model: ModelConfig) -> None:
    records, weights, nobody = make_records("binary"), weights_for(model, "binary"), np.zeros(0, dtype=np.int64)
    moved = run(records, make_plan(noise_multiplier=1.0), weights, nobody, model=model)
    assert np.all(moved != 0)
    still = run(records, make_plan(noise_multiplier=0.0), weights, nobody, model=model)
    assert np.all(still == 0)  # control: it was the noise


@pytest.mark.parametrize(("sigma", "clip", "rate", "population"), [(1.0, 1.0, 1.0, 20), (2.5, 0.3, 0.25, 400)])
@pytest.mark.parametrize("people", [0, 12])
def test_the_noise_of_one_step_has_the_promised_spread(
    sigma: float, clip: float, rate: float, population: int, people: int
) -> None:
    """Standard deviation σ·C/(q·N) in every coordinate, with data and without."""
    model = ModelConfig(kind="mlp", hidden=(80, 60))
    records, weights, eligible = make_records("binary"), weights_for(model, "binary"), np.arange(people)
    plan = make_plan(max_grad_norm=clip, sample_rate=rate, population=population, noise_multiplier=sigma)
    quiet = make_plan(max_grad_norm=clip, sample_rate=rate, population=population, noise_multiplier=0.0)
    signal = run(records, quiet, weights, eligible, model=model)
    noise = run(records, plan, weights, eligible, model=model) - signal  # the same stream draws the same people
    n, expected = len(noise), sigma * clip / (rate * population)
    assert np.std(noise) == pytest.approx(expected, rel=4 / np.sqrt(2 * n))
    assert abs(noise.mean()) < 4 * expected / np.sqrt(n)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / np.sqrt(n)
    assert np.std(run(records, quiet, weights, eligible, model=model) - signal) == 0  # control


def test_the_noise_is_fresh_in_every_step() -> None:
    records, weights, nobody = make_records("binary"), weights_for(MLP, "binary"), np.zeros(0, dtype=np.int64)
    one = run(records, make_plan(noise_multiplier=1.0), weights, nobody, model=MLP)
    four = run(records, make_plan(noise_multiplier=1.0, local_steps=4), weights, nobody, model=MLP)
    assert np.std(four) == pytest.approx(2 * np.std(one), rel=0.35)  # repeated noise would give four times


def test_the_sum_is_divided_by_the_declared_population_and_not_by_anything_counted() -> None:
    """The same twelve people give the same update in a larger table, and half the people give half of it."""
    weights, plan = weights_for(LOGISTIC, "binary"), make_plan()
    x = np.tile(np.array([[0.3, -0.2, 0.9]], dtype=np.float32), (40, 1))
    alike = SiteRecords(x, np.ones(40, np.float32), np.arange(40), np.arange(40), [f"p{i}" for i in range(40)])
    fewer = SiteRecords(x[:12], np.ones(12, np.float32), np.arange(12), np.arange(12), [f"p{i}" for i in range(12)])
    twelve = run(alike, plan, weights, np.arange(12))
    np.testing.assert_array_equal(twelve, run(fewer, plan, weights, np.arange(12)))
    np.testing.assert_allclose(run(alike, plan, weights, np.arange(6)), twelve / 2, rtol=1e-4)
    np.testing.assert_allclose(run(alike, plan, weights, np.arange(24)), twelve * 2, rtol=1e-4)
    np.testing.assert_allclose(run(alike, make_plan(population=40), weights, np.arange(12)), twelve / 2, rtol=1e-4)
    assert np.abs(twelve).max() > 0.01


def test_the_same_torch_seed_does_not_give_two_sites_the_same_noise() -> None:
    """The attack on Opacus's default generator: two sites with one `manual_seed` cancel by subtraction."""
    records, weights, plan = make_records("binary"), weights_for(MLP, "binary"), make_plan(noise_multiplier=1.0)
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        seen.append(run(records, plan, weights, np.arange(12), model=MLP, rng=SecureRandom()))
    assert np.all(seen[0] != seen[1])
    same = [run(records, plan, weights, np.arange(12), model=MLP) for _ in range(2)]
    assert np.all(same[0] == same[1])  # control: with one stream, named unsafe, they do


class NoChain(nn.Module):
    """An MLP that is trained through Opacus, as it is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model(MLP, INPUTS, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


def test_opacus_own_generator_would_have_repeated_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control for the test above: take our noise away and the seed decides everything. Without a chain, too."""
    from opacus.optimizers import DPOptimizer

    from confide.clients.training import opacus_steps

    records, weights, plan = make_records("binary"), weights_for(MLP, "binary"), make_plan(noise_multiplier=1.0)

    def drawn(make: Callable[[], nn.Module]) -> list[NDArray[np.float64]]:
        seen = []
        for _ in range(2):
            model = make()
            torch.manual_seed(0)
            seen.append(LocalTrainer(model, records, plan, CPU, SecureRandom()).train(weights, np.arange(12)))
        return seen

    ours = drawn(NoChain)
    assert np.all(ours[0] != ours[1])
    with monkeypatch.context() as patch:
        patch.setattr(opacus_steps.PersonOptimizer, "add_noise", DPOptimizer.add_noise)
        theirs = drawn(NoChain)
    assert np.all(theirs[0] == theirs[1])
    monkeypatch.setattr(SecureRandom, "normal", lambda _self, count: torch.randn(count).double().numpy())
    chain = drawn(lambda: build_model(MLP, INPUTS, 1))
    assert np.all(chain[0] == chain[1])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_trainer_carries_nothing_from_one_round_to_the_next(optimizer: str) -> None:
    records, weights = make_records("binary"), weights_for(MLP, "binary")
    plan = make_plan(local_steps=3, optimizer=optimizer)
    trainer = LocalTrainer(build_model(MLP, INPUTS, 1), records, plan, CPU, SecureRandom(unsafe_key=KEY))
    first = trainer.train(weights, np.arange(12))
    trainer.train(weights * 2, np.arange(5))
    np.testing.assert_array_equal(trainer.train(weights, np.arange(12)), first)


def test_only_the_eligible_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    records, read = make_records("binary"), set[int]()
    gather = SiteRecords.gather
    monkeypatch.setattr(
        SiteRecords, "gather", lambda self, units: (read.update(units.tolist()), gather(self, units))[1]
    )
    run(records, make_plan(local_steps=20, sample_rate=0.5), weights_for(LOGISTIC, "binary"), np.array([1, 4, 6]))
    assert read == {1, 4, 6}


@pytest.mark.parametrize("task", TASKS)
def test_the_metric_sum_counts_each_person_once_whatever_the_number_of_records(task: Task) -> None:
    records, weights = make_records(task), weights_for(MLP, task)
    trainer = LocalTrainer(build_model(MLP, INPUTS, outputs(task)), records, make_plan(task), CPU, SecureRandom())
    once = {  # the coordinates in which a record counts once
        "binary": np.ones(2 * BINS),
        "multiclass": np.repeat([1.0, 2**0.5, 0.0], BINS),
        "regression": np.array([1.0, 1.0, 0.0]),
    }
    for people in (1, 7, 12):
        assert trainer.metric_sum(weights, np.arange(people)) @ once[task] == pytest.approx(people, rel=1e-6)
    assert np.all(trainer.metric_sum(weights, np.zeros(0, dtype=np.int64)) == 0)
