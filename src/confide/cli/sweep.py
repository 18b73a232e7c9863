"""`confide sweep`: what accuracy which ε buys, on public data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from confide.cli.render import Display, err, number, out, show_json
from confide.errors import ConfigError

if TYPE_CHECKING:
    from confide.simulations import Sweep, SweepProgress

__all__ = ["sweep"]

_INTERRUPTED = 130


def sweep(
    experiment: Annotated[
        Path | None, typer.Argument(help="Experiment (TOML), or example:NAME. Default: example:rand_health.")
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="KEY=V1,V2,…", help="An axis, e.g. privacy.epsilon=0.5,1,2; may be repeated."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key in every cell, e.g. run.rounds=10."),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="New folder for the results. Default: runs/…")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Run an experiment on public data at every combination of values: the privacy/utility frontier."""
    from confide import simulations

    try:
        with _CellDisplay() as display:
            found = simulations.sweep(
                experiment,
                over=over or (),
                overrides=assignments or (),
                out=out_folder,
                progress=display.update,
            )
    except KeyboardInterrupt:
        err.print("[yellow]interrupted[/] finished cells stay; the folder says so")
        raise typer.Exit(_INTERRUPTED) from None
    except PermissionError as error:
        raise ConfigError(
            "may not be written", where=str(error.filename), hint="name a folder you may write to"
        ) from None
    if as_json:
        show_json(found.to_json())
    else:
        _show(found)


class _CellDisplay(Display):
    """A bar over all cells on a terminal, a line a finished cell elsewhere; both on stderr."""

    def __init__(self) -> None:
        super().__init__("checking")

    def update(self, progress: SweepProgress) -> None:
        doing, share = "checking", 0.0
        note = f"cell {progress.cell}/{progress.cells}  {progress.label}"
        if progress.round is not None:
            doing, share = "running", progress.round.round / progress.round.rounds
            note += f"  round {progress.round.round}/{progress.round.rounds}"
        if progress.result is not None:
            doing, share = "running", 1.0
            metrics = (progress.result.metrics or {}).items()
            note += f"  ε {number(progress.result.epsilon.max, 2)}" + "".join(f"  {k} {v:.3f}" for k, v in metrics)
            if not err.is_terminal:
                err.print(note, soft_wrap=True, markup=False)
        done = progress.cell - 1 + share
        self._bar.update(self._task, description=doing, completed=done, total=progress.cells, note=note)


def _show(found: Sweep) -> None:
    from confide.simulations.sweep_page import describe_best, describe_cost, show_value

    for warning in found.warnings:
        out.print(f"[bold white on red] {warning} [/]")
    cells = Table(box=None, padding=(0, 2, 0, 0), title=f"Sweep of {found.name}", title_justify="left",
                  title_style="bold")  # fmt: skip
    cells.add_column("cell", justify="right")
    short = [key.rpartition(".")[2] for key in found.axes]
    for key, name in zip(found.axes, short, strict=True):
        cells.add_column(Text(name if short.count(name) == 1 else key))
    shown = found.metric_names[:2]  # all of them stand in sweep.json and on the page
    for name in ("ε (PRV)", *shown, "seconds"):
        cells.add_column(name, justify="right")
    cells.add_column()
    best = found.best
    for cell in found.cells:
        metrics = cell.result.metrics or {}
        cells.add_row(
            str(cell.number),
            *(Text(show_value(v)) for v in cell.values.values()),
            number(cell.result.epsilon.max, 2),
            *(number(metrics.get(name)) for name in shown),
            f"{cell.result.seconds:.1f}",
            "best" if best is not None and cell.number in best.cells else "",
        )
    out.print(cells)
    if best is not None:
        out.print(f"best  {describe_best(found)}", markup=False, soft_wrap=True)
    out.print(
        f"{describe_cost(found)}: what that run alone would cost; to choose among runs after seeing them costs more.",
        markup=False,
        soft_wrap=True,
    )
    out.print(f"written to {found.out}", markup=False, soft_wrap=True)
