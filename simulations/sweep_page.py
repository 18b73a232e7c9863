"""A sweep's frontier figure and its page; both bear the watermark."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from confide.privacy.audit.page import write_page
from confide.simulations.frontier import Line, Panel, Point, write_frontier
from confide.simulations.sweep_result import EPSILON, Setting, Sweep

__all__ = ["describe_best", "describe_cost", "describe_values", "show_value", "write_sweep_figure", "write_sweep_page"]

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
    return write_frontier([panel], path, title=title, x_label=describe_cost(sweep), y_label=f"held-out {quality}")


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
        "keys": list(sweep.axes),
        "metrics": metrics,
        "rows": [
            {
                "number": cell.number,
                "link": f"cells/{cell.result.out.name}/index.html",
                "values": [show_value(v) for v in cell.values.values()],
                "epsilon": _number(cell.result.epsilon.max, 2),
                "metrics": [_number((cell.result.metrics or {}).get(m), 3) for m in metrics],
                "best": sweep.best is not None and cell.number in sweep.best.cells,
            }
            for cell in sweep.cells
        ],
        "seconds": f"{sweep.seconds:.1f}",
    }
    path = sweep.out / "index.html"
    write_page(Path(__file__).with_name("sweep.html.j2"), context, path)
    return path


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


def describe_cost(sweep: Sweep) -> str:
    """The axis title: ε with its unit and δ, where all cells have the same."""
    kinds = {(c.result.unit, c.result.delta) for c in sweep.cells}
    if len(kinds) != 1:
        return "ε of one run (unit and δ differ)"
    unit, delta = next(iter(kinds))
    return f"ε per {unit} (δ = {delta:g})"


def show_value(value: Any) -> str:
    """A value of an axis for people."""
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "—"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"
