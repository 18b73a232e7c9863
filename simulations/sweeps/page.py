"""A sweep's frontier figure and its page; both bear the watermark."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from confide.privacy.audit.page import write_page
from confide.privacy.dp import LEDGER_LABEL, run_label
from confide.simulations.sweeps.charts import Cost, costs, curves, rounds_chart
from confide.simulations.sweeps.frontier import Line, Panel, Point, write_frontier
from confide.simulations.sweeps.result import EPSILON, Setting, Sweep, show_value

__all__ = [
    "describe_best",
    "describe_cost",
    "describe_values",
    "describe_whole",
    "show_value",
    "write_sweep_figure",
    "write_sweep_page",
]

_QUALITY_NAMES = {"auc": "AUC", "r2": "R²", "accuracy": "accuracy"}


def write_sweep_figure(sweep: Sweep) -> Path | None:
    """Write `figures/frontier.svg` where ε is an axis and the settings can be compared; returns its path."""
    if EPSILON not in sweep.axes or not sweep.settings:
        return None
    lines: dict[str, list[Setting]] = {}
    for setting in sweep.settings:
        others = {key: value for key, value in setting.values.items() if key != EPSILON}
        lines.setdefault(describe_values(others) or sweep.name, []).append(setting)
    panel = Panel("", [
        Line(name, [Point(float(s.values[EPSILON]), s.median, s.low, s.high) for s in sorted(
            settings, key=lambda s: float(s.values[EPSILON]))])
        for name, settings in lines.items()
    ])  # fmt: skip
    path = sweep.out / "figures" / "frontier.svg"
    path.parent.mkdir(exist_ok=True)
    quality = _QUALITY_NAMES[str(sweep.quality)]
    title = f"{sweep.name}: held-out {quality} by ε"
    kind = "" if sweep.exact else ", released (noised)"
    return write_frontier(
        [panel], path, title=title, x_label=describe_cost(sweep), y_label=f"held-out {quality}{kind}",
        watermark=sweep.watermark,
    )  # fmt: skip


def write_sweep_page(sweep: Sweep) -> Path:
    """Write `index.html`, which holds the figure; returns its path."""
    figure = sweep.out / "figures" / "frontier.svg"
    image = ""
    if figure.exists():
        # As an image, the figure's style cannot reach the page, nor the page's the figure.
        image = "data:image/svg+xml;base64," + base64.b64encode(figure.read_bytes()).decode("ascii")
    metrics = sweep.metric_names
    context: dict[str, Any] = {
        "name": sweep.name,
        "axes": [(key, ", ".join(map(show_value, values))) for key, values in sweep.axes.items()],
        "count": len(sweep.cells),
        "watermark": sweep.watermark,
        "warnings": sweep.warnings,
        "best": describe_best(sweep),
        "image": image,
        "cost": describe_cost(sweep),
        "exact": sweep.exact,
        "whole": describe_whole(sweep),
        "whole_epsilon": "" if sweep.cost is None else _number(sweep.cost.epsilon, 2),
        "keys": list(sweep.axes),
        "metrics": metrics,
        "rows": [
            {
                "number": cell.number,
                "link": f"cells/{cell.result.out.name}/index.html",
                "values": [show_value(v) for v in cell.values.values()],
                "epsilon": _number(cell.result.epsilon.max, 2),
                "metrics": [_number(sweep.metrics_of(cell).get(m), 3) for m in metrics],
                "best": sweep.best is not None and cell.number in sweep.best.cells,
            }
            for cell in sweep.cells
        ],
        "seconds": f"{sweep.seconds:.1f}",
        **_rounds(sweep),
        "profiles": _profiles(costs(sweep)),
    }
    path = sweep.out / "index.html"
    write_page(Path(__file__).with_name("sweep.html.j2"), context, path)
    return path


def _rounds(sweep: Sweep) -> dict[str, Any]:
    """Quality by round: the chart, how much of it is drawn, and a row a setting."""
    found = curves(sweep)
    if not found:
        return {"rounds": "", "drawn": "", "curves": []}
    quality = _QUALITY_NAMES[str(sweep.quality)]
    chart, drawn = rounds_chart(found, quality)
    return {
        # Markup: the chart is built from numbers and escaped text only.
        "rounds": Markup(chart),  # noqa: S704
        "drawn": "" if len(drawn) == len(found) else f"The {len(drawn)} best of {len(found)} settings are drawn.",
        "quality": quality,
        "curves": [
            {
                "setting": c.setting, "name": c.name, "short": c.short, "cells": c.cells, "first":
                f"{c.median[0]:.3f}", "half": f"{c.median[len(c.median) // 2]:.3f}", "last": f"{c.median[-1]:.3f}",
                "spread": "—" if c.cells == 1 else f"{c.low[-1]:.3f} to {c.high[-1]:.3f}",
            }
            for c in found
        ],
    }  # fmt: skip


def _profiles(found: list[Cost]) -> list[dict[str, Any]]:
    """Rows of costs; a bar is a share of the largest in its column."""
    most = max((c.uplink_bytes or 0 for c in found), default=0), max((c.seconds[0] for c in found), default=0)
    return [
        {
            "profile": c.profile, "cells": c.cells, "up": _bytes(c.uplink_bytes), "down": _bytes(c.downlink_bytes),
            "each": f"{c.bytes_per_parameter:,.2f}", "seconds": _range(c.seconds, 1), "quality":
            "—" if c.quality is None else _range(c.quality, 3),
            "up_share": round(100 * (c.uplink_bytes or 0) / (most[0] or 1), 1),
            "seconds_share": round(100 * c.seconds[0] / (most[1] or 1), 1),
        }
        for c in found
    ]  # fmt: skip


def _bytes(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f} B" if value < 1000 else f"{value / 1000:,.1f} kB"


def _range(spread: tuple[float, float, float], digits: int) -> str:
    median, low, high = (f"{v:.{digits}f}" for v in spread)
    return median if low == high else f"{median} ({low} to {high})"


def describe_values(values: dict[str, Any]) -> str:
    """`training.learning_rate=0.5, model.kind=mlp`."""
    return ", ".join(f"{key}={show_value(value)}" for key, value in values.items())


def describe_best(sweep: Sweep) -> str:
    """The best setting in a line that ends in the watermark; empty where nothing can be compared."""
    best = sweep.best
    if best is None:
        return ""
    name = _QUALITY_NAMES[str(sweep.quality)]
    spread = "" if len(best.cells) == 1 else f" (median of {len(best.cells)}: {best.low:.3f} to {best.high:.3f})"
    return f"{describe_values(best.values) or 'all cells'}: {name} {best.median:.3f}{spread}; {sweep.watermark}"


def describe_whole(sweep: Sweep) -> str:
    """All cells together, in a line; empty where nobody has composed them."""
    cost = sweep.cost
    if cost is None:
        return ""
    worst = cost.worst
    return (
        f"ε = {_number(cost.epsilon, 2)} per {cost.unit} for all {cost.cells} cells together (δ = {cost.delta:g}; "
        f"{run_label(cost.composed_sites)}); the ledgers hold ε = {worst.epsilon_after:.2f} of {worst.limit:g} with "
        f"all of them ({LEDGER_LABEL})"
    )


def describe_cost(sweep: Sweep) -> str:
    """The axis title: ε with its unit and δ, where all cells have the same."""
    kinds = {(c.result.unit, c.result.delta) for c in sweep.cells}
    if len(kinds) != 1:
        return "ε of one run (unit and δ differ)"
    unit, delta = next(iter(kinds))
    return f"ε per {unit} (δ = {delta:g})"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "—"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"
