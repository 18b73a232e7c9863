"""What a sweep's page draws beside the frontier: quality by round with its spread over seeds, and cost by profile.

Charts follow the page's colours and say in words what they show; every number also stands in a table of the page.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from confide.privacy.audit.chart import Series, line_chart
from confide.simulations.sweeps.frontier import WATERMARK
from confide.simulations.sweeps.result import Cell, Sweep, show_value, without_seed

__all__ = ["PROFILE", "Cost", "Curve", "costs", "curves", "rounds_chart"]

PROFILE = "sealing.profile"
#: More lines than this lie on each other; names longer than this do not fit beside their line.
_MOST_LINES, _LONGEST_NAME = 6, 12


@dataclass(frozen=True, slots=True)
class Curve:
    """Quality after 0, 1, … rounds of one setting: the median over its cells, and the lowest and highest of them.

    Attributes:
        setting: Its number, from 1, in the order of the grid.
        name: Its values on the axes without the seed.
        short: The same, or its number, for a chart.
    """

    setting: int
    name: str
    short: str
    median: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    cells: int


def curves(sweep: Sweep) -> list[Curve]:
    """One a setting, over the rounds that all its cells have; empty where no quality is common to all."""
    quality = sweep.quality
    if quality is None or not sweep.exact:
        return []
    found = []
    for number, group in enumerate(sweep.groups, 1):
        known = ([p[quality] for p in takewhile(lambda p: quality in p, cell.result.curve)] for cell in group)
        rounds = list(zip(*known, strict=False))
        if not rounds:
            continue
        values = without_seed(group[0].values)
        name = ", ".join(f"{key}={show_value(value)}" for key, value in values.items()) or "all cells"
        short = ", ".join(f"{_symbol(key)} {show_value(value)}" for key, value in values.items())
        found.append(Curve(
            setting=number, name=name, short=short if 0 < len(short) <= _LONGEST_NAME else f"setting {number}",
            median=[statistics.median(r) for r in rounds], low=[min(r) for r in rounds], high=[max(r) for r in rounds],
            cells=len(group),
        ))  # fmt: skip
    return found


def rounds_chart(found: Sequence[Curve], quality: str) -> tuple[str, Sequence[Curve]]:
    """The chart as SVG text, and the curves it draws: of many, those that are best at the end."""
    drawn = sorted(found, key=lambda c: -c.median[-1])[:_MOST_LINES]
    drawn.sort(key=lambda c: c.setting)
    apart = 0.009 * max(1, max(len(curve.median) for curve in drawn) - 1)
    series = [
        Series(
            curve.short,
            # A little beside each other, so that no bar hides another.
            [(i + (place - (len(drawn) - 1) / 2) * apart, value) for i, value in enumerate(curve.median)],
            list(zip(curve.low, curve.high, strict=True)) if curve.cells > 1 else (),
        )
        for place, curve in enumerate(drawn)
    ]
    title = f"Held-out {quality} by round; {WATERMARK}"
    return line_chart("rounds", title, "rounds trained", f"held-out {quality}, exact", series), drawn


@dataclass(frozen=True, slots=True)
class Cost:
    """What one profile costs, over all cells that have it: the median, and the lowest and highest.

    Attributes:
        uplink_bytes, downlink_bytes: For one training round's sum, a site; None where unknown.
        bytes_per_parameter: Sent, as it was measured.
        seconds: Of a whole run on this machine.
        quality: Held-out, where the cells have one in common.
    """

    profile: str
    cells: int
    uplink_bytes: float | None
    downlink_bytes: float | None
    bytes_per_parameter: float
    seconds: tuple[float, float, float]
    quality: tuple[float, float, float] | None


def costs(sweep: Sweep) -> list[Cost]:
    """One a profile, in the order of the axis; empty where the profile is not an axis."""
    groups: dict[str, list[Cell]] = {}
    for cell in sweep.cells:
        if PROFILE in cell.values:
            groups.setdefault(str(cell.values[PROFILE]), []).append(cell)
    quality = sweep.quality
    return [
        Cost(
            profile=profile, cells=len(cells), uplink_bytes=_median([c.uplink_bytes for c in cells]),
            downlink_bytes=_median([c.downlink_bytes for c in cells]),
            bytes_per_parameter=statistics.median(c.result.bytes_per_parameter for c in cells),
            seconds=_spread([c.result.seconds for c in cells]),
            quality=_spread([sweep.metrics_of(c)[quality] for c in cells]) if quality is not None else None,
        )
        for profile, cells in groups.items()
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _median(values: Sequence[int | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if len(known) == len(values) and known else None


def _symbol(key: str) -> str:
    return "ε" if key == "privacy.epsilon" else key.rpartition(".")[2]
