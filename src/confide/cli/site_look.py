"""`confide site check | status`: is a site ready, and what has it done.

`--json` prints: check: {folder, ready, findings: [{check, state: ok|warn|fail, said, todo, code}]}; status: {site,
federation, agent_running, runs: [{run, joined, latest: microseconds since 1970, state, round, sealed}], refusals: [{at,
run, step, reason}], ledger: [{role, epsilon, used, charges, open_charges}], epsilon_limit}. Neither is for others: it
stays at the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from confide.cli.render import number, out, plain, show_json, table, when
from confide.cli.site_setup import AsJson, PassphraseFile

__all__ = ["check", "status"]

Folder = Annotated[Path, typer.Argument(help="The site's folder.")]
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def check(folder: Folder, passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Look at everything that a run needs, before one does. Exit 0, or the code of the first failure."""
    from confide.clients.doctor import Finding, examine
    from confide.protocol.keyfiles import passphrase_from

    findings, code = list[Finding](), 0
    for finding in examine(folder, passphrase_from(passphrase_file)):
        findings.append(finding)
        code = code or finding.code
        if not as_json:
            out.print(Text.assemble((f"{finding.state:5}", _STYLES[finding.state]), (f"{finding.check}: ", "bold"),
                                    finding.said), soft_wrap=True)  # fmt: skip
            if finding.todo:
                out.print(f"     → {finding.todo}", markup=False, soft_wrap=True)
    if as_json:
        show_json({"folder": str(folder), "ready": code == 0, "findings": [plain(finding) for finding in findings]})
    raise typer.Exit(code)


def status(folder: Folder, as_json: AsJson = False) -> None:
    """The latest runs, refusals with their whole reasons, and ε used. Changes nothing; for the site only."""
    from confide.clients.status import read_status

    found = read_status(folder)
    if as_json:
        show_json(plain(found))
        return
    used = [(f"ε used, {role.role}".replace("_", " "), f"≤ {number(role.epsilon, 2)} of {found.epsilon_limit:g}")
            for role in found.ledger]  # fmt: skip
    out.print(table(f"Site {found.site} of {found.federation}: for the site only", [
        ("agent", "running" if found.agent_running else "not running"), *(used or [("ε used", "none")]),
    ]))  # fmt: skip
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "state", "round", "sealed", "latest entry"):
        shown.add_column(name, overflow="fold")
    for run in found.runs:
        shown.add_row(*map(Text, (run.run, run.state, str(run.round), str(run.sealed), when(run.latest))))
    out.print(shown if found.runs else "no run was joined yet")
    for refusal in found.refusals:
        out.print(f"refused {when(refusal.at)} {refusal.step} of {refusal.run}: {refusal.reason}",
                  markup=False, soft_wrap=True)  # fmt: skip
