"""`confide consent impact`: which released models and rounds a withdrawal touches, and what can be done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from confide.cli.consent_inputs import JsonOption, instant
from confide.cli.consent_output import show
from confide.cli.render import number, out, plain, show_json
from confide.cli.site_setup import PassphraseFile
from confide.errors import ConfigError, ConsentError

__all__ = ["impact"]

RETAIN = "retain (nothing to do): the models stay; no round from the withdrawal on computes with whoever has left"
RETRAIN = "retrain, on the date of a public schedule"


def impact(
    subjects: Annotated[list[str] | None, typer.Argument(help="Persons, as in the site's table.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="A simulated run's output folder.")] = None,
    site: Annotated[Path | None, typer.Option("--site", help="Or a deployed site's folder (site.toml).")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Or everybody who has left since: ISO 8601 with an offset.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="A simulated run's ledger folder. Default: ledgers/ in --run.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: JsonOption = False,
) -> None:
    """List the released models and the rounds that whoever withdraws took part in. For the site only."""
    from confide.clients.impact import touched_runs
    from confide.clients.sitefiles import sites_of
    from confide.protocol.keyfiles import passphrase_from
    from confide.simulations import HONEST

    if bool(subjects) == (since is not None):
        raise ConfigError("name persons, or --since", where="confide consent impact",
                          hint="one of both: ann bob, or --since 2026-01-31T00:00:00Z")  # fmt: skip
    folder = run or site
    if folder is None or (run is not None and site is not None):
        raise ConfigError("name --run or --site", where="confide consent impact",
                          hint="one of both: a simulated run's output folder, or a site's folder")  # fmt: skip
    at = None if since is None else instant(since, "--since")
    sites = sites_of(folder, ledger, passphrase_from(passphrase_file))
    answers = [touched_runs(files, subjects or (), at) for files in sites]
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
    how = "the coordinator's confide run start RUN.toml --retrain-after NAME"
    if run is not None:
        how = f"confide simulate --retrain-after {run} --out NEW"
    rows = [
        (f"{r.run} at {r.site}", f"{r.purpose}; {r.persons:,} {'person' if r.persons == 1 else 'persons'}; rounds "
         f"{', '.join(map(str, r.rounds))}; ε ≤ {number(r.epsilon, 2)} at δ = {r.delta:g}; model "
         + (f"{r.model[:16]}…, released {r.released}" if r.model else "not released"))
        for r in runs
    ]  # fmt: skip
    show("What they took part in: for the site only", [
        *rows, ("policies", RETAIN), ("", f"{RETRAIN}: {how}: a run of its own, charged as any"),
        ("either way", HONEST),
    ])  # fmt: skip
