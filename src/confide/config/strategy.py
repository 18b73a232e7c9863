"""`[strategy]`: which rule makes the next model of the sites' updates, and its options.

An option belongs to the kinds that use it and is refused elsewhere: an option that does nothing is a mistake that
nobody notices. What is not given has its default filled in, so that a run's manifest holds every number that its sites
compute with.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import Field, model_validator

from confide.config.section import Scalar, Section

__all__ = ["STRATEGY_GROUP", "STRATEGY_OPTIONS", "StrategyConfig", "installed_strategies"]

#: Packages offer strategies under this group of entry points.
STRATEGY_GROUP = "confide.strategies"

#: The built-in kinds: each one's options and their defaults. Those of the adaptive ones are Flower's.
STRATEGY_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {"server_learning_rate": 1.0},
    "fedprox": {"server_learning_rate": 1.0, "mu": 0.1},
    "fedavgm": {"server_learning_rate": 1.0, "momentum": 0.9},
    "fedadam": {"server_learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedyogi": {"server_learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedadagrad": {"server_learning_rate": 0.1, "tau": 1e-3},
    "scaffold": {"server_learning_rate": 1.0, "steps": None},
    "fednova": {"server_learning_rate": 1.0, "steps": None},
    "median": {"server_learning_rate": 1.0},
    "trimmed_mean": {"server_learning_rate": 1.0, "trim": 0.2},
    "krum": {"server_learning_rate": 1.0, "byzantine": 1},
    "multi_krum": {"server_learning_rate": 1.0, "byzantine": 1, "keep": None},
}

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class StrategyConfig(Section):
    """`[strategy]`: a built-in kind with its options; or your own, `package.module:Class` or an installed name, with
    `options`.

    `mu`: weight of the proximal term (fedprox). `momentum`, `beta1`, `beta2`: decay of the server's momentum and
    second moment; `tau`: added to its root. `steps`: local steps of single sites, where they differ (fednova,
    scaffold). `trim`: share of updates cut off at each end (trimmed_mean). `byzantine`: how many sites may send
    anything at all; `keep`: how many updates are averaged (krum, multi_krum).
    """

    kind: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?$", max_length=200)] = "fedavg"
    server_learning_rate: Positive | None = None
    mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    momentum: Decay | None = None
    beta1: Decay | None = None
    beta2: Decay | None = None
    tau: Positive | None = None
    steps: dict[str, Annotated[int, Field(ge=1, le=100_000)]] | None = None
    trim: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    byzantine: Annotated[int, Field(ge=0)] | None = None
    keep: Annotated[int, Field(ge=1)] | None = None
    options: dict[str, Scalar] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Fill in what this kind uses and was not given; refuse what it does not use."""
        if not isinstance(data, Mapping):
            return data
        given = {k: v for k, v in data.items() if v is not None}
        kind = given.get("kind", cls.model_fields["kind"].default)
        own = STRATEGY_OPTIONS.get(kind) if isinstance(kind, str) else None
        known = set(own) if own is not None else {"options"}
        for name in given:
            if name in cls.model_fields and name not in known | {"kind"} and given[name] != {}:
                raise ValueError(_not_for(name, str(kind), known))
        return {**{k: v for k, v in (own or {}).items() if v is not None}, **given}

    @property
    def is_own(self) -> bool:
        """Is it a strategy that does not come with confide?"""
        return self.kind not in STRATEGY_OPTIONS

    def describe(self) -> str:
        """The kind and every option in force, for people."""
        chosen = self.options if self.is_own else {k: getattr(self, k) for k in STRATEGY_OPTIONS[self.kind]}
        shown = [
            f"{name.replace('_', ' ')} {_shown(value)}" for name, value in chosen.items() if value not in (None, {})
        ]
        return f"{self.kind} ({', '.join(shown)})" if shown else self.kind

    def unknown(self) -> str | None:
        """What to say of a name that nothing installed answers to; None where something does."""
        if not self.is_own or ":" in self.kind or self.kind in (names := installed_strategies()):
            return None
        known = [*STRATEGY_OPTIONS, *names]
        near = difflib.get_close_matches(self.kind, known, n=1, cutoff=0.5)
        guess = f": did you mean {near[0]!r}?" if near else ""
        return f"input should be one of {', '.join(map(repr, known))}, or 'package.module:Class'{guess}"


def installed_strategies() -> list[str]:
    """Names of strategies that installed packages offer; a built-in kind keeps its name."""
    return sorted({e.name for e in entry_points(group=STRATEGY_GROUP)} - set(STRATEGY_OPTIONS))


def _not_for(name: str, kind: str, known: set[str]) -> str:
    if known == {"options"}:
        return f"{name} belongs to a built-in kind; a strategy of your own takes options"
    users = [k for k, names in STRATEGY_OPTIONS.items() if name in names] or ["a strategy of your own"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"{kind} has {', '.join(sorted(known))}"
    return f"{name} belongs to {', '.join(users)}, not to {kind}; {hint}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
