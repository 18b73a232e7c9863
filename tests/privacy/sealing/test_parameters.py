"""Parameters: exact decryption, head-room for every site, two tags where t is small, helpful refusals."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal

from confide.config import SealingConfig
from confide.errors import ConfigError, SealingError
from confide.privacy.sealing import make_profile, parameters
from confide.privacy.sealing.bfv import BfvLock, lattice_for
from confide.privacy.sealing.lattice import Lattice
from confide.privacy.sealing.packing import fields_below
from confide.privacy.sealing.parameters import (
    COEFFICIENT_BITS,
    DEGREE,
    MAX_BITS,
    MAX_SITES,
    MIN_BITS,
    BfvParameters,
    choose_parameters,
    fresh_noise,
)
from confide.privacy.sealing.profile import Segment
from tests.privacy.sealing.cohort import Cohort

EVERYTHING = [(sites, bits) for sites in range(2, MAX_SITES + 1) for bits in range(MIN_BITS, MAX_BITS + 1)]


def is_prime(n: int) -> bool:
    """Miller–Rabin with bases that decide every n < 3.3 · 10²⁴."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


@pytest.fixture(scope="module")
def choices() -> dict[tuple[int, int], BfvParameters]:
    """Every choice there is. SEAL's searches for primes are remembered: there are few different ones."""
    create = functools.lru_cache(lambda degree, bits: seal.CoeffModulus.Create(degree, list(bits)))
    remembering = SimpleNamespace(
        CoeffModulus=SimpleNamespace(Create=lambda degree, bits: create(degree, tuple(bits))),
        PlainModulus=SimpleNamespace(Batching=functools.lru_cache(seal.PlainModulus.Batching)),
        Modulus=seal.Modulus,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "seal", remembering)
        return {place: choose_parameters.__wrapped__(*place) for place in EVERYTHING}


def test_a_sum_over_all_sites_fits_its_field_and_its_slot_whatever_is_asked_for(
    choices: dict[tuple[int, int], BfvParameters],
) -> None:
    assert len(choices) == 999 * 13
    for (sites, bits), chosen in choices.items():
        packing = chosen.packing
        assert (packing.sites, packing.bits, packing.words) == (sites, bits, DEGREE)
        assert sites * (2**bits - 1) < packing.radix
        assert packing.fields >= 1
        assert packing.radix**packing.fields <= chosen.plain_modulus, (sites, bits)


def test_decryption_of_every_sum_is_exact_by_the_noise_bound_with_a_bit_of_margin(
    choices: dict[tuple[int, int], BfvParameters],
) -> None:
    for (sites, bits), chosen in choices.items():
        q, t = chosen.coefficient_modulus, chosen.plain_modulus
        # A fresh ciphertext's noise is at most 21 and a half; 42 fair coin flips have variance 42 / 4.
        noise = min(21.5 * sites, 12 * math.sqrt((42 / 4 + 1 / 12) * sites))
        assert noise < q / (2 * t) / 2, (sites, bits)
        assert chosen.noise_budget >= 1
        assert chosen.noise_budget == math.floor(math.log2(q / (2 * t * noise)))


def test_moduli_are_primes_that_seal_can_batch_with(choices: dict[tuple[int, int], BfvParameters]) -> None:
    assert {chosen.coefficient_modulus.bit_length() for chosen in choices.values()} == {COEFFICIENT_BITS}
    moduli = {chosen.plain_modulus for chosen in choices.values()} | {c.coefficient_modulus for c in choices.values()}
    assert len(moduli) > 100
    for modulus in moduli:
        assert is_prime(modulus)
        assert modulus % (2 * DEGREE) == 1
    assert all(chosen.plain_modulus < 2**52 for chosen in choices.values()), "what the tags' inner products hold"


def test_a_composite_modulus_would_be_noticed() -> None:
    t = choose_parameters(4, 12).plain_modulus
    assert not is_prime(t - 1)
    assert not is_prime(2**48)
    assert not is_prime(3_215_031_751)  # a strong pseudoprime to the bases 2, 3, 5 and 7


def test_no_plain_modulus_with_the_margin_would_hold_one_field_more(
    choices: dict[tuple[int, int], BfvParameters],
) -> None:
    for (sites, bits), chosen in choices.items():
        largest = min(2**52, math.floor(chosen.coefficient_modulus / (4 * fresh_noise(sites))))
        assert chosen.plain_modulus <= largest
        assert chosen.packing.radix ** (chosen.packing.fields + 1) > largest, (sites, bits)
        assert chosen.packing.fields == fields_below(largest, sites, bits)


def test_a_modulus_is_of_a_whole_bit_length_where_that_costs_no_field(
    choices: dict[tuple[int, int], BfvParameters],
) -> None:
    """Masks are drawn by rejection: just above a power of two half of what is drawn would be thrown away."""
    whole = {c.plain_modulus for c in choices.values() if c.plain_modulus > 0.999 * 2 ** c.plain_modulus.bit_length()}
    for chosen in choices.values():
        if chosen.plain_modulus not in whole:
            below = 2 ** (chosen.plain_modulus.bit_length() - 1)
            assert chosen.packing.radix**chosen.packing.fields > 0.999 * below, "it is odd only to hold one field more"
    share = sum(chosen.plain_modulus in whole for chosen in choices.values()) / len(choices)
    assert 0.9 < share < 1, "both kinds occur"


def test_there_are_two_tags_exactly_where_one_would_leave_a_forger_a_chance_above_two_to_the_minus_45(
    choices: dict[tuple[int, int], BfvParameters], monkeypatch: pytest.MonkeyPatch
) -> None:
    for chosen in choices.values():
        assert chosen.tags == (1 if chosen.plain_modulus >= 2**45 else 2)
        assert chosen.tags * math.log2(chosen.plain_modulus) >= 45
    # No modulus that is chosen today is that small: with less room in q there would be.
    monkeypatch.setattr(parameters, "_LARGEST_PLAIN_BITS", 45)
    assert choose_parameters.__wrapped__(4, 8).plain_modulus < 2**45
    assert choose_parameters.__wrapped__(4, 8).tags == 2


def test_the_ring_is_well_inside_seals_own_table_of_secure_sizes() -> None:
    assert seal.CoeffModulus.MaxBitCount(DEGREE, seal.SEC_LEVEL_TYPE.TC128) == 109
    assert seal.CoeffModulus.MaxBitCount(DEGREE, seal.SEC_LEVEL_TYPE.TC192) >= COEFFICIENT_BITS
    assert seal.CoeffModulus.MaxBitCount(DEGREE // 2, seal.SEC_LEVEL_TYPE.TC128) < COEFFICIENT_BITS, "not half of it"


@pytest.mark.parametrize("sites", [2, 3, 16, 65, 300, 1000])
@pytest.mark.parametrize("bits", [MIN_BITS, 13, MAX_BITS])
def test_seal_accepts_every_choice(sites: int, bits: int) -> None:
    lattice = lattice_for(choose_parameters(sites, bits))
    assert lattice.context.parameters_set()
    qualifiers = lattice.context.first_context_data().qualifiers()
    assert qualifiers.using_batching
    assert qualifiers.sec_level == seal.SEC_LEVEL_TYPE.TC128


@pytest.mark.parametrize("plain_modulus", [2**60 - 1, 2**61 - 1])
def test_parameters_that_seals_constructor_takes_in_silence_but_cannot_use_are_refused(plain_modulus: int) -> None:
    choice = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    choice.set_poly_modulus_degree(DEGREE)
    choice.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, [COEFFICIENT_BITS]))
    choice.set_plain_modulus(plain_modulus)
    assert not seal.SEALContext(choice, True, seal.SEC_LEVEL_TYPE.TC128).parameters_set()  # the control: no error
    with pytest.raises(SealingError, match="SEAL does not accept"):
        Lattice(seal.SCHEME_TYPE.BFV, plain_modulus=plain_modulus)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
@pytest.mark.parametrize("bits", [MIN_BITS - 1, MAX_BITS + 1, 0, -3])
def test_impossible_bits_are_refused_and_the_nearest_possible_is_named(profile: str, bits: int) -> None:
    config = SealingConfig.model_construct(profile=profile, bits=bits)
    with pytest.raises(ConfigError) as caught:
        make_profile(config, 4)
    nearest = MIN_BITS if bits < MIN_BITS else MAX_BITS
    assert caught.value.hint == f"the nearest possible is {nearest}"
    assert caught.value.where == "sealing.bits"
    assert make_profile(SealingConfig.model_construct(profile=profile, bits=nearest), 4).parameters["bits"] == nearest


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
@pytest.mark.parametrize(("sites", "nearest"), [(-1, 2), (0, 2), (1, 2), (1001, 1000), (10**9, 1000)])
def test_impossible_numbers_of_sites_are_refused_and_the_nearest_possible_is_named(
    profile: str, sites: int, nearest: int
) -> None:
    config = SealingConfig.model_construct(profile=profile, bits=12)
    with pytest.raises(ConfigError, match=f"over {sites} sites") as caught:
        make_profile(config, sites)
    assert caught.value.hint == f"the nearest possible is {nearest} sites"
    assert make_profile(config, nearest).parameters["bits"] == 12


def test_where_a_slot_were_too_small_the_nearest_number_of_bits_would_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "_LARGEST_PLAIN_BITS", 26)  # 1000 sites of 20 bits need 30
    with pytest.raises(ConfigError) as caught:
        choose_parameters.__wrapped__(1000, 20)
    assert caught.value.hint == "the nearest is 16 bits"
    assert choose_parameters.__wrapped__(1000, 16).packing.fields == 1
    monkeypatch.setattr(parameters, "_LARGEST_PLAIN_BITS", 14)
    with pytest.raises(ConfigError, match="do not fit") as caught:
        choose_parameters.__wrapped__(1000, 20)
    assert caught.value.hint == "use fewer sites"


# --- measured ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [2, 3, 12, 1000])
def test_every_choice_that_is_not_refused_works_in_seal_and_in_the_tags(sites: int) -> None:
    cohort = Cohort.make(sites=min(sites, 3), bits=8, most=sites)
    segments = [Segment(3, -1.0, 1.0)]
    vectors = {name: np.array([1.0, -1.0, 1.0]) for name in cohort.names}
    total = cohort.total(list(cohort.seal(vectors, segments).values()), 3)
    assert np.allclose(cohort.open(total, segments), np.array([1, -1, 1]) * len(cohort.names))


@pytest.mark.parametrize("sites", [3, 6, 16, 64, 300, 1000])
def test_a_sum_keeps_at_least_the_noise_budget_that_is_predicted_and_decrypts_exactly(sites: int) -> None:
    """Every ciphertext is a fresh one: nothing is added twice, so noise adds up as in a run."""
    chosen = choose_parameters(sites, 8)
    lattice = lattice_for(chosen)
    key = lattice.generate_key()
    lock, rng, t = BfvLock(chosen, key), np.random.default_rng(sites), np.uint64(chosen.plain_modulus)
    expected, total, first = np.zeros(DEGREE, dtype=np.uint64), None, b""
    for _ in range(sites):
        slots = rng.integers(0, chosen.plain_modulus, DEGREE).astype(np.uint64)  # as wide as masked slots are
        expected = (expected + slots) % t
        fresh = lattice.parse(lock.close(slots), fresh=True)
        if total is None:
            total, first = fresh, lattice.summed(fresh)
        else:
            lattice.evaluator.add_inplace(total, fresh)
    data = lattice.summed(total)
    assert _budget(lattice, key, data) >= chosen.noise_budget >= 1
    assert np.array_equal(lock.open(data), expected)
    assert _budget(lattice, key, first) > _budget(lattice, key, data), "the measurement does measure"


def _budget(lattice: Lattice, key: bytes, data: bytes) -> int:
    decryptor: Any = seal.Decryptor(lattice.context, lattice.parse_key(key))
    return int(decryptor.invariant_noise_budget(lattice.parse(data, fresh=False)))
