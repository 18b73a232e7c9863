"""`confide site`: what a site's operator sees at the site, and nobody else.

`site ledger --json` prints {folder, sites}, with one object a site; the text "inf" stands for infinity:

- site, unit, neighbours, delta, epsilon_limit; held_out: share of persons.
- roles: [{role, epsilon: RDP filter, of the whole ledger; used: share of the budget; charges; open_charges}].
- runs: [{run; rounds: those charged; roles: [{role, steps, noise_multiplier, sample_rate}]; epsilon: PRV, of this run
  alone, its parameters fixed beforehand; sites: at how many a person may lie, as the run assumed}]. Null: a role's
  charges differ in σ or q.
- persons: {recorded: is there a personal.db; enrolled; never_exposed; quantiles: {percent: ε};
  histogram: [[above, up to, persons]]; infinite: persons without a finite ε; unnoted_charges; uncharged_notes;
  at_most: nobody's ε is above it}. ε by RDP filter, over the charges that held the person.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from confide.cli import site_keep, site_look, site_run, site_setup
from confide.cli.render import number, out, plain, show_json
from confide.errors import ConfigError

if TYPE_CHECKING:
    from confide.privacy.dp.statement import Persons, RunStatement, Statement

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="For a site's operator, beside the data.")
_BAR = 24


@app.callback()
def root() -> None:
    """For a site's operator, beside the data."""


app.command("init")(site_setup.init)
app.command("confirm")(site_setup.confirm)
app.command("rotate")(site_setup.rotate)
app.command("lock")(site_setup.lock)
app.command("run")(site_run.run)
app.command("check")(site_look.check)
app.command("status")(site_look.status)
app.command("export")(site_keep.export)
app.command("backup")(site_keep.backup)
app.command("restore")(site_keep.restore)


@app.command("ledger")
def ledger(
    folder: Annotated[
        Path, typer.Argument(help="A site's ledger folder, or a folder of several sites' ledger folders.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What was charged, run by run, and its distribution over persons. For the site only; makes and changes nothing."""
    from confide.privacy.dp.statement import read_statement

    statements = [read_statement(path) for path in _ledger_folders(folder)]
    if as_json:
        sites = [{**plain(s), "neighbours": _neighbours(s)} for s in statements]
        show_json({"folder": str(folder), "sites": sites})
        return
    for place, statement in enumerate(statements):
        if place:
            out.print("\n")
        _show(statement)


@app.command("recover")
def recover(
    folder: Annotated[Path, typer.Argument(help="The site's ledger folder.")],
    log: Annotated[Path, typer.Option("--log", help="The site's federated log, or a copy that somebody kept.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: ledger, log, added.")] = False,
) -> None:
    """Add to a ledger that was put back what the site's log says was charged since. It only ever raises ε."""
    from confide.clients.continuity import complete_ledger
    from confide.privacy.dp import Ledger
    from confide.privacy.dp.statement import LEDGER

    if not (folder / LEDGER).is_file():
        raise ConfigError(f"holds no privacy ledger ({LEDGER})", where=str(folder),
                          hint="where it was deleted, start the site: it makes an empty one, and refuses")  # fmt: skip
    read = Ledger.open(folder / LEDGER)
    read.close()
    ledger = Ledger(folder / LEDGER, read.budget, read.unit, read.held_out)
    try:
        added = complete_ledger(ledger, log)
    finally:
        ledger.close()
    if as_json:
        show_json({"ledger": str(folder / LEDGER), "log": str(log), "added": added})
    elif added:
        out.print(f"{len(added)} charges added, from {added[0]} to {added[-1]}", markup=False, soft_wrap=True)
    else:
        out.print("nothing was missing: the ledger holds every charge of the log", markup=False)


def _ledger_folders(folder: Path) -> list[Path]:
    """The folder itself, or those in it that hold a ledger."""
    from confide.privacy.dp.statement import is_ledger_folder

    if not folder.is_dir():
        raise ConfigError("there is no such folder", where=str(folder),
                          hint="name a site's ledger folder, or the --ledger folder of a simulation")  # fmt: skip
    try:
        found = [folder] if is_ledger_folder(folder) else sorted(p for p in folder.iterdir() if is_ledger_folder(p))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(folder),
                          hint="only the site's operator may read its ledger") from None  # fmt: skip
    if not found:
        raise ConfigError("neither holds a privacy ledger (ledger.db) nor a folder that does", where=str(folder),
                          hint="name a site's ledger folder; a run's own lie in its folder ledgers/")  # fmt: skip
    return found


def _neighbours(statement: Statement) -> str:
    return f"add or remove one {statement.unit}"


def _show(s: Statement) -> None:
    from confide.privacy.dp import LEDGER_LABEL, RUN_LABEL

    _heading(f"Privacy ledger of {s.site}: for the site only, these numbers do not leave it")
    out.print(_pairs([
        ("unit", f"{s.unit}; neighbours: {_neighbours(s)}"),
        ("limit", f"ε = {s.epsilon_limit:g} at δ = {s.delta:g}, for the ledger's lifetime"),
        ("held out", f"{s.held_out:.0%} of persons, for ever: roles compose in parallel"),
    ]))  # fmt: skip
    _heading("The whole ledger", LEDGER_LABEL)
    roles = _grid(["role", "ε (RDP filter)", "budget used", "charges", "of them open"])
    for r in s.roles:
        cells = _role(r.role), number(r.epsilon), f"{r.used:.1%}", f"{r.charges:,}", f"{r.open_charges:,}"
        roles.add_row(*map(Text, cells))
    out.print(roles)
    out.print("open: may still be given back, and counts whole until then", style="dim")
    _heading("Runs, oldest first", RUN_LABEL)
    _show_runs(s.runs)
    _heading("Each person's own ε", f"RDP filter, over the charges that held the person; δ = {s.delta:g}")
    _show_persons(s.persons)


def _show_runs(runs: list[RunStatement]) -> None:
    if not runs:
        out.print("nothing was charged yet")
        return
    shown = _grid(["run", "rounds charged", "role", "σ", "q", "steps", "ε (PRV)"])
    shown.columns[0].overflow = "fold"
    shown.columns[1].justify = shown.columns[2].justify = "left"
    for run in runs:
        first = (run.run, f"{len(run.rounds)} ({_ranges(run.rounds)})" if run.rounds else "—")
        for place, role in enumerate(run.roles):
            name, rounds, epsilon = ("", "", "") if place else (*first, number(run.epsilon))
            sigma, rate = ("mixed" if v is None else f"{v:.6g}" for v in (role.noise_multiplier, role.sample_rate))
            shown.add_row(*map(Text, (name, rounds, _role(role.role), sigma, rate, f"{role.steps:,}", epsilon)))
    out.print(shown)
    if (sites := max(run.sites for run in runs)) > 1:
        out.print(f"charges of runs whose persons may lie at up to {sites} sites count so many times", style="dim")


def _show_persons(p: Persons) -> None:
    if p.recorded:
        rows = [("enrolled", f"{p.enrolled:,}"), ("never exposed", f"{p.never_exposed:,}")]
        rows += [(f"{percent} % of persons", f"ε ≤ {number(e)}") for percent, e in p.quantiles.items()]
    else:
        rows = [("enrolled", "not known")]
    out.print(_pairs([*rows, ("nobody above", f"ε = {number(p.at_most)}")]))
    if p.histogram:
        most = max(n for _, _, n in p.histogram)
        bars = _grid(["ε above", "up to", "persons", ""])
        bars.columns[0].justify, bars.columns[3].justify = "right", "left"
        for low, high, n in p.histogram:
            bars.add_row(number(low), number(high), f"{n:,}", "█" * -(-n * _BAR // most))
        out.print(bars)
    if p.infinite:
        _note(f"{p.infinite:,} persons have no finite ε.")
    if not p.recorded:
        _note("personal.db is missing: whom a charge held is not known, so whoever is here counts as held by every "
              "charge of the role. Restore the file.")  # fmt: skip
    elif p.unnoted_charges:
        _note(f"{p.unnoted_charges:,} charges have no note of whom they held (personal.db was lost, or is newer than "
              "the ledger): everybody counts as held by those of the role, and whoever was never held, by those of "
              "the role that costs more.")  # fmt: skip
    if p.uncharged_notes:
        _note(f"{p.uncharged_notes:,} charges are noted for persons and not in the ledger: an older copy of the ledger "
              "was restored, and every ε here is too low. Restore the newest copy.")  # fmt: skip


def _heading(title: str, what: str = "") -> None:
    if what:
        out.print()
    out.print(Text(title, style="bold"), Text(f"({what})" if what else ""), soft_wrap=False)


def _pairs(rows: list[tuple[str, str]]) -> Table:
    found = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    found.add_column(style="dim")
    found.add_column(overflow="fold")
    for row in rows:
        found.add_row(*map(Text, row))
    return found


def _grid(columns: list[str]) -> Table:
    found = Table(box=None, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        found.add_column(name, justify="right" if place else "left")
    return found


def _note(text: str) -> None:
    out.print("[yellow]Note[/] ", end="")
    out.print(text, markup=False)


def _role(role: str) -> str:
    return str(role).replace("_", " ")


def _ranges(rounds: list[int]) -> str:
    """1, 2, 3, 5 → 1–3, 5."""
    parts = []
    for _, group in groupby(enumerate(rounds), key=lambda pair: pair[1] - pair[0]):
        run = [value for _, value in group]
        parts.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(parts)
