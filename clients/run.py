"""One run at one site: the objects made from its manifest, kept while the agent lives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confide.clients.data.preprocess import encoded_width, unscaled_columns
from confide.clients.data.records import SiteRecords
from confide.clients.gathered import signed_payloads
from confide.clients.keys import RunKeys
from confide.clients.ranges import segments
from confide.clients.store import ModelState
from confide.clients.training.resident import resident_model
from confide.clients.training.trainer import LocalTrainer, TrainingPlan, choose_device
from confide.errors import ConfigError, PolicyError, SealingError
from confide.privacy.digest import digest, keyed_digest
from confide.privacy.dp import SecureRandom
from confide.privacy.dp.metrics import SENSITIVITY
from confide.privacy.dp.statistics import contributions
from confide.privacy.sealing import Agreement, Opened, Payload, Segment, make_profile
from confide.privacy.sealing.transcript import transcript
from confide.privacy.sealing.vault import Vault
from confide.protocol.bounds import coarse_ranges
from confide.protocol.envelope import Address
from confide.protocol.manifest import Manifest
from confide.protocol.messages import SumReference, UnlockReply
from confide.protocol.statements import signed_reply
from confide.strategies import State, StepInput, Strategy, admit_strategy, make_strategy, to_grid
from confide.strategies.scaffold import control_change, correction

__all__ = ["SiteRun", "model_digest"]

Floats = NDArray[np.float64]


class SiteRun:
    """Everything a site derives from the manifest, and its keys; a restart makes it anew."""

    def __init__(
        self,
        manifest: Manifest,
        site: str,
        records: SiteRecords,
        rng: SecureRandom,
        device: str,
        coordinator: str,
        vault: Vault | None = None,
    ) -> None:
        #: Does a seed decide every draw? Then a restarted site computes the very same update again.
        self.reproducible = manifest.privacy.unsafe_noise_seed is not None  # admitted by the policy on public data only
        self.manifest, self.site, self._coordinator = manifest, site, coordinator
        self._rng = SecureRandom(unsafe_key=self._unsafe_key(0, "noise")) if self.reproducible else rng
        self._records = records
        self.strategy = _admitted(manifest, site)
        self.profile = make_profile(manifest.sealing, len(manifest.members), gather=manifest.single_updates)
        self.keys = RunKeys(manifest, site, self.profile, coordinator, vault)
        inputs = encoded_width(manifest.schema_)
        model, layout = resident_model(manifest.model, inputs, manifest.label.outputs)
        if layout != manifest.layout or records.inputs != inputs:
            raise PolicyError("the manifest's model is not the one this site builds from it", where=f"site {site}",
                              hint="install the same version of confide and of the model's package")  # fmt: skip
        member = manifest.member(site)
        if member is None:
            raise PolicyError("this site is not in the roster", where=f"site {site}")
        most = manifest.training.local_steps
        #: Local steps that this site takes, a public constant.
        self.steps = self.strategy.steps_of(site, most)
        if not 1 <= self.steps <= most:
            raise PolicyError("the strategy asks for more local steps than are charged", where=f"site {site}")
        plan = TrainingPlan(
            training=manifest.training.model_copy(update={"local_steps": self.steps}),
            proximal=self.strategy.proximal,
            task=manifest.label.task,
            noise_multiplier=manifest.noise_multiplier,
            sample_rate=manifest.privacy.sample_rate,
            max_grad_norm=manifest.privacy.max_grad_norm,
            population=member.population,
        )
        self.trainer = LocalTrainer(model, records, plan, choose_device(device), self._rng)
        #: The round and the update that waits to be sealed. Never on a disk.
        self.pending: tuple[int, Floats] | None = None
        #: This site's own control variate, where the strategy has them; 0 before its first update was applied.
        self.control = np.zeros(manifest.layout.size)
        #: What that update was sealed for, by attempt, where the run retries.
        self.attempts: dict[int, Agreement] = {}

    def destroy(self) -> None:
        """Forget every key, and an update that waits."""
        self.pending = None
        self.trainer.destroy()
        self.keys.destroy()

    def address(self, round_: int, step: str, *, epoch: int | None = None, attempt: int = 0) -> Address:
        """Where a message of this run belongs; the key epoch is the one in force unless another is named."""
        manifest = self.manifest
        in_force = 0 if step == "join" else self.keys.epoch
        return Address(
            federation=manifest.federation, roster_version=manifest.roster_version, run=manifest.run,
            manifest=manifest.digest, key_epoch=in_force if epoch is None else epoch, round=round_, step=step,
            attempt=attempt,
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
        if self.reproducible:
            self._rng.unsafe_restart(self._unsafe_key(round_, "noise"))
        if self.manifest.trains_in(round_):
            parts += self._train(model, train)
        if size := self.manifest.metric_width(round_):
            exact = (
                self._histograms(round_, model, held_out)
                if self.manifest.statistics
                else self.trainer.metric_sum(model.weights, held_out)
            )
            noise = self._rng.normal(size) * (SENSITIVITY * self.manifest.metrics_noise_multiplier)
            parts.append(exact + noise)
        return np.concatenate(parts)

    def _train(self, model: ModelState, train: NDArray[np.int64]) -> list[Floats]:
        """This site's weighted update; with control variates also the weighted change of its own."""
        weight, training = self.weight(self.site), self.manifest.training
        factor = weight * self.strategy.factor(self.site, training.local_steps)
        if not self.manifest.control_variates:
            return [self.trainer.train(model.weights, train) * factor]
        common = model.state[0]
        update = self.trainer.train(model.weights, train, correction(common, self.control))
        change = control_change(update, common, self.steps, training.learning_rate)
        return [update * factor, change * weight]

    def weight(self, site: str) -> float:
        """A site's public weight in sums; where single updates are compared, each site counts once."""
        return 1.0 if self.manifest.single_updates else self.manifest.weight(site)

    def next_control(self, round_: int, vector: Floats) -> Floats | None:
        """This site's own control variate once a round's vector is applied; None where it stays as it is."""
        if not self.manifest.control_variates or not self.manifest.trains_in(round_):
            return None
        size = self.manifest.layout.size
        return self.control + vector[size : 2 * size] / self.weight(self.site)

    def rounding(self, round_: int) -> SecureRandom | None:
        """Draws for rounding a round's vector to integers; None: from the operating system."""
        return SecureRandom(unsafe_key=self._unsafe_key(round_, "rounding")) if self.reproducible else None

    def _unsafe_key(self, round_: int, what: str) -> bytes:
        """A round's own stream, so that no draw depends on where an earlier process was killed. The run's name is not
        in it: a run can be repeated."""
        seed = str(self.manifest.privacy.unsafe_noise_seed)
        return digest("unsafe noise", *(part.encode() for part in (seed, self.site, str(round_), what)))

    def _histograms(self, round_: int, model: ModelState, held_out: NDArray[np.int64]) -> Floats:
        """The exact statistics of these units, before noise; they must not leave as they are."""
        batch = self._records.gather(held_out)
        weight = (1.0 / batch.records_of[batch.owner]).double().numpy()
        values = batch.x[:, unscaled_columns(self.manifest.schema_)].double().numpy()
        ranges = None
        if round_ > 1:
            if model.metrics is None:
                raise SealingError("the first release of the statistics was not opened", where=f"round {round_}")
            ranges = coarse_ranges(self.manifest, model.metrics)
        return contributions(values, weight, ranges)

    def segments(self, round_: int) -> list[Segment]:
        """Public ranges of a round's vector."""
        return segments(self.manifest, round_)

    def apply(self, model: ModelState, reference: SumReference, chunks: Sequence[bytes]) -> ModelState:
        """The replicated strategy step for one opened sum.

        Raises:
            SealingError: The cohort or the sum is not acceptable.
        """
        cohort = reference.cohort
        strangers = any(self.manifest.member(site) is None for site in cohort)
        if list(cohort) != sorted(set(cohort)) or strangers or len(cohort) < self.manifest.min_sites:
            raise SealingError("a sum over a cohort that this run does not allow", where=f"round {reference.round}")
        # The transcript holds the round: a sum cannot be passed off as that of another one.
        statements = dict(zip(cohort, reference.statements, strict=False))
        manifest, attempt = self.manifest, reference.attempt
        bound = transcript(
            manifest.digest, manifest.roster_version, self.keys.epoch, reference.round, statements, attempt
        )
        if len(reference.statements) != len(cohort) or reference.transcript != bound:
            raise SealingError("a sum whose transcript is not of this round", where=f"round {reference.round}")
        if manifest.single_updates:
            place = self.address(reference.round, "seal", attempt=attempt)
            chunks = signed_payloads(manifest, reference, chunks, place, self._coordinator)
        total = Payload(tuple(chunks), tuple(int(tag, 16) for tag in reference.tags))
        opened = self.keys.session.open(total, self.segments(reference.round), self._agreement(reference))
        values = opened.values
        size = self.manifest.metric_width(reference.round)
        metrics = values[len(values) - size :] if size else None
        weights, state, trained = model.weights, model.state, model.trained
        if self.manifest.trains_in(reference.round):
            trained = reference.round
            weights, state = self._step(model, cohort, opened, reference.round)
        return ModelState(reference.round, weights, state, metrics, opened.saturated, trained)

    def _step(
        self, model: ModelState, cohort: Sequence[str], opened: Opened, round_: int
    ) -> tuple[NDArray[np.float32], State]:
        """The strategy's step."""
        manifest, size = self.manifest, self.manifest.layout.size
        weights = [(site, self.weight(site)) for site in cohort]
        everybody = float(len(manifest.members)) if manifest.single_updates else manifest.roster_weight
        updates, unit = None, 1.0
        if opened.each is not None:
            updates, unit = to_grid(opened.each[:, :size], self.segments(round_)[0].high)
        # fsum is correctly rounded: the same number from every version of Python, which sum() does not give.
        return self.strategy.step(
            StepInput(
                model=model.weights, total=opened.values[:size], weight=math.fsum(w for _, w in weights),
                state=model.state, control=opened.values[size : 2 * size] if manifest.control_variates else None,
                roster_weight=everybody, cohort=tuple(weights),
                local_steps=manifest.training.local_steps, updates=updates, unit=unit,
            )
        )  # fmt: skip

    def model_tag(self, model: ModelState) -> str:
        """Names the weights among the sites. The coordinator learns the key with the released model, and no other."""
        return keyed_digest(self.keys.model_key(model.trained), "model", model.weights.astype("<f4").tobytes()).hex()

    def state_tag(self, model: ModelState) -> str:
        """Names the strategy's memory among the sites."""
        parts = (part.astype("<f8").tobytes() for part in model.state)
        return keyed_digest(self.keys.model_key(model.trained), "state", *parts).hex()

    def _agreement(self, reference: SumReference) -> Agreement:
        """What a sum claims to be bound to; unlocked seeds count only inside their owners' signed replies."""
        seeds = []
        for site, statement in zip(reference.cohort, reference.unlocked, strict=False):
            place = self.address(reference.round, "unlock", attempt=reference.attempt)
            reply = signed_reply(self.manifest, statement, site, place, self._coordinator, UnlockReply)
            if reply.transcript != reference.transcript:
                raise SealingError("a seed that was unlocked for another sum", where=f"round {reference.round}")
            seeds.append(bytes.fromhex(reply.seed))
        return Agreement(reference.cohort, reference.transcript, self.manifest.sealing.retry, tuple(seeds))


def _admitted(manifest: Manifest, site: str) -> Strategy:
    """The run's strategy, if this run may have it: the coordinator's word for it does not count here."""
    strategy = make_strategy(manifest.strategy)
    try:
        admit_strategy(strategy, manifest)
    except ConfigError as error:
        raise PolicyError(f"{error.where} {error.what}", where=f"site {site}", hint=error.hint) from None
    return strategy


def model_digest(model: ModelState) -> str:
    """Names weights to everybody: the first ones, and the released ones."""
    return digest("model", model.weights.astype("<f4").tobytes()).hex()
