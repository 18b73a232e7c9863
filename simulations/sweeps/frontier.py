"""The privacy/utility frontier: quality by ε, drawn so that it can be read without colour, and aloud.

Every such figure compares runs, and so carries the watermark: the ε beside a point is what that run alone would cost;
to choose a point after seeing them all would cost more, and nobody has charged it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from confide.simulations.figures import STYLE, save_figure

__all__ = ["WATERMARK", "Line", "Panel", "Point", "write_frontier"]

#: Stands wherever cells of a sweep are compared or the best of them is shown.
WATERMARK = "hypothetical ε; selection not private"

_LOOKS = (("#1d4ed8", "o"), ("#b45309", "s"), ("#166534", "^"), ("#7c3aed", "D"), ("#be123c", "v"), ("#0f766e", "P"))
_DASHES = ("-", "--", ":", "-.")
_TICKS = 8


@dataclass(frozen=True, slots=True)
class Point:
    """Median, lowest and highest quality over the repetitions at one ε; ε = ∞ is drawn as a level."""

    epsilon: float
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """One way of training, at several ε, ascending."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Panel:
    """What is compared on one data set."""

    title: str
    lines: Sequence[Line]


def write_frontier(
    panels: Sequence[Panel], path: Path, *, title: str, x_label: str, y_label: str, watermark: str = WATERMARK
) -> Path:
    """Write the figure: panels side by side on one scale of quality; returns its path.

    Args:
        panels: At least one, with the same lines in the same order.
        path: Where the SVG goes.
        title: Of the whole figure.
        x_label: Names ε with its unit and δ.
        y_label: Names the quality.
        watermark: What stands in the figure; its own where somebody has charged all of its points.
    """
    with rc_context(STYLE):  # type: ignore[arg-type]  # the stub wants matplotlib's literal type for keys
        figure = Figure(figsize=(7.2 if len(panels) == 1 else 4.6 * len(panels), 4.4), layout="constrained")
        shared = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(shared, panels, strict=True):
            _draw(axes, panel, watermark)
            axes.set_xlabel(x_label)
        shared[0].set_ylabel(y_label)
        handles, names = shared[0].get_legend_handles_labels()
        if len(names) > 1:
            # A marker is repeated on a long handle, so that dashes can be told apart.
            columns = 4 if max(map(len, names)) < 30 else 2
            figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        described = " ".join(_describe(panel) for panel in panels)
        return save_figure(figure, path, title, f"{y_label} by {x_label}; {watermark}. {described}")


def _draw(axes: Axes, panel: Panel, watermark: str) -> None:
    # Colour, marker and dash change together; lines look alike from the thirteenth on.
    epsilons: set[float] = set()
    for number, line in enumerate(panel.lines):
        colour, marker = _LOOKS[number % len(_LOOKS)]
        dash = _DASHES[number % len(_DASHES)]
        finite = [p for p in line.points if math.isfinite(p.epsilon)]
        xs = [p.epsilon for p in finite]
        epsilons.update(xs)
        if finite:
            axes.fill_between(xs, [p.low for p in finite], [p.high for p in finite], color=colour, alpha=0.12, lw=0)
            axes.plot(xs, [p.median for p in finite], color=colour, linestyle=dash, marker=marker, label=line.name)
        for point in (p for p in line.points if math.isinf(p.epsilon)):
            label = "ε = ∞, no privacy" if len(panel.lines) == 1 else f"{line.name}, ε = ∞"
            axes.plot(
                [0, 1], [point.median] * 2, transform=axes.get_yaxis_transform(), color=colour, marker=marker,
                markerfacecolor="white", linestyle=(0, (1, 3)), lw=1.6, clip_on=False, label=label,
            )  # fmt: skip
    if epsilons:
        axes.set_xscale("log")
        ticks = sorted(epsilons)
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / _TICKS)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.text(
        0.98, 0.03, watermark, transform=axes.transAxes, ha="right", va="bottom", fontsize=9.5, fontstyle="italic",
        color="#4b5563", bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 2.0}, zorder=5,
    )  # fmt: skip


def _describe(panel: Panel) -> str:
    lines = (
        f"{line.name}: " + ", ".join(f"{p.median:.3f} at ε = {_text(p.epsilon)}" for p in line.points)
        for line in panel.lines
    )
    return f"{panel.title}: " + "; ".join(lines) + "."


def _text(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{epsilon:g}"
