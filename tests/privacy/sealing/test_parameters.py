"""Parameters: exact decryption, head-room for every site, two tags where t is small, helpful refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from confide.errors import ConfigError
from confide.privacy.sealing.bfv import Bfv, BfvKey
from confide.privacy.sealing.parameters import DEGREE, MAX_BITS, MIN_BITS, choose_parameters
from confide.privacy.sealing.profile import Segment
from tests.privacy.sealing.cohort import Cohort

GRID = [(sites, bits) for sites in (3, 4, 5, 8, 9, 12, 64, 300, 1000) for bits in range(MIN_BITS, MAX_BITS + 1)]


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


@pytest.mark.parametrize(("sites", "bits"), GRID)
def test_a_sum_over_all_sites_fits_its_field_and_its_slot(sites: int, bits: int) -> None:
    chosen = choose_parameters(sites, bits)
    assert sites * (2**bits - 1) < 2**chosen.field_bits
    assert chosen.fields >= 1
    assert 2 ** (chosen.fields * chosen.field_bits) <= chosen.plain_modulus


@pytest.mark.parametrize("sites", [3, 4, 12, 100, 1000])
def test_decryption_of_a_sum_is_exact_by_the_noise_bound(sites: int) -> None:
    chosen = choose_parameters(sites, 12)
    q, t = chosen.coefficient_modulus, chosen.plain_modulus
    assert 21.5 * sites < q / (2 * t)
    assert q.bit_length() == 60
    assert is_prime(t)
    assert is_prime(q)
    assert t % (2 * DEGREE) == 1
    assert not 21.5 * sites < q / (2 * 4 * t), "a plain modulus two bits longer would have been possible as well"


def test_a_composite_modulus_would_be_noticed() -> None:
    t = choose_parameters(4, 12).plain_modulus
    assert not is_prime(t - 1)
    assert not is_prime(2**48)
    assert not is_prime(3_215_031_751)  # a strong pseudoprime to the bases 2, 3, 5 and 7


@pytest.mark.parametrize(("sites", "bits"), GRID)
def test_forging_all_tags_by_chance_is_less_likely_than_two_to_the_minus_43(sites: int, bits: int) -> None:
    chosen = choose_parameters(sites, bits)
    assert chosen.tags == (1 if chosen.plain_modulus >= 2**45 else 2)
    assert chosen.tags * math.log2(chosen.plain_modulus) > 43


@pytest.mark.parametrize("bits", [MIN_BITS - 1, MAX_BITS + 1, 0, -3])
def test_impossible_bits_are_refused_and_the_nearest_possible_is_named(bits: int) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_parameters(4, bits)
    nearest = MIN_BITS if bits < MIN_BITS else MAX_BITS
    assert str(nearest) in caught.value.hint
    assert choose_parameters(4, nearest).bits == nearest


@pytest.mark.parametrize("sites", [-1, 0, 1, 1001])
def test_impossible_numbers_of_sites_are_refused(sites: int) -> None:
    with pytest.raises(ConfigError, match="sites"):
        choose_parameters(sites, 12)


@pytest.mark.parametrize("sites", [2, 3, 12, 1000])
def test_every_choice_that_is_not_refused_works_in_seal_and_in_the_tags(sites: int) -> None:
    try:
        cohort = Cohort.make(sites=min(sites, 3), bits=8, most=sites)
    except ConfigError:
        assert sites == 2, "a federation of at least three sites must not be refused"
        return
    segments = [Segment(3, -1.0, 1.0)]
    vectors = {name: np.array([1.0, -1.0, 1.0]) for name in cohort.names}
    total = cohort.total(list(cohort.seal(vectors, segments).values()), 3)
    assert np.allclose(cohort.open(total, segments), np.array([1, -1, 1]) * len(cohort.names))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * 4096, 100_000])
def test_ciphertexts_cover_the_vector_and_no_more_than_needed(size: int) -> None:
    chosen = choose_parameters(4, 20)
    capacity = chosen.fields * DEGREE
    assert chosen.slots(size) == chosen.ciphertexts(size) * DEGREE
    assert chosen.ciphertexts(size) * capacity >= size
    assert chosen.ciphertexts(size) == 1 or (chosen.ciphertexts(size) - 1) * capacity < size


@pytest.mark.parametrize("sites", [3, 12, 50])
def test_a_sum_keeps_at_least_the_noise_budget_that_is_predicted(sites: int) -> None:
    bfv = Bfv(choose_parameters(sites, 8))
    key = BfvKey(bfv, bfv.generate_key())
    rng = np.random.default_rng(1)
    total: list[object] | None = None
    for _ in range(sites):
        slots = rng.integers(0, bfv.parameters.plain_modulus, DEGREE).astype(np.uint64)
        total = bfv.add(total, [bfv.parse(key.encrypt(slots), seeded=True)])
    assert total is not None
    _, budget = key.decrypt(bfv.serialise(total)[0])
    assert budget >= max(1, bfv.parameters.noise_budget)
    fresh = bfv.serialise([bfv.parse(key.encrypt(slots), seeded=True)])[0]
    assert key.decrypt(fresh)[1] > budget, "adding ciphertexts costs noise budget, so the measurement measures"
