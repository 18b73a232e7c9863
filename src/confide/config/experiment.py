"""What an experiment file may say: frozen, keyword-only, every unknown key refused.

The sections that a site must know (`model`, `training`, `strategy`, `privacy`, `sealing`, `schema`, label) are
the same objects in the run's manifest, so a simulated and a deployed run are described by one vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from confide.config.partition import PartitionConfig
from confide.config.protection import PrivacyConfig, SealingConfig
from confide.config.scenario import ScenarioConfig
from confide.config.section import Scalar
from confide.config.section import Section as _Section
from confide.config.strategy import StrategyConfig

__all__ = [
    "CategoryFeature",
    "ConsentConfig",
    "DataConfig",
    "Experiment",
    "Feature",
    "LabelConfig",
    "ModelConfig",
    "NumberFeature",
    "PartitionConfig",
    "PrivacyConfig",
    "RunConfig",
    "ScenarioConfig",
    "SchemaConfig",
    "SealingConfig",
    "SimulatedConsent",
    "SitesConfig",
    "StrategyConfig",
    "TrainingConfig",
    "Withdrawal",
    "metric_rounds",
]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Purpose = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*$", max_length=200)]


class RunConfig(_Section):
    """`[run]`: what the training is called and is for. `seed` draws splits and simulated consent, never noise."""

    name: Name
    purpose: Purpose
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 20
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    report_metrics_every: Annotated[int, Field(ge=1)] = 10


class LabelConfig(_Section):
    """What is predicted: exactly one of a threshold (`at_least`), `classes`, or public `bounds` (regression)."""

    column: str
    at_least: Annotated[float, Field(allow_inf_nan=False)] | None = None
    classes: tuple[Scalar, ...] | None = None
    bounds: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> LabelConfig:
        given = [k for k in ("at_least", "classes", "bounds") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of at_least, classes, bounds (got {', '.join(given) or 'none'})")
        if self.classes is not None and (len(self.classes) < 2 or not _all_different(self.classes)):
            raise ValueError("classes needs at least two different values")
        if self.bounds is not None:
            _check_bounds(self.bounds)
        return self

    @property
    def task(self) -> Literal["binary", "multiclass", "regression"]:
        """The kind of prediction."""
        if self.bounds is not None:
            return "regression"
        return "multiclass" if self.classes is not None and len(self.classes) > 2 else "binary"

    @property
    def outputs(self) -> int:
        """Columns of the model's output: one logit, a logit a class, or one number."""
        return len(self.classes or ()) if self.task == "multiclass" else 1


class DataConfig(_Section):
    """`[data]`: the table. `public` means that anybody may see every row. `site` is read by natural partitions only."""

    file: str
    subject: str
    site: str | None = None
    label: LabelConfig
    public: bool = False
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2

    @property
    def keys(self) -> list[str]:
        """Columns that tell whose a row is, and where it lies: identifiers, and no features."""
        return [self.subject] if self.site is None else [self.subject, self.site]


class NumberFeature(_Section):
    """A number, clipped to public bounds and scaled to [-1, 1]. Bounds may be left out where they are learned."""

    kind: Literal["number"]
    bounds: tuple[float, float] | None = None
    missing: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @field_validator("bounds")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if value is None else _check_bounds(value)

    @property
    def known_bounds(self) -> tuple[float, float]:
        """The bounds, declared or learned by now.

        Raises:
            ValueError: They are still to be learned.
        """
        if self.bounds is None:
            raise ValueError("the bounds of a number are not known yet")
        return self.bounds


class CategoryFeature(_Section):
    """One of a public list of values, one-hot; a value outside the list has no hot column."""

    kind: Literal["category"]
    values: Annotated[tuple[Scalar, ...], Field(min_length=1)]
    missing: Scalar | None = None

    @model_validator(mode="after")
    def _values(self) -> CategoryFeature:
        if not _all_different(self.values):
            raise ValueError("values are not all different")
        if self.missing is not None and canonical_value(self.missing) not in map(canonical_value, self.values):
            raise ValueError(f"missing = {self.missing!r} is not one of values")
        return self


Feature = Annotated[NumberFeature | CategoryFeature, Field(discriminator="kind")]


class SchemaConfig(_Section):
    """`[schema]`: the features and their public bounds. A name may be a pattern (`pixel*`).

    `missing = "midpoint"` fills a missing number with the middle of its bounds and gives a missing category no
    hot column; `"refuse"` (the default) makes a missing value an error.

    `bounds = "learn"` lets numbers leave out their bounds: they are then learned by a statistics run before the
    training, from noised, sealed histograms that are charged to the held-out persons.
    """

    missing: Literal["midpoint", "refuse"] = "refuse"
    bounds: Literal["declared", "learn"] = "declared"
    features: Annotated[dict[str, Feature], Field(min_length=1)]

    @model_validator(mode="after")
    def _known_or_learned(self) -> SchemaConfig:
        for name in self.unknown_bounds:
            if self.bounds != "learn":
                raise ValueError(f'feature {name} has no bounds: declare them, or set schema.bounds = "learn"')
        return self

    @property
    def unknown_bounds(self) -> tuple[str, ...]:
        """Numbers whose bounds are still to be learned, in the schema's order."""
        return tuple(n for n, f in self.features.items() if isinstance(f, NumberFeature) and f.bounds is None)

    def with_bounds(self, bounds: Mapping[str, tuple[float, float]]) -> SchemaConfig:
        """The schema with these bounds where they were unknown."""
        known = {n: f.model_copy(update={"bounds": bounds[n]}) if n in bounds else f for n, f in self.features.items()}
        return self.model_copy(update={"features": known})


class SitesConfig(_Section):
    """`[sites]`: thresholds, and each site's declared population (a public constant, never recomputed)."""

    min_sites: Annotated[int, Field(ge=3)] = 3
    min_subjects: Annotated[int, Field(ge=1)] = 20
    #: How many sites each round is drawn for; all of them where it is left out.
    per_round: Annotated[int, Field(ge=3)] | None = None
    population: dict[str, Annotated[int, Field(ge=1)]]

    @model_validator(mode="after")
    def _floor(self) -> SitesConfig:
        small = [name for name, count in self.population.items() if count < self.min_subjects]
        if small:
            raise ValueError(f"population of {', '.join(small)} is below min_subjects = {self.min_subjects}")
        if self.per_round is not None and self.per_round < self.min_sites:
            raise ValueError(f"per_round = {self.per_round} is below min_sites = {self.min_sites}")
        return self

    def population_of(self, site: str) -> int | None:
        """Declared number of subjects of a site, or None where neither it nor a default is declared."""
        return self.population.get(site, self.population.get("default"))


class SimulatedConsent(_Section):
    """Draw who consents, at the experiment's seed."""

    fraction: Fraction


class Withdrawal(_Section):
    """Before round `round`, this fraction of the consenting subjects withdraws."""

    round: Annotated[int, Field(ge=1)]
    fraction: Fraction


class ConsentConfig(_Section):
    """`[consent]`: simulated, or imported from a file in any format that `confide consent import` reads.

    The format is told from the content; `format` names it. `mapping` is a mapping file, see `docs/consent.md`.
    """

    simulate: SimulatedConsent | None = None
    file: str | None = None
    format: Literal["csv", "jsonl", "27560", "fhir", "kantara", "mapped"] | None = None
    mapping: str | None = None
    withdrawals: tuple[Withdrawal, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> ConsentConfig:
        if (self.simulate is None) == (self.file is None):
            raise ValueError("give exactly one of simulate, file: without consent nobody takes part")
        if self.file is None and (self.format is not None or self.mapping is not None):
            raise ValueError("format and mapping belong to file")
        return self


class ModelConfig(_Section):
    """`[model]`: `logistic`, `mlp` with `hidden`, or `package.module:function` returning an `nn.Module`."""

    kind: str = "logistic"
    hidden: tuple[Annotated[int, Field(ge=1, le=100_000)], ...] = ()
    options: dict[str, Scalar] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> ModelConfig:
        if self.kind not in ("logistic", "mlp") and self.kind.count(":") != 1:
            raise ValueError(f"kind is 'logistic', 'mlp' or 'package.module:function' (got {self.kind!r})")
        if self.kind == "mlp" and not self.hidden:
            raise ValueError("an mlp needs hidden, for example hidden = [64, 32]")
        if self.kind != "mlp" and self.hidden:
            raise ValueError("hidden belongs to kind = 'mlp'")
        if self.kind in ("logistic", "mlp") and self.options:
            raise ValueError("options belong to a model of your own (package.module:function)")
        return self


class TrainingConfig(_Section):
    """`[training]`: what a site does in a round."""

    local_steps: Annotated[int, Field(ge=1, le=100_000)] = 10
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _momentum(self) -> TrainingConfig:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum belongs to optimizer = 'sgd'")
        return self


class Experiment(_Section):
    """A whole experiment file."""

    run: RunConfig
    data: DataConfig
    schema_: Annotated[SchemaConfig, Field(alias="schema")]
    sites: SitesConfig
    partition: PartitionConfig = PartitionConfig()
    consent: ConsentConfig
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    strategy: StrategyConfig = StrategyConfig()
    privacy: PrivacyConfig
    sealing: SealingConfig = SealingConfig()
    scenario: ScenarioConfig = ScenarioConfig()

    @model_validator(mode="before")
    @classmethod
    def _overlapping(cls, tree: Any) -> Any:
        """Where people lie at several sites and nobody says at how many at most, it is two."""
        if not isinstance(tree, Mapping):
            return tree
        partition, privacy = tree.get("partition"), tree.get("privacy")
        split = isinstance(partition, Mapping) and partition.get("overlap") not in (None, 0)
        if split and isinstance(privacy, Mapping) and "max_sites_per_subject" not in privacy:
            return {**tree, "privacy": {**privacy, "max_sites_per_subject": 2}}
        return tree

    @model_validator(mode="after")
    def _together(self) -> Experiment:
        if (why := self.strategy.unknown()) is not None:
            raise ValueError(f"strategy.kind = {self.strategy.kind!r}: {why}")
        if self.partition.kind == "natural" and self.data.site is None:
            raise ValueError(
                "data.site is missing: name the column that says where a record lies, or deal people out with "
                "partition.kind = iid, dirichlet, quantity or shards"
            )
        if self.partition.overlap and self.privacy.max_sites_per_subject < 2:
            raise ValueError(
                "partition.overlap puts people at several sites, and privacy.max_sites_per_subject = 1 says that "
                "nobody is: leave it out (then it is 2), or say at how many a person may be"
            )
        if not self.privacy.is_private and not self.data.public:
            raise ValueError(
                "privacy.epsilon = inf needs data.public = true: without noise, what a site sends reveals its people"
            )
        if self.privacy.unsafe_noise_seed is not None and not self.data.public:
            raise ValueError(
                "privacy.unsafe_noise_seed needs data.public = true: noise that everybody knows protects nobody"
            )
        if self.sites.per_round is not None and (self.sealing.profile != "open" or self.schema_.bounds == "learn"):
            raise ValueError(
                "sites.per_round needs sealing.profile = 'open' and declared bounds: under the other profiles the keys "
                "of a run are agreed on by all of its sites"
            )
        if self.sealing.rotation and self.training.optimizer != "sgd":
            raise ValueError(
                "sealing.rotation needs training.optimizer = 'sgd': no tight bound on Adam's norm is public"
            )
        if self.privacy.is_private and self.privacy.epsilon > self.privacy.site_epsilon_limit:
            raise ValueError(
                f"privacy.epsilon = {self.privacy.epsilon:g} is above privacy.site_epsilon_limit = "
                f"{self.privacy.site_epsilon_limit:g}, the most a site's ledger will ever hold"
            )
        return self

    @property
    def metric_rounds(self) -> tuple[int, ...]:
        """See `metric_rounds`."""
        return metric_rounds(self.run)


def metric_rounds(run: RunConfig) -> tuple[int, ...]:
    """Rounds at which the model *entering* the round is evaluated; the last is `rounds + 1`, without training."""
    every = run.report_metrics_every
    return (*range(every + 1, run.rounds + 1, every), run.rounds + 1)


def canonical_value(value: object) -> str:
    """One spelling for a category that a table may hold as boolean, integer, whole float or text."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    return {"true": "1", "false": "0"}.get(text.lower(), text)


def _all_different(values: tuple[Scalar, ...]) -> bool:
    return len(set(map(canonical_value, values))) == len(values)


def _check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"bounds are two finite numbers, the lower first (got [{low:g}, {high:g}])")
    return bounds


def describe_value(value: Any) -> str:
    """A value as it would stand in TOML, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
