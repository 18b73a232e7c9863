"""The BFV lock: opens honest sums, refuses noisier ones, and is the same lock in another process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.bfv import BfvLock, lattice_for
from confide.privacy.sealing.parameters import DEGREE, choose_parameters

CHOICE = choose_parameters(3, 8)
LATTICE = lattice_for(CHOICE)
LOCK = BfvLock(CHOICE, LATTICE.generate_key())
SLOTS = np.random.default_rng(1).integers(0, CHOICE.plain_modulus, DEGREE).astype(np.uint64)


def total(parts: list[bytes], doublings: int = 0) -> bytes:
    """A sum as it travels; doubling adds a sum to itself."""
    sums = [LATTICE.parse(part, fresh=True) for part in parts]
    for part in sums[1:]:
        LATTICE.evaluator.add_inplace(sums[0], part)
    for _ in range(doublings):
        LATTICE.evaluator.add_inplace(sums[0], sums[0])
    return LATTICE.summed(sums[0])


def close(values: NDArray[np.uint64]) -> bytes:
    """Fresh bytes."""
    return LOCK.close(values)


def test_slots_are_added_modulo_t() -> None:
    t = np.uint64(CHOICE.plain_modulus)
    top = np.full(DEGREE, CHOICE.plain_modulus - 1, dtype=np.uint64)
    assert np.array_equal(LOCK.open(total([close(SLOTS), close(top), close(top)])), (SLOTS + t - np.uint64(2)) % t)


def test_a_sum_with_more_noise_than_an_honest_one_is_refused() -> None:
    ones = [close(np.ones(DEGREE, dtype=np.uint64)) for _ in range(3)]
    assert set(LOCK.open(total(ones)).tolist()) == {3}
    with pytest.raises(SealingError, match="more noise"):
        LOCK.open(total(ones, doublings=5))  # thirty-two times as much of everything


def test_a_pickled_lock_is_the_same_lock() -> None:
    other = pickle.loads(pickle.dumps(LOCK))  # noqa: S301  # our own bytes, as a worker process gets them
    assert np.array_equal(other.open(total([close(SLOTS)])), SLOTS)
    assert np.array_equal(LOCK.open(total([other.close(SLOTS)])), SLOTS)


def test_another_key_opens_nothing() -> None:
    other = BfvLock(CHOICE, LATTICE.generate_key())
    with pytest.raises(SealingError, match="more noise"):
        other.open(total([close(SLOTS)]))


def test_there_is_one_lattice_for_the_same_parameters() -> None:
    one = lattice_for(choose_parameters(3, 8))
    assert lattice_for(choose_parameters(3, 8)) is one
    assert lattice_for(choose_parameters(3, 9)) is not one
