"""Figures of a run, as SVG with text that a screen reader can read."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from confide.privacy.dp import run_label
from confide.privacy.dp.metrics import NAMES
from confide.privacy.files import write_atomically
from confide.simulations.result import Result

__all__ = ["STYLE", "save_figure", "write_figures"]

_INK, _ACCENT, _SECOND = "#1f2937", "#1d4ed8", "#b45309"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "confide", "font.size": 11, "axes.edgecolor": _INK, "text.color": _INK,
    "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "text.parse_math": False,
}  # fmt: skip


def write_figures(result: Result, folder: Path) -> list[Path]:
    """Write `quality.svg` (public data only) and `epsilon.svg`; returns their paths."""
    folder.mkdir(exist_ok=True)
    written = []
    with rc_context(STYLE):  # type: ignore[arg-type]  # the stub wants matplotlib's literal type for keys
        if result.curve:
            written.append(_quality(result, folder / "quality.svg"))
        if result.epsilon_curve and result.epsilon.max != float("inf"):
            written.append(_epsilon(result, folder / "epsilon.svg"))
    return written


def _quality(result: Result, path: Path) -> Path:
    figure, axes = _axes()
    known = ("auc", "accuracy", "mean_absolute_error_scaled")
    shown = [name for name in known if any(name in point for point in result.curve)]
    for name, colour in zip(shown, (_ACCENT, _SECOND), strict=False):
        rounds, values = zip(*((i, p[name]) for i, p in enumerate(result.curve) if name in p), strict=True)
        axes.plot(rounds, values, color=colour, marker="o", markersize=3.5, label=NAMES[name])
        axes.annotate(
            f"{values[-1]:.3f}",
            (rounds[-1], values[-1]),
            textcoords="offset points",
            xytext=(6, -3),
            color=colour,
        )
    axes.set_xlabel("rounds trained")
    axes.set_ylabel("exact, on held-out persons")
    axes.legend(frameon=False, loc="lower right")
    cost = (
        "no privacy (ε = ∞)"
        if result.epsilon.max == float("inf")
        else f"ε = {result.epsilon.max:.2f} (PRV) per {result.unit}"
    )
    title = f"Quality by round, {cost}"
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    return save_figure(
        figure,
        path,
        title,
        f"After {result.rounds} rounds: "
        + ", ".join(f"{NAMES.get(k, k)} {v:.3f}" for k, v in result.curve[-1].items())
        + ". Simulator only: the data are public.",
    )


def _epsilon(result: Result, path: Path) -> Path:
    figure, axes = _axes()
    axes.plot(range(len(result.epsilon_curve)), result.epsilon_curve, color=_ACCENT, marker="o", markersize=3.5)
    axes.set_xlabel("rounds trained")
    axes.set_ylabel(f"ε (PRV) of this run per {result.unit} (δ = {result.delta:g})")
    axes.set_ylim(bottom=0)
    title = f"Privacy loss by round: {result.epsilon.max:.2f} at the end"
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    return save_figure(
        figure,
        path,
        title,
        f"Differential privacy per {result.unit}; neighbours: {result.neighbours} {result.unit}; "
        f"{run_label(result.composed_sites)}.",
    )


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def save_figure(figure: Figure, path: Path, title: str, description: str) -> Path:
    """Write the figure as SVG with a title and a description; returns its path."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    text = re.sub(
        r"<svg(?=[ \n])",
        '<svg role="img" aria-labelledby="figure-title figure-desc"',
        buffer.getvalue(),
        count=1,
    )
    head = re.search(r"<svg[^>]*>", text)
    if head is not None:
        inner = f'<title id="figure-title">{escape(title)}</title>'
        inner += f'<desc id="figure-desc">{escape(description)}</desc>'
        text = text[: head.end()] + inner + text[head.end() :]
    write_atomically(path, text.encode())
    return path
