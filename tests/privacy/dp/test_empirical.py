"""What an attack's guesses show of ε, against the theorem written out, and against mechanisms whose ε is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from confide.privacy.dp.empirical import epsilon_shown


def written_out(canaries: int, guesses: int, correct: int, delta: float, epsilon: float) -> float:
    """Steinke, Nasr, Jagielski 2023, Theorem 5.2, term by term."""
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    worst, below = 0.0, 0.0
    for i in range(1, correct + 1):
        below += float(binom.pmf(correct - i, guesses, right))
        worst = max(worst, below / i)
    return float(binom.sf(correct - 1, guesses, right)) + 2 * canaries * delta * worst


@st.composite
def results(draw: st.DrawFn) -> tuple[int, int, int, float]:
    guesses = draw(st.integers(1, 200))
    delta = draw(st.sampled_from([0.0, 1e-9, 1e-6, 1e-5, 1e-3]))
    return guesses + draw(st.integers(0, 800)), guesses, draw(st.integers(0, guesses)), delta


@given(results())
def test_what_is_shown_is_where_the_theorem_stops_refuting(result: tuple[int, int, int, float]) -> None:
    shown = epsilon_shown(*result, 0.95)
    if shown == 0.0:
        assert written_out(*result, 1e-6) > 0.05 - 1e-9
    else:
        assert written_out(*result, shown - 1e-6) <= 0.05 + 1e-6
        assert written_out(*result, shown + 1e-6) >= 0.05 - 1e-6


@given(results())
def test_more_right_guesses_show_no_less_and_a_larger_delta_shows_no_more(result: tuple[int, int, int, float]) -> None:
    canaries, guesses, correct, delta = result
    if correct < guesses:
        assert epsilon_shown(canaries, guesses, correct + 1, delta) >= epsilon_shown(*result)
    assert epsilon_shown(canaries, guesses, correct, delta * 2) <= epsilon_shown(*result)


def test_perfect_guesses_of_a_pure_claim() -> None:
    """P[all of r right] = (e^ε / (1 + e^ε))^r, which is the risk (0.001) at the ε shown."""
    right = 0.001 ** (1 / 100)
    assert epsilon_shown(100, 100, 100, 0.0) == pytest.approx(math.log(right / (1 - right)), abs=1e-6)


def test_coin_tosses_show_nothing() -> None:
    assert epsilon_shown(1000, 200, 100, 1e-5) == 0.0


def test_it_holds_as_often_as_it_says_for_randomised_response() -> None:
    """Each person's own answer, true with e^ε / (1 + e^ε): the best attack there is. Wrong one time in 20."""
    epsilon, rng = 1.0, np.random.default_rng(3)
    right = rng.binomial(400, math.exp(epsilon) / (1 + math.exp(epsilon)), size=400)
    shown = np.array([epsilon_shown(400, 400, int(v), 0.0, 0.95) for v in right])
    assert np.mean(shown > epsilon) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert np.median(shown) > 0.7  # and it is no empty statement


@pytest.mark.parametrize("result", [(10, 20, 5, 0.0), (10, 5, 6, 0.0), (10, 5, -1, 0.0), (10, 5, 5, 1.0)])
def test_numbers_that_do_not_go_together(result: tuple[int, int, int, float]) -> None:
    with pytest.raises(ValueError, match="attack"):
        epsilon_shown(*result)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_a_confidence_that_is_none(confidence: float) -> None:
    with pytest.raises(ValueError, match="attack"):
        epsilon_shown(10, 10, 10, 0.0, confidence)
