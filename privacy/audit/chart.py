"""A line chart as inline SVG that follows the page's colours (light and dark) and can be read aloud."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

__all__ = ["Series", "line_chart"]

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 84, 30, 40
_NEAR = 30


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y), optionally with intervals (low, high) of the same length; drawn as class `s1`, `s2`, …"""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float] | None] = ()
    line: bool = True


def line_chart(identifier: str, title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """The chart; its description lists the last value of every series."""
    points = [p for s in series for p in s.points]
    lows = [i[0] for s in series for i in s.intervals if i] + [y for _, y in points]
    highs = [i[1] for s in series for i in s.intervals if i] + [y for _, y in points]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high, y_step = _nice(min(lows), max(highs))

    def px(x: float) -> float:
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    last = "; ".join(f"{s.name} ends at {s.points[-1][1]:.3f}" for s in series)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="{identifier}-t {identifier}-d">',
        f'<title id="{identifier}-t">{escape(title)}</title>',
        f'<desc id="{identifier}-d">{escape(y_label)} by {escape(x_label)}: {escape(last)}.</desc>',
    ]
    y = y_low
    while y <= y_high + 1e-9:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
        y = round(y + y_step, 10)
    step = max(1, round((x_high - x_low) / 5))
    for tick in range(int(x_low), int(x_high) + 1, step):
        at = f'x="{px(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}"'
        parts.append(f'<text class="tick" {at} text-anchor="middle">{tick}</text>')
    middle = f'x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}"'
    parts.append(f'<text class="label" {middle} text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="4" y="14">{escape(y_label)}</text>')
    names = _spread([py(s.points[-1][1]) + 4 for s in series])
    last_x = [px(s.points[-1][0]) for s in series]
    for number, one in enumerate(series, 1):
        for (x, _), bar in zip(one.points, one.intervals, strict=False):
            if bar:
                ends = f'y1="{py(bar[0]):.1f}" y2="{py(bar[1]):.1f}"'
                parts.append(f'<line class="s{number} bar" x1="{px(x):.1f}" x2="{px(x):.1f}" {ends}/>')
        if one.line:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in one.points)
            parts.append(f'<polyline class="s{number}" points="{path}"/>')
        parts += [f'<circle class="s{number}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6"/>' for x, y in one.points]
        # Beside whatever else ends about there, not on it.
        end = max(x for x in last_x if x - last_x[number - 1] < _NEAR)
        at = f'x="{end + 8:.1f}" y="{names[number - 1]:.1f}"'
        parts.append(f'<text class="s{number} name" {at}>{escape(one.name)}</text>')
    return "".join(parts) + "</svg>"


def _spread(positions: list[float], gap: float = 15.0) -> list[float]:
    """Move names apart that would lie on each other, keeping their order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    return moved


def _nice(low: float, high: float) -> tuple[float, float, float]:
    """Axis ends and a round step of about four."""
    if 0 <= low < 0.3 * high:
        low = 0.0
    raw = ((high - low) or 0.1) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return bottom, top if top > bottom else bottom + step, step
