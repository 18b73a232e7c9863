"""What goes wrong in a simulated world: sites that are late, leave or come late, whose data drifted, or that lie.

All of it happens outside the deployed code: messages that a grid does not deliver, tables that are changed before a
site reads them, and a site whose own program multiplies what it trained. So what is shown is how the real coordinator
and the real other sites behave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray

from confide.clients.data.records import SiteRecords
from confide.clients.run import SiteRun
from confide.clients.site import Site
from confide.clients.training.trainer import LocalTrainer
from confide.config import Experiment, LabelConfig, NumberFeature, ScenarioConfig, SchemaConfig
from confide.errors import ConfigError
from confide.protocol.envelope import Header
from confide.protocol.flower import from_records
from confide.protocol.manifest import Manifest

__all__ = ["PoisonedSite", "Unreachable", "false_label", "honest", "in_scenario"]


#: Whoever is to take part at all agrees with the others on keys before the first round.
_JOINING = ("join", "secret", "keys")


class Unreachable:
    """Says of a message whether its site can be reached: stragglers, dropouts and latecomers, at the run's seed."""

    def __init__(self, scenario: ScenarioConfig, seed: int) -> None:
        self._stragglers, self._seed = scenario.stragglers, seed
        self._leave = {entry.site: entry.round for entry in scenario.dropouts}
        self._come = {entry.site: entry.round for entry in scenario.latecomers}
        self._round = 0

    def begin(self, round_: int) -> None:
        """The coordinator begins a round; what it sends before its first one belongs to round 0."""
        self._round = round_

    def __call__(self, message: Message, site: str) -> bool:
        if self._round >= self._leave.get(site, self._round + 1):
            return True
        if self._round < self._come.get(site, 0):
            return _step(message) not in _JOINING
        return bool(self._stragglers) and _step(message) == "train" and self._late(site)

    def _late(self, site: str) -> bool:
        text = f"confide/simulation/straggler/{self._seed}/{self._round}/{site}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48 < self._stragglers


def _step(message: Message) -> str:
    return Header.model_validate_json(from_records(message.content).header).step


def in_scenario(
    records: Mapping[str, SiteRecords], experiment: Experiment, schema: SchemaConfig
) -> dict[str, SiteRecords]:
    """The sites' records as the scenario has them: drifted, or with false labels.

    Raises:
        ConfigError: The scenario names a site that is not there, or labels that cannot be false.
    """
    scenario, found = experiment.scenario, dict(records)
    unknown = sorted(scenario.sites - set(records))
    if unknown:
        raise ConfigError(f"names site {unknown[0]!r}, which is not there", where="[scenario]",
                          hint=f"sites: {', '.join(sorted(records)[:20])}")  # fmt: skip
    for drifted in scenario.drifted:
        found[drifted.site] = found[drifted.site].changed(features=partial(_shifted, schema=schema, by=drifted.shift))
    label = experiment.data.label
    for poisoned in scenario.poisoned:
        if label.task == "regression":
            raise ConfigError("needs classes: a number has no next one", where="scenario.poisoned",
                              hint="poison a run whose label has classes or a threshold")  # fmt: skip
        found[poisoned.site] = found[poisoned.site].changed(labels=partial(false_label, label=label))
    return found


def honest(
    records: Mapping[str, SiteRecords], experiment: Experiment
) -> tuple[dict[str, SiteRecords], Callable[[torch.Tensor], torch.Tensor] | None]:
    """Whose held-out persons count, and what a poisoned site would call them; None where there is no such site."""
    liars = {poisoned.site for poisoned in experiment.scenario.poisoned}
    counted = {name: r for name, r in records.items() if name not in liars}
    return counted, partial(false_label, label=experiment.data.label) if liars else None


def false_label(y: torch.Tensor, label: LabelConfig) -> torch.Tensor:
    """Each class is called the next one, the last the first."""
    return torch.remainder(y + 1, max(2, label.outputs))


def _shifted(x: torch.Tensor, schema: SchemaConfig, by: float) -> torch.Tensor:
    """Numbers are encoded as [-1, 1]: a half-width of the bounds is 1."""
    moved, at = x.clone(), 0
    for feature in schema.features.values():
        if isinstance(feature, NumberFeature):
            moved[:, at] = (moved[:, at] + by).clamp(-1.0, 1.0)
            at += 1
        else:
            at += len(feature.values)
    return moved


class _Boosted:
    """A trainer whose updates are multiplied."""

    def __init__(self, trainer: LocalTrainer, factor: float) -> None:
        self._trainer, self._factor = trainer, factor

    def train(self, *args: Any, **kwargs: Any) -> NDArray[np.float64]:
        return self._trainer.train(*args, **kwargs) * self._factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class PoisonedSite(Site):
    """A site whose operator has changed its program; everything else is as deployed."""

    def __init__(self, *, factor: float, **deployed: Any) -> None:
        super().__init__(**deployed)
        self._factor = factor

    def _run(self, manifest: Manifest) -> SiteRun:
        run = super()._run(manifest)
        if not isinstance(run.trainer, _Boosted):
            run.trainer = _Boosted(run.trainer, self._factor)  # type: ignore[assignment]  # stands in for one
        return run
