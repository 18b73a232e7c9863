"""Noise that nobody can seed, and that is distributed as the accountant assumes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from confide.privacy.dp import SecureRandom

KEY = b"a key for tests, of thirty-two b"
DRAWS: dict[str, Callable[[SecureRandom], NDArray[np.generic]]] = {
    "words": lambda rng: rng.words(8),
    "uniform": lambda rng: rng.uniform(8),
    "normal": lambda rng: rng.normal(8),
    "poisson_sample": lambda rng: rng.poisson_sample(np.arange(200), 0.5),
}


def seed_everything() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


@pytest.mark.parametrize("draw", DRAWS)
def test_seeding_every_library_changes_nothing(draw: str) -> None:
    seen, torch_seen = [], []
    for _ in range(2):
        seed_everything()
        seen.append(DRAWS[draw](SecureRandom()).tolist())
        torch_seen.append(torch.randn(8).tolist())
    assert seen[0] != seen[1]
    assert torch_seen[0] == torch_seen[1]  # control: a generator that can be seeded does repeat itself


def test_drawing_does_not_disturb_the_seeded_generators() -> None:
    seed_everything()
    expected = (torch.randn(4).tolist(), np.random.rand(4).tolist(), random.getrandbits(64))
    seed_everything()
    SecureRandom().normal(100)
    assert (torch.randn(4).tolist(), np.random.rand(4).tolist(), random.getrandbits(64)) == expected


def test_only_an_option_called_unsafe_repeats_a_stream() -> None:
    assert SecureRandom(unsafe_key=KEY).normal(9).tolist() == SecureRandom(unsafe_key=KEY).normal(9).tolist()
    assert SecureRandom(unsafe_key=KEY).normal(9).tolist() != SecureRandom(unsafe_key=KEY[::-1]).normal(9).tolist()
    with pytest.raises(TypeError):
        SecureRandom(KEY)  # type: ignore[misc]  # it has to be named


def test_a_stream_never_repeats_itself() -> None:
    rng = SecureRandom(unsafe_key=KEY)
    parts = [rng.words(1000) for _ in range(20)]
    assert len(np.unique(np.concatenate(parts))) == 20_000


@given(st.lists(st.integers(0, 40), max_size=12))
def test_how_the_draws_are_cut_does_not_change_the_stream(cuts: list[int]) -> None:
    whole, pieces = SecureRandom(unsafe_key=KEY), SecureRandom(unsafe_key=KEY)
    expected = whole.words(sum(cuts))
    assert np.array_equal(np.concatenate([np.zeros(0, np.uint64), *(pieces.words(n) for n in cuts)]), expected)


def test_uniforms_are_uniform_and_independent() -> None:
    u = SecureRandom(unsafe_key=KEY).uniform(200_000)
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(len(u))


def test_normals_have_the_moments_the_tails_and_the_shape_of_a_standard_normal() -> None:
    x = SecureRandom(unsafe_key=KEY).normal(400_000)
    n = len(x)
    assert abs(x.mean()) < 4 / np.sqrt(n)
    assert abs(x.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.kurtosis(x)) < 4 * np.sqrt(24 / n)
    assert stats.kstest(x, "norm").pvalue > 0.01
    assert stats.kstest(x * 1.01, "norm").pvalue < 0.01  # control: one per cent off is seen
    for z in (2.0, 3.0, 4.0):
        expected = n * 2 * stats.norm.sf(z)
        assert abs(np.sum(np.abs(x) > z) - expected) < 4 * np.sqrt(expected)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize("word", [0, 1, 2**63, 2**64 - 1])
def test_the_extreme_words_give_finite_numbers(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureRandom, "words", lambda _self, count: np.full(count, word, dtype=np.uint64))
    value = SecureRandom().normal(1)[0]
    assert np.isfinite(value)
    assert abs(value) < 9


def test_everybody_is_drawn_at_rate_one_whatever_the_stream_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureRandom, "words", lambda _self, count: np.full(count, 2**64 - 1, dtype=np.uint64))
    assert SecureRandom().poisson_sample(np.arange(5), 1.0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_poisson_sampling_includes_each_at_the_rate_and_independently(rate: float) -> None:
    rng, people, rounds = SecureRandom(unsafe_key=KEY), 60, 4000
    drawn = np.zeros((rounds, people))
    for r in range(rounds):
        drawn[r, rng.poisson_sample(np.arange(people), rate)] = 1
    variance = rate * (1 - rate)
    assert abs(drawn.mean() - rate) < 4 * np.sqrt(variance / drawn.size)
    assert np.all(np.abs(drawn.mean(axis=0) - rate) < 5 * np.sqrt(variance / rounds))  # nobody is favoured
    # The number drawn varies as a binomial: sampling a fixed number would make this variance vanish.
    assert drawn.sum(axis=1).var() == pytest.approx(people * variance, rel=0.12)
    together = np.corrcoef(drawn.T)[np.triu_indices(people, 1)]
    assert np.abs(together).max() < 5 / np.sqrt(rounds)
    over_time = [np.corrcoef(drawn[:-1, i], drawn[1:, i])[0, 1] for i in range(people)]
    assert np.abs(over_time).max() < 5 / np.sqrt(rounds)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**9), unique=True, max_size=50), st.floats(0.001, 1.0))
def test_a_sample_is_a_sub_list_of_its_population(people: list[int], rate: float) -> None:
    population = np.array(people, dtype=np.int64)
    drawn = SecureRandom().poisson_sample(population, rate).tolist()
    assert [p for p in people if p in set(drawn)] == drawn


def test_a_sample_may_be_empty() -> None:
    assert len(SecureRandom().poisson_sample(np.zeros(0, np.int64), 1.0)) == 0
    assert len(SecureRandom(unsafe_key=KEY).poisson_sample(np.arange(3), 1e-9)) == 0
