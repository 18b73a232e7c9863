"""What an attack shows of ε: a lower bound, from how often invented persons were told apart.

An auditor invents m persons, lets a fair coin decide about each whether she takes part, and guesses from what is
released, for r of them, what the coin said. If the mechanism were (ε, δ)-private, at least v right guesses would have a
probability of at most

    P[B ≥ v] + 2 m δ · max_{1 ≤ i ≤ v} P[v > B ≥ v − i] / i,    B ~ Binomial(r, e^ε / (1 + e^ε))

(Steinke, Nasr, Jagielski 2023, Theorem 5.2), however the persons depend on each other. An ε for which that is less than
1 − confidence is refuted. What it does not show is an upper bound: a weak attack proves nothing.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["CONFIDENCE", "MOST", "epsilon_shown"]

#: Of every statement made here: an honest run must not be called refuted by chance.
CONFIDENCE = 0.999
#: Of persons in one attack; more take too long to evaluate.
MOST = 100_000
_LARGEST, _HALVINGS = 64.0, 40


def epsilon_shown(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest ε that the guesses refute; 0 if they refute none.

    Args:
        canaries: Invented persons m ≤ `MOST`, each in or out by a fair coin of her own.
        guesses: How many of them were guessed, r ≤ m, fixed before anything was seen.
        correct: How many guesses were right, v ≤ r.
        delta: δ of the claim.
        confidence: Probability that the statement holds.

    Raises:
        ValueError: The numbers do not go together.
    """
    if not 0 <= correct <= guesses <= canaries <= MOST or not 0 <= delta < 1 or not 0 < confidence < 1:
        raise ValueError("not an attack's result")
    risk = 1.0 - confidence
    if _probability(canaries, guesses, correct, delta, 0.0) > risk:
        return 0.0
    low, high = 0.0, _LARGEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _probability(canaries, guesses, correct, delta, middle) <= risk:
            low = middle
        else:
            high = middle
    return low


def _probability(canaries: int, guesses: int, correct: int, delta: float, epsilon: float) -> float:
    """The theorem's bound on P[at least `correct` right guesses]."""
    from scipy.stats import binom  # slow to import, and seldom needed

    right = 1 / (1 + math.exp(-epsilon))
    bound = float(binom.sf(correct - 1, guesses, right))
    if correct:
        just_below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
        bound += 2 * canaries * delta * float(np.max(just_below / np.arange(1, correct + 1)))
    return min(bound, 1.0)
