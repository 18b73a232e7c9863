"""Pairwise masks: they cancel exactly over the cohort, and hide everything in anything less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest

from confide.errors import SealingError
from confide.privacy.sealing.masks import PairKeys
from confide.privacy.sealing.parameters import choose_parameters
from confide.privacy.sealing.wrapping import new_ephemeral

Words = NDArray[np.uint64]
T = choose_parameters(12, 16).plain_modulus
X, Y = "11" * 32, "22" * 32
NAMES = tuple(f"s{i}" for i in range(8))
KEYS = {name: new_ephemeral() for name in NAMES}


def pairs(site: str) -> PairKeys:
    """One site's pair secrets with everybody."""
    return PairKeys(site, KEYS[site][0], {name: public for name, (_, public) in KEYS.items()})


PAIRS = {name: pairs(name) for name in NAMES}


def masked(site: str, cohort: tuple[str, ...], values: Words, chunk: int = 0, transcript: str = X) -> Words:
    """One site's masked values."""
    return PAIRS[site].for_cohort(cohort, transcript).apply(values, chunk, T)


def mod_sum(parts: list[Words]) -> Words:
    """The sum mod t."""
    total = np.zeros_like(parts[0])
    for part in parts:
        total = (total + part) % np.uint64(T)
    return total


@given(
    cohort=st.sets(st.sampled_from(NAMES), min_size=3).map(lambda s: tuple(sorted(s))),
    length=st.integers(1, 300),
    chunk=st.integers(0, 2**40),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_masks_cancel_exactly_over_the_cohort_and_over_nothing_smaller(
    cohort: tuple[str, ...], length: int, chunk: int, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, T, (len(cohort), length)).astype(np.uint64)
    parts = [masked(site, cohort, row, chunk) for site, row in zip(cohort, values, strict=True)]
    assert np.array_equal(mod_sum(parts), mod_sum(list(values)))
    assert not np.array_equal(mod_sum(parts[1:]), mod_sum(list(values[1:])))
    assert all(int(part.max()) < T for part in parts)


@pytest.mark.parametrize(("chunk", "transcript", "cohort"), [(1, X, NAMES), (0, Y, NAMES), (0, X, NAMES[:-1])])
def test_another_chunk_transcript_or_cohort_has_other_masks(
    chunk: int, transcript: str, cohort: tuple[str, ...]
) -> None:
    zeros = np.zeros(2000, dtype=np.uint64)
    here = masked("s0", NAMES, zeros)
    assert np.array_equal(here, masked("s0", NAMES, zeros)), "the same place has the same masks"
    assert not np.any(here == masked("s0", cohort, zeros, chunk, transcript))


def test_masked_slots_look_uniform_and_unmasked_ones_do_not() -> None:
    small = np.random.default_rng(3).integers(0, 2**32, 20_000).astype(np.uint64)
    assert kstest(masked("s3", NAMES, small) / T, "uniform").pvalue > 1e-3
    assert kstest(small / T, "uniform").pvalue < 1e-9


def test_a_coalition_that_lacks_one_other_site_still_sees_uniform_slots() -> None:
    """The coalition takes off every mask that it knows: the one with the honest third site is left."""
    cohort, small = ("s0", "s1", "s2"), np.zeros(20_000, dtype=np.uint64)
    sealed = masked("s0", cohort, small)
    known = (np.uint64(T) - masked("s1", ("s0", "s1"), small)) % np.uint64(T)  # s1 subtracts what s0 added
    left = (sealed + np.uint64(T) - known) % np.uint64(T)
    assert kstest(left / T, "uniform").pvalue > 1e-3
    also = (np.uint64(T) - masked("s2", ("s0", "s2"), small)) % np.uint64(T)
    assert not np.any((left + np.uint64(T) - also) % np.uint64(T)), "all others together unmask it, as documented"


def test_a_stranger_in_the_cohort_is_refused() -> None:
    with pytest.raises(SealingError, match="no ephemeral key"):
        PAIRS["s0"].for_cohort(("s0", "s1", "sybil"), X)


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), b"short", b""])
def test_keys_that_give_no_secret_are_refused(public: bytes) -> None:
    with pytest.raises(SealingError, match="not usable"):
        PairKeys("s0", KEYS["s0"][0], {"s0": KEYS["s0"][1], "s1": public})


def test_destroyed_secrets_make_no_masks() -> None:
    own = pairs("s0")
    assert own.for_cohort(NAMES, X) is not None
    own.destroy()
    with pytest.raises(SealingError):
        own.for_cohort(NAMES, X)
