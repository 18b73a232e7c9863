"""A run's own ε: never below the true value and within 0.2 % of it, against brackets that other people's code gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import norm

from confide.privacy.dp import PrivacyEvent, Role, rdp_epsilon, run_epsilon
from confide.privacy.dp.accounting import gaussian_epsilon
from confide.privacy.dp.loss_distribution import SMALLEST_DELTA, loss_epsilon

TOLERANCE = 0.002
#: (σ, q, steps, δ): ε from 0.02 to 18, one step to hundreds, rates from 0.1 % to 90 %.
RUNS = [
    (100.0, 0.1, 200, 1e-5), (80.0, 0.1, 150, 1e-5), (40.0, 0.05, 100, 1e-5), (20.0, 0.1, 200, 1e-5),
    (3.0, 0.1, 200, 1e-5),
    (1.2, 0.1, 200, 1e-5), (60.0, 0.3, 50, 1e-6), (30.0, 0.3, 20, 1e-5), (1.0, 0.3, 20, 1e-5), (0.7, 0.3, 20, 1e-5),
    (80.0, 0.9, 50, 1e-8), (5.0, 0.9, 3, 1e-3), (2.0, 0.5, 1, 1e-5), (0.7, 0.01, 20, 1e-5), (1.0, 0.01, 40, 1e-5),
    (4.0, 0.01, 100, 1e-8), (0.8, 0.001, 5, 1e-6), (1.0, 0.05, 1, 1e-5), (2.0, 0.02, 100, 1e-6),
]  # fmt: skip
#: Where other people's grid needs so many points that a comparison takes ten seconds or more.
FINE = {(1.0, 0.01, 40, 1e-5), (4.0, 0.01, 100, 1e-8), (2.0, 0.02, 100, 1e-6), (0.8, 0.001, 5, 1e-6)}


def event(sigma: float, q: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(
        role=Role.TRAIN, unit="subject", noise_multiplier=sigma, sample_rate=q, steps=steps, max_grad_norm=1.0
    )


def bracket(sigma: float, q: float, steps: int, delta: float, width: float) -> tuple[float, float]:
    """dp-accounting's lower and upper bound of the true ε, on a grid of this width."""
    found = []
    for pessimistic in (False, True):
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=width, pessimistic_estimate=pessimistic
        )
        found.append(one.self_compose(steps).get_epsilon_for_delta(delta))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta"), [pytest.param(*run, marks=[pytest.mark.long] * (run in FINE)) for run in RUNS]
)
def test_a_runs_epsilon_is_at_most_a_fifth_of_a_percent_above_the_true_one_and_never_below(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    ours = run_epsilon(event(sigma, q, steps), delta)
    low, high = bracket(sigma, q, steps, delta, width=9e-4 * ours / steps)
    assert high <= low * 1.001, "the bracket itself must be narrow, or the comparison says little"
    assert ours >= low
    assert ours <= low * (1 + TOLERANCE)


def test_the_comparison_reaches_down_to_a_twentieth() -> None:
    found = [run_epsilon(event(s, q, k), d) for s, q, k, d in RUNS]
    assert sum(0.02 < e < 0.1 for e in found) >= 3
    assert sum(0.1 <= e < 1 for e in found) >= 4
    assert sum(e >= 1 for e in found) >= 4


@pytest.mark.parametrize(("mu", "steps"), [(0.01, 1), (0.02, 40), (0.1, 5), (0.5, 4), (1.0, 9), (0.3, 400)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_where_almost_everybody_is_drawn_it_tends_to_the_exact_gaussian(mu: float, steps: int, delta: float) -> None:
    """No grid on the other side: Balle and Wang's formula. q = 1 − 10⁻⁹ changes the true ε by less than a millionth."""
    exact = gaussian_epsilon(mu * steps**0.5, delta)
    if exact < 1e-6:
        pytest.fail("the case says nothing")
    ours = loss_epsilon(1 / mu, 1 - 1e-9, steps, delta, about=exact)
    assert exact * (1 - 1e-6) <= ours <= exact * (1 + TOLERANCE)


@pytest.mark.parametrize(("sigma", "q", "steps", "delta"), [r for r in RUNS if r[2] > 1][::3])
def test_however_wrong_the_guess_that_sets_the_grid_is_the_answer_stays_above(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    fine = run_epsilon(event(sigma, q, steps), delta)
    for factor in (0.2, 5.0, 100.0):
        assert loss_epsilon(sigma, q, steps, delta, about=min(factor * fine, 600.0)) >= fine / (1 + TOLERANCE)


def test_one_release_is_what_its_hockey_stick_integral_says() -> None:
    """δ(ε) = ∫ [p − e^ε q]⁺, the worse of both neighbours, by the trapezoid rule; no composition, no library."""
    for sigma, q in itertools.product((0.6, 1.0, 3.0), (0.01, 0.2, 0.8)):
        epsilon = run_epsilon(event(sigma, q, 1), 1e-5)
        x = np.linspace(-12 * sigma, 1 + 12 * sigma, 2_000_001)
        without = norm.pdf(x, 0, sigma)
        mixture = (1 - q) * without + q * norm.pdf(x, 1, sigma)

        def delta_at(e: float, p: np.ndarray = mixture, r: np.ndarray = without, x: np.ndarray = x) -> float:
            return max(float(np.trapezoid(np.maximum(a - np.exp(e) * b, 0), x)) for a, b in ((p, r), (r, p)))

        assert delta_at(epsilon) <= 1e-5
        assert delta_at(epsilon * (1 - TOLERANCE)) > 1e-5


def test_outside_what_the_grid_resolves_the_rdp_bound_is_reported() -> None:
    """A δ below rounding, a loss above what a float64 can exponentiate: looser, still a bound."""
    for run, delta in ((event(2.0, 0.1, 20), SMALLEST_DELTA / 10), (event(0.06, 0.5, 500), 1e-5)):
        with pytest.raises(ValueError, match=r"resolves|points"):
            loss_epsilon(run.noise_multiplier, run.sample_rate, run.steps, delta, about=rdp_epsilon([run], delta))
        assert run_epsilon(run, delta) == pytest.approx(rdp_epsilon([run], delta))


def test_at_the_smallest_delta_rounding_is_still_small() -> None:
    """Against the exact formula, where a part in 10¹⁰ decides."""
    exact = gaussian_epsilon(0.5, SMALLEST_DELTA)
    assert exact <= loss_epsilon(20.0, 1 - 1e-12, 100, SMALLEST_DELTA, about=exact) <= exact * (1 + TOLERANCE)


def test_what_costs_nothing_is_reported_as_nothing() -> None:
    """A draw so rare that δ alone covers it."""
    assert run_epsilon(event(5.0, 1e-7, 10), 1e-5) == 0.0
