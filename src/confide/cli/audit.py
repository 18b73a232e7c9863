"""`confide audit`: verify logs offline, and write the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from confide.cli.render import err, out, show_json
from confide.errors import AuditError, ConfigError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Evidence that a stranger can verify offline.")
_Folder = Annotated[Path, typer.Argument(help="A run's output folder, or a folder of exported logs.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def root() -> None:
    """Evidence that a stranger can verify offline."""


@app.command("verify")
def verify(folder: _Folder, as_json: _Json = False) -> None:
    """Check signatures, trees, agreement between the parties, charges and ε. Exit 0, or 7 with what does not hold."""
    from confide.privacy.audit.verify import verify as check

    evidence = check(folder)
    entries = len(evidence.coordinator.entries) + sum(len(s.entries) for s in evidence.sites.values())
    findings = [{"party": f.party, "entry": f.entry, "what": f.what} for f in evidence.findings]
    if as_json:
        show_json({
            "run_id": evidence.run, "parties": 1 + len(evidence.sites), "entries": entries,
            "verified": not findings, "findings": findings,
        })  # fmt: skip
    if findings and as_json:
        err.print(f"{folder}: {len(findings)} findings; first: {evidence.findings[0]}", markup=False, soft_wrap=True)
        raise typer.Exit(AuditError.exit_code)
    if findings:
        for finding in evidence.findings[1:20]:
            err.print(f"also: {finding}", markup=False, soft_wrap=True)
        raise AuditError(
            f"{len(findings)} finding{'s' if len(findings) > 1 else ''}; first: {evidence.findings[0]}",
            where=str(folder),
            hint="do not rely on this run's evidence; compare with copies that other parties keep",
        )
    if not as_json:
        out.print(f"verified: run {evidence.run}, {1 + len(evidence.sites)} logs, {entries:,} entries, no finding")


@app.command("report")
def report(
    folder: _Folder,
    out_file: Annotated[Path | None, typer.Option("--out", help="Default: report.html in the folder.")] = None,
    as_json: _Json = False,
) -> None:
    """Write one self-contained HTML page: what was trained, for what, at what privacy loss, who could see what."""
    from confide.privacy.audit.report import write_report

    path = out_file or folder / "report.html"
    try:
        summary = write_report(folder, path)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=str(path), hint="name a place you may write to"
        ) from None
    if as_json:
        show_json({"report": str(path), **summary})
    else:
        verdict = "verified" if summary["verified"] else f"{summary['findings']} findings: the page says which"
        out.print(f"{path} ({verdict})", soft_wrap=True)
