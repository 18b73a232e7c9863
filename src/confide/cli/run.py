"""`confide run start | status | stop`: the runs of a federation.

`--json` prints: start: {run, sites, min_sites, rounds, epsilon, position: how many are before it,
learns: columns whose bounds it learns, begins_after: the earlier run whose model it begins with, or null}; status:
{runs: [{run, status, round, rounds, sites, min_sites, begins_after, result}]}; stop: {run, status}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from confide.cli.render import number, out, show_json, table
from confide.cli.server import Store
from confide.cli.site_setup import AsJson
from confide.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from confide.protocol.manifest import Manifest
    from confide.server.runs import RunStore

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
    retrain_after: Annotated[
        str | None, typer.Option("--retrain-after", help="Begin with the model that this finished run began with.")
    ] = None,
    go_on_from: Annotated[
        str | None, typer.Option("--go-on-from", help="Begin with the model that this finished run has released.")
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Fix a run and put it into the store, from which the coordinator takes it.

    A file that leaves out bounds (schema.bounds = "learn") starts the run that learns them. When that has ended, and
    the sites' operators have written them into site.toml, the same file with --bounds starts the training.

    With --retrain-after a model is trained anew without whoever has left the sites since. Do it on dates that were
    declared beforehand, whether or not anybody has: a retraining that follows on a withdrawal would announce it.
    """
    from confide.clients.data.preprocess import encoded_width
    from confide.clients.training.admission import admit_model
    from confide.clients.training.models import build_model, initial_model
    from confide.config.run import load_run
    from confide.server.beginning import require_same
    from confide.server.federation import FederationFolder
    from confide.server.outcome import run_loss
    from confide.server.plan import make_manifest
    from confide.server.runs import RunStore
    from confide.server.service import run_store
    from confide.simulations import HONEST

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
    runs = RunStore(run_store(federation, store))
    try:
        before, weights = _beginning(runs, federation, retrain_after, go_on_from) or (None, weights)
        manifest = make_manifest(
            asked, roster=roster, schema=schema, initial_model=weights, layout=layout, sites=asked.sites.names,
            statistics=bool(schema.unknown_bounds), begins_after=before.run if before is not None else None,
        )  # fmt: skip
        if before is not None:
            require_same(before, manifest, f"after run {before.run}")
        position = sum(status in ("waiting", "running", "stopping") for status in runs.runs().values())
        runs.submit(manifest.run, manifest.to_bytes(), weights.astype("<f4").tobytes())
    finally:
        runs.close()
    epsilon = run_loss(manifest)
    if as_json:
        show_json({"run": manifest.run, "sites": [m.site for m in manifest.members], "min_sites": manifest.min_sites,
                   "rounds": manifest.rounds, "epsilon": epsilon, "position": position,
                   "learns": list(schema.unknown_bounds), "begins_after": manifest.begins_after})  # fmt: skip
        return
    out.print(table(f"Run {manifest.run}", [
        ("purpose", manifest.purpose), ("sites", ", ".join(m.site for m in manifest.members)),
        ("smallest cohort", str(manifest.min_sites)), ("rounds", str(manifest.rounds)),
        ("ε of this run", f"{number(epsilon, 2)} per {manifest.privacy.unit}"), ("runs before it", str(position)),
        *([("learns the bounds of", ", ".join(schema.unknown_bounds))] if schema.unknown_bounds else []),
        *([("begins with", f"the model that {before.run} {'began with' if retrain_after else 'has released'}")]
          if before is not None else []),
    ]))  # fmt: skip
    if retrain_after is not None:
        out.print(HONEST, markup=False, soft_wrap=True)
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
                "min_sites": manifest.min_sites, "begins_after": manifest.begins_after,
                "result": json.loads(result.read_text()) if result.is_file() else None,
            })  # fmt: skip
    finally:
        runs.close()
    return found


def _beginning(
    runs: RunStore, federation: Path, retrain_after: str | None, go_on_from: str | None
) -> tuple[Manifest, NDArray[np.float32]] | None:
    """An earlier run, and which of its models another one is to begin with; None: fresh weights."""
    from confide.server.beginning import earlier_run, first_model

    if retrain_after is not None and go_on_from is not None:
        raise ConfigError("are two beginnings", where="--retrain-after, --go-on-from", hint="give one of them")
    name = retrain_after if retrain_after is not None else go_on_from
    if name is None:
        return None
    where = f"--{'go-on-from' if retrain_after is None else 'retrain-after'} {name[:128]}"
    manifest, data = earlier_run(runs, name, where)
    if retrain_after is not None:
        return manifest, first_model(manifest, data, where)
    return manifest, _released(federation, name, where)


def _released(federation: Path, run: str, where: str) -> NDArray[np.float32]:
    """The model that a run has released, as it lies in the run's folder."""
    from confide.clients.training.artifact import load_model
    from confide.clients.training.models import flatten
    from confide.server.service import RESULT, RUNS

    folder = federation / RUNS / run
    found = load_model(folder / "model.safetensors")
    try:
        told = json.loads((folder / RESULT).read_text()).get("model")
    except (OSError, ValueError):
        told = None
    if (found.card.run, found.card.digest) != (run, told):
        raise ConfigError("its folder does not hold the model that it has released", where=where,
                          hint=f"restore {folder} from a backup")  # fmt: skip
    return flatten(found.module)


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
