"""`confide sweep`: what accuracy which ε buys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from confide.cli.render import err, number, out, show_json
from confide.cli.sweep_display import CellDisplay
from confide.errors import ConfigError

if TYPE_CHECKING:
    from confide.simulations import Quote, Sweep

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
    ledger: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the sites' privacy ledgers: all cells are charged to them, composed. Data that are "
            "not public need it."
        ),
    ] = None,
    workers: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Cells beside each other; auto: as cores and the memory of one allow."),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in --out: finished cells are kept.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the cells cost, alone and together; run nothing.")
    ] = False,
    mlflow: Annotated[
        str | None,
        typer.Option(metavar="URI|DIR", help="Log the finished sweep to MLflow (extra: mlflow)."),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write event files of the finished sweep (extra: tensorboard)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Run an experiment at every combination of values: the privacy/utility frontier."""
    from confide import simulations

    processes = _processes(workers)
    if dry_run:
        if resume or out_folder is not None:
            raise ConfigError("--dry-run plans a new sweep and writes nothing",
                              where="--resume" if resume else "--out", hint="leave one of them out")  # fmt: skip
        with CellDisplay() as display:
            quote = simulations.plan_sweep(
                experiment, over=over or (), overrides=assignments or (), ledger=ledger, progress=display.update
            )
        show_json(quote.to_json()) if as_json else _show_quote(quote)
        return
    if resume and out_folder is not None and (done := simulations.finished_sweep(out_folder)) is not None:
        show_json(done) if as_json else out.print(f"{out_folder}: this sweep is finished already", soft_wrap=True)
        return
    tracker = simulations.open_tracker(mlflow=mlflow, tensorboard=tensorboard)
    try:
        with CellDisplay() as display:
            found = simulations.sweep(
                experiment,
                over=over or (),
                overrides=assignments or (),
                out=out_folder,
                ledger=ledger,
                workers=processes,
                resume=resume,
                progress=display.update,
            )
        tracker.sweep(found)
    except KeyboardInterrupt:
        err.print("confide sweep --resume --out FOLDER goes on with this sweep", markup=False)
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


def _processes(text: str) -> int | None:
    """A number; None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{text!r} is not a number of processes", where="--workers", hint="at least 1, or auto")
    return int(text)


def _show(found: Sweep) -> None:
    from confide.simulations.sweeps.page import describe_best, describe_cost, describe_whole, show_value

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
        metrics = found.metrics_of(cell)
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
    if not found.exact:
        out.print("metrics: as released, noised and charged")
    told = f"{describe_cost(found)}: what that run alone would cost; to choose among runs after seeing them costs "
    whole = describe_whole(found)
    out.print(told + ("more." if not whole else f"what all of them cost: {whole}."), markup=False, soft_wrap=True)
    if found.beside > 1:
        out.print(f"up to {found.beside} cells ran beside each other")
    out.print(f"written to {found.out}", markup=False, soft_wrap=True)


def _show_quote(quote: Quote) -> None:
    from confide.privacy.dp import LEDGER_LABEL, run_label
    from confide.simulations.sweeps.page import show_value

    shown = Table(box=None, padding=(0, 2, 0, 0), title=f"Plan of the sweep {quote.name}: nothing has run",
                  title_justify="left", title_style="bold")  # fmt: skip
    shown.add_column("cell", justify="right")
    for key in quote.cells[0]["values"]:
        shown.add_column(Text(key))
    shown.add_column("ε (PRV) alone", justify="right")
    for cell in quote.cells:
        values = (Text(show_value(value)) for value in cell["values"].values())
        shown.add_row(str(cell["cell"]), *values, number(float(cell["epsilon"]), 2))
    out.print(shown)
    cost = quote.cost
    if cost is None:
        out.print("Every cell has ledgers of its own: nobody composes them. The data are public.")
        return
    out.print(f"all {cost.cells} cells together: ε = {number(cost.epsilon, 2)} per {cost.unit} (δ = {cost.delta:g}; "
              f"{run_label(cost.composed_sites)})", markup=False, soft_wrap=True)  # fmt: skip
    sites = Table(box=None, padding=(0, 2, 0, 0), title=f"The sites' ledgers in {cost.folder}, before → after",
                  title_justify="left", title_style="bold")  # fmt: skip
    for name in ("site", "ε (RDP filter)", "of", "budget used"):
        sites.add_column(name, justify="left" if name == "site" else "right")
    for site, one in cost.ledgers.items():
        sites.add_row(site, f"{number(one.epsilon_before, 2)} → {number(one.epsilon_after, 2)}", f"{one.limit:g}",
                      f"{one.used_before:.0%} → {one.used_after:.0%}")  # fmt: skip
    out.print(sites)
    out.print(LEDGER_LABEL, style="dim")
    if not cost.admitted:
        out.print("[bold red]This sweep would be refused[/]: the budget of a site does not hold all of its cells.")
