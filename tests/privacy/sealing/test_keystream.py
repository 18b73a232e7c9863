"""Uniform numbers modulo t: no modulo bias, one stream a key, info that cannot run together."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.stats import chisquare

from confide.privacy.sealing.keystream import derive, expand, random_words, uniform_mod
from confide.privacy.sealing.masked import MODULUS
from confide.privacy.sealing.parameters import choose_parameters

KEY = bytes(range(32))
DRAWS = 200_000


def naive(key: bytes, count: int, modulus: int) -> NDArray[np.uint64]:
    """What the module must not do: reduce words of one bit more than the modulus needs."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count))
    words = np.frombuffer(stream, dtype="<u8") & np.uint64((1 << modulus.bit_length()) - 1)
    return np.asarray(words % np.uint64(modulus), dtype=np.uint64)


def bias(values: NDArray[np.uint64], modulus: int, cells: int = 64) -> float:
    """p-value of equal shares in equal cells of [0, modulus)."""
    edges = np.linspace(0, modulus, cells + 1)
    found, _ = np.histogram(values.astype(np.float64), edges)
    return float(chisquare(found).pvalue)


def off_the_middle(values: NDArray[np.uint64], modulus: int) -> float:
    """How many standard deviations the mean lies from that of uniforms."""
    return abs(float(values.astype(np.float64).mean()) / modulus - 0.5) * (12 * len(values)) ** 0.5


@pytest.mark.parametrize(
    "modulus",
    [2**47 + 1, 2**51 + 5, 3 * 2**44, 2**48 - 59, choose_parameters(4, 20).plain_modulus, MODULUS, 2**60 + 33],
)
def test_every_part_of_the_range_is_equally_likely(modulus: int) -> None:
    values = uniform_mod(KEY, DRAWS, modulus)
    assert len(values) == DRAWS
    assert int(values.max()) < modulus
    assert bias(values, modulus) > 1e-3
    assert off_the_middle(values, modulus) < 5


@pytest.mark.parametrize("modulus", [3 * 2**44, 5 * 2**49 + 1, 11 * 2**40 - 7, 5 * 2**58 + 3])
def test_reducing_words_instead_would_be_biased(modulus: int) -> None:
    assert bias(uniform_mod(KEY, DRAWS, modulus), modulus) > 1e-3
    assert bias(naive(KEY, DRAWS, modulus), modulus) < 1e-9
    assert (
        off_the_middle(uniform_mod(KEY, DRAWS, modulus), modulus)
        < 5
        < off_the_middle(naive(KEY, DRAWS, modulus), modulus)
    )


def test_just_above_a_power_of_two_fewer_bits_would_miss_the_top_and_nothing_here_does() -> None:
    modulus = 2**47 + 2**41  # one part in 65 lies above the power of two
    above = np.count_nonzero(uniform_mod(KEY, DRAWS, modulus) >= 2**47) / DRAWS
    assert above == pytest.approx(1 / 65, rel=0.1)
    assert np.count_nonzero(naive(KEY, DRAWS, modulus) >= 2**47) / DRAWS < 0.9 / 65


@pytest.mark.parametrize("modulus", [2**47 + 1, 2**51 + 5, 5 * 2**58 + 3, 17])
def test_however_many_are_asked_for_they_are_the_beginning_of_one_sequence(modulus: int) -> None:
    """Two sites that share a key may ask in different portions of a chunk; nothing may depend on the count."""
    whole = uniform_mod(KEY, 9000, modulus)
    for count in (1, 63, 64, 100, 4096, 8999):
        assert np.array_equal(uniform_mod(KEY, count, modulus), whole[:count])


def test_small_moduli_hit_every_residue_equally() -> None:
    values = uniform_mod(KEY, DRAWS, 17)  # just above a power of two: nearly half of all words are thrown away
    found = np.bincount(values.astype(np.int64), minlength=17)
    assert len(found) == 17
    assert chisquare(found).pvalue > 1e-3
    assert chisquare(np.bincount(naive(KEY, DRAWS, 17).astype(np.int64), minlength=17)).pvalue < 1e-9


def test_a_key_gives_one_stream_and_another_key_another() -> None:
    modulus = choose_parameters(4, 20).plain_modulus
    assert np.array_equal(uniform_mod(KEY, 5000, modulus), uniform_mod(KEY, 5000, modulus))
    assert not np.any(uniform_mod(KEY, 5000, modulus) == uniform_mod(bytes(32), 5000, modulus))
    values = uniform_mod(KEY, 5000, modulus)
    assert len(set(values.tolist())) == 5000


@pytest.mark.parametrize("count", [0, 1, 2, 4096])
def test_exactly_as_many_as_asked(count: int) -> None:
    assert uniform_mod(KEY, count, 2**50 + 3).shape == (count,)


def test_random_words_are_the_key_stream_itself() -> None:
    words = random_words(KEY, 1000)
    assert (words.shape, words.dtype) == ((1000,), np.uint64)
    stream = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(8000))
    assert words.astype("<u8").tobytes() == stream
    assert random_words(KEY, 0).shape == (0,)
    assert not np.any(words == random_words(bytes(32), 1000))


def test_parts_of_the_info_cannot_run_together() -> None:
    seen = {expand(KEY, *info) for info in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc"), ())}
    assert len(seen) == 6
    seen = {derive(KEY, salt, *info) for salt in (b"x", b"y") for info in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",))}
    assert len(seen) == 6
    assert all(len(key) == 32 for key in seen)
