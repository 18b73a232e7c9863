"""FedAvgM, FedAdam, FedYogi, FedAdagrad: by hand, against Flower's own, and what they reduce to."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import pytest
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.config import StrategyConfig
from confide.strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy, make_strategy
from tests.strategies.flower import aggregate
from tests.strategies.steps import Vector, step

ONE = np.array([1.0, -2.0], dtype=np.float32)


def trained_at(*deltas: tuple[float, float]) -> list[Vector]:
    """Three equal sites that all moved from `ONE` by this much: then the mean is it."""
    assert len(deltas) == 1
    return [ONE + np.array(deltas[0], dtype=np.float32)] * 3


def two_steps(strategy: Strategy) -> tuple[list[float], list[float]]:
    """Two steps in which the sites' mean update is (0.5, −1) each time; the models after each."""
    first, state = step(strategy, ONE, trained_at((0.5, -1.0)), [1.0] * 3)
    second, _ = step(strategy, first, [first + np.array([0.5, -1.0], dtype=np.float32)] * 3, [1.0] * 3, state)
    return first.tolist(), second.tolist()


def test_momentum_by_hand() -> None:
    # v = (.5, −1), then .9 v + Δ = (.95, −1.9); η = .5
    first, second = two_steps(FedAvgM(server_learning_rate=0.5, momentum=0.9))
    assert first == pytest.approx([1.25, -2.5])
    assert second == pytest.approx([1.725, -3.45])


def test_adagrad_by_hand() -> None:
    # v = Δ², so the first step is η Δ / (|Δ| + τ); then v = 2 Δ²
    first, second = two_steps(FedAdagrad(server_learning_rate=0.1, tau=0.5))
    one = [1 + 0.1 * 0.5 / 1.0, -2 - 0.1 * 1 / 1.5]
    assert first == pytest.approx(one)
    assert second == pytest.approx(
        [one[0] + 0.1 * 0.5 / (0.5 * sqrt(2) + 0.5), one[1] - 0.1 * 1 / (sqrt(2) + 0.5)], abs=1e-6
    )


def test_yogi_by_hand() -> None:
    # m = .5 Δ = (.25, −.5), then .75 Δ; v = −.5 Δ² sign(0 − Δ²) = .5 Δ², then .5 Δ² − .5 Δ² sign(−.5 Δ²) = Δ²
    first, second = two_steps(FedYogi(server_learning_rate=1.0, beta1=0.5, beta2=0.5, tau=1.0))
    one = [1 + 0.25 / (0.5 * sqrt(0.5) + 1), -2 - 0.5 / (sqrt(0.5) + 1)]
    assert first == pytest.approx(one)
    assert second == pytest.approx([one[0] + 0.375 / 1.5, one[1] - 0.75 / 2], abs=1e-6)


def test_adam_by_hand() -> None:
    # exponents are 2 and 3: √(1 − .25) / (1 − .25), then √(1 − .125) / (1 − .125); m and v as above, v = .75 Δ² then
    first, second = two_steps(FedAdam(server_learning_rate=1.0, beta1=0.5, beta2=0.5, tau=1.0))
    rate = sqrt(0.75) / 0.75, sqrt(0.875) / 0.875
    one = [1 + rate[0] * 0.25 / (0.5 * sqrt(0.5) + 1), -2 - rate[0] * 0.5 / (sqrt(0.5) + 1)]
    assert first == pytest.approx(one)
    expected = [
        one[0] + rate[1] * 0.375 / (0.5 * sqrt(0.75) + 1),
        one[1] - rate[1] * 0.75 / (sqrt(0.75) + 1),
    ]
    assert second == pytest.approx(expected, abs=1e-6)


Pair = tuple[Strategy, Callable[[], flower.FedAvg]]
PAIRS: dict[str, Pair] = {
    "fedavg": (FedAvg(), lambda: flower.FedAvg()),
    "fedprox": (make_strategy(StrategyConfig(kind="fedprox", mu=0.1)), lambda: flower.FedProx(proximal_mu=0.1)),
    "fedavgm": (
        FedAvgM(server_learning_rate=0.7, momentum=0.8),
        lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.8),
    ),
    "fedadam": (make_strategy(StrategyConfig(kind="fedadam")), lambda: flower.FedAdam()),
    "fedadam, other options": (
        FedAdam(server_learning_rate=0.3, beta1=0.5, beta2=0.7, tau=0.01),
        lambda: flower.FedAdam(eta=0.3, beta_1=0.5, beta_2=0.7, tau=0.01),
    ),
    "fedyogi": (make_strategy(StrategyConfig(kind="fedyogi")), lambda: flower.FedYogi()),
    "fedadagrad": (make_strategy(StrategyConfig(kind="fedadagrad")), lambda: flower.FedAdagrad()),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sites", [3, 7])
def test_many_steps_agree_with_flowers_own_strategy_and_its_defaults(name: str, sites: int) -> None:
    ours, theirs = PAIRS[name][0], PAIRS[name][1]()
    rng = np.random.default_rng(sites)
    model = rng.normal(size=300).astype(np.float32)
    state, plain = ours.initial_state(300), model
    weights = [float(w) for w in rng.integers(50, 1000, size=sites)]
    for round_ in range(1, 9):
        moves = [rng.normal(scale=0.1, size=300).astype(np.float32) for _ in range(sites)]
        trained = [model + move for move in moves]
        plain, _ = step(FedAvg(), plain, [plain + move for move in moves], weights)
        expected = aggregate(theirs, model, trained, weights, round_)
        model, state = step(ours, model, trained, weights, state)
        assert np.allclose(model, expected, rtol=1e-5, atol=2e-6), round_
    differs = not np.allclose(model, plain, atol=1e-3)
    assert differs == (name not in ("fedavg", "fedprox")), "otherwise the comparison could not fail"


Deltas = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=3, max_size=6)


def of(deltas: list[list[float]]) -> list[Vector]:
    """What sites trained from zeros."""
    return [np.array(d, dtype=np.float32) for d in deltas]


ZEROS = np.zeros(4, dtype=np.float32)


@given(Deltas)
def test_without_momentum_fedavgm_is_fedavg(deltas: list[list[float]]) -> None:
    weights = [1.0] * len(deltas)
    momentum, _ = step(FedAvgM(momentum=0.0), ZEROS, of(deltas), weights)
    assert np.allclose(momentum, step(FedAvg(), ZEROS, of(deltas), weights)[0], atol=1e-6)


@given(Deltas, st.floats(0.01, 10), st.floats(1e-4, 1))
def test_with_beta_0_fedadam_and_a_first_fedyogi_are_a_first_fedadagrad(
    deltas: list[list[float]], rate: float, tau: float
) -> None:
    weights = [1.0] * len(deltas)
    adagrad, _ = step(FedAdagrad(server_learning_rate=rate, tau=tau), ZEROS, of(deltas), weights)
    for kind in (FedAdam, FedYogi):
        found, _ = step(kind(server_learning_rate=rate, beta1=0.0, beta2=0.0, tau=tau), ZEROS, of(deltas), weights)
        assert found.tobytes() == adagrad.tobytes()


@settings(max_examples=50)
@given(Deltas, st.sampled_from([FedAdam, FedYogi, FedAdagrad]))
def test_a_first_adaptive_step_is_no_longer_than_the_rate_and_goes_the_updates_way(
    deltas: list[list[float]], kind: type[Strategy]
) -> None:
    """m = (1 − β₁) Δ and v ≥ (1 − β₂) Δ², and the bias correction of a first step is below √(1 − β₂) / (1 − β₁)."""
    strategy = kind()
    found, _ = step(strategy, ZEROS, of(deltas), [1.0] * len(deltas))
    assert np.all(np.abs(found) <= 1.0001 * strategy.server_learning_rate)  # type: ignore[attr-defined]
    mean = np.mean(np.array(deltas, dtype=np.float64), axis=0)
    moved = np.abs(mean) > 1e-3
    assert np.array_equal(np.sign(found)[moved], np.sign(mean)[moved])


@given(Deltas, st.sampled_from([FedAvgM, FedAdam, FedYogi, FedAdagrad]))
def test_the_step_leaves_its_input_alone(deltas: list[list[float]], kind: type[Strategy]) -> None:
    strategy, model = kind(), ZEROS.copy()
    state = strategy.initial_state(4)
    before = [part.copy() for part in state]
    found, after = step(strategy, model, of(deltas), [1.0] * len(deltas), state)
    assert model.tobytes() == ZEROS.tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(state, before, strict=True))
    assert found.dtype == np.float32
    assert [part.shape for part in after] == [part.shape for part in state]
    assert all(part.dtype == np.float64 for part in after)
