"""One run at one site: the objects made from its manifest, kept while the agent lives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confide.clients.data.preprocess import encoded_width
from confide.clients.data.records import SiteRecords
from confide.clients.keys import RunKeys
from confide.clients.store import ModelState
from confide.clients.training.admission import admit_model
from confide.clients.training.models import build_model, layout_of
from confide.clients.training.trainer import LocalTrainer, TrainingPlan, choose_device
from confide.errors import PolicyError, SealingError
from confide.privacy.digest import digest
from confide.privacy.dp import SecureRandom
from confide.privacy.dp.metrics import SENSITIVITY
from confide.privacy.sealing import Agreement, Payload, Segment, make_profile
from confide.privacy.sealing.transcript import transcript
from confide.protocol.envelope import Address
from confide.protocol.manifest import Manifest
from confide.protocol.messages import SumReference
from confide.strategies import StepInput, make_strategy

__all__ = ["SiteRun", "model_digest", "state_digest"]

Floats = NDArray[np.float64]


class SiteRun:
    """Everything a site derives from the manifest. Holds no state that a restart must keep."""

    def __init__(
        self, manifest: Manifest, site: str, records: SiteRecords, rng: SecureRandom, device: str, coordinator: str
    ) -> None:
        self.manifest, self.site, self._rng = manifest, site, rng
        self.profile = make_profile(manifest.sealing, len(manifest.members))
        self.strategy = make_strategy(manifest.strategy)
        self.keys = RunKeys(manifest, site, self.profile, coordinator)
        inputs, outputs = encoded_width(manifest.schema_), manifest.label.outputs
        model = build_model(manifest.model, inputs, outputs)
        if layout_of(model) != manifest.layout or records.inputs != inputs:
            raise PolicyError("the manifest's model is not the one this site builds from it", where=f"site {site}",
                              hint="install the same version of confide and of the model's package")  # fmt: skip
        admit_model(model, inputs, outputs)
        member = manifest.member(site)
        if member is None:
            raise PolicyError("this site is not in the roster", where=f"site {site}")
        plan = TrainingPlan(
            training=manifest.training,
            task=manifest.label.task,
            noise_multiplier=manifest.noise_multiplier,
            sample_rate=manifest.privacy.sample_rate,
            max_grad_norm=manifest.privacy.max_grad_norm,
            population=member.population,
        )
        self.trainer = LocalTrainer(model, records, plan, choose_device(device), rng)

    def address(self, round_: int, step: str) -> Address:
        """Where a message of this run belongs."""
        manifest = self.manifest
        return Address(
            federation=manifest.federation, roster_version=manifest.roster_version, run=manifest.run,
            manifest=manifest.digest, key_epoch=0, round=round_, step=step,
        )  # fmt: skip

    def compute(self, round_: int, model: ModelState, train: NDArray[np.int64], held_out: NDArray[np.int64]) -> Floats:
        """The round's vector, private by itself.

        Args:
            round_: The round.
            model: The replicated model.
            train: Units that may be drawn for training.
            held_out: Units that the metrics are computed on.
        """
        parts: list[Floats] = []
        if self.manifest.trains_in(round_):
            parts.append(self.trainer.train(model.weights, train) * self.manifest.weight(self.site))
        if size := self.manifest.metric_width(round_):
            exact = self.trainer.metric_sum(model.weights, held_out)
            noise = self._rng.normal(size) * (SENSITIVITY * self.manifest.metrics_noise_multiplier)
            parts.append(exact + noise)
        return np.concatenate(parts)

    def segments(self, round_: int) -> list[Segment]:
        """Public ranges of a round's vector, from the manifest alone, the same at every site.

        A step moves the weights by at most lr · C (everybody drawn pulls the same way, at the expected number of
        draws) plus noise of standard deviation lr · σ · C / (q N); Adam's step is below 3.2 · lr (Kingma, Ba 2015,
        with β = 0.9, 0.999). Half as much again and eight standard deviations are left for the unexpected; what still
        lies outside is clipped after the noise, which costs accuracy, never privacy.
        """
        manifest, training, found = self.manifest, self.manifest.training, []
        smallest = min(m.population for m in manifest.members)
        if manifest.trains_in(round_):
            steps, lr, clip = training.local_steps, training.learning_rate, manifest.privacy.max_grad_norm
            noise = manifest.noise_multiplier * clip * steps**0.5 / (manifest.privacy.sample_rate * smallest)
            pull = (
                3.2 * steps
                if training.optimizer == "adam"
                else (1.5 * clip * steps + 8 * noise) / (1 - training.momentum)
            )
            bound = lr * pull * max(manifest.weight(m.site) for m in manifest.members)
            found.append(Segment(manifest.layout.size, -bound, bound))
        if size := manifest.metric_width(round_):
            spread = 8 * SENSITIVITY * manifest.metrics_noise_multiplier
            largest = max(m.population for m in manifest.members)
            found.append(Segment(size, -spread - 1, largest + spread + 1))
        return found

    def apply(self, model: ModelState, reference: SumReference, chunks: Sequence[bytes]) -> ModelState:
        """The replicated strategy step for one opened sum.

        Raises:
            SealingError: The cohort or the sum is not acceptable.
        """
        members = {m.site for m in self.manifest.members}
        cohort = reference.cohort
        if list(cohort) != sorted(set(cohort)) or not set(cohort) <= members or len(cohort) < self.manifest.min_sites:
            raise SealingError("a sum over a cohort that this run does not allow", where=f"round {reference.round}")
        # The transcript holds the round: a sum cannot be passed off as that of another one.
        statements = dict(zip(cohort, reference.statements, strict=False))
        bound = transcript(self.manifest.digest, self.manifest.roster_version, 0, reference.round, statements)
        if len(reference.statements) != len(cohort) or reference.transcript != bound:
            raise SealingError("a sum whose transcript is not of this round", where=f"round {reference.round}")
        total = Payload(tuple(chunks), tuple(int(tag, 16) for tag in reference.tags))
        agreement = Agreement(cohort, reference.transcript)
        opened = self.keys.session.open(total, self.segments(reference.round), agreement)
        size = self.manifest.metric_width(reference.round)
        metrics = opened[len(opened) - size :] if size else None
        weights, state = model.weights, model.state
        if self.manifest.trains_in(reference.round):
            weight = sum(self.manifest.weight(site) for site in cohort)
            update = opened[: self.manifest.layout.size]
            weights, state = self.strategy.step(StepInput(weights, update, weight, state))
        return ModelState(reference.round, weights, state, metrics)


def model_digest(model: ModelState) -> str:
    """Names the replicated weights."""
    return digest("model", model.weights.astype("<f4").tobytes()).hex()


def state_digest(model: ModelState) -> str:
    """Names the strategy's memory."""
    return digest("state", *(part.astype("<f8").tobytes() for part in model.state)).hex()
