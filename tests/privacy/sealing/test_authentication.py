"""Tags: exact inner products; honest sums pass; added, scaled, dropped, doubled and swapped ones do not."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from confide.privacy.sealing.authentication import SumMac, inner_product
from confide.privacy.sealing.masked import MODULUS
from confide.privacy.sealing.parameters import choose_parameters

Words = NDArray[np.uint64]
T = choose_parameters(4, 20).plain_modulus
SMALL = choose_parameters(1000, 8).plain_modulus
Q = choose_parameters(4, 20).coefficient_modulus
X, Y = "33" * 32, "44" * 32
SITES = ("a", "b", "c", "d")
MAC = SumMac(bytes(32), X, T, 1)
RNG = np.random.default_rng(5)
VALUES = {site: RNG.integers(0, T, 512).astype(np.uint64) for site in SITES}


def tag(mac: SumMac, site: str, values: Words, chunk: int = 0) -> int:
    """One site's tag over one chunk."""
    return mac.tags(site, mac.products(chunk, values))[0]


TAGS = {site: tag(MAC, site, VALUES[site]) for site in SITES}


def accepts(total: Words, tag_: int, cohort: tuple[str, ...] = SITES, mac: SumMac = MAC, chunk: int = 0) -> bool:
    """Does an opener that sees `total` accept?"""
    return mac.accepts(cohort, [tag_ % T], mac.products(chunk, total))


def mod_sum(*parts: Words) -> Words:
    """The sum mod t."""
    total = np.zeros(512, dtype=np.uint64)
    for part in parts:
        total = (total + part) % np.uint64(T)
    return total


@given(
    pairs=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1)), max_size=300),
    modulus=st.sampled_from([T, SMALL, MODULUS, Q, 2**52, 2**52 + 1, 2**63, 3]),
)
@settings(max_examples=200, deadline=None)
def test_inner_products_are_exact(pairs: list[tuple[int, int]], modulus: int) -> None:
    pairs = [(a % modulus, b % modulus) for a, b in pairs]
    left, right = (np.array([p[i] for p in pairs], dtype=np.uint64) for i in range(2))
    assert inner_product(left, right, modulus) == sum(a * b for a, b in pairs) % modulus


@pytest.mark.parametrize("modulus", [T, SMALL, MODULUS, Q, 2**52, 2**63])
@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 8192, 20_000])
def test_inner_products_are_exact_at_the_extreme_and_at_any_length(modulus: int, length: int) -> None:
    top = np.full(length, modulus - 1, dtype=np.uint64)
    assert inner_product(top, top, modulus) == length * (modulus - 1) ** 2 % modulus
    ramp = np.arange(length, dtype=np.uint64)
    assert inner_product(top, ramp, modulus) == sum((modulus - 1) * i for i in range(length)) % modulus


def test_without_limbs_64_bits_would_wrap_around() -> None:
    top = np.full(4096, T - 1, dtype=np.uint64)
    assert inner_product(top, top, T) == 4096
    assert int(np.dot(top, top)) % T != 4096
    limbs = np.full(4097, 2**26 - 1, dtype=np.uint64)
    assert int(np.dot(limbs[:4096], limbs[:4096])) == 4096 * (2**26 - 1) ** 2
    assert int(np.dot(limbs, limbs)) != 4097 * (2**26 - 1) ** 2, "one more than a block would not fit"


@pytest.mark.parametrize(("modulus", "tags"), [(T, 1), (SMALL, 2), (MODULUS, 1), (Q, 1), (T, 3)])
def test_an_honest_sum_is_accepted(modulus: int, tags: int) -> None:
    mac = SumMac(secrets.token_bytes(32), X, modulus, tags)
    values = {s: RNG.integers(0, modulus, (3, 4096)).astype(np.uint64) for s in SITES}
    summed = [0] * tags
    for site in SITES:
        products = np.sum([mac.products(i, chunk) for i, chunk in enumerate(values[site])], axis=0, dtype=object)
        summed = [a + b for a, b in zip(summed, mac.tags(site, list(products)), strict=True)]
    total = np.zeros((3, 4096), dtype=np.uint64)
    for site in SITES:
        total = (total + values[site]) % np.uint64(modulus)
    opened = np.sum([mac.products(i, chunk) for i, chunk in enumerate(total)], axis=0, dtype=object)
    assert mac.accepts(SITES, summed, list(opened))
    for i in range(tags):
        off = [t + (j == i) for j, t in enumerate(summed)]
        assert not mac.accepts(SITES, off, list(opened)), "every tag counts"


def _added(total: Words, tag_: int) -> tuple[Words, int]:
    changed = total.copy()
    changed[7] = (changed[7] + np.uint64(1)) % np.uint64(T)
    return changed, tag_


def _swapped(total: Words, tag_: int) -> tuple[Words, int]:
    changed = total.copy()
    changed[[3, 4]] = changed[[4, 3]]
    return changed, tag_


def _moved_by_half(total: Words, tag_: int) -> tuple[Words, int]:
    changed = total.copy()
    changed[0] = (changed[0] + np.uint64(T // 2)) % np.uint64(T)
    return changed, tag_


ATTACKS: dict[str, Callable[[Words, int], tuple[Words, int]]] = {
    "added": _added,
    "doubled everything": lambda total, tag_: ((total * np.uint64(2)) % np.uint64(T), 2 * tag_),
    "scaled by three": lambda total, tag_: ((total * np.uint64(3)) % np.uint64(T), 3 * tag_),
    "dropped a site": lambda total, tag_: (
        mod_sum(total, np.uint64(T) - VALUES["a"]),
        tag_ - TAGS["a"],
    ),
    "doubled a site": lambda total, tag_: (mod_sum(total, VALUES["a"]), tag_ + TAGS["a"]),
    "a site replaced by another": lambda total, tag_: (
        mod_sum(total, np.uint64(T) - VALUES["a"], VALUES["b"]),
        tag_ - TAGS["a"] + TAGS["b"],
    ),
    "swapped two slots": _swapped,
    "one slot moved by half the modulus": _moved_by_half,
    "everything negated": lambda total, tag_: ((np.uint64(T) - total) % np.uint64(T), -tag_),
    "reversed": lambda total, tag_: (total[::-1].copy(), tag_),
    "shorter": lambda total, tag_: (total[:-1], tag_),
    "longer": lambda total, tag_: (np.append(total, np.uint64(1)), tag_),
    "everything zero": lambda total, tag_: (np.zeros_like(total), 0),
    "another tag": lambda total, tag_: (total, tag_ + 1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_not_the_sum_fails(attack: str) -> None:
    total, tag_ = mod_sum(*VALUES.values()), sum(TAGS.values())
    assert accepts(total, tag_)
    assert not accepts(*ATTACKS[attack](total, tag_))


@given(
    place=st.integers(0, 511),
    change=st.integers(1, T - 1),
    wrong_tag=st.integers(0, T - 1),
    key=st.binary(min_size=32, max_size=32),
)
@settings(max_examples=100, deadline=None)
def test_any_change_of_any_one_slot_or_of_the_tag_is_refused(
    place: int, change: int, wrong_tag: int, key: bytes
) -> None:
    mac = SumMac(key, X, T, 1)
    tags = [tag(mac, site, VALUES[site]) for site in SITES]
    total = mod_sum(*VALUES.values())
    assert accepts(total, sum(tags), mac=mac)
    changed = total.copy()
    changed[place] = (int(changed[place]) + change) % T
    assert not accepts(changed, sum(tags), mac=mac)
    assert accepts(total, wrong_tag, mac=mac) == (wrong_tag == sum(tags) % T)


@pytest.mark.parametrize(
    "cohort", [SITES[:3], SITES[1:], (*SITES, "e"), ("a", "b", "c", "e"), ("a", "b", "c", "c"), (), ("abcd",)]
)
def test_another_cohort_than_the_one_that_sealed_is_refused(cohort: tuple[str, ...]) -> None:
    total, tag_ = mod_sum(*VALUES.values()), sum(TAGS.values())
    assert accepts(total, tag_, tuple(reversed(SITES))), "the control: the order of names does not matter"
    assert not accepts(total, tag_, cohort)


def test_a_dropped_site_fails_also_where_the_cohort_is_said_to_be_smaller_after_the_fact() -> None:
    """The pads alone would match; in a run the transcript of the smaller cohort is another one, so r differs."""
    rest = SITES[1:]
    total, tag_ = mod_sum(*(VALUES[s] for s in rest)), sum(TAGS[s] for s in rest)
    assert accepts(total, tag_, rest), "the control: the tag itself binds to X, and X to the cohort"
    assert not accepts(total, tag_, rest, SumMac(bytes(32), Y, T, 1))


@pytest.mark.parametrize(
    ("mac", "chunk"), [(SumMac(b"\x01" * 32, X, T, 1), 0), (SumMac(bytes(32), Y, T, 1), 0), (MAC, 1)]
)
def test_another_key_transcript_or_position_fails(mac: SumMac, chunk: int) -> None:
    total, tag_ = mod_sum(*VALUES.values()), sum(TAGS.values())
    assert not accepts(total, tag_, mac=mac, chunk=chunk)


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_or_too_many_tags_fail(count: int) -> None:
    total, tag_ = mod_sum(*VALUES.values()), sum(TAGS.values()) % T
    assert not MAC.accepts(SITES, [tag_] * count, MAC.products(0, total))


def test_nothing_of_the_pad_or_the_coefficients_repeats_between_sites_chunks_tags_or_transcripts() -> None:
    ones = [np.eye(1, 8, i, dtype=np.uint64)[0] for i in range(8)]
    two = SumMac(bytes(32), X, T, 2)
    coefficients = [two.products(chunk, one)[i] for chunk in (0, 1) for one in ones for i in range(2)]
    coefficients += [SumMac(bytes(32), Y, T, 1).products(0, one)[0] for one in ones]
    pads = [pad for site in (*SITES, "ab", "") for pad in two.tags(site, (0, 0))]
    assert len(set(coefficients + pads)) == 8 * 5 + 12
    assert two.tags("a", (3, 5)) == tuple((p + i) % T for p, i in zip(two.tags("a", (0, 0)), (3, 5), strict=True))


@pytest.mark.parametrize("modulus", [T, MODULUS])
def test_chunks_may_be_added_up_in_any_order_and_their_places_count(modulus: int) -> None:
    mac, values = SumMac(bytes(32), X, modulus, 1), RNG.integers(0, modulus, (4, 300)).astype(np.uint64)
    parts = [mac.products(i, chunk)[0] for i, chunk in enumerate(values)]
    right = mac.tags("a", [sum(parts)])
    assert mac.accepts(("a",), right, [sum(reversed(parts))])
    swapped = [mac.products(i, chunk)[0] for i, chunk in enumerate(values[[1, 0, 2, 3]])]
    assert not mac.accepts(("a",), right, [sum(swapped)])


def test_modulo_a_power_of_two_a_change_of_half_the_modulus_would_pass_half_the_time() -> None:
    delta, trials = 2**47, 400
    passed = sum(secrets.randbelow(2**48) * delta % 2**48 == 0 for _ in range(trials))
    assert 140 < passed < 260
    value = np.zeros(4, dtype=np.uint64)
    changed = value.copy()
    changed[0] = T // 2
    caught = [
        not mac.accepts(("a",), mac.tags("a", mac.products(0, value)), mac.products(0, changed))
        for mac in (SumMac(secrets.token_bytes(32), X, T, 1) for _ in range(trials))
    ]
    assert all(caught)
