"""Reading the logs of one run or more from files: what each party's log holds, and what keeps it from being read.

Nothing here trusts a file: a log parses in one canonical form or not at all, names from a manifest are checked before
they become paths, and whatever cannot be read is a finding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from confide.errors import AuditError
from confide.privacy.audit import records as r
from confide.privacy.audit.checkpoint import Checkpoint, parse_note
from confide.privacy.audit.log import CHECKPOINT_SUFFIX, LOG_SUFFIX, read_lines
from confide.privacy.audit.merkle import Tree
from confide.privacy.digest import digest

__all__ = [
    "COORDINATOR",
    "ROSTER",
    "Evidence",
    "Finding",
    "PartyLog",
    "Rosters",
    "broken",
    "load_evidence",
    "load_runs",
]

COORDINATOR = "coordinator"
#: Whom a finding about the roster names: no site can be called so.
ROSTER = "(roster)"
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
        place = "roster" if self.party == ROSTER else f"log of {self.party}"
        place += f", entry {self.entry}" if self.entry is not None else ""
        return f"{place}: {self.what}"


def broken(party: str, entry: int | None, what: str) -> Finding:
    """What the evidence tells breaks a rule."""
    return Finding(party, entry, what, "high")


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
    #: Every key that the party has had, as far as anything here tells.
    keys: tuple[bytes, ...] = ()
    #: The run that is looked at; None: all of them.
    run: str | None = None
    #: False where reading stopped at a bad entry: what follows from missing entries then needs no finding of its own.
    complete: bool = True

    def of(self, kind: type[r.Record]) -> Iterator[tuple[int, Any]]:
        """(entry number, record) of a kind, of the run that is looked at."""
        return ((i, e) for i, e in self.of_run() if isinstance(e, kind))

    def of_run(self) -> Iterator[tuple[int, r.Record]]:
        """(entry number, record) of the run that is looked at."""
        return ((i, e) for i, e in enumerate(self.entries) if self.run in (None, e.run))


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


class Rosters(Protocol):
    """The chain of rosters beside the logs, whose signatures are another package's to check."""

    def keys(self, party: str) -> Sequence[bytes]:
        """Every signing key that a party has had, the newest first; none where the chain does not hold."""

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """What does not fit the chain."""


def load_evidence(folder: Path, run: str | None = None, rosters: Rosters | None = None) -> Evidence:
    """Steps 1 and 2, for one run.

    Args:
        folder: The logs.
        run: Its name; None where the logs hold one run only.
        rosters: Says which keys a site has had; None: the manifests' alone.

    Raises:
        AuditError: There is no readable coordinator's log that starts with a run, no such run in it, or several and
            none was named.
    """
    found = load_runs(folder, rosters)
    if run is None and len(found) == 1:
        return found[0]
    names = [evidence.run for evidence in found]
    if run is None:
        raise AuditError(f"the logs hold {len(names)} runs", where=str(folder),
                         hint=f"name one with --run: {', '.join(names[-10:])}")  # fmt: skip
    if run not in names:
        raise AuditError(f"the logs hold no run {run[:128]!r}", where=str(folder),
                         hint=f"they hold {', '.join(names[-10:])}")  # fmt: skip
    return found[names.index(run)]


def load_runs(folder: Path, rosters: Rosters | None = None) -> list[Evidence]:
    """Every run in the logs under a folder, oldest first. What is wrong with a log as a whole is a finding of each.

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
    if not coordinator.entries or not isinstance(coordinator.entries[0], r.RunCreated):
        why = f" ({findings[0]})" if findings else ""
        raise AuditError(f"the first entry is not a run{why}", where=str(path),
                         hint="the log is damaged from its start, or is no coordinator's log")  # fmt: skip
    manifests: dict[str, _Created] = {}
    for number, entry in enumerate(coordinator.entries):
        if isinstance(entry, r.RunCreated) and entry.run not in manifests:
            manifests[entry.run] = _parse(entry, path, number)
        elif isinstance(entry, r.RunCreated) or entry.run not in manifests:
            findings.append(Finding(COORDINATOR, number, f"belongs to another run ({entry.run[:80]})"))
            break
    return _by_run(folder, logs, path, coordinator, manifests, findings, rosters)


@dataclass(frozen=True, slots=True)
class _Created:
    """A run as the coordinator's log begins it, and what is needed to read the logs of its members."""

    entry: r.RunCreated
    manifest: dict[str, Any]
    federation: str
    coordinator_key: bytes
    keys: dict[str, bytes]


def _parse(entry: r.RunCreated, path: Path, number: int) -> _Created:
    try:
        manifest = json.loads(entry.manifest)
        keys = {_name(m["site"]): bytes.fromhex(m["public_key"]) for m in manifest["members"]}
        if manifest["run"] != entry.run:
            raise ValueError("the manifest of another run")
        return _Created(entry, manifest, str(manifest["federation"]), bytes.fromhex(manifest["coordinator_key"]), keys)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AuditError(f"the run's manifest cannot be read ({type(error).__name__})",
                         where=f"{path}, entry {number}") from None  # fmt: skip


def _by_run(
    folder: Path, logs: Path, path: Path, coordinator: PartyLog, runs: Mapping[str, _Created], findings: list[Finding],
    rosters: Rosters | None,
) -> list[Evidence]:  # fmt: skip
    # A log is signed with the key that its party held last, so with the one that the latest run names, or a later one.
    latest = list(runs.values())[-1]
    if any((c.federation, c.coordinator_key) != (latest.federation, latest.coordinator_key) for c in runs.values()):
        findings.append(Finding(COORDINATOR, None, "runs of several federations, or coordinators, in one log"))
    origin = f"confide/{latest.federation}"
    _check_signature(path, coordinator, f"{origin}/{COORDINATOR}/coordinator", (latest.coordinator_key,), findings)
    named = {site: key for created in runs.values() for site, key in created.keys.items()}
    keys = {s: tuple(dict.fromkeys((*(rosters.keys(s) if rosters else ()), key))) for s, key in named.items()}
    silent = _never_asked(coordinator, runs, named)
    federated = {
        site: PartyLog(site)
        if site in silent and not (logs / f"{site}{LOG_SUFFIX}").is_file()
        else _party(logs / f"{site}{LOG_SUFFIX}", site, f"{origin}/{site}/federated", key, runs, findings)
        for site, key in keys.items()
    }
    local = {
        # A local log is there only when its own site verifies; it never travels.
        site: _party(file, f"{site} (local)", f"{origin}/{site}/local", key, runs, findings, name=site)
        for site, key in keys.items()
        if (file := folder / "sites" / site / f"local{LOG_SUFFIX}").is_file()
    }
    for extra in sorted(logs.glob(f"*{LOG_SUFFIX}")):
        if extra.stem != COORDINATOR and extra.stem not in keys:
            findings.append(Finding(extra.stem, None, "is no site of this run's roster", "low"))
    found = []
    for run, created in runs.items():
        evidence = Evidence(
            created.manifest, digest("manifest", created.entry.manifest.encode()).hex(), created.entry.software,
            replace(coordinator, run=run), {s: replace(federated[s], run=run) for s in created.keys}, list(findings),
            [replace(local[s], run=run) for s in created.keys if s in local],
        )  # fmt: skip
        for site, log in evidence.sites.items():
            for number, joined in log.of(r.Joined):
                if joined.manifest != evidence.manifest_digest:
                    evidence.findings.append(
                        Finding(site, number, "joined another manifest than the coordinator's")
                    )  # fmt: skip
                elif joined.roster != evidence.manifest.get("roster"):
                    evidence.findings.append(
                        Finding(site, number, "joined under another roster than the manifest names", "high")
                    )
        found.append(evidence)
    return found


def _never_asked(coordinator: PartyLog, runs: Mapping[str, _Created], sites: Iterable[str]) -> set[str]:
    """Where all runs draw their rounds: those sites that are in no cohort. They may have no log to show."""
    if any(created.manifest.get("sites_per_round") is None for created in runs.values()):
        return set()
    seen = {site for entry in coordinator.entries if isinstance(entry, r.Cohort) for site in entry.cohort}
    return set(sites) - seen


def _party(
    path: Path,
    party: str,
    origin: str,
    keys: Sequence[bytes],
    runs: Mapping[str, _Created],
    findings: list[Finding],
    name: str = "",
) -> PartyLog:
    if not path.is_file():
        findings.append(Finding(party, None, "the log is missing"))
        return PartyLog(party)
    log = _read(path, party, findings)
    _check_signature(path, log, origin, keys, findings, name=name or party)
    for number, entry in enumerate(log.entries):
        if entry.run not in runs:
            findings.append(Finding(party, number, f"belongs to another run ({entry.run[:80]})"))
            break
    return log


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
    path: Path, log: PartyLog, origin: str, keys: Sequence[bytes], findings: list[Finding], name: str = COORDINATOR
) -> None:
    log.keys = tuple(keys)
    try:
        note = path.with_suffix(CHECKPOINT_SUFFIX).read_bytes().decode("utf-8")
        checkpoint, key = _signed_by(note, origin, name, keys)
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


def _signed_by(note: str, origin: str, name: str, keys: Sequence[bytes]) -> tuple[Checkpoint, bytes]:
    """The state that a note says, and the first of these keys that has signed it; the first one's error if none has."""
    first: AuditError | None = None
    for key in keys:
        try:
            return parse_note(note, origin, name, key), key
        except AuditError as error:
            first = first or error
    raise first or AuditError("is signed by nobody")


def _first_difference(log: PartyLog, checkpoint: Checkpoint) -> int | None:
    """A signed root names no entry; only other parties' checkpoints can narrow it down (step 4)."""
    return 0 if checkpoint.size == 1 else None
