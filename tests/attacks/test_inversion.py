"""A record back from a gradient: with a logistic model and one person, a readable update *is* that person's record.

∂loss/∂w = (p − y)·x and ∂loss/∂b = p − y, so x is their quotient, whatever clipping and the learning rate scale both by
(for deeper models: Zhu et al. 2019; Geiping et al. 2020). The update is the real trainer's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chi2

from confide.clients.data.records import SiteRecords
from confide.clients.training.models import build_model, flatten
from confide.clients.training.trainer import LocalTrainer, TrainingPlan
from confide.config import ModelConfig, TrainingConfig
from confide.privacy.dp import SecureRandom
from confide.privacy.sealing import Payload, Segment
from confide.privacy.sealing.lattice import KEY_BYTES, unpack_residues
from tests.privacy.sealing.cohort import Cohort

Floats = NDArray[np.float64]
INPUTS = 2000
SEGMENTS = [Segment(INPUTS + 1, -1.5, 1.5)]
#: Of a correlation between independent vectors of that length: seven standard deviations.
NOTHING = 7 / INPUTS**0.5
KEYED = ["sealed", "masked", "ckks"]


def update_of_one_record(record: NDArray[np.float32], noise_multiplier: float = 0.0) -> Floats:
    """One step of local training on one person with one record, as a site computes it."""
    label = np.ones(1, dtype=np.float32)
    records = SiteRecords(record[None, :], label, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), ["p"])
    plan = TrainingPlan(
        training=TrainingConfig(local_steps=1, learning_rate=1.0), task="binary", noise_multiplier=noise_multiplier,
        sample_rate=1.0, max_grad_norm=1.0, population=1,
    )  # fmt: skip
    model = build_model(ModelConfig(kind="logistic"), INPUTS, 1)
    trainer = LocalTrainer(model, records, plan, torch.device("cpu"), SecureRandom())
    return trainer.train(flatten(model), np.zeros(1, dtype=np.int64))


def invert(update: Floats) -> Floats:
    """The attack: features from a logistic model's update, weights first and the bias last."""
    return np.asarray(update[:INPUTS] / update[INPUTS])


def correlation(guess: Floats, record: NDArray[np.float32]) -> float:
    """How much of the record is in a guess, whatever its scale."""
    return abs(float(np.corrcoef(guess, record)[0, 1]))


@pytest.fixture(scope="module")
def record() -> NDArray[np.float32]:
    """One person's features."""
    return np.random.default_rng(8).uniform(-1, 1, INPUTS).astype(np.float32)


def payload_of(profile: str, update: Floats) -> Payload:
    """What the coordinator gets from a site for this update."""
    cohort = Cohort.make(3, 20, profile=profile)
    victim, *others = cohort.names
    vectors = {victim: update, **{name: np.zeros_like(update) for name in others}}
    return cohort.seal(vectors, SEGMENTS)[victim]


def readings(profile: str, payload: Payload) -> Iterator[Floats]:
    """Ways to read a payload as a vector of numbers, at every place that a vector could start."""
    data = b"".join(payload.chunks)
    numbers = [np.frombuffer(data, np.uint8)]
    if profile == "masked":
        numbers.append(np.frombuffer(data, "<u8"))
    else:
        numbers.append(np.concatenate([unpack_residues(chunk[:KEY_BYTES]) for chunk in payload.chunks]))
    for values in (part.astype(np.float64) for part in numbers):
        yield from (values[start : start + INPUTS] for start in range(0, len(values) - INPUTS + 1, INPUTS // 4))
        if len(values) < INPUTS:  # several coordinates share a word
            yield np.repeat(values, -(-INPUTS // len(values)))[:INPUTS]
            yield np.tile(values, -(-INPUTS // len(values)))[:INPUTS]


def looks_random(data: bytes) -> bool:
    """χ² of the bytes' frequencies against uniform, at one error in a million."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2).sum() / expected) < chi2.isf(1e-6, 255)


def test_an_open_update_of_one_record_is_that_record(record: NDArray[np.float32]) -> None:
    payload = payload_of("open", update_of_one_record(record))
    received = np.frombuffer(b"".join(payload.chunks), "<f4").astype(np.float64)
    assert np.abs(invert(received) - record).max() < 1e-3, "every feature, to three digits"
    assert not looks_random(b"".join(payload.chunks))


@pytest.mark.parametrize("profile", KEYED)
def test_from_a_protected_payload_the_same_update_gives_nothing(record: NDArray[np.float32], profile: str) -> None:
    """A correlation does not care for scale and offset, so nothing has to be divided out first."""
    update = update_of_one_record(record)
    found = list(readings(profile, payload_of(profile, update)))
    assert max(correlation(guess, record) for guess in found) < NOTHING
    assert correlation(update[:INPUTS], record) > 0.999, "the control: the update itself, read in the same way"


@pytest.mark.parametrize("profile", KEYED)
def test_a_protected_payload_is_indistinguishable_from_random_bytes(record: NDArray[np.float32], profile: str) -> None:
    payload = payload_of(profile, update_of_one_record(record))
    data = b"".join(payload.chunks)
    if profile == "masked":  # words below 2⁶¹: the highest byte is not a whole one
        data = np.frombuffer(data, np.uint8).reshape(-1, 8)[:, :7].tobytes()
    assert looks_random(data)
    values = np.frombuffer(data[: len(data) // 2 * 2], np.uint8).astype(np.float64)
    assert correlation(values[:-1], values[1:]) < 7 / len(values) ** 0.5, "nor does a byte tell the next one"


def test_the_noise_of_a_private_run_hides_the_record_even_in_an_open_update(record: NDArray[np.float32]) -> None:
    """Two locks, and this is the one that stands when all others fall (the control is the first test)."""
    update = update_of_one_record(record, noise_multiplier=1.0)
    assert correlation(invert(update), record) < NOTHING
