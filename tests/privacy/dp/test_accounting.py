"""Our ε against other people's code (dp-accounting), a formula written out again, and the budget's two ends."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import rdp_privacy_accountant as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import norm

from confide.errors import BudgetError
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role, calibrate, rdp_epsilon, run_epsilon
from confide.privacy.dp.accounting import ORDERS, conversion, gaussian_epsilon, rdp, sampled_gaussian_rdp

DELTA = 1e-5
SETTINGS = [
    (sigma, q, steps)
    for sigma, q, steps in itertools.product((0.7, 1.0, 2.0, 5.0), (0.01, 0.1, 0.3, 1.0), (1, 20, 200))
    if not (sigma <= 1 and q >= 0.3 and steps == 200)  # ε in the hundreds: of no use, and beyond what PLD computes
]


def event(sigma: float, q: float, steps: int, role: Role = Role.TRAIN) -> PrivacyEvent:
    return PrivacyEvent(
        role=role, unit="subject", noise_multiplier=sigma, sample_rate=q, steps=steps, max_grad_norm=1.0
    )


@pytest.mark.parametrize(("sigma", "q", "steps"), SETTINGS)
def test_a_run_is_never_reported_below_what_dp_accounting_proves_it_costs(sigma: float, q: float, steps: int) -> None:
    """The optimistic PLD is a lower bound of the true ε, the pessimistic one an upper bound."""
    ours = run_epsilon(event(sigma, q, steps), DELTA)
    step = max(1e-4, ours / 4000)
    bounds = []
    for pessimistic in (False, True):
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=step, pessimistic_estimate=pessimistic
        )
        bounds.append(one.self_compose(steps).get_epsilon_for_delta(DELTA))
    low, high = bounds
    assert low <= ours
    assert ours <= max(high, low) * 1.02 + 0.01  # nor is it loose


def test_the_comparison_covers_enough_settings_with_and_without_sampling() -> None:
    assert len(SETTINGS) >= 30
    assert sum(q == 1.0 for _, q, _ in SETTINGS) >= 5


@pytest.mark.parametrize(("sigma", "q", "steps"), SETTINGS)
def test_the_rdp_of_a_run_agrees_with_dp_accounting(sigma: float, q: float, steps: int) -> None:
    """At whole orders they are equal; between them dp-accounting drops the series' signs and so overestimates."""
    run = [event(sigma, q, steps)]
    expected = np.array([steps * theirs._compute_rdp_poisson_subsampled_gaussian(q, sigma, [a])[0] for a in ORDERS])
    ours = np.array([rdp(run, a) for a in ORDERS])
    whole = np.array([float(a).is_integer() for a in ORDERS])
    np.testing.assert_allclose(ours[whole], expected[whole], rtol=1e-6, atol=1e-12)
    assert np.all((ours <= expected * (1 + 1e-6)) | np.isinf(ours))
    orders = [a for a, keep in zip(ORDERS, whole, strict=True) if keep]
    at_whole_orders = min(rdp(run, a) + conversion(a, DELTA) for a in orders)
    assert max(0.0, at_whole_orders) == pytest.approx(
        theirs.compute_epsilon(orders, expected[whole], DELTA)[0], rel=1e-6
    )
    assert rdp_epsilon(run, DELTA) <= at_whole_orders * (1 + 1e-9)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("q", [0.01, 0.1, 0.3])
def test_the_sampled_gaussian_rdp_is_at_every_order_the_integral_that_defines_it(sigma: float, q: float) -> None:
    """ρ(α) = log ∫ ((1−q) φ₀ + q φ₁)^α φ₀^(1−α) / (α−1), by the trapezoid rule in logarithms."""
    orders = np.array([a for a in ORDERS if a <= 64], dtype=float)[:, None]
    x = np.linspace(-14 * sigma, 64 + 14 * sigma, 40_001)
    without = norm.logpdf(x, 0, sigma)
    mixture = np.logaddexp(math.log1p(-q) + without, math.log(q) + norm.logpdf(x, 1, sigma))
    inside = orders * mixture + (1 - orders) * without
    expected = (logsumexp(inside, axis=1) + math.log(x[1] - x[0])) / (orders[:, 0] - 1)
    ours = np.array([sampled_gaussian_rdp(sigma, q, a) for a in orders[:, 0]])
    known = np.isfinite(ours)  # +∞ says "cannot be bounded", which is safe
    assert known.mean() > 0.9
    np.testing.assert_allclose(ours[known], expected[known], rtol=1e-6, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(mu=st.floats(0.02, 6.0), delta=st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_the_exact_gaussian_epsilon_is_the_smallest_that_its_hockey_stick_allows(mu: float, delta: float) -> None:
    """δ(ε) written as the expectation of [1 − exp(ε − L)]⁺ over the loss L ~ N(μ²/2, μ²), integrated numerically."""

    def delta_at(epsilon: float) -> float:
        start = (epsilon - mu * mu / 2) / mu
        return float(
            quad(
                lambda z: -math.expm1(min(0.0, epsilon - mu * mu / 2 - mu * z)) * math.exp(-z * z / 2),
                start, max(start, 0.0) + 12, epsabs=0, epsrel=1e-9, limit=200,
            )[0]
        ) / math.sqrt(2 * math.pi)  # fmt: skip

    epsilon = gaussian_epsilon(mu, delta)
    assert delta_at(epsilon) <= delta * (1 + 1e-5)
    if epsilon > 1e-3:
        assert delta_at(epsilon * 0.999) > delta


def test_runs_of_the_unsampled_gaussian_compose_as_one_with_less_noise() -> None:
    assert run_epsilon(event(4.0, 1.0, 16), DELTA) == pytest.approx(run_epsilon(event(1.0, 1.0, 1), DELTA), rel=1e-9)


def test_nothing_released_costs_nothing() -> None:
    assert run_epsilon(event(1.0, 0.1, 0), DELTA) == rdp_epsilon([event(1.0, 0.1, 0)], DELTA) == 0.0
    assert rdp_epsilon([], DELTA) == 0.0


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([0.8, 1.0, 3.0]), st.sampled_from([0.02, 0.2, 1.0]), st.integers(1, 300))
def test_more_noise_fewer_steps_and_less_sampling_never_cost_more(sigma: float, q: float, steps: int) -> None:
    base = rdp_epsilon([event(sigma, q, steps)], DELTA)
    assert rdp_epsilon([event(sigma * 1.5, q, steps)], DELTA) <= base
    assert rdp_epsilon([event(sigma, q / 2, steps)], DELTA) <= base
    assert rdp_epsilon([event(sigma, q, steps - 1)], DELTA) <= base
    assert run_epsilon(event(sigma, q, steps), DELTA) <= base * (1 + 1e-9)  # the exact loss is below the RDP bound


@given(st.floats(0.05, 50.0), st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_a_budget_converts_back_to_exactly_its_limit(limit: float, delta: float) -> None:
    budget = RenyiBudget.for_limit(limit, delta)
    for order, share in zip(budget.orders, budget.limits, strict=True):
        assert share + conversion(order, delta) == pytest.approx(limit, rel=1e-12)
    full = np.full(len(ORDERS), np.inf)
    for order, share in zip(budget.orders, budget.limits, strict=True):
        full[ORDERS.index(order)] = max(share, 0.0)
    assert theirs.compute_epsilon(ORDERS, full, delta)[0] == pytest.approx(limit, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    limit=st.sampled_from([0.5, 2.0, 8.0]),
    parts=st.lists(
        st.tuples(st.sampled_from([0.6, 1.0, 4.0]), st.sampled_from([0.05, 0.5, 1.0]), st.integers(1, 60)), max_size=6
    ),
)
def test_whatever_the_budget_admits_stays_within_the_limit(limit: float, parts: list[tuple[float, float, int]]) -> None:
    budget, held = RenyiBudget.for_limit(limit, DELTA), list[PrivacyEvent]()
    for part in parts:
        if budget.admits([*held, event(*part)]):
            held.append(event(*part))
    assert rdp_epsilon(held, DELTA) <= limit * (1 + 1e-9)
    assert budget.used(held) <= 1.0


CALIBRATIONS = [(0.5, 0.1, 50), (2.0, 0.1, 200), (2.0, 0.01, 1000), (8.0, 1.0, 3), (1.0, 1.0, 20)]


@pytest.mark.parametrize(("epsilon", "q", "steps"), CALIBRATIONS)
@pytest.mark.parametrize("limit_factor", [1.0, 4.0])
def test_calibration_finds_the_smallest_noise_that_keeps_the_promise(
    epsilon: float, q: float, steps: int, limit_factor: float
) -> None:
    budget, run = RenyiBudget.for_limit(epsilon * limit_factor, DELTA), event(1.0, q, steps)
    sigma = calibrate(run, epsilon, budget)

    def keeps(sigma: float) -> bool:
        candidate = replace(run, noise_multiplier=sigma)
        return run_epsilon(candidate, DELTA) <= epsilon and budget.admits([candidate])

    assert keeps(sigma)
    assert not keeps(sigma * 0.998)
    # The given event's own σ is no input.
    assert calibrate(replace(run, noise_multiplier=77.0), epsilon, budget) == sigma


def test_calibration_finds_a_small_noise_where_little_is_needed() -> None:
    budget, run = RenyiBudget.for_limit(2000.0, DELTA), event(1.0, 1.0, 1)
    sigma = calibrate(run, 2000.0, budget)
    assert sigma < 0.1
    assert run_epsilon(replace(run, noise_multiplier=sigma), DELTA) <= 2000.0


@pytest.mark.parametrize(("epsilon", "q", "steps"), CALIBRATIONS)
def test_a_run_that_asks_for_the_whole_limit_is_admitted_on_an_empty_ledger_round_by_round(
    tmp_path: Path, epsilon: float, q: float, steps: int
) -> None:
    budget = RenyiBudget.for_limit(epsilon, DELTA)
    one = event(calibrate(event(1.0, q, steps), epsilon, budget), q, 1)
    ledger = Ledger(tmp_path / "ledger.db", budget)
    parts = [steps // 3, steps // 3, steps - 2 * (steps // 3)]
    ledger.check([replace(one, steps=n) for n in parts if n])
    for round_, n in enumerate(parts):
        ledger.reserve(str(round_), replace(one, steps=n))
    assert 0.2 < ledger.used() <= 1.0
    ledger.close()


def test_an_impossible_epsilon_is_refused_and_says_what_to_change() -> None:
    with pytest.raises(BudgetError, match="no noise makes 1000000 steps"):
        calibrate(event(1.0, 1.0, 10**6), 1e-6, RenyiBudget.for_limit(8.0, DELTA))
