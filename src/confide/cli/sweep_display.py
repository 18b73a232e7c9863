"""Where a sweep is: a live table of its cells on a terminal, a line a finished cell elsewhere; both on stderr."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rich.live import Live
from rich.table import Table
from rich.text import Text

from confide.cli.render import err, number

if TYPE_CHECKING:
    from confide.simulations import SweepProgress

__all__ = ["CellDisplay"]

#: Lines of the terminal that are not cells: title, head, sum, and the prompt's.
_AROUND = 6


@dataclass(slots=True)
class _Row:
    """What is known of one cell."""

    label: str
    state: str = "checking"
    round: str = ""
    quality: str = ""
    began: float | None = None
    seconds: float | None = None


class CellDisplay:
    """See the module. A context: the table stands while the block lasts."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._cells, self._latest = 0, 1
        self._live = Live(get_renderable=self.table, console=err, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self._live.stop()

    def update(self, progress: SweepProgress) -> None:
        """Take note of what a cell came to."""
        self._cells, self._latest = progress.cells, progress.cell
        row = self._rows.setdefault(progress.cell, _Row(progress.label))
        row.state = progress.state
        if progress.state == "running" and row.began is None:
            row.began = time.monotonic()
        if progress.round is not None:
            row.round = f"{progress.round.round}/{progress.round.rounds}"
            row.quality = _first(progress.round.metrics)
        if progress.result is not None:
            row.round = f"{progress.result.rounds}/{progress.result.rounds}"
            row.quality, row.seconds = _first(progress.result.metrics), progress.result.seconds
            if not err.is_terminal:
                err.print(_line(progress), soft_wrap=True, markup=False)

    def table(self) -> Table:
        """The cells, as many as the terminal has lines for: those around the one that was last heard of."""
        done = sum(row.state in ("finished", "kept") for row in self._rows.values())
        title = f"{done} of {self._cells} cells" if self._cells else "reading…"
        table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
        for name, justify in (("cell", "right"), ("", "left"), ("state", "left"), ("round", "right"),
                              ("quality", "left"), ("seconds", "right")):  # fmt: skip
            table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
        for cell in self._shown():
            row = self._rows[cell]
            seconds = row.seconds if row.seconds is not None else _since(row.began)
            style = {"running": "bold", "finished": "green", "kept": "green"}.get(row.state, "dim")
            table.add_row(str(cell), Text(row.label), Text(row.state, style), row.round, Text(row.quality),
                          "" if seconds is None else f"{seconds:.0f}")  # fmt: skip
        return table

    def _shown(self) -> list[int]:
        cells, room = sorted(self._rows), max(1, err.height - _AROUND)
        if len(cells) <= room:
            return cells
        first = min(max(0, cells.index(self._latest) - room // 2), len(cells) - room)
        return cells[first : first + room]


def _first(metrics: dict[str, float] | None) -> str:
    return next((f"{name} {value:.3f}" for name, value in (metrics or {}).items()), "")


def _since(began: float | None) -> float | None:
    return None if began is None else time.monotonic() - began


def _line(progress: SweepProgress) -> str:
    result = progress.result
    note = f"cell {progress.cell}/{progress.cells}  {progress.label}"
    if result is None:
        return note
    metrics = (result.metrics or {}).items()
    note += f"  ε {number(result.epsilon.max, 2)}" + "".join(f"  {k} {v:.3f}" for k, v in metrics)
    return note + ("  kept" if progress.state == "kept" else "")
