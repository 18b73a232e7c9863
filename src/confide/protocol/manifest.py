"""The manifest: everything that defines a run, fixed from public inputs before it starts.

Its digest stands in every envelope: no peer can be talked into another profile, threshold, noise or step.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, FailFast, Field, model_validator

from confide.config import (
    LabelConfig,
    ModelConfig,
    PrivacyConfig,
    SchemaConfig,
    SealingConfig,
    StrategyConfig,
    TrainingConfig,
)
from confide.config.run import MAX_WAIT
from confide.privacy.digest import digest
from confide.privacy.dp import PrivacyEvent, Role, metrics, statistics
from confide.privacy.dp.events import merge_events
from confide.privacy.randomness import UNSAFE_NOISE
from confide.protocol.frozen import Frozen
from confide.protocol.identity import Hex32

__all__ = ["Hex32", "Layout", "Manifest", "Member"]


def _computable(sigma: float) -> float:
    """What an accountant cannot work with would be a fault at every site, or keep it busy for ever."""
    if sigma and not 1e-3 <= sigma <= 1e7:
        raise ValueError("a noise multiplier is 0, or between 0.001 and 10 million")
    return sigma


NoiseMultiplier = Annotated[float, AfterValidator(_computable)]


#: Left out of the bytes where they say nothing: a run that was begun before they existed keeps its digest.
_LATER = ("wait_seconds", "begins_after")
#: Draws that are remembered: of the round under way, those around it, and the last.
_KEPT_DRAWS = 8


class _Part(Frozen):
    model_config = ConfigDict(ser_json_inf_nan="strings")


class Member(_Part):
    """A site of the roster that takes part in a run: its name, signing key and declared population."""

    site: str
    public_key: Hex32
    population: Annotated[int, Field(ge=1)]


class Layout(_Part):
    """Where each parameter lies in the flat float32 model vector."""

    names: Annotated[tuple[str, ...], FailFast()]
    shapes: Annotated[tuple[Annotated[tuple[int, ...], FailFast()], ...], FailFast()]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)


class Manifest(_Part):
    """One run."""

    version: int = 1
    #: Charges are called `run/round/role`, and are found by that beginning: no name may be the beginning of another's.
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    federation: str
    #: The federation's roster: which version, and its digest. `members` are those of it that take part in this run.
    roster_version: int
    roster: Hex32
    purpose: str
    coordinator_key: Hex32
    members: Annotated[tuple[Member, ...], FailFast()]
    min_sites: Annotated[int, Field(ge=3)]
    min_subjects: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1, le=10_000)]
    metric_rounds: Annotated[tuple[int, ...], FailFast()]
    held_out: float
    label: LabelConfig
    schema_: SchemaConfig
    model: ModelConfig
    layout: Layout
    initial_model: Hex32
    training: TrainingConfig
    strategy: StrategyConfig
    privacy: PrivacyConfig
    #: σ of the training steps and of the metric releases; 0 only for the ε = ∞ baseline on public data.
    noise_multiplier: NoiseMultiplier
    metrics_noise_multiplier: NoiseMultiplier
    sealing: SealingConfig
    #: What the strategy needs sent: every site's single update, to every site (profile `open`); or, as further
    #: coordinates of a round's vector, the changes of the sites' control variates.
    single_updates: bool = False
    control_variates: bool = False
    #: How many sites each round is drawn for (profile `open`); None: every round is everybody's.
    sites_per_round: Annotated[int, Field(ge=3)] | None = None
    #: How long the coordinator waits for the sites' replies of a step; None: as long as it likes.
    wait_seconds: Annotated[int, Field(ge=1, le=MAX_WAIT)] | None = None
    #: The earlier run that began with the same first model, or released it; None: its weights are fresh.
    begins_after: str | None = None
    #: A statistics run: its two rounds learn the bounds that the schema leaves out, and nothing is trained.
    statistics: bool = False

    @model_validator(mode="after")
    def _bounds_known(self) -> Manifest:
        if self.statistics != bool(self.schema_.unknown_bounds):
            raise ValueError("bounds are learned in a run of its own, and before anything is trained")
        if self.statistics and (self.rounds, self.metric_rounds) != (1, (1, 2)):
            raise ValueError("a statistics run has two releases")
        return self

    @model_validator(mode="after")
    def _says_unsafe(self) -> Manifest:
        if self.privacy.unsafe_noise_seed is not None and not self.run.startswith("UNSAFE-"):
            raise ValueError("a run whose noise comes from a seed is called UNSAFE-…, so that its charges are, too")
        return self

    @model_validator(mode="after")
    def _roster(self) -> Manifest:
        for values in ([m.site for m in self.members], [m.public_key for m in self.members]):
            if len(set(values)) != len(values):
                raise ValueError("a site or a key takes part twice")
        return self

    @model_validator(mode="after")
    def _drawn(self) -> Manifest:
        if self.sites_per_round is None:
            return self
        if self.sealing.profile != "open" or self.single_updates or self.control_variates or self.statistics:
            raise ValueError("rounds are drawn for some of the sites under profile open, with a sum of updates only")
        if not self.min_sites <= self.sites_per_round <= len(self.members):
            raise ValueError("a round is drawn for at least min_sites sites, and at most all")
        return self

    def drawn(self, round_: int) -> tuple[str, ...]:
        """The sites that a round is for, in the order of the draw: everybody can compute it, and nobody chooses.

        The draw is a public hash of the run's name, the round and the site; where a seed makes the run repeatable, of
        that seed instead of the name.
        """
        return self._listed if self.sites_per_round is None else self._draws(round_)

    @cached_property
    def _listed(self) -> tuple[str, ...]:
        return tuple(m.site for m in self.members)

    @cached_property
    def _drawn_rounds(self) -> dict[int, tuple[str, ...]]:
        return {}

    def _draws(self, round_: int) -> tuple[str, ...]:
        if (found := self._drawn_rounds.get(round_)) is None:
            seed = self.privacy.unsafe_noise_seed
            start = (self.run if seed is None else f"seed {seed}", str(round_))
            parts = [part.encode() for part in start]
            ranks = {name: digest("sites of a round", *parts, name.encode()) for name in self._listed}
            found = tuple(sorted(self._listed, key=ranks.__getitem__)[: self.sites_per_round])
            if len(self._drawn_rounds) > _KEPT_DRAWS:
                self._drawn_rounds.clear()
            self._drawn_rounds[round_] = found
        return found

    def to_bytes(self) -> bytes:
        """The bytes that are signed and hashed."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        unsaid = {name for name in _LATER if getattr(self, name) is None}
        return self.model_dump_json(by_alias=False, exclude=unsaid).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse and validate; raises pydantic's `ValidationError`. The same bytes are parsed once: many sites of a
        simulation share the object, which never changes."""
        return _parsed(data)

    @cached_property
    def digest(self) -> str:
        """Hex digest of `to_bytes`."""
        return digest("manifest", self.to_bytes()).hex()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What nobody who reads of this run may overlook."""
        return (UNSAFE_NOISE,) if self.privacy.unsafe_noise_seed is not None else ()

    def bounds_of(self, column: str) -> tuple[float, float] | None:
        """The bounds of a number column, declared or learned; None where they are not known yet, or it is none."""
        return getattr(self.schema_.features.get(column), "bounds", None)

    def member(self, site: str) -> Member | None:
        """The entry of a site that takes part."""
        return self._by_name.get(site)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sites that take part, sorted."""
        return tuple(sorted(self._by_name))

    @cached_property
    def _by_name(self) -> dict[str, Member]:
        return {m.site: m for m in self.members}

    @cached_property
    def _mean_population(self) -> float:
        return sum(m.population for m in self.members) / len(self.members)

    @cached_property
    def populations(self) -> tuple[int, int]:
        """The smallest and the largest declared population."""
        found = [m.population for m in self.members]
        return min(found), max(found)

    @cached_property
    def heaviest(self) -> float:
        """The largest weight."""
        return max(self.weight(m.site) for m in self.members)

    @cached_property
    def roster_weight(self) -> float:
        """The sum of all weights; correctly rounded, and so the same from every version of Python."""
        return math.fsum(self.weight(m.site) for m in self.members)

    def weight(self, site: str) -> float:
        """Public aggregation weight of a site: its declared population over the roster's mean."""
        member = self.member(site)
        return member.population / self._mean_population if member is not None else 0.0

    def trains_in(self, round_: int) -> bool:
        """The round after the last only evaluates; a statistics run trains in none."""
        return round_ <= self.rounds and not self.statistics

    def metric_width(self, round_: int) -> int:
        """Coordinates of metrics, or of statistics, that ride at the end of a round's vector."""
        if round_ not in self.metric_rounds:
            return 0
        if self.statistics:
            return statistics.width(len(self.schema_.unknown_bounds), round_)
        return metrics.width(self.label.task)

    def vector_size(self, round_: int) -> int:
        """Coordinates of a round's vector: the update's, the control variate's where there is one, the metrics'."""
        parts = 2 if self.control_variates else 1
        return (parts * self.layout.size if self.trains_in(round_) else 0) + self.metric_width(round_)

    def charges(self, round_: int) -> list[PrivacyEvent]:
        """What a round costs each role; empty for ε = ∞ on public data."""
        privacy, found = self.privacy, list[PrivacyEvent]()
        if not privacy.is_private:
            return found
        if self.trains_in(round_):
            found.append(
                PrivacyEvent(
                    role=Role.TRAIN, unit=privacy.unit, noise_multiplier=self.noise_multiplier,
                    sample_rate=privacy.sample_rate, steps=self.training.local_steps,
                    max_grad_norm=privacy.max_grad_norm, sites=privacy.composed_sites,
                )
            )  # fmt: skip
        if self.metric_width(round_):
            found.append(
                PrivacyEvent(
                    role=Role.HELD_OUT, unit=privacy.unit, noise_multiplier=self.metrics_noise_multiplier,
                    sample_rate=1.0, steps=1, max_grad_norm=metrics.SENSITIVITY, sites=privacy.composed_sites,
                )
            )  # fmt: skip
        return found

    def all_charges(self, rounds: int | None = None) -> list[PrivacyEvent]:
        """What the first `rounds` rounds cost (None: the whole run), equal releases merged."""
        last = self.rounds + 1 if rounds is None else rounds
        return merge_events(e for r in range(1, last + 1) for e in self.charges(r))


@lru_cache(maxsize=8)
def _parsed(data: bytes) -> Manifest:
    return Manifest.model_validate_json(data)
