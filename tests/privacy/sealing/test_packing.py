"""Packing: sums unpack exactly, also at the extremes; no carry; words that no honest sum has are noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from confide.privacy.sealing.masked import MODULUS
from confide.privacy.sealing.packing import Packing, fields_below
from confide.privacy.sealing.parameters import DEGREE, choose_parameters
from confide.privacy.sealing.slots import chunk_words

Words = NDArray[np.uint64]


def masked(sites: int, bits: int) -> Packing:
    """The packing of profile `masked`."""
    return Packing(sites=sites, bits=bits, fields=fields_below(MODULUS, sites, bits), modulus=MODULUS, words=4096)


@st.composite
def packings(draw: st.DrawFn, most: int = 1000) -> Packing:
    """Every kind that a run can have."""
    sites, bits = draw(st.integers(2, most)), draw(st.integers(8, 20))
    return draw(st.sampled_from([masked(sites, bits), choose_parameters(sites, bits).packing]))


@given(packing=packings(), words=st.integers(1, 300), short=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_what_was_packed_unpacks_to_itself_and_to_zeros_behind_it(
    packing: Packing, words: int, short: float, seed: int
) -> None:
    size = round(short * packing.fields * words)
    values = np.random.default_rng(seed).integers(0, 2**packing.bits, size).astype(np.uint64)
    packed = packing.pack(values, words)
    assert (packed.shape, packed.dtype) == ((words,), np.uint64)
    assert int(packed.max()) < packing.modulus
    unpacked, clean = packing.unpack(packed)
    assert clean
    assert np.array_equal(unpacked[:size], values)
    assert unpacked[size:].tolist() == [0] * (packing.fields * words - size)


@given(packing=packings(most=40), words=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packed_sums_of_all_sites_unpack_to_the_exact_integer_sums(
    packing: Packing, words: int, share: float, seed: int
) -> None:
    rng, size = np.random.default_rng(seed), packing.fields * words
    values = rng.integers(0, 2**packing.bits, (packing.sites, size)).astype(np.uint64)
    values[:, rng.random(size) < share] = 2**packing.bits - 1  # the extreme is where a carry would show
    total = np.zeros(words, dtype=np.uint64)
    for row in values:
        total += packing.pack(row, words)  # without any reduction: it must not be needed
    assert int(total.max()) < packing.modulus
    unpacked, clean = packing.unpack(total)
    assert clean
    assert np.array_equal(unpacked, values.sum(axis=0))


@pytest.mark.parametrize("bits", range(8, 21))
@pytest.mark.parametrize("sites", [2, 3, 6, 64, 300, 999, 1000])
def test_the_largest_sum_of_all_fields_at_once_carries_nowhere(sites: int, bits: int) -> None:
    for packing in (masked(sites, bits), choose_parameters(sites, bits).packing):
        top = np.full(packing.fields * 3, 2**bits - 1, dtype=np.uint64)
        total = packing.pack(top, 3) * np.uint64(sites)
        assert int(total[0]) == packing.radix**packing.fields - 1 < packing.modulus
        unpacked, clean = packing.unpack(total)
        assert clean
        assert set(unpacked.tolist()) == {sites * (2**bits - 1)}


def test_one_site_too_many_would_run_over_into_the_next_field() -> None:
    packing = choose_parameters(4, 20).packing  # the control of the head-room above
    alone = packing.pack(np.array([2**20 - 1, 0], dtype=np.uint64), 1)
    assert packing.unpack(alone * np.uint64(4))[0].tolist() == [4 * (2**20 - 1), 0]
    assert packing.unpack(alone * np.uint64(5))[0].tolist() == [2**20 - 2, 1]


@given(packing=packings(), word=st.integers(0, 2**61 - 2))
@settings(max_examples=200, deadline=None)
def test_a_word_is_flagged_exactly_where_it_is_no_list_of_fields(packing: Packing, word: int) -> None:
    word %= packing.modulus
    fields, clean = packing.unpack(np.array([0, word, 0], dtype=np.uint64))
    assert clean == (word < packing.radix**packing.fields)
    again = sum(int(field) * packing.radix**i for i, field in enumerate(fields.reshape(packing.fields, 3)[:, 1]))
    assert (again == word) == clean


@pytest.mark.parametrize("packing", [masked(3, 20), choose_parameters(3, 20).packing, masked(2, 8)])
def test_the_first_word_that_is_no_list_of_fields_is_flagged_wherever_it_stands(packing: Packing) -> None:
    edge = packing.radix**packing.fields
    assert edge < packing.modulus
    for place in (0, 2, 4):
        words = np.full(5, edge - 1, dtype=np.uint64)
        assert packing.unpack(words)[1]
        words[place] += np.uint64(1)
        assert not packing.unpack(words)[1]


@pytest.mark.parametrize("changed", [{"fields": 0}, {"fields": 3}, {"modulus": 2**41}, {"sites": 100_000}])
def test_fields_that_do_not_fit_a_word_are_refused(changed: dict[str, Any]) -> None:
    fitting: dict[str, Any] = {"sites": 3, "bits": 20, "fields": 2, "modulus": 2**44, "words": 4}
    assert Packing(**fitting).coordinates == 8
    with pytest.raises(ValueError, match="do not fit"):
        Packing(**fitting | changed)


@settings(deadline=None)
@given(limit=st.integers(1, 2**62), sites=st.integers(2, 1000), bits=st.integers(8, 20))
def test_as_many_fields_as_fit_and_no_more(limit: int, sites: int, bits: int) -> None:
    fields, radix = fields_below(limit, sites, bits), sites * (2**bits - 1) + 1
    assert radix**fields <= limit < radix ** (fields + 1)


@settings(deadline=None)
@given(packing=packings(), size=st.integers(0, 200_000))
def test_chunks_cover_the_coordinates_and_are_no_more_than_needed(packing: Packing, size: int) -> None:
    count = packing.chunks(size)
    assert count * packing.coordinates >= size
    assert count == 1 or (count - 1) * packing.coordinates < size
    whole, short = (chunk_words(packing, max(1, size), whole=whole) for whole in (True, False))
    assert whole == [packing.words] * count
    assert short[:-1] == whole[:-1]
    held = (count - 1) * packing.coordinates + short[-1] * packing.fields
    assert max(1, size) <= held < max(1, size) + packing.fields, "not a word too many"
    assert 1 <= short[-1] <= packing.words


def test_a_chunk_is_a_ring_of_slots() -> None:
    assert choose_parameters(3, 20).packing.words == DEGREE
