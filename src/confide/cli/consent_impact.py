"""`confide consent impact`: which released models and rounds a withdrawal touches, and what can be done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from confide.cli.consent_inputs import JsonOption, instant
from confide.cli.consent_output import show
from confide.cli.render import number, out, plain, show_json
from confide.errors import ConfigError, ConsentError

__all__ = ["impact"]

RETAIN = "retain (nothing to do): the models stay; no round from the withdrawal on computes with whoever has left"
RETRAIN = "retrain, on the date of a public schedule: confide simulate --retrain-after"


def impact(
    folder: Annotated[Path, typer.Option("--run", help="A run's output folder, at the site.")],
    subjects: Annotated[list[str] | None, typer.Argument(help="Persons, as in the site's table.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Or everybody who has left since: ISO 8601 with an offset.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="The sites' ledger folder. Default: ledgers/ in the folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the released models and the rounds that whoever withdraws took part in. For the site only."""
    from confide.clients.exposure import SiteFiles
    from confide.clients.impact import touched_runs
    from confide.simulations import HONEST

    if bool(subjects) == (since is not None):
        raise ConfigError("name persons, or --since", where="confide consent impact",
                          hint="one of both: ann bob, or --since 2026-01-31T00:00:00Z")  # fmt: skip
    at, ledgers = None if since is None else instant(since, "--since"), ledger or folder / "ledgers"
    sites = sorted(p for p in (folder / "sites").glob("*") if (p / "consent.db").is_file())
    if not sites:
        raise ConfigError("holds no site (sites/NAME/consent.db)", where=f"--run {folder}",
                          hint="give the output folder of a run, at the site")  # fmt: skip
    answers = [touched_runs(SiteFiles.of(p.name, p, ledgers / p.name), subjects or (), at) for p in sites]
    persons, runs = sum(count for count, _ in answers), [run for _, found in answers for run in found]
    if subjects and not persons:
        raise ConsentError("no site here knows any of these persons", where=", ".join(subjects),
                           hint="check the identifiers: they are those of the sites' tables")  # fmt: skip
    if as_json:
        show_json({"persons": persons, "runs": plain(runs), "policies": ["retain", "retrain"]})
        return
    if not runs:
        out.print(f"{persons:,} {'person' if persons == 1 else 'persons'}; no round here computed with any of them.")
        return
    rows = [
        (f"{r.run} at {r.site}", f"{r.purpose}; {r.persons:,} {'person' if r.persons == 1 else 'persons'}; rounds "
         f"{', '.join(map(str, r.rounds))}; ε ≤ {number(r.epsilon, 2)} at δ = {r.delta:g}; model "
         + (f"{r.model[:16]}…, released {r.released}" if r.model else "not released"))
        for r in runs
    ]  # fmt: skip
    show("What they took part in: for the site only", [
        *rows, ("policies", RETAIN), ("", f"{RETRAIN} {folder} --out NEW: a run of its own, charged as any"),
        ("either way", HONEST),
    ])  # fmt: skip
