"""`confide data check`: what a table holds, and what a run would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from confide.cli.render import out, show_json, table
from confide.errors import DataError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Look at data before anything runs.")


@app.callback()
def root() -> None:
    """Look at data before anything runs."""


@app.command("check")
def check(
    source: Annotated[Path, typer.Argument(help="An experiment (TOML, or example:NAME), or a CSV or Parquet file.")],
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Columns, bounds, subjects, sites, and what would be refused. For the data's holder: nothing is sent."""
    from confide.simulations import checks

    if source.suffix.lower() == ".toml" or str(source).startswith(checks.EXAMPLE):
        found = checks.check_experiment(source, assignments or ())
        show_json(found) if as_json else _show_experiment(found)
        if found["refusals"]:
            raise typer.Exit(DataError.exit_code)
    else:
        found = checks.describe_table(source)
        show_json(found) if as_json else _show_table(found)


def _show_experiment(found: dict[str, Any]) -> None:
    out.print(table("The table can be read as declared", [
        ("file", found["file"]), ("rows", f"{found['rows']:,}"), ("subjects", f"{found['subjects']:,}"),
        ("label", f"{found['label']} ({found['task']})"), ("model inputs", f"{found['inputs']}"),
    ]))  # fmt: skip
    features = Table(box=None, padding=(0, 2, 0, 0), title="Features", title_justify="left", title_style="bold")
    for name in ("feature", "kind", "bounds or values", "missing", "outside (clipped)"):
        features.add_column(name)
    for f in found["features"]:
        features.add_row(*map(Text, (f["name"], f["kind"], f["range"], f"{f['missing']:,}", f"{f['outside']:,}")))
    out.print(features)
    sites = Table(box=None, padding=(0, 2, 0, 0), title="Sites", title_justify="left", title_style="bold")
    for name in ("site", "subjects", "records", "declared population", "remark"):
        sites.add_column(name)
    for s in found["sites"]:
        sites.add_row(
            *map(Text, (s["site"], f"{s['subjects']:,}", f"{s['records']:,}", f"{s['population']:,}", s["remark"]))
        )
    out.print(sites)
    for line in found["refusals"]:
        out.print("[yellow]would be refused:[/] ", end="")
        out.print(line, markup=False)


def _show_table(found: dict[str, Any]) -> None:
    out.print(table(found["file"], [("rows", f"{found['rows']:,}"), ("columns", f"{len(found['columns'])}")]))
    columns = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("column", "type", "missing", "different values", "a schema line to start from"):
        columns.add_column(name, overflow="fold")
    for c in found["columns"]:
        columns.add_row(*map(Text, (c["name"], c["type"], f"{c['missing']:,}", f"{c['distinct']:,}", c["suggestion"])))
    out.print(columns)
    out.print(
        "[yellow]Bounds must be public knowledge[/] (what a value can be), not read off private data: "
        "a suggestion is a start, not an answer."
    )
