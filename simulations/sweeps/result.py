"""What a sweep tells its caller: its cells, and the settings they are repetitions of."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from confide.simulations.result import Result, json_number
from confide.simulations.sweeps.cost import SweepCost
from confide.simulations.sweeps.frontier import WATERMARK

__all__ = ["EPSILON", "SEED", "Cell", "Setting", "Sweep", "show_value", "without_seed"]

EPSILON, SEED = "privacy.epsilon", "run.seed"
#: Metrics by which settings are compared, the first that all cells have; higher is better in each.
_QUALITIES = ("auc", "r2", "accuracy")


@dataclass(frozen=True, slots=True)
class Cell:
    """One finished run. `values` are the axes' values, `label` the same as assignments; the bytes are what a site sends
    and receives for one training round's sum, None where nobody has computed them."""

    number: int
    label: str
    values: dict[str, Any]
    result: Result
    uplink_bytes: int | None = None
    downlink_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """Cells that differ only in their seed.

    Attributes:
        values: The axes' values without the seed.
        epsilon: What any one of its runs costs a person, by itself.
        median, low, high: Quality over the cells, on held-out persons; exact or released, as `Sweep.exact` says.
        cells: Their numbers.
    """

    values: dict[str, Any]
    epsilon: float
    median: float
    low: float
    high: float
    cells: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep, finished or under way.

    Attributes:
        name: Of the experiment.
        axes: Key → values, in the order given.
        cells: What is finished, in the order of the grid.
        seconds: Since it was begun or, in a later process, resumed.
        out: The folder.
        cost: What all cells of the grid cost together; None where each has ledgers of its own.
        beside: The most cells that ran beside each other.
    """

    name: str
    axes: dict[str, list[Any]]
    cells: tuple[Cell, ...]
    seconds: float
    out: Path
    cost: SweepCost | None = None
    beside: int = 1

    @cached_property
    def exact(self) -> bool:
        """Are the cells' metrics the simulator's own? Only where all data are public; else they are the released ones,
        noised and charged."""
        return all(cell.result.metrics is not None for cell in self.cells)

    def metrics_of(self, cell: Cell) -> dict[str, float]:
        """What may be said of a cell's model."""
        found = cell.result.metrics if self.exact else cell.result.released_metrics
        return {name: value for name, value in (found or {}).items() if value is not None}

    @cached_property
    def quality(self) -> str | None:
        """The metric that settings are compared by; None where the cells have none in common."""
        return next((q for q in _QUALITIES if self.cells and all(q in self.metrics_of(c) for c in self.cells)), None)

    @property
    def metric_names(self) -> list[str]:
        """Of all cells, in order."""
        return list(dict.fromkeys(name for cell in self.cells for name in self.metrics_of(cell)))

    @cached_property
    def groups(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells of each point of the grid, repetitions taken together, in the order of the grid."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(repr(without_seed(cell.values)), []).append(cell)
        return tuple(map(tuple, found.values()))

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """What each group came to; empty where nothing can be compared."""
        quality = self.quality
        if quality is None:
            return ()
        found = []
        for group in self.groups:
            values = [self.metrics_of(cell)[quality] for cell in group]
            found.append(Setting(
                values=without_seed(group[0].values),
                epsilon=max(cell.result.epsilon.max for cell in group),
                median=statistics.median(values), low=min(values), high=max(values),
                cells=tuple(cell.number for cell in group),
            ))  # fmt: skip
        return tuple(found)

    @property
    def best(self) -> Setting | None:
        """The highest median; of equals the one with the lower ε. A baseline without privacy competes only with its
        like. Whoever shows it shows the watermark beside it."""
        private = [s for s in self.settings if math.isfinite(s.epsilon)]
        return max(private or self.settings, key=lambda s: (s.median, -s.epsilon), default=None)

    @property
    def watermark(self) -> str:
        """What must stand wherever `best` is shown. Exact metrics are outside of what anybody has paid for."""
        if self.cost is None or self.exact:
            return WATERMARK
        whole = show_value(round(self.cost.epsilon, 2))
        return f"selection paid for: all {self.cost.cells} cells together cost ε = {whole} per {self.cost.unit}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What nobody may overlook in any of the cells."""
        return tuple(dict.fromkeys(w for cell in self.cells for w in cell.result.warnings))

    def to_json(self) -> dict[str, Any]:
        """The object of `sweep.json` and `--json`; where all cells were charged together, also what they cost so."""
        return {
            "name": self.name,
            "axes": {key: _plain(values) for key, values in self.axes.items()},
            "quality": self.quality,
            "best": None if self.best is None else self._setting(self.best),
            "watermark": self.watermark,
            **({} if self.cost is None else {"metrics": self._kind, "cost": self.cost.to_json()}),
            "warnings": list(self.warnings),
            "settings": [self._setting(s) for s in self.settings],
            "cells": [self._cell(c) for c in self.cells],
            "seconds": self.seconds,
            "out": str(self.out),
        }

    @property
    def _kind(self) -> str:
        return "exact" if self.exact else "released"

    def _setting(self, setting: Setting) -> dict[str, Any]:
        spread = {"median": setting.median, "low": setting.low, "high": setting.high}
        return {
            "values": _plain(setting.values),
            "epsilon": json_number(setting.epsilon),
            str(self.quality): spread,
            "cells": list(setting.cells),
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        result = cell.result
        return {
            "cell": cell.number,
            "values": _plain(cell.values),
            "run_id": result.run_id,
            "metrics": result.metrics,
            "released_metrics": result.released_metrics,
            "epsilon": json_number(result.epsilon.max),
            **({} if self.cost is None else {"epsilon_of_sweep": json_number(self.cost.epsilon)}),
            "delta": result.delta,
            "unit": result.unit,
            "neighbours": result.neighbours,
            "bytes_per_parameter": result.bytes_per_parameter,
            "uplink_bytes": cell.uplink_bytes,
            "downlink_bytes": cell.downlink_bytes,
            "seconds": result.seconds,
            "out": str(result.out),
        }


def show_value(value: Any) -> str:
    """A value of an axis for people."""
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def without_seed(values: dict[str, Any]) -> dict[str, Any]:
    """What repetitions of one point have in common."""
    return {key: value for key, value in values.items() if key != SEED}


def _plain(value: Any) -> Any:
    """Infinities as text, dates and the like as they would be written."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return json_number(value) if isinstance(value, str | int | float) else str(value)
