"""FedNova: sites that take different, public numbers of steps pull with the same force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.strategies import FedAvg, FedNova, StepInput
from tests.strategies.steps import Vector, step

ZEROS = np.zeros(2, dtype=np.float32)


def nova(strategy: FedNova, updates: dict[str, list[float]], weights: dict[str, float], most: int) -> list[float]:
    """A step from zeros; each site multiplies its update as the strategy says, before the sum."""
    names = sorted(updates)
    total = sum(
        (weights[n] * strategy.factor(n, most) * np.array(updates[n]) for n in names), start=np.zeros(2)
    )  # fmt: skip
    given_ = StepInput(
        ZEROS, total, sum(weights[n] for n in names), (), cohort=tuple((n, weights[n]) for n in names), local_steps=most
    )
    return [float(x) for x in strategy.step(given_)[0]]


def test_the_step_by_hand() -> None:
    # ash took 2 of 8 steps and moved (2, 0), birch 8 and (0, 8): a step each is (1, 0) and (0, 1).
    # weights 1 and 3: mean step (1/4, 3/4), mean number of steps (1·2 + 3·8) / 4 = 6.5
    updates, weights = {"ash": [2.0, 0.0], "birch": [0.0, 8.0]}, {"ash": 1.0, "birch": 3.0}
    assert nova(FedNova(steps={"ash": 2}), updates, weights, 8) == pytest.approx([1.625, 4.875])
    half = FedNova(steps={"ash": 2}, server_learning_rate=0.5)
    assert nova(half, updates, weights, 8) == pytest.approx([0.8125, 2.4375])
    # the control: FedAvg follows the one that took more steps, (2/4, 24/4)
    assert nova(FedNova(), updates, weights, 8) == pytest.approx([0.5, 6.0])


def test_a_site_takes_the_steps_that_the_manifest_says() -> None:
    strategy = FedNova(steps={"ash": 2})
    assert (strategy.steps_of("ash", 8), strategy.steps_of("birch", 8)) == (2, 8)
    assert (strategy.factor("ash", 8), strategy.factor("birch", 8)) == (4.0, 1.0)


Numbers = st.lists(st.integers(1, 12), min_size=3, max_size=6)


@given(Numbers, st.lists(st.floats(0.1, 5), min_size=6, max_size=6), st.floats(-2, 2), st.floats(-2, 2))
def test_sites_that_agree_on_a_step_move_the_model_the_mean_number_of_steps(
    taken: list[int], weights: list[float], x: float, y: float
) -> None:
    names = [f"site-{i}" for i in range(len(taken))]
    steps, weight = dict(zip(names, taken, strict=True)), dict(zip(names, weights, strict=False))
    updates = {n: [x * steps[n], y * steps[n]] for n in names}
    mean = sum(weight[n] * steps[n] for n in names) / sum(weight[n] for n in names)
    assert nova(FedNova(steps=steps), updates, weight, 12) == pytest.approx([mean * x, mean * y], rel=1e-5, abs=1e-6)


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=2), min_size=3, max_size=5))
def test_where_all_take_the_same_number_it_is_fedavg(trained: list[list[float]]) -> None:
    vectors: list[Vector] = [np.array(t, dtype=np.float32) for t in trained]
    weights = [float(i + 1) for i in range(len(vectors))]
    nova_, _ = step(FedNova(), ZEROS, vectors, weights)
    assert np.allclose(nova_, step(FedAvg(), ZEROS, vectors, weights)[0], rtol=1e-6, atol=1e-6)
