"""How things look: results on stdout, progress and messages on stderr, one JSON object per line with `--json`."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import UTC, datetime
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from confide.errors import ConfideError

__all__ = ["Display", "err", "number", "out", "plain", "show_error", "show_json", "table", "when"]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Display:
    """What shows that long work goes on: a bar on stderr while the block lasts, where stderr is a terminal.

    Args:
        doing: What is done first.
    """

    def __init__(self, doing: str) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=err,
            transient=True,
        )
        self._task = self._bar.add_task(doing, total=None, note="", visible=err.is_terminal)

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self._bar.stop()

    def count(self, done: int, of: int) -> None:
        """So many of so many are done."""
        self._bar.update(self._task, completed=done, total=of, note=f"{done:,} of {of:,}")


def plain(value: Any) -> Any:
    """Dataclasses as objects, in depth; JSON has no infinity, so it is the text "inf"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def show_json(tree: dict[str, Any]) -> None:
    """One object on one line of stdout."""
    out.file.write(json.dumps(tree, allow_nan=False) + "\n")
    out.file.flush()


def show_error(error: ConfideError, *, as_json: bool) -> None:
    """What is wrong, where, and what to do next."""
    if as_json:
        fields = {"kind": error.kind, "what": error.what, "where": error.where, "hint": error.hint}
        show_json({"error": {**fields, "exit_code": error.exit_code}})
    err.print(f"[bold red]{error.kind} error[/] ", end="")
    err.print(str(error), markup=False, soft_wrap=True)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: ∞ and — where there is none."""
    if value is None:
        return "—"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    found = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    found.add_column(style="dim")
    found.add_column(overflow="fold")
    for name, value in rows:
        found.add_row(Text(name), Text(value))  # as it is: a name may hold brackets
    return found


def when(micros: int) -> str:
    """A time (microseconds since 1970) in UTC."""
    return datetime.fromtimestamp(micros / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
