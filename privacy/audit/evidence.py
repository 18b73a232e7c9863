"""Reading a run's logs from files: what each party's log holds, and everything that keeps it from being read.

Nothing here trusts a file: a log parses in one canonical form or not at all, names from a manifest are checked before
they become paths, and whatever cannot be read is a finding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from confide.errors import AuditError
from confide.privacy.audit import records as r
from confide.privacy.audit.checkpoint import Checkpoint, parse_note
from confide.privacy.audit.log import CHECKPOINT_SUFFIX, LOG_SUFFIX, read_lines
from confide.privacy.audit.merkle import Tree
from confide.privacy.digest import digest

__all__ = ["COORDINATOR", "Evidence", "Finding", "PartyLog", "load_evidence"]

COORDINATOR = "coordinator"
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not hold: whose log, which entry (None: the whole log), what it means, and how bad it is.

    *critical*: the evidence itself was changed, or is gone. *high*: what it tells breaks a rule of the run. *low*: it
    cannot all be checked, or has an innocent explanation.
    """

    party: str
    entry: int | None
    what: str
    severity: Literal["critical", "high", "low"] = field(default="critical", compare=False)

    def __str__(self) -> str:
        place = f"log of {self.party}" + (f", entry {self.entry}" if self.entry is not None else "")
        return f"{place}: {self.what}"


@dataclass(slots=True)
class PartyLog:
    """One party's log, parsed."""

    party: str
    entries: list[r.Record] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    tree: Tree = field(default_factory=Tree)
    path: Path | None = None
    #: Its signed note, the state that it says, and whose key signed it; None and empty where that does not hold.
    checkpoint: Checkpoint | None = None
    note: str = ""
    public_key: bytes = b""
    #: False where reading stopped at a bad entry: what follows from missing entries then needs no finding of its own.
    complete: bool = True

    def of(self, kind: type[r.Record]) -> Iterator[tuple[int, Any]]:
        """(entry number, record) of a kind."""
        return ((i, e) for i, e in enumerate(self.entries) if isinstance(e, kind))


@dataclass(slots=True)
class Evidence:
    """Everything that could be read, and what could not."""

    manifest: dict[str, Any]
    manifest_digest: str
    software: dict[str, str]
    coordinator: PartyLog
    sites: dict[str, PartyLog]
    findings: list[Finding]
    #: Local logs, where their own site verifies.
    local: list[PartyLog] = field(default_factory=list)

    @property
    def run(self) -> str:
        """The run's name."""
        return str(self.manifest["run"])


def load_evidence(folder: Path) -> Evidence:
    """Steps 1 and 2.

    Raises:
        AuditError: There is no readable coordinator's log that starts with a run.
    """
    logs = folder / "logs" if (folder / "logs").is_dir() else folder
    path = logs / f"{COORDINATOR}{LOG_SUFFIX}"
    if not path.is_file():
        raise AuditError("there is no coordinator's log here", where=str(folder),
                         hint="give the output folder of a run, or a folder of exported logs; "
                         "where the run was killed, confide audit export FOLDER writes them")  # fmt: skip
    findings: list[Finding] = []
    coordinator = _read(path, COORDINATOR, findings)
    first = coordinator.entries[0] if coordinator.entries else None
    if not isinstance(first, r.RunCreated):
        why = f" ({findings[0]})" if findings else ""
        raise AuditError(f"the first entry is not a run{why}", where=str(path),
                         hint="the log is damaged from its start, or is no coordinator's log")  # fmt: skip
    try:
        manifest = json.loads(first.manifest)
        keys = {_name(m["site"]): bytes.fromhex(m["public_key"]) for m in manifest["members"]}
        coordinator_key = bytes.fromhex(manifest["coordinator_key"])
        federation, _ = str(manifest["federation"]), manifest["run"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AuditError(f"the run's manifest cannot be read ({type(error).__name__})", where=str(path)) from None
    evidence = Evidence(
        manifest, digest("manifest", first.manifest.encode()).hex(), first.software, coordinator, {}, findings
    )
    for number, entry in enumerate(coordinator.entries):
        if entry.run != evidence.run or (number and isinstance(entry, r.RunCreated)):
            findings.append(Finding(COORDINATOR, number, f"belongs to another run ({entry.run[:80]})"))
            break
    _check_signature(path, coordinator, f"confide/{federation}/{COORDINATOR}/coordinator", coordinator_key, findings)
    for site, key in keys.items():
        evidence.sites[site] = _site_log(logs / f"{site}{LOG_SUFFIX}", site, federation, key, evidence)
        local = folder / "sites" / site / f"local{LOG_SUFFIX}"
        if local.is_file():
            # A local log is there only when its own site verifies; it never travels.
            log = _read(local, f"{site} (local)", findings)
            _check_signature(local, log, f"confide/{federation}/{site}/local", key, findings, name=site)
            _check_run(log, evidence)
            evidence.local.append(log)
    for extra in sorted(logs.glob(f"*{LOG_SUFFIX}")):
        if extra.stem != COORDINATOR and extra.stem not in keys:
            findings.append(Finding(extra.stem, None, "is no site of this run's roster", "low"))
    return evidence


def _site_log(path: Path, site: str, federation: str, key: bytes, evidence: Evidence) -> PartyLog:
    if not path.is_file():
        evidence.findings.append(Finding(site, None, "the log is missing"))
        return PartyLog(site)
    log = _read(path, site, evidence.findings)
    _check_signature(path, log, f"confide/{federation}/{site}/federated", key, evidence.findings)
    _check_run(log, evidence)
    for number, joined in log.of(r.Joined):
        if joined.manifest != evidence.manifest_digest:
            evidence.findings.append(Finding(site, number, "joined another manifest than the coordinator's"))
        elif joined.roster != evidence.manifest.get("roster"):
            evidence.findings.append(
                Finding(site, number, "joined under another roster than the manifest names", "high")
            )
    return log


def _check_run(log: PartyLog, evidence: Evidence) -> None:
    for number, entry in enumerate(log.entries):
        if entry.run != evidence.run:
            evidence.findings.append(Finding(log.party, number, f"belongs to another run ({entry.run[:80]})"))
            break


def _name(site: object) -> str:
    """A site's name is about to become a path."""
    if not isinstance(site, str) or not _SITE_NAME.fullmatch(site):
        raise ValueError("not a site's name")
    return site


def _read(path: Path, party: str, findings: list[Finding]) -> PartyLog:
    """Step 1: entries up to the first bad one."""
    log = PartyLog(party, path=path)
    try:
        data = path.read_bytes()
    except OSError as error:
        findings.append(Finding(party, None, f"the log cannot be read ({error.strerror})"))
        log.complete = False
        return log
    if not data.endswith(b"\n") and data:
        findings.append(Finding(party, data.count(b"\n"), "is not complete", "low"))
    try:
        for record, leaf, at in read_lines(data, str(path)):
            log.tree.append(leaf)
            log.entries.append(record)
            log.times.append(at)
    except AuditError as error:
        findings.append(Finding(party, len(log.entries), error.what))
        log.complete = False
    return log


def _check_signature(
    path: Path, log: PartyLog, origin: str, key: bytes, findings: list[Finding], name: str | None = None
) -> None:
    try:
        note = path.with_suffix(CHECKPOINT_SUFFIX).read_bytes().decode("utf-8")
        checkpoint = parse_note(note, origin, name or log.party, key)
        log.checkpoint, log.note, log.public_key = checkpoint, note, key
    except (OSError, UnicodeDecodeError):
        findings.append(Finding(log.party, None, "there is no readable checkpoint"))
        return
    except AuditError as error:
        findings.append(Finding(log.party, None, f"the checkpoint {error.what}"))
        return
    if checkpoint.size > len(log.entries):
        # Where an entry is unreadable that finding already says so; otherwise entries are gone.
        if not any(f.party == log.party for f in findings):
            findings.append(Finding(log.party, len(log.entries), "entries are missing that the checkpoint covers"))
    elif log.tree.root(checkpoint.size) != checkpoint.root:
        findings.append(Finding(log.party, _first_difference(log, checkpoint), "is not what was signed"))
    elif checkpoint.size < len(log.entries):
        findings.append(Finding(log.party, checkpoint.size, "entries follow that no checkpoint covers", "low"))


def _first_difference(log: PartyLog, checkpoint: Checkpoint) -> int | None:
    """A signed root names no entry; only other parties' checkpoints can narrow it down (step 4)."""
    return 0 if checkpoint.size == 1 else None
