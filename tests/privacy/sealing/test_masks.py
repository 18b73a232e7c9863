"""Masks: they cancel exactly over the cohort, and hide everything in anything less; the ring above 65 sites."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest

from confide.errors import SealingError
from confide.privacy.sealing.masked import MODULUS
from confide.privacy.sealing.masks import NEIGHBOURS, PairKeys, neighbours, remove_own
from confide.privacy.sealing.parameters import choose_parameters
from confide.privacy.sealing.wrapping import new_ephemeral

Words = NDArray[np.uint64]
T = choose_parameters(12, 16).plain_modulus
X, Y = "11" * 32, "22" * 32
MANY = tuple(f"s{i:02d}" for i in range(70))
NAMES = MANY[:8]
KEYS = {name: new_ephemeral() for name in MANY}
PUBLIC = {name: public for name, (_, public) in KEYS.items()}
SEED = bytes(range(32))


def pairs(site: str) -> PairKeys:
    """One site's pair secrets with everybody."""
    return PairKeys(site, KEYS[site][0], PUBLIC)


PAIRS = {name: pairs(name) for name in MANY}


def masked(
    site: str, cohort: tuple[str, ...], values: Words, chunk: int = 0, transcript: str = X, own: bytes | None = None
) -> Words:
    """One site's masked values."""
    return PAIRS[site].for_cohort(cohort, transcript, own).apply(values, chunk, T)


def mod_sum(parts: Sequence[Words], modulus: int = T) -> Words:
    """The sum mod t."""
    total = np.zeros_like(parts[0])
    for part in parts:
        total = (total + part) % np.uint64(modulus)
    return total


def draw(seed: int, shape: tuple[int, int], modulus: int = T) -> Words:
    """Values mod t."""
    return np.random.default_rng(seed).integers(0, modulus, shape).astype(np.uint64)


@given(
    cohort=st.sets(st.sampled_from(NAMES), min_size=2).map(lambda s: tuple(sorted(s))),
    length=st.integers(1, 300),
    chunk=st.integers(0, 2**40),
    modulus=st.sampled_from([T, MODULUS, 2**47 + 5, 17, 3]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_masks_cancel_exactly_over_the_cohort_and_over_nothing_smaller(
    cohort: tuple[str, ...], length: int, chunk: int, modulus: int, seed: int
) -> None:
    values = draw(seed, (len(cohort), length), modulus)
    parts = [
        PAIRS[site].for_cohort(cohort, X).apply(row, chunk, modulus) for site, row in zip(cohort, values, strict=True)
    ]
    assert np.array_equal(mod_sum(parts, modulus), mod_sum(values, modulus))
    assert all(int(part.max()) < modulus for part in parts)
    if modulus > 2**40:
        for i in range(len(cohort)):
            rest = mod_sum(np.delete(np.array(parts), i, axis=0), modulus)
            assert not np.any(rest == mod_sum(np.delete(values, i, axis=0), modulus)), "with one part missing"


@pytest.mark.parametrize("size", range(2, 71))
def test_masks_cancel_in_a_cohort_of_any_size(size: int) -> None:
    """On both sides of 65, where the ring begins."""
    cohort, values = MANY[:size], draw(size, (size, 5))
    parts = [masked(site, cohort, row, 3) for site, row in zip(cohort, values, strict=True)]
    assert np.array_equal(mod_sum(parts), mod_sum(values))
    assert not np.any(mod_sum(parts[1:]) == mod_sum(values[1:]))


@pytest.mark.parametrize(("chunk", "transcript", "cohort"), [(1, X, NAMES), (0, Y, NAMES), (0, X, NAMES[:-1])])
@pytest.mark.parametrize("own", [None, SEED])
def test_another_chunk_transcript_or_cohort_has_other_masks(
    chunk: int, transcript: str, cohort: tuple[str, ...], own: bytes | None
) -> None:
    zeros = np.zeros(2000, dtype=np.uint64)
    here = masked("s00", NAMES, zeros, own=own)
    assert np.array_equal(here, masked("s00", NAMES, zeros, own=own)), "the same place has the same masks"
    assert not np.any(here == masked("s00", cohort, zeros, chunk, transcript, own))


def test_masked_slots_look_uniform_and_unmasked_ones_do_not() -> None:
    small = np.random.default_rng(3).integers(0, 2**32, 20_000).astype(np.uint64)
    assert kstest(masked("s03", NAMES, small) / T, "uniform").pvalue > 1e-6
    assert kstest(small / T, "uniform").pvalue < 1e-9


def test_a_coalition_that_lacks_one_other_site_still_sees_uniform_slots() -> None:
    """The coalition takes off every mask that it knows: the one with the honest third site is left."""
    cohort, small = NAMES[:3], np.zeros(20_000, dtype=np.uint64)
    sealed = masked("s00", cohort, small)
    known = (np.uint64(T) - masked("s01", NAMES[:2], small)) % np.uint64(T)  # s01 subtracts what s00 added
    left = (sealed + np.uint64(T) - known) % np.uint64(T)
    assert kstest(left / T, "uniform").pvalue > 1e-6
    also = (np.uint64(T) - masked("s02", ("s00", "s02"), small)) % np.uint64(T)
    assert not np.any((left + np.uint64(T) - also) % np.uint64(T)), "all others together unmask it, as documented"


# --- own masks --------------------------------------------------------------------------------------------------------


@given(size=st.integers(2, 8), length=st.integers(1, 200), chunk=st.integers(0, 2**40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_own_masks_hide_the_sum_until_every_one_of_them_is_unlocked(
    size: int, length: int, chunk: int, seed: int
) -> None:
    cohort, values = NAMES[:size], draw(seed, (size, length))
    seeds = [secrets.token_bytes(32) for _ in cohort]
    parts = [masked(s, cohort, row, chunk, own=own) for s, row, own in zip(cohort, values, seeds, strict=True)]
    total, exact = mod_sum(parts), mod_sum(values)
    assert np.array_equal(remove_own(total, seeds, chunk, T), exact)
    assert np.array_equal(remove_own(total, reversed(seeds), chunk, T), exact)
    assert not np.any(remove_own(total, seeds[1:], chunk, T) == exact)
    assert not np.any(remove_own(total, [bytes(32), *seeds[1:]], chunk, T) == exact)
    assert not np.any(remove_own(total, seeds, chunk + 1, T) == exact)
    assert np.array_equal(remove_own(exact, [], chunk, T), exact)


def test_an_own_mask_is_uniform_and_no_pairs_mask() -> None:
    zeros = np.zeros(20_000, dtype=np.uint64)
    bare, own = masked("s00", NAMES, zeros), masked("s00", NAMES, zeros, own=SEED)
    alone = (own + np.uint64(T) - bare) % np.uint64(T)
    assert kstest(alone / T, "uniform").pvalue > 1e-6
    assert not np.any(remove_own(alone, [SEED], 0, T)), "it is what the seed gives"


def test_a_pairs_secret_that_is_taken_for_a_seed_does_not_take_off_its_mask() -> None:
    """What is unlocked is expanded under its own label: no seed can be made to stand for a pair's key."""
    zeros = np.zeros(100, dtype=np.uint64)
    here = PAIRS["s00"].for_cohort(NAMES[:2], X)
    (key, adds), *_ = here._keys
    assert adds
    assert np.any(remove_own(here.apply(zeros, 0, T), [key], 0, T) != 0)


# --- the ring above 65 sites ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [66, 67, 70, 128, 129, 1000])
def test_the_ring_is_64_regular_symmetric_and_connected(size: int) -> None:
    cohort = [f"s{i:04d}" for i in range(size)]
    graph = {site: neighbours(site, cohort, X) for site in cohort}
    for site, near in graph.items():
        assert len(near) == len(set(near)) == NEIGHBOURS == 64
        assert site not in near
        assert all(site in graph[peer] for peer in near)
    reached, edge = {cohort[0]}, [cohort[0]]
    while edge:
        edge = [peer for site in edge for peer in graph[site] if peer not in reached and not reached.add(peer)]
    assert reached == set(cohort)


@pytest.mark.parametrize("size", [2, 3, 64, 65])
def test_up_to_65_sites_everybody_is_everybodys_neighbour(size: int) -> None:
    cohort = MANY[:size]
    for site in cohort:
        assert sorted([*neighbours(site, cohort, X), site]) == list(cohort)
        assert neighbours(site, cohort, X) == neighbours(site, cohort, Y)


def test_the_ring_is_shuffled_by_the_transcript() -> None:
    cohort = [f"s{i:04d}" for i in range(500)]
    near = {x: set(neighbours("s0250", cohort, x)) for x in (X, Y, "33" * 32)}
    assert near[X] == set(neighbours("s0250", cohort, X))
    for one, other in ((X, Y), (Y, "33" * 32), (X, "33" * 32)):
        assert len(near[one] & near[other]) < 25, "about 8 of 64 are the same by chance"
    names = {f"s{250 + step:04d}" for d in range(1, 33) for step in (d, -d)}
    assert len(near[X] & names) < 25, "it is not the order of the names"


def test_two_sites_that_are_no_neighbours_share_no_mask() -> None:
    cohort = MANY
    near = neighbours("s00", cohort, X)
    far = [peer for peer in cohort[1:] if peer not in near]
    assert len(far) == 5
    fresh = PairKeys("s00", KEYS["s00"][0], PUBLIC)
    fresh.for_cohort(cohort, X)
    assert set(fresh._shared) == set(near), "no key agreement with the others either"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_stranger_in_the_cohort_is_refused() -> None:
    with pytest.raises(SealingError, match="no ephemeral key") as caught:
        PAIRS["s00"].for_cohort(("s00", "s01", "sybil"), X)
    assert caught.value.where == "site sybil"


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), b"short", b"", bytes(33)])
def test_keys_that_give_no_secret_are_refused_when_a_cohort_needs_them(public: bytes) -> None:
    own = PairKeys("s00", KEYS["s00"][0], PUBLIC | {"s02": public})
    assert own.for_cohort(("s00", "s01"), X) is not None
    with pytest.raises(SealingError, match="not usable") as caught:
        own.for_cohort(("s00", "s01", "s02"), X)
    assert caught.value.where == "site s02"


def test_a_sites_own_public_key_does_not_matter() -> None:
    other = PairKeys("s00", KEYS["s00"][0], PUBLIC | {"s00": bytes(32)})
    zeros = np.zeros(50, dtype=np.uint64)
    assert np.array_equal(other.for_cohort(NAMES, X).apply(zeros, 0, T), masked("s00", NAMES, zeros))


def test_destroyed_secrets_make_no_masks() -> None:
    own = pairs("s00")
    assert own.for_cohort(NAMES, X) is not None
    own.destroy()
    assert not own._shared
    with pytest.raises(SealingError):
        own.for_cohort(NAMES, X)
