"""What FedProx and SCAFFOLD add to a site's own steps: after clipping and noise, from no record, so for no charge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from confide.clients.data.records import SiteRecords
from confide.clients.training.models import build_model
from confide.clients.training.stacked import Chain
from confide.clients.training.trainer import LocalTrainer, TrainingPlan
from confide.config import ModelConfig, TrainingConfig
from confide.privacy.dp import SecureRandom
from confide.strategies.scaffold import control_change, correction

KEY, INPUTS, PERSONS, RATE = b"a key for tests, of thirty-two b", 3, 12, 0.25
SIZE = INPUTS + 1
Floats = NDArray[np.float64]
EVERYBODY, NOBODY = np.arange(PERSONS), np.arange(0)


def records() -> SiteRecords:
    """A few persons with one to five records each."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(PERSONS), rng.integers(1, 6, PERSONS))
    x = rng.uniform(-1, 1, (len(owner), INPUTS)).astype(np.float32)
    y = rng.integers(0, 2, len(owner)).astype(np.float32)
    return SiteRecords(x, y, owner, np.arange(PERSONS), [f"p{i}" for i in range(PERSONS)])


def train(
    eligible: NDArray[np.int64] = EVERYBODY, correct: Floats | None = None, start: float = 0.5, **changes: Any
) -> Floats:
    """The update of a site from a model of `start` in every weight."""
    steps, optimizer = changes.pop("steps", 5), changes.pop("optimizer", "sgd")
    plan = TrainingPlan(
        training=TrainingConfig(local_steps=steps, learning_rate=RATE, optimizer=optimizer), task="binary",
        **{"noise_multiplier": 0.0, "sample_rate": 1.0, "max_grad_norm": 1.0, "population": PERSONS} | changes,
    )  # fmt: skip
    model = build_model(ModelConfig(kind="logistic"), INPUTS, 1)
    trainer = LocalTrainer(model, records(), plan, torch.device("cpu"), SecureRandom(unsafe_key=KEY))
    return trainer.train(np.full(SIZE, start, dtype=np.float32), eligible, correct)


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Floats]:
    """Every step's clipped, noised and divided gradient, as the mechanism that is charged for leaves it."""
    seen: list[Floats] = []
    scale = DPOptimizer.scale_grad

    def watched(self: Any) -> None:
        scale(self)
        seen.append(np.concatenate([p.grad.detach().double().numpy().reshape(-1) for p in self.params]))

    monkeypatch.setattr(Chain, "of", lambda _: None)  # as any model but a chain is trained; a chain does the same
    monkeypatch.setattr(DPOptimizer, "scale_grad", watched)
    return seen


# --- FedProx ---------------------------------------------------------------------------------------------------------


def naive_proximal(mu: float, steps: int) -> Floats:
    """Gradient descent by autograd on: mean over persons of their mean loss, plus μ/2 ‖w − w₀‖²."""
    batch, start = records().gather(EVERYBODY), torch.full((SIZE,), 0.5, dtype=torch.float64)
    w = start.clone()
    for _ in range(steps):
        w.requires_grad_()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            batch.x.double() @ w[:INPUTS] + w[INPUTS], batch.y.double(), reduction="none"
        )
        of_person = torch.zeros(PERSONS, dtype=torch.float64).index_add(0, batch.owner, losses) / batch.records_of
        goal = of_person.mean() + mu / 2 * (w - start).square().sum()
        (gradient,) = torch.autograd.grad(goal, [w])
        w = (w - RATE * gradient).detach()
    return np.asarray((w - start).numpy())


@pytest.mark.parametrize("mu", [0.0, 0.3, 2.0])
def test_the_proximal_term_is_the_gradient_of_the_local_objective(mu: float) -> None:
    found = train(proximal=mu, max_grad_norm=1e3, steps=20)  # nobody is clipped
    assert np.allclose(found, naive_proximal(mu, 20), atol=1e-5)
    assert mu == 0.0 or not np.allclose(found, naive_proximal(0.0, 20), atol=1e-3)


def test_a_stronger_pull_keeps_a_site_nearer_to_the_rounds_model() -> None:
    lengths = [float(np.linalg.norm(train(proximal=mu, steps=30))) for mu in (0.0, 0.1, 1.0, 4.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0] / 3


def test_the_pull_is_added_after_clipping_and_noise(gradients: list[Floats]) -> None:
    """The update is exactly the recursion over what the mechanism gave: the pull is neither clipped nor noised."""
    mu, noisy = 0.8, {"noise_multiplier": 2.0, "max_grad_norm": 1e-2}
    found = train(proximal=mu, start=50.0, **noisy)
    w = np.zeros(SIZE)
    for gradient in gradients:
        w -= RATE * (gradient + mu * w)
    assert np.allclose(found, w, atol=1e-4)
    assert not np.allclose(found, -RATE * np.sum(gradients, axis=0), atol=1e-4), "the control: there is a pull"


def test_without_any_record_and_noise_the_pull_has_nothing_to_pull_at() -> None:
    assert train(NOBODY, proximal=1.0).tolist() == [0.0] * SIZE


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_pull_of_0_changes_not_one_bit(optimizer: str) -> None:
    noisy = {"noise_multiplier": 1.0, "optimizer": optimizer}
    assert train(proximal=0.0, **noisy).tobytes() == train(**noisy).tobytes()
    assert train(proximal=0.5, **noisy).tobytes() != train(**noisy).tobytes()


# --- SCAFFOLD --------------------------------------------------------------------------------------------------------


def controls(seed: int = 1) -> tuple[Floats, Floats]:
    """Somebody's c and cᵢ."""
    common, own = np.random.default_rng(seed).normal(scale=0.1, size=(2, SIZE))
    return common, own


def test_a_sites_next_control_variate_is_the_mean_of_its_private_gradients(gradients: list[Floats]) -> None:
    """Why it costs nothing: cᵢ⁺ is a mean of what the round is charged for, whatever c and cᵢ were."""
    (common, own), steps = controls(), 7
    update = train(correct=correction(common, own), steps=steps, noise_multiplier=1.5, sample_rate=0.5)
    following = own + control_change(update, common, steps, RATE)
    assert len(gradients) == steps
    assert np.allclose(following, np.mean(gradients, axis=0), atol=1e-6)


def test_the_correction_is_added_after_clipping_and_noise(gradients: list[Floats]) -> None:
    common, own = controls()
    found = train(correct=correction(common * 100, own), noise_multiplier=1.0, max_grad_norm=1e-2)
    assert np.allclose(found, -RATE * np.sum([g + common * 100 - own for g in gradients], axis=0), atol=1e-4)
    assert all(np.linalg.norm(g) < 1 for g in gradients), "the control: a clipped correction would be this short"


def test_a_correction_needs_no_record() -> None:
    common, own = controls()
    found = train(NOBODY, correction(common, own), steps=4)
    assert np.allclose(found, -4 * RATE * (common - own), atol=1e-6)


def test_a_step_with_control_variates_by_hand() -> None:
    # c = 1, cᵢ = 0.5, K = 4, η = 0.25, y − x = −2: cᵢ⁺ = cᵢ − c + 2 / 1 = 1.5, so the change is 1
    assert control_change(np.array([-2.0]), np.array([1.0]), 4, 0.25).tolist() == [1.0]
    assert correction(np.array([1.0]), np.array([0.5])).tolist() == [0.5]
