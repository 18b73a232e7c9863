"""`[scenario]`: what goes wrong in a simulated world. Nothing of it exists in a deployment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from confide.config.section import Section

__all__ = ["Absence", "Churn", "Drifted", "Poisoned", "ScenarioConfig"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Absence(Section):
    """A site, and the round at which it leaves for good, or first answers."""

    site: str
    round: Annotated[int, Field(ge=1)]


class Drifted(Section):
    """A site whose numbers lie `shift` half-widths of their bounds too high (negative: too low), clipped to them."""

    site: str
    shift: Annotated[float, Field(ge=-2, le=2)]


class Poisoned(Section):
    """A site that trains on false labels, each class called the next one, and multiplies its update by `factor` (model
    replacement, Bagdasaryan et al. 2020). What it may send stays within the public range, as anybody's."""

    site: str
    factor: Annotated[float, Field(ge=1, le=1e6)] = 1.0


class Churn(Section):
    """Before every round, the share of those who consent that withdraws, and of those who do not that gives consent."""

    withdraw: Fraction = 0.0
    give: Fraction = 0.0


class ScenarioConfig(Section):
    """All of it; empty: nothing goes wrong.

    `stragglers` is the chance of a site to be too late with its update in a round. `dropouts` leave at a round and do
    not come back; `latecomers` agree on keys with the rest, and first answer in a round at one.
    """

    stragglers: Fraction = 0.0
    dropouts: tuple[Absence, ...] = ()
    latecomers: tuple[Absence, ...] = ()
    churn: Churn = Churn()
    drifted: tuple[Drifted, ...] = ()
    poisoned: tuple[Poisoned, ...] = ()

    @model_validator(mode="after")
    def _once(self) -> ScenarioConfig:
        named: dict[str, list[str]] = {
            "dropouts": [e.site for e in self.dropouts], "latecomers": [e.site for e in self.latecomers],
            "drifted": [e.site for e in self.drifted], "poisoned": [e.site for e in self.poisoned],
        }  # fmt: skip
        for name, sites in named.items():
            if len(sites) != len(set(sites)):
                raise ValueError(f"{name} names a site twice")
        return self

    @property
    def sites(self) -> set[str]:
        """Every site that is named."""
        absent = {e.site for e in (*self.dropouts, *self.latecomers)}
        return absent | {e.site for e in self.drifted} | {e.site for e in self.poisoned}
