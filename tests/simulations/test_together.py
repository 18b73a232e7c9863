"""Sites that train at once answer as they would one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from confide.clients.training.models import build_model
from confide.clients.training.stacked import Chain, Work
from confide.clients.training.trainer import TRAIN
from confide.simulations.engines.together import answer_together
from tests.clients.training.test_stacked import work
from tests.clients.training.test_trainer import CPU, INPUTS, LOGISTIC, MLP, make_plan

PLAN = make_plan(local_steps=2, noise_multiplier=0.5, sample_rate=0.6)


def chain_of(model: object = MLP) -> Chain:
    found = Chain.of(build_model(model, INPUTS, 1))  # type: ignore[arg-type]  # one of the two configurations
    assert found is not None
    return found


def task(number: int, times: int = 1, model: object = MLP):  # type: ignore[no-untyped-def]
    def train() -> tuple[int, np.ndarray]:
        asked = work(number, "binary", model, PLAN)  # type: ignore[arg-type]
        moved = [TRAIN.get()(chain_of(model), asked, CPU) for _ in range(times)]
        return number, np.sum(moved, axis=0)

    return train


def test_each_gets_what_it_would_get_alone_however_often_it_trains() -> None:
    tasks = [task(0), task(1, times=3), task(2, times=0), task(3, times=2, model=LOGISTIC), task(4)]
    for (number, moved), alone in zip(answer_together(tasks), tasks, strict=True):
        expected = alone()
        assert number == expected[0]
        np.testing.assert_allclose(moved, expected[1], rtol=0, atol=1e-5)


def test_they_are_trained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from confide.simulations.engines import together

    seen: list[int] = []
    train = together.train_stacked
    monkeypatch.setattr(together, "train_stacked", lambda c, w, d: (seen.append(len(w)), train(c, w, d))[1])
    answer_together([task(0), task(1, times=2), task(2)])
    assert seen == [3, 1]


def test_who_cannot_train_keeps_nobody_else_from_it() -> None:
    def broken() -> str:
        bad = work(1, "binary", MLP, PLAN)
        short = Work(bad.records, bad.plan, bad.rng, bad.weights[:-1], bad.eligible)
        with pytest.raises((RuntimeError, ValueError)):
            TRAIN.get()(chain_of(), short, CPU)
        return "told"

    first, told, last = answer_together([task(0), broken, task(2)])
    assert told == "told"
    assert (first[0], last[0]) == (0, 2)
    assert np.isfinite(last[1]).all()


def test_a_task_that_fails_is_told_of_and_the_callers_way_of_training_stays() -> None:
    before = TRAIN.get()

    def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        answer_together([task(0), fails])
    assert TRAIN.get() is before
    assert torch.is_grad_enabled()
