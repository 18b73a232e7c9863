"""`confide run start | status | stop`: the runs of a federation.

`--json` prints: start: {run, sites, min_sites, rounds, epsilon, position: how many are before it,
learns: columns whose bounds it learns}; status: {runs:
[{run, status, round, rounds, sites, min_sites, result}]}; stop: {run, status}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from confide.cli.render import number, out, show_json, table
from confide.cli.server import Store
from confide.cli.site_setup import AsJson
from confide.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Start, watch and stop the runs of a federation.")
Federation = Annotated[Path, typer.Option("--federation", help="The federation's folder.")]


@app.callback()
def root() -> None:
    """Start, watch and stop the runs of a federation."""


@app.command("start")
def start(
    file: Annotated[Path, typer.Argument(help="The run (TOML): an experiment without data files and consent.")],
    federation: Federation,
    bounds: Annotated[
        str | None, typer.Option("--bounds", help="The run that has learned the bounds which the file leaves out.")
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Fix a run and put it into the store, from which the coordinator takes it.

    A file that leaves out bounds (schema.bounds = "learn") starts the run that learns them. When that has ended, and
    the sites' operators have written them into site.toml, the same file with --bounds starts the training.
    """
    from confide.clients.data.preprocess import encoded_width
    from confide.clients.training.admission import admit_model
    from confide.clients.training.models import build_model, initial_model
    from confide.config.run import load_run
    from confide.server.federation import FederationFolder
    from confide.server.outcome import run_loss
    from confide.server.plan import make_manifest
    from confide.server.runs import RunStore
    from confide.server.service import run_store

    asked, roster = load_run(file), FederationFolder(federation).state.roster
    if roster is None:
        raise ConfigError("has no complete roster yet", where=str(federation),
                          hint="confide federation show says who has to confirm")  # fmt: skip
    schema = asked.schema_
    if bounds is not None:
        schema = schema.with_bounds(_learned(federation, bounds, schema.unknown_bounds))
    inputs, outputs = encoded_width(schema), asked.data.label.outputs
    admit_model(build_model(asked.model, inputs, outputs), inputs, outputs)
    weights, layout = initial_model(asked.model, inputs, outputs, asked.run.seed)
    manifest = make_manifest(
        asked, roster=roster, schema=schema, initial_model=weights, layout=layout, sites=asked.sites.names,
        statistics=bool(schema.unknown_bounds),
    )  # fmt: skip
    runs = RunStore(run_store(federation, store))
    try:
        before = sum(status in ("waiting", "running", "stopping") for status in runs.runs().values())
        runs.submit(manifest.run, manifest.to_bytes(), weights.astype("<f4").tobytes())
    finally:
        runs.close()
    epsilon = run_loss(manifest)
    if as_json:
        show_json({"run": manifest.run, "sites": [m.site for m in manifest.members], "min_sites": manifest.min_sites,
                   "rounds": manifest.rounds, "epsilon": epsilon, "position": before,
                   "learns": list(schema.unknown_bounds)})  # fmt: skip
        return
    out.print(table(f"Run {manifest.run}", [
        ("purpose", manifest.purpose), ("sites", ", ".join(m.site for m in manifest.members)),
        ("smallest cohort", str(manifest.min_sites)), ("rounds", str(manifest.rounds)),
        ("ε of this run", f"{number(epsilon, 2)} per {manifest.privacy.unit}"), ("runs before it", str(before)),
        *([("learns the bounds of", ", ".join(schema.unknown_bounds))] if schema.unknown_bounds else []),
    ]))  # fmt: skip
    out.print(f"watch it: confide run status --federation {federation}", markup=False, soft_wrap=True)


@app.command("status")
def status(
    federation: Federation,
    run: Annotated[str | None, typer.Argument(help="One run; left out: all.")] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """How far the runs are, and what came of them."""
    found = _described(federation, store)
    if run is not None:
        found = [tree for tree in found if tree["run"] == run]
        if not found:
            raise _unknown(run, federation)
    if as_json:
        show_json({"runs": found})
        return
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "status", "round", "released metrics, or why not"):
        shown.add_column(name, overflow="fold")
    for tree in found:
        result = tree["result"] or {}
        said = result.get("reason") or _bounds(result) or _metrics(result)
        shown.add_row(*map(Text, (tree["run"], tree["status"], f"{tree['round']}/{tree['rounds']}", said)))
    out.print(shown if found else "no run was started yet")


@app.command("stop")
def stop(
    run: Annotated[str, typer.Argument(help="The run.")],
    federation: Federation,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Stop a run, within seconds where its coordinator runs. What was charged stays charged, and nothing of it is
    released; one whose model the sites are handing over already is no longer stopped."""
    from confide.server.runs import RunStore
    from confide.server.service import run_store

    runs = RunStore(run_store(federation, store))
    try:
        if runs.status(run) is None:
            raise _unknown(run, federation)
        runs.mark(run, "stopped", only=("waiting",))
        runs.mark(run, "stopping", only=("running",))
        now = runs.status(run)
    finally:
        runs.close()
    if as_json:
        show_json({"run": run, "status": now})
    else:
        out.print(f"{run}: {now}", markup=False, soft_wrap=True)


def _described(federation: Path, store: str | None) -> list[dict[str, Any]]:
    from confide.protocol.manifest import Manifest
    from confide.server.federation import FederationFolder
    from confide.server.runs import RunStore
    from confide.server.service import RUNS, run_store

    FederationFolder(federation)
    runs, found = RunStore(run_store(federation, store)), list[dict[str, Any]]()
    try:
        for name, state in runs.runs().items():
            held, result = runs.load(name), federation / RUNS / name / "result.json"
            if held is None:
                continue
            manifest = Manifest.from_bytes(held[0])
            found.append({
                "run": name, "status": state, "round": min(runs.next_round(name), manifest.rounds),
                "rounds": manifest.rounds, "sites": [m.site for m in manifest.members],
                "min_sites": manifest.min_sites,
                "result": json.loads(result.read_text()) if result.is_file() else None,
            })  # fmt: skip
    finally:
        runs.close()
    return found


def _learned(federation: Path, run: str, wanted: Sequence[str]) -> dict[str, tuple[float, float]]:
    """What a statistics run of this federation has learned."""
    from confide.server.service import RESULT, RUNS

    names = {p.parent.name: p for p in (federation / RUNS).glob(f"*/{RESULT}")}
    if run not in names:
        raise ConfigError(
            "has no result", where=f"--bounds {run[:128]}", hint="confide run status says when it has ended"
        )
    found = json.loads(names[run].read_text()).get("bounds")
    if not found or set(found) != set(wanted):
        why = (
            f"has not learned the bounds of {', '.join(wanted)}"
            if wanted
            else "is not needed: the file leaves out none"
        )
        raise ConfigError(why, where=f"--bounds {run}", hint="name the run that this very file has started")
    return {name: (low, high) for name, (low, high) in found.items()}


def _bounds(result: dict[str, Any]) -> str:
    """As an operator writes them into site.toml, digit by digit."""
    return "; ".join(f"{name}: bounds = {json.dumps(pair)}" for name, pair in (result.get("bounds") or {}).items())


def _metrics(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in (result.get("released_metrics") or {}).items())


def _unknown(run: str, federation: Path) -> ConfigError:
    return ConfigError("there is no such run", where=run[:128], hint=f"confide run status --federation {federation}")
