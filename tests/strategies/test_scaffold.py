"""SCAFFOLD's step, and that control variates do what they are for: sites that differ find the common optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from confide.strategies import FedAvg, Scaffold, StepInput
from confide.strategies.scaffold import control_change, correction

Floats = NDArray[np.float64]


def test_the_step_by_hand() -> None:
    # weights 1 and 2 of a roster of 4: updates sum to 6, control changes to 2
    given_ = StepInput(
        np.array([1.0], dtype=np.float32), np.array([6.0]), 3.0, (np.array([0.25]),), control=np.array([2.0]),
        roster_weight=4.0,
    )  # fmt: skip
    model, state = Scaffold(server_learning_rate=0.5).step(given_)
    assert model.tolist() == [2.0]
    assert state[0].tolist() == [0.75]


def test_a_sum_without_control_variates_is_refused() -> None:
    with pytest.raises(ValueError, match="control variates"):
        Scaffold().step(StepInput(np.ones(1, dtype=np.float32), np.ones(1), 1.0, (np.zeros(1),)))


class Quadratics:
    """Sites whose loss is curvature/2 · (w − optimum)²: far from alike. Weights are public."""

    def __init__(self, curvatures: list[float], optima: list[float], weights: list[float]) -> None:
        self.curvature, self.optimum, self.weight = map(np.array, (curvatures, optima, weights))

    @property
    def best(self) -> float:
        """Where the weighted sum of the losses is least."""
        return float(
            np.sum(self.weight * self.curvature * self.optimum) / np.sum(self.weight * self.curvature)
        )  # fmt: skip

    def local(self, site: int, start: float, steps: int, rate: float, extra: float) -> float:
        """The update of a site: plain gradient steps, each corrected by `extra`."""
        y = start
        for _ in range(steps):
            y -= rate * (self.curvature[site] * (y - self.optimum[site]) + extra)
        return y - start

    def train(self, rounds: int, scaffold: bool, cohorts: list[list[int]], steps: int = 10, rate: float = 0.1) -> float:
        """The model after so many rounds."""
        strategy = Scaffold() if scaffold else FedAvg()
        model, state = np.zeros(1, dtype=np.float32), strategy.initial_state(1)
        own = np.zeros(len(self.weight))
        for round_ in range(rounds):
            cohort = cohorts[round_ % len(cohorts)]
            total, change = np.zeros(1), np.zeros(1)
            for i in cohort:
                common = state[0] if scaffold else np.zeros(1)
                extra = float(correction(common, own[i : i + 1])[0]) if scaffold else 0.0
                update = np.array([self.local(i, float(model[0]), steps, rate, extra)])
                total += self.weight[i] * update
                if scaffold:
                    moved = control_change(update, common, steps, rate)
                    own[i] += float(moved[0])
                    change += self.weight[i] * moved
            model, state = strategy.step(
                StepInput(
                    model, total, float(self.weight[cohort].sum()), state, control=change,
                    roster_weight=float(self.weight.sum()),
                )
            )  # fmt: skip
            if scaffold:
                expected = np.sum(self.weight * own) / self.weight.sum()
                assert state[0][0] == pytest.approx(expected, abs=1e-6), "c is the weighted mean of all cᵢ"
        return float(model[0])


def test_unlike_sites_reach_the_common_optimum_that_federated_averaging_misses() -> None:
    sites = Quadratics([10.0, 1.0, 0.5], [3.0, -2.0, -8.0], [1.0, 1.0, 2.0])
    everybody = [[0, 1, 2]]
    assert sites.train(300, True, everybody) == pytest.approx(sites.best, abs=1e-3)
    assert abs(sites.train(300, False, everybody) - sites.best) > 0.5, "the control"


def test_it_gets_there_with_changing_cohorts_too() -> None:
    sites = Quadratics([2.0, 1.0, 0.5, 1.0], [3.0, -2.0, -8.0, 1.0], [1.0, 1.0, 2.0, 0.5])
    cohorts = [[0, 1, 2], [1, 2, 3], [0, 2, 3], [0, 1, 3]]
    # all but one take part: the step is a mean over the cohort, so it circles the optimum at a small distance
    assert sites.train(800, True, cohorts) == pytest.approx(sites.best, abs=0.05)
    assert abs(sites.train(800, False, cohorts) - sites.best) > 0.2, "the control"


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=5), st.integers(1, 20))
def test_alike_sites_need_no_correction(optima: list[float], rounds: int) -> None:
    alike = Quadratics([1.0] * len(optima), [optima[0]] * len(optima), [1.0] * len(optima))
    everybody = [list(range(len(optima)))]
    assert alike.train(rounds, True, everybody) == pytest.approx(alike.train(rounds, False, everybody), abs=1e-4)
