"""What a simulated run, or the plan of one, tells its caller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from confide.privacy.sealing import Exposure

__all__ = [
    "HONEST",
    "Epsilon",
    "Intervals",
    "Plan",
    "Progress",
    "Result",
    "SitePlan",
    "intervals_from_json",
    "json_intervals",
    "json_number",
]

#: What whoever trains anew must not be left to believe.
HONEST = (
    "The model released before stays as it was. Differential privacy bounds what it says about whoever has left; it is "
    "not erasure."
)

NEIGHBOURS = "add or remove one"
#: 95 % intervals by metric, over noise and sampling error; None where the noise is too large to give one.
Intervals = dict[str, tuple[float, float] | None]


def json_number(value: Any) -> Any:
    """JSON has no infinity: ε = ∞ is the text "inf"."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def json_intervals(intervals: Intervals | None) -> dict[str, list[float] | None] | None:
    """JSON has no tuples."""
    return None if intervals is None else {k: None if v is None else list(v) for k, v in intervals.items()}


def intervals_from_json(tree: Mapping[str, Any] | None) -> Intervals | None:
    """Inverse of `json_intervals`."""
    return None if tree is None else {k: None if v is None else (v[0], v[1]) for k, v in tree.items()}


@dataclass(frozen=True, slots=True)
class Epsilon:
    """What this run costs a person: the bound from the public schedule, over all sites where she may lie, and what each
    adds to it."""

    max: float
    per_site: dict[str, float]


@dataclass(frozen=True, slots=True)
class Progress:
    """One round as it ends. Exact metrics belong to the model after `round` rounds, on public data only; released
    ones arrive later and belong to the model after `released_round` rounds."""

    round: int
    rounds: int
    epsilon: float
    metrics: dict[str, float] | None
    released: dict[str, float | None] | None
    released_intervals: Intervals | None
    released_round: int | None
    abandoned: bool
    #: Share of the latest sum's coordinates that were clipped to the quantiser's range.
    saturated: float
    #: Of the run: everything that may be said of its rounds so far lies there.
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        metrics: Exact, simulator-only; None unless the data are declared public.
        released_metrics: What a deployment would see: noised and charged.
        released_intervals: 95 % intervals of the released metrics, over noise and sampling error.
        curve: Exact metrics of the model after 0, 1, … rounds; empty unless the data are public.
        epsilon_curve: ε of this run after each round.
        ledger: Per site, the RDP ε of everything its ledger holds now, and its limit.
        consent_is_simulated: True unless a file said who consents.
        saturated: Largest share of a sum's coordinates that were clipped to the quantiser's range.
        exposure: What each coalition learns under the run's profile.
        learned: Bounds by column, where they were learned by a statistics run before the training.
        warnings: What nobody may overlook, e.g. that the noise came from a seed.
        retrained_after: The run after which this one trained anew; None where there is none.
        composed_sites: Over how many sites of a person ε is composed; 1: everybody lies at one.
    """

    run_id: str
    rounds: int
    sites: list[str]
    profile: str
    metrics: dict[str, float] | None
    released_metrics: dict[str, float | None] | None
    released_intervals: Intervals | None
    epsilon: Epsilon
    delta: float
    unit: str
    neighbours: str
    placement: str
    bytes_per_parameter: float
    rounds_abandoned: int
    seconds: float
    out: Path
    curve: list[dict[str, float]]
    epsilon_curve: list[float]
    ledger: dict[str, tuple[float, float]]
    consent_is_simulated: bool
    saturated: float
    exposure: tuple[Exposure, ...]
    learned: dict[str, tuple[float, float]]
    warnings: tuple[str, ...]
    retrained_after: str | None = None
    composed_sites: int = 1

    @property
    def consent_source(self) -> str:
        """Where consent came from, for people."""
        if self.retrained_after is not None:
            return "from the earlier run’s registries"
        return "simulated consent" if self.consent_is_simulated else "from the imported file"

    def describe_learned(self) -> str:
        """Learned bounds, for people."""
        return ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in self.learned.items())

    def describe_released(self, names: Mapping[str, str]) -> str:
        """Released metrics with their intervals, for people; `names` says what a metric is called."""
        intervals, found = self.released_intervals or {}, []
        for key, value in (self.released_metrics or {}).items():
            bounds = intervals.get(key)
            shown = "too noisy to say" if bounds is None else f"{bounds[0]:.3f}, {bounds[1]:.3f}"
            found.append(f"{names.get(key, key)} " + ("—" if value is None else f"{value:.3f} [{shown}]"))
        return ", ".join(found) + " (95 % intervals: noise and sampling of persons)"

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints: exactly these keys; where it trained anew, also `retrained_after`, and where
        people may lie at several sites, also `composed_sites`."""
        return {
            "run_id": self.run_id,
            "rounds": self.rounds,
            "sites": self.sites,
            "profile": self.profile,
            "metrics": self.metrics,
            "released_metrics": self.released_metrics,
            "released_intervals": json_intervals(self.released_intervals),
            "epsilon": {
                "max": json_number(self.epsilon.max),
                "per_site": {k: json_number(v) for k, v in self.epsilon.per_site.items()},
            },
            "delta": self.delta,
            "unit": self.unit,
            "neighbours": self.neighbours,
            "placement": self.placement,
            "bytes_per_parameter": self.bytes_per_parameter,
            "rounds_abandoned": self.rounds_abandoned,
            "seconds": self.seconds,
            "out": str(self.out),
            "warnings": list(self.warnings),
            **({} if self.retrained_after is None else {"retrained_after": self.retrained_after}),
            **({} if self.composed_sites == 1 else {"composed_sites": self.composed_sites}),
        }


@dataclass(frozen=True, slots=True)
class SitePlan:
    """A site before a run. `subjects` is exact on public data and None otherwise.

    `epsilon_*` are RDP ε of the whole ledger, `used_*` shares of its budget, before and after this run.
    """

    site: str
    population: int
    subjects: int | None
    epsilon_before: float
    epsilon_after: float
    used_before: float
    used_after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `--dry-run` prints: everything that is fixed before anything runs."""

    name: str
    purpose: str
    rounds: int
    local_steps: int
    #: The strategy with all its options.
    strategy: str
    metric_rounds: list[int]
    #: Columns whose bounds a statistics run learns before the training.
    learned: list[str]
    parameters: int
    profile: str
    sealing: str
    #: Bytes a site sends and receives for a training round's sum, and the share of it that is padding.
    uplink_bytes: int
    downlink_bytes: int
    padding: float
    unit: str
    neighbours: str
    placement: str
    epsilon: float
    delta: float
    #: Over how many sites of a person ε is composed.
    composed_sites: int
    sample_rate: float
    noise_multiplier: float
    metrics_noise_multiplier: float
    max_grad_norm: float
    site_epsilon_limit: float
    admitted: bool
    sites: list[SitePlan]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tree = asdict(self)
        tree["sites"] = [{k: json_number(v) for k, v in site.items()} for site in tree["sites"]]
        return {k: json_number(v) for k, v in tree.items()}
