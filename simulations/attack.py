"""An attack on a finished run's claim of ε: can its training tell that a person took part?

The auditor is as strong as the definition of differential privacy allows. She knows every other person at the site, so
that nobody else need be there; she chooses the model of every round; and she sees the site's whole update, as only all
the other sites together could. She invents a person whom the public schema allows and whose gradient is as long as she
can make it, and lets a fair coin decide whether that person is in the site's data for a whole run: all rounds, all
local steps, through the code that sites run, noise from the operating system included. From the updates she guesses
what the coin said. Many such runs, each with a coin of its own, refute every ε that makes so many right guesses
improbable (`confide.privacy.dp.empirical`). One person a run: Jagielski, Ullman, Oprea 2020; Nasr et al. 2021.

No record of a real person is read and nothing real is released, so that it costs nothing on private data either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from confide.clients.data.records import SiteRecords
from confide.clients.run import SiteRun
from confide.clients.store import ModelState
from confide.clients.training.models import build_model, initial_model
from confide.clients.training.trainer import LocalTrainer, TrainingPlan, choose_device, require_device
from confide.config import CategoryFeature, LabelConfig, Scalar, SchemaConfig
from confide.errors import AuditError, ConfideError, ConfigError
from confide.privacy.audit.attacks import PLACES, Attack, claimed_epsilon, write_attack
from confide.privacy.audit.evidence import Evidence, load_evidence
from confide.privacy.audit.records import AttackResult, RunCreated
from confide.privacy.dp import SecureRandom
from confide.privacy.dp.empirical import CONFIDENCE, MOST, epsilon_shown
from confide.protocol.manifest import Manifest
from confide.server.software import software_versions

__all__ = ["ATTACK", "CANARIES", "FEWEST", "attack_run"]

#: How the attack is called in its record.
ATTACK = "one invented person a run, all updates of her site seen"
#: With fewer invented persons not even perfect guesses show anything worth a record.
FEWEST, CANARIES = 60, 500
_GUESSED, _CANDIDATES = 3, 64  # a third is guessed: those whose score says most, as many in as out
_RUN_SEED, _SITE = 0, "confide audit attack"
Floats = NDArray[np.float64]


def attack_run(
    folder: Path,
    *,
    run: str | None = None,
    site: str | None = None,
    canaries: int = CANARIES,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Attack:
    """Attack a run, and put the signed result beside its logs.

    Args:
        folder: Its output folder, or a folder of exported logs.
        run: Its name; None where the logs hold one run only.
        site: Which site's part is attacked; None: the first of the roster.
        canaries: How many persons are invented, m: so many whole runs of one site.
        device: Where to compute.
        progress: Called after each of them with how many are done, of how many.

    Raises:
        ConfigError: There is no such site, too few canaries, no such device, or the run claims no
            differential privacy of training.
        AuditError: There is no such run, or its logs do not hold.
        StorageError: The result cannot be written.
    """
    evidence = load_evidence(folder, run)
    if evidence.findings:
        raise AuditError(f"its logs do not hold together ({evidence.findings[0]})", where=str(folder),
                         hint="see confide audit verify: of such a run an attack shows nothing")  # fmt: skip
    manifest = _manifest(evidence)
    if not manifest.privacy.protects or manifest.statistics:
        raise ConfigError("claims no differential privacy of a training", where=f"run {manifest.run}",
                          hint="there is nothing to refute: attack a run with a finite ε, noise from the operating "
                          "system, and a model")  # fmt: skip
    site = manifest.members[0].site if site is None else site
    if manifest.member(site) is None:
        raise ConfigError(f"there is no site {site[:64]!r} in this run", where="--site",
                          hint=f"sites: {', '.join(m.site for m in manifest.members)}")  # fmt: skip
    if not FEWEST <= canaries <= MOST:
        raise ConfigError(f"{canaries:,} are too few to show anything, or too many to evaluate", where="--canaries",
                          hint=f"{FEWEST} to {MOST:,}")  # fmt: skip
    require_device(device, "--device")
    guesses, correct = _Attack(manifest, site, device).execute(canaries, progress)
    shown = epsilon_shown(canaries, guesses, correct, manifest.privacy.delta)
    return write_attack(folder, evidence, AttackResult(
        run=manifest.run, manifest=evidence.manifest_digest, attack=ATTACK, site=site, canaries=canaries,
        guesses=guesses, correct=correct, confidence=f"{CONFIDENCE:g}", shown=f"{shown:.{PLACES}f}",
        claimed=f"{claimed_epsilon(evidence.manifest):.{PLACES}f}", delta=f"{manifest.privacy.delta:g}",
        software=software_versions(),
    ))  # fmt: skip


def _manifest(evidence: Evidence) -> Manifest:
    number, created = next(evidence.coordinator.of(RunCreated))
    try:
        return Manifest.from_bytes(created.manifest.encode())
    except (ConfideError, ValueError) as error:
        raise AuditError(f"the manifest is not one of this version ({type(error).__name__})",
                         where=f"log of coordinator, entry {number}",
                         hint="attack it with the version of confide that made the run") from None  # fmt: skip


class _Attack:
    """A site with one person in its data, who takes part or does not.

    `direction` is what one draw of her adds to a step, in model coordinates, at the round's model; float64 [d].
    """

    def __init__(self, manifest: Manifest, site: str, device: str) -> None:
        self._manifest = manifest
        inputs = SiteRecords.build(
            _invented(manifest.schema_, manifest.label), schema=manifest.schema_, label=manifest.label,
            subject=_SUBJECT, unit=manifest.privacy.unit, where=_SITE,
        )  # fmt: skip
        self._run = SiteRun(manifest, site, inputs, SecureRandom(), device, manifest.coordinator_key)
        weights, _ = initial_model(manifest.model, inputs.inputs, manifest.label.outputs, _RUN_SEED)
        size = manifest.layout.size
        self._model = ModelState(0, weights, self._run.strategy.initial_state(size), None)
        gradients = _gradients(manifest, inputs, weights)
        # What is longer than C is clipped to C: her gradient, as a step adds it.
        lengths = np.maximum(np.linalg.norm(gradients, axis=1), 1e-12)
        self._unit = int(np.argmax(lengths))
        self._direction = gradients[self._unit] * min(1.0, manifest.privacy.max_grad_norm / lengths[self._unit])

    def execute(self, canaries: int, progress: Callable[[int, int], None]) -> tuple[int, int]:
        """(guesses, right guesses)."""
        coins = SecureRandom().uniform(canaries) < 0.5
        scores = np.empty(canaries)
        try:
            for number, takes_part in enumerate(coins):
                scores[number] = self._score(bool(takes_part))
                progress(number + 1, canaries)
        finally:
            self._run.destroy()
        side = max(1, canaries // _GUESSED // 2)
        order = np.argsort(scores, kind="stable")
        return 2 * side, int((~coins[order[:side]]).sum() + coins[order[-side:]].sum())

    def _score(self, takes_part: bool) -> float:
        """How far a whole run moved against her gradient."""
        units = np.array([self._unit] if takes_part else [], dtype=np.int64)
        nobody, size = np.zeros(0, dtype=np.int64), self._manifest.layout.size
        total = 0.0
        for round_ in range(1, self._manifest.rounds + 1):
            vector = self._run.compute(round_, self._model, units, nobody)
            total -= float(vector[:size] @ self._direction)
        return total if math.isfinite(total) else 0.0


_SUBJECT = "confide audit attack: invented person"


def _gradients(manifest: Manifest, records: SiteRecords, weights: NDArray[np.float32]) -> Floats:
    """Every person's own gradient, float64 [persons, d]: one step over her alone, without noise or clipping."""
    one_step = TrainingPlan(
        training=manifest.training.model_copy(
            update={"local_steps": 1, "learning_rate": 1.0, "optimizer": "sgd", "momentum": 0.0}
        ),
        task=manifest.label.task, noise_multiplier=0.0, sample_rate=1.0, max_grad_norm=1e12, population=1,
    )  # fmt: skip
    model = build_model(manifest.model, records.inputs, manifest.label.outputs)
    trainer = LocalTrainer(model, records, one_step, choose_device("cpu"), SecureRandom())
    return np.stack([-trainer.train(weights, np.array([unit])) for unit in range(len(records.persons))])


def _invented(schema: SchemaConfig, label: LabelConfig) -> pd.DataFrame:
    """Persons at random corners of the public schema, a record each."""
    rng = SecureRandom()

    def pick(values: tuple[Scalar, ...]) -> list[Scalar]:
        return [values[int(u * len(values))] for u in rng.uniform(_CANDIDATES)]

    columns: dict[str, list[Scalar]] = {}
    for name, feature in schema.features.items():
        columns[name] = pick(feature.values if isinstance(feature, CategoryFeature) else feature.bounds or (-1.0, 1.0))
    if label.at_least is not None:
        columns[label.column] = pick((label.at_least - 1.0, label.at_least))
    else:
        columns[label.column] = pick(label.classes or label.bounds or ())
    return pd.DataFrame({**columns, _SUBJECT: [f"invented {i}" for i in range(_CANDIDATES)]})
