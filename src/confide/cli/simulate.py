"""`confide simulate`: run an experiment, or print its plan."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from confide.cli.render import Display, err, number, out, show_json, table
from confide.errors import ConfigError

if TYPE_CHECKING:
    from confide.simulations import Plan, Result
    from confide.simulations import Progress as RoundProgress

__all__ = ["simulate"]

_INTERRUPTED = 130
#: Metrics in a round's line; the rest, and the intervals, stand in the summary.
_SHOWN = 2


class Engine(StrEnum):
    """Where the sites run."""

    LOCAL = "local"
    RAY = "ray"
    DEPLOYMENT = "deployment"


def simulate(
    experiment: Annotated[
        Path | None, typer.Argument(help="Experiment (TOML), or example:NAME. Default: example:rand_health.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. privacy.epsilon=1."),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="New folder for the results. Default: runs/…")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Folder of the sites' privacy ledgers; runs that share it compose.")
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="Where the sites run: this process (the default), Flower's simulation engine (extra: ray), or "
            "real processes over TLS on this machine. A resumed run stays with its own."
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="HOST:PORT",
            help="For --engine ray: a Ray cluster; on one of its machines, auto.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="For --engine local: processes that have the sites between them. Left out: one for each core, where "
            "there are more than a dozen sites. The result does not depend on it.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, wherever it was interrupted.")
    ] = False,
    retrain_after: Annotated[
        Path | None,
        typer.Option(
            "--retrain-after",
            metavar="RUN_FOLDER",
            help="Train anew from a finished run's initial model, without those who have left; charged as any run.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its ε; run nothing, write nothing.")
    ] = False,
    mlflow: Annotated[
        str | None,
        typer.Option(metavar="URI|DIR", help="Log the finished run to MLflow (extra: mlflow)."),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write event files of the finished run (extra: tensorboard)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Train over simulated sites, with consent and person-level privacy."""
    from confide import simulations

    if resume and dry_run:
        raise ConfigError("--dry-run plans a new run", where="--resume", hint="leave one of them out")
    if retrain_after is not None and (resume or dry_run):
        what = "--resume" if resume else "--dry-run"
        raise ConfigError(f"does not go with {what}", where="--retrain-after",
                          hint="an interrupted retraining is resumed by --resume alone")  # fmt: skip
    if resume and out_folder is not None and (done := simulations.finished_result(out_folder)) is not None:
        show_json(done) if as_json else out.print(f"{out_folder}: this run is finished already", soft_wrap=True)
        return
    with err.status("reading…") if err.is_terminal else _Quiet():
        if dry_run:
            plan = simulations.plan(experiment, overrides=assignments or (), ledger=ledger)
    if dry_run:
        show_json(plan.to_json()) if as_json else _show_plan(plan)
        return
    tracker = simulations.open_tracker(mlflow=mlflow, tensorboard=tensorboard)
    try:
        with _RoundDisplay() as display:
            result = simulations.simulate(
                experiment,
                overrides=assignments or (),
                out=out_folder,
                ledger=ledger,
                resume=resume,
                retrain_after=retrain_after,
                engine=None if engine is None else engine.value,
                ray_address=ray_address,
                workers=workers,
                progress=display.update,
            )
        tracker.run(result)
    except KeyboardInterrupt:
        err.print("confide simulate --resume --out FOLDER goes on with this run", markup=False)
        err.print(
            "[yellow]interrupted[/] the folder says so; what was charged stays charged, nothing else was released"
        )
        raise typer.Exit(_INTERRUPTED) from None
    except PermissionError as error:
        raise ConfigError(
            "may not be written", where=str(error.filename), hint="name a folder you may write to"
        ) from None
    if as_json:
        show_json(result.to_json())
    else:
        _show_result(result)


class _Quiet:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _RoundDisplay(Display):
    """A progress bar on a terminal, a line a round elsewhere; both on stderr."""

    def __init__(self) -> None:
        super().__init__("preparing")

    def update(self, progress: RoundProgress) -> None:
        note = f"ε (PRV) {number(progress.epsilon, 2)}"
        if progress.metrics:
            note += "".join(f"  {k} {v:.3f}" for k, v in islice(progress.metrics.items(), _SHOWN))
        if progress.released:
            shown = ", ".join(f"{k} {number(v)}" for k, v in islice(progress.released.items(), _SHOWN))
            note += f"  (released of round {progress.released_round}: {shown})"
        if progress.abandoned:
            note += "  (round abandoned)"
        line = f"round {progress.round}/{progress.rounds}  {note}"
        if err.is_terminal:
            done, all_ = progress.round, progress.rounds
            self._bar.update(self._task, description="training", completed=done, total=all_, note=line)
        else:
            err.print(line, soft_wrap=True)


def _show_plan(plan: Plan) -> None:
    from confide.privacy.dp import LEDGER_LABEL, RUN_LABEL

    unit = f"per {plan.unit}, δ = {plan.delta:g}, neighbours: {plan.neighbours} {plan.unit}"
    rows = [
        ("purpose", plan.purpose),
        ("model", f"{plan.parameters:,} parameters"),
        (
            "rounds",
            f"{plan.rounds} × {plan.local_steps} local steps; metrics leave after rounds {_list(plan.metric_rounds)}",
        ),
        ("strategy", plan.strategy),
        ("sites", str(len(plan.sites))),
        ("profile", f"{plan.profile}: {plan.sealing}"),
        (
            "traffic",
            f"{plan.uplink_bytes / 1000:,.1f} kB up and {plan.downlink_bytes / 1000:,.1f} kB down a site and "
            f"training round ({plan.uplink_bytes / plan.parameters:,.2f} bytes a parameter up; float32 is 4)"
            + _padding(plan),
        ),
        ("ε of this run", f"{number(plan.epsilon, 2)} ({unit}; {RUN_LABEL})"),
        (
            "noise multiplier σ",
            f"{plan.noise_multiplier:g} training, {plan.metrics_noise_multiplier:g} metrics",
        ),
        ("sample rate q, clip C", f"{plan.sample_rate:g}, {plan.max_grad_norm:g}"),
        ("ledger limit", f"ε = {plan.site_epsilon_limit:g} ({LEDGER_LABEL})"),
    ]
    if plan.learned:
        rows.insert(1, ("bounds", f"of {_list(plan.learned)}: learned first, in a statistics run of its own, charged"))
    _show_warnings(plan.warnings)
    out.print(table(f"Plan of {plan.name}: nothing has run", rows))
    sites = Table(
        box=None,
        padding=(0, 2, 0, 0),
        title="The sites' ledgers, before → after",
        title_justify="left",
        title_style="bold",
    )
    for name in ("site", "declared population", "subjects in data", "ε charged (RDP filter)", "budget used"):
        sites.add_column(name, justify="left" if name == "site" else "right")
    for s in plan.sites:
        sites.add_row(
            s.site, f"{s.population:,}", "not shown" if s.subjects is None else f"{s.subjects:,}",
            f"{number(s.epsilon_before, 2)} → {number(s.epsilon_after, 2)}",
            f"{s.used_before:.0%} → {s.used_after:.0%}",
        )  # fmt: skip
    out.print(sites)
    if not plan.admitted:
        out.print("[bold red]This run would be refused[/]: the budget of a site does not suffice.")


def _show_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        out.print(f"[bold white on red] {warning} [/]")


def _padding(plan: Plan) -> str:
    if plan.padding <= 0.1:
        return ""
    why = ": a small model pays for one whole ciphertext" if plan.profile in ("sealed", "ckks") else ""
    return f"; {plan.padding:.1%} of it is padding{why}"


def _show_result(result: Result) -> None:
    from confide import simulations
    from confide.privacy.dp import LEDGER_LABEL, RUN_LABEL

    private = result.epsilon.max != float("inf")
    cost = f"{number(result.epsilon.max, 2)} per {result.unit}"
    rows = [
        ("run", result.run_id),
        ("sites", f"{len(result.sites)} ({_list(result.sites)})"),
        ("profile", result.profile),
        ("rounds", f"{result.rounds}" + (f", {result.rounds_abandoned} abandoned" if result.rounds_abandoned else "")),
        ("consent", result.consent_source),
        ("ε of this run", f"{cost} (δ = {result.delta:g}; neighbours: {result.neighbours} {result.unit}; {RUN_LABEL})"
         if private else "∞: nobody is protected" if result.warnings
         else "∞: a baseline on public data, nobody is protected"),
    ]  # fmt: skip
    if private:
        used = max(result.ledger.values())
        rows.append(("ledger", f"ε {number(used[0], 2)} of {used[1]:g} charged so far, all runs ({LEDGER_LABEL})"))
    if result.learned:
        rows.append(("bounds", "learned in a statistics run of its own, charged: " + result.describe_learned()))
    if result.metrics:
        exact = ", ".join(f"{k} {v:.3f}" for k, v in result.metrics.items())
        rows.append(("exact, simulator only", exact + " on held-out persons (public data)"))
    if result.released_metrics:
        rows.append(("released, noised" if private else "released", result.describe_released({})))
    rows += [
        ("uplink", f"{result.bytes_per_parameter:,.2f} bytes a parameter (float32: 4)" + _small(result)),
        ("time", f"{result.seconds:.1f} s"),
    ]
    if result.saturated:
        rows.append(("clipped to the range", f"at most {result.saturated:.2%} of a round's coordinates"))
    if result.retrained_after is not None:
        rows.insert(1, ("trained anew after", f"{result.retrained_after}. {simulations.HONEST}"))
    _show_warnings(result.warnings)
    out.print(table("Done", rows))
    _show_exposure(result)
    # On a line of its own and never broken, so that it can be copied.
    out.print(f"written to {result.out}", markup=False, soft_wrap=True)


def _small(result: Result) -> str:
    if result.profile not in ("sealed", "ckks") or result.bytes_per_parameter < 16:
        return ""
    return ": a small model pays for one whole ciphertext, 31 kB"


def _show_exposure(result: Result) -> None:
    who = Table(
        box=None, padding=(0, 2, 0, 0), title=f"Who learns what under profile {result.profile}", title_justify="left",
        title_style="bold",
    )  # fmt: skip
    who.add_column("coalition")
    who.add_column("learns")
    for exposure in result.exposure:
        who.add_row(exposure.coalition, exposure.learns)
    out.print(who)


def _list(items: list[str] | list[int]) -> str:
    return ", ".join(map(str, items))
