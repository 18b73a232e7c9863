"""What was released, as data: frozen records that accountants interpret. Never change a field's meaning; add a type.

σ is the noise multiplier (standard deviation of the noise over the sensitivity), q the Poisson sampling rate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Literal

from confide.errors import BudgetError

__all__ = ["PrivacyEvent", "Role", "event_from_json", "event_to_json", "merge_events"]


class Role(StrEnum):
    """Which part of a site's people a release touches. A person holds one role for ever, so the two compose in
    parallel: a person's loss is that of the role held."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyEvent:
    """`steps` Gaussian releases over Poisson-sampled units (q = 1: no sampling); neighbours add or remove one unit.

    Attributes:
        role: Whose data.
        unit: What a neighbour adds or removes: a `subject` or a `record`.
        noise_multiplier: σ > 0.
        sample_rate: q in (0, 1].
        steps: Number of releases, ≥ 0.
        max_grad_norm: The L2 sensitivity before noise (documentation; σ is relative to it).
        mechanism: How it was released.
        neighbours: Which data sets count as neighbours; substituting a unit would be about twice as far.
        sites: At how many sites a unit may lie, at most. Each of them makes these releases, so they compose that many
            times; 1: a unit lies at one site.
    """

    role: Role
    unit: Literal["subject", "record"]
    noise_multiplier: float
    sample_rate: float
    steps: int
    max_grad_norm: float
    mechanism: Literal["poisson_gaussian"] = "poisson_gaussian"
    neighbours: Literal["add_or_remove_one"] = "add_or_remove_one"
    sites: int = 1

    def __post_init__(self) -> None:
        if self.mechanism != "poisson_gaussian" or self.unit not in ("subject", "record"):
            raise BudgetError(f"unknown privacy event {self.mechanism!r} per {self.unit!r}", hint="update confide")
        if self.neighbours != "add_or_remove_one":
            raise BudgetError(f"unknown neighbours {self.neighbours!r}", hint="update confide")
        positive = self.noise_multiplier > 0 and 0 < self.sample_rate <= 1 and self.max_grad_norm > 0
        if not (positive and type(self.steps) is int and self.steps >= 0):
            raise BudgetError("a privacy event needs σ > 0, 0 < q ≤ 1, a whole number of steps ≥ 0, clip > 0")
        if type(self.sites) is not int or self.sites < 1:
            raise BudgetError("a privacy event needs a whole number of sites ≥ 1")

    @property
    def releases(self) -> int:
        """How many releases a unit may be in: those of every site where it may lie."""
        return self.steps * self.sites


def merge_events(events: Iterable[PrivacyEvent]) -> list[PrivacyEvent]:
    """Equal releases counted together: composition does not depend on the order."""
    steps: dict[PrivacyEvent, int] = {}
    for event in events:
        if event.steps:
            key = replace(event, steps=1)
            steps[key] = steps.get(key, 0) + event.steps
    return [replace(key, steps=count) for key, count in steps.items()]


def event_to_json(event: PrivacyEvent) -> str:
    """Canonical text: sorted keys, numbers as their shortest exact decimals. One site is not said, as in ledgers that
    were written before there could be more."""
    fields = asdict(event)
    if event.sites == 1:
        del fields["sites"]
    fields["noise_multiplier"] = repr(event.noise_multiplier)
    fields["sample_rate"] = repr(event.sample_rate)
    fields["max_grad_norm"] = repr(event.max_grad_norm)
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def event_from_json(text: str) -> PrivacyEvent:
    """Inverse of `event_to_json`.

    Raises:
        BudgetError: The event is unknown. Nothing may be charged on top of what cannot be read.
    """
    try:
        fields = json.loads(text)
        if set(fields) | {"sites"} != set(PrivacyEvent.__slots__):
            raise ValueError  # nothing is taken for granted about what was released
        return PrivacyEvent(
            role=Role(fields.pop("role")),
            noise_multiplier=float(fields.pop("noise_multiplier")),
            sample_rate=float(fields.pop("sample_rate")),
            max_grad_norm=float(fields.pop("max_grad_norm")),
            **fields,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BudgetError(
            f"holds an event that this version cannot read ({type(error).__name__})",
            where="privacy ledger",
            hint="use the version of confide that wrote it, or a newer one",
        ) from None
