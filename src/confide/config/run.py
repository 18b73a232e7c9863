"""A run file: what a coordinator asks of a federation's sites. An experiment without data: those lie at the sites.

Column patterns (`pixel*`) are for experiments only: the coordinator, who expands them there, sees no table here, and a
site that told it its columns would tell more than was agreed on. Numbers may leave out their bounds (`bounds =
"learn"`): the file then starts the run that learns them, and afterwards, with what that has learned, the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from confide.config.experiment import (
    LabelConfig,
    ModelConfig,
    PrivacyConfig,
    RunConfig,
    SchemaConfig,
    SealingConfig,
    TrainingConfig,
    metric_rounds,
)
from confide.config.load import read_toml, validate
from confide.config.section import Section as _Section
from confide.config.strategy import StrategyConfig

__all__ = ["MAX_WAIT", "DeployedRun", "RunDataConfig", "RunSitesConfig", "load_run"]

#: Seconds that a step ever waits for replies: a week.
MAX_WAIT = 7 * 86_400


class RunDataConfig(_Section):
    """`[data]`: what is predicted, and the share of persons held out; both as the sites have it in their `site.toml`.

    `public` says that anybody may see every row; a site takes part in a run without noise only if it says so, too.
    """

    label: LabelConfig
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    public: bool = False


class RunSitesConfig(_Section):
    """`[sites]`: who takes part (`names`; left out: all members), and how few may.

    `min_sites` is the smallest cohort that is ever summed; left out: two thirds of those who take part, at least 3.
    `wait_seconds`: how long a step waits for the sites' replies. A site answers after twice what a round takes, and a
    part of its `reply_seconds`; it refuses a run that waits no longer than these.
    """

    names: tuple[str, ...] | None = None
    min_sites: Annotated[int, Field(ge=3)] | None = None
    min_subjects: Annotated[int, Field(ge=1)] = 20
    wait_seconds: Annotated[int, Field(ge=1, le=MAX_WAIT)] = 3600


class DeployedRun(_Section):
    """A whole run file."""

    run: RunConfig
    data: RunDataConfig
    schema_: Annotated[SchemaConfig, Field(alias="schema")]
    sites: RunSitesConfig = RunSitesConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    strategy: StrategyConfig = StrategyConfig()
    privacy: PrivacyConfig
    sealing: SealingConfig = SealingConfig()

    @model_validator(mode="after")
    def _together(self) -> DeployedRun:
        if not self.privacy.is_private and not self.data.public:
            raise ValueError("privacy.epsilon = inf needs data.public = true")
        if self.privacy.unsafe_noise_seed is not None and not self.data.public:
            raise ValueError("privacy.unsafe_noise_seed needs data.public = true")
        if self.sealing.rotation and self.training.optimizer != "sgd":
            raise ValueError("sealing.rotation needs training.optimizer = 'sgd'")
        if self.privacy.is_private and self.privacy.epsilon > self.privacy.site_epsilon_limit:
            raise ValueError("privacy.epsilon is above privacy.site_epsilon_limit, what a site's ledger ever holds")
        if (why := self.strategy.unknown()) is not None:
            raise ValueError(f"strategy.kind = {self.strategy.kind!r}: {why}")
        for name in self.schema_.features:
            if any(c in name for c in "*?["):
                raise ValueError(
                    f"feature {name!r} is a pattern: only who sees a table knows which columns it names, and a "
                    "coordinator sees none; a deployed run names its columns"
                )
        if self.data.label.column in self.schema_.features:
            raise ValueError(f"{self.data.label.column} is a feature and the label")
        return self

    @property
    def metric_rounds(self) -> tuple[int, ...]:
        """Rounds at which the model *entering* the round is evaluated."""
        return metric_rounds(self.run)


def load_run(source: Path | Mapping[str, Any]) -> DeployedRun:
    """Read a run file.

    Raises:
        ConfigError: It cannot be read or parsed, a key is unknown, or a value is not allowed.
    """
    where = str(source) if isinstance(source, Path) else "run"
    tree = read_toml(source, "give the path of a run file") if isinstance(source, Path) else source
    return validate(DeployedRun, tree, where, "mend the run file: it is an experiment without data files and consent")
