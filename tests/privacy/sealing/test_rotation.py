"""The randomised Hadamard rotation: orthonormal, undone exactly, the same bits everywhere, and spreading spikes."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy._core import _multiarray_umath
from numpy.typing import NDArray

from confide.privacy.sealing.rotation import LARGEST_BLOCK, blocks, half_range, rotate, rotate_back

Floats = NDArray[np.float64]
powers = st.integers(0, 12).map(lambda n: 1 << n)


def signs(size: int, seed: int) -> Floats:
    """Public signs."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], size)


def sylvester(size: int) -> Floats:
    """The Hadamard matrix, from its definition: entry (i, j) is (−1) to the number of ones in i & j."""
    ones = [[(i & j).bit_count() for j in range(size)] for i in range(size)]
    return (-1.0) ** np.array(ones)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 256])
def test_it_is_the_hadamard_matrix_times_the_signs_and_orthonormal(size: int) -> None:
    d = signs(size, size)
    matrix = np.stack([rotate(column, d) for column in np.eye(size)], axis=1)
    assert np.allclose(matrix, sylvester(size) @ np.diag(d) / math.sqrt(size), rtol=0, atol=1e-15)
    assert np.allclose(matrix.T @ matrix, np.eye(size), rtol=0, atol=1e-14)


@given(size=powers, seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_the_inverse_is_exact_and_lengths_are_kept(size: int, seed: int, scale: float) -> None:
    values, d = np.random.default_rng(seed).normal(scale=scale, size=size), signs(size, seed + 1)
    kept = values.copy()
    turned = rotate(values, d)
    assert np.max(np.abs(rotate_back(turned, d) - values)) <= 1e-12 * scale
    assert np.max(np.abs(rotate(rotate_back(values, d), d) - values)) <= 1e-12 * scale
    assert math.isclose(np.linalg.norm(turned), np.linalg.norm(values), rel_tol=1e-12)
    assert np.array_equal(values, kept), "what is rotated is left alone"


@given(size=powers, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_sums_may_be_rotated_back_instead_of_each_part(size: int, seed: int) -> None:
    d, parts = signs(size, seed), np.random.default_rng(seed).normal(size=(5, size))
    total = np.sum([rotate(part, d) for part in parts], axis=0)
    assert np.allclose(rotate_back(total, d), parts.sum(axis=0), rtol=0, atol=1e-12)


@given(size=st.integers(0, 5 * LARGEST_BLOCK))
@settings(deadline=None)
def test_blocks_are_powers_of_two_largest_first_that_add_up(size: int) -> None:
    found = blocks(size)
    assert sum(found) == size
    assert found == sorted(found, reverse=True)
    assert all(block & (block - 1) == 0 and 1 <= block <= LARGEST_BLOCK for block in found)
    below = [block for block in found if block < LARGEST_BLOCK]
    assert len(below) == len(set(below)), "no more blocks than needed"


@pytest.mark.parametrize("size", [2**10, 2**14, LARGEST_BLOCK])
def test_a_spiky_vector_is_spread_below_the_narrow_range(size: int) -> None:
    """A coordinate beyond six standard deviations has probability 2e-9: none among a few hundred thousand."""
    norm, rng = 3.0, np.random.default_rng(size)
    half = half_range(size, norm, 0.0)
    for spikes in (1, 3, 10, 30):
        spiky = np.zeros(size)
        spiky[rng.choice(size, spikes, replace=False)] = rng.exponential(size=spikes) + 0.1
        spiky *= norm / np.linalg.norm(spiky)
        assert np.max(np.abs(spiky)) > half, "the control: unrotated it is outside"
        assert np.max(np.abs(rotate(spiky, signs(size, spikes)))) < half


def test_without_the_signs_a_vector_can_be_built_that_is_not_spread_at_all() -> None:
    size = 2**12
    constant = np.full(size, 1 / math.sqrt(size))
    assert np.max(np.abs(rotate(constant, np.ones(size)))) > 0.999
    assert np.max(np.abs(rotate(constant, signs(size, 1)))) < half_range(size, 1.0, 0.0)


def test_the_half_range_is_six_standard_deviations_of_a_coordinate_and_its_noise() -> None:
    assert half_range(2**10, 2.0, 0.0) == pytest.approx(6 * 2.0 / 32)
    assert half_range(2**10, 0.0, 0.5) == pytest.approx(3.0)
    assert half_range(2**10, 4.0, 0.5) == pytest.approx(6 * math.hypot(4.0 / 32, 0.5))
    noisy = np.random.default_rng(3).normal(scale=0.5, size=LARGEST_BLOCK)
    noisy[17] += 4.0
    turned = rotate(noisy, signs(LARGEST_BLOCK, 5))
    assert float(turned.std()) == pytest.approx(half_range(LARGEST_BLOCK, 4.0, 0.5) / 6, rel=0.05)


# --- every processor gets the same bits -------------------------------------------------------------------------------

#: Rotates awkward numbers there and back; prints the switches in force and the digest.
REPLAY = """
import hashlib, sys
import numpy as np
from numpy._core import _multiarray_umath
from confide.privacy.sealing.encoding import Encoder
from confide.privacy.sealing.profile import Segment
from confide.privacy.sealing.rotation import rotate, rotate_back
hasher = hashlib.sha256()
for size in (1, 2, 4, 8, 16, 1024, 2**15):
    stream = b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() for i in range(size // 4 + 1))
    integers = np.frombuffer(stream[: 8 * size], dtype="<u8")
    values = (integers % np.uint64(2**53)).astype(np.float64) / 3.0**30
    signs = (integers >> np.uint64(63)).astype(np.float64) * 2 - 1
    turned = rotate(values, signs)
    hasher.update(turned.astype("<f8").tobytes())
    hasher.update(rotate_back(turned * 1.1, signs).astype("<f8").tobytes())
encoder = Encoder([Segment(3000, -0.7, 0.7, rotation=(0.5, 0.01)), Segment(50, 1.0, 9.0)], 12, "5a" * 32)
total = np.arange(3051, dtype=np.uint64) * np.uint64(5)
opened = encoder.decode([total], 6)
hasher.update(opened.values.astype("<f8").tobytes() + str(opened.saturated).encode())
features = _multiarray_umath.__cpu_features__
print(",".join(f for f in sys.argv[1].split(",") if f and features[f]) or "-")
print(hasher.hexdigest())
"""


def test_the_rotation_and_an_opened_sum_have_the_same_bits_whatever_the_processor_can_do() -> None:
    dispatched = [f for f in _multiarray_umath.__cpu_dispatch__ if _multiarray_umath.__cpu_features__[f]]
    clean = {k: v for k, v in os.environ.items() if k != "NPY_DISABLE_CPU_FEATURES"}
    environments = {"as it is": clean}
    if dispatched:
        environments["without vector instructions"] = clean | {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched)}
        environments["without one of them"] = clean | {"NPY_DISABLE_CPU_FEATURES": dispatched[-1]}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", REPLAY, ",".join(dispatched)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, environment in environments.items()
    }
    told, digests = {}, {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        told[name], digests[name] = out.splitlines()
    if dispatched:
        assert told["as it is"] == ",".join(dispatched)  # the control: otherwise they are in use
        assert told["without vector instructions"] == "-"
    assert len(set(digests.values())) == 1, digests


def test_the_same_input_gives_the_same_bits_again() -> None:
    values, d = np.random.default_rng(1).normal(size=2**12), signs(2**12, 2)
    digests = {hashlib.sha256(rotate(values, d).tobytes()).hexdigest() for _ in range(3)}
    assert len(digests) == 1
    other = d.copy()
    other[5] = -other[5]
    assert hashlib.sha256(rotate(values, other).tobytes()).hexdigest() not in digests
