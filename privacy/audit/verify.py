"""Verify a run's logs offline, from files alone.

Steps (numbered in the code):
1. Every log parses line by line, in its one canonical form, and matches its signed checkpoint.
2. The coordinator's log starts with the run; every log is about that run, and signed by the key its manifest names.
3. Times never go backwards inside a log.
4. What one party recorded of another's log (checkpoints in envelopes) is what that log held at that size.
5. Every cohort is at least `min_sites` of the roster; its transcript is the hash of what was agreed; every member
   committed to its update and sealed under exactly this transcript, once.
6. Every update has its charges before it, with the manifest's parameters; ε recomputed from them by two accountants is
   within what the manifest promises.
7. All sites opened each sum to the same model, and the released model is the last of these.
8. Every refusal a site sent is in both logs.

Keys come from the manifest in the coordinator's log: whoever doubts the roster compares its fingerprints out of band.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from confide.errors import AuditError, ConfideError
from confide.privacy.audit import records as r
from confide.privacy.audit.checkpoint import Checkpoint, parse_note
from confide.privacy.audit.log import CHECKPOINT_SUFFIX, LOG_SUFFIX, read_lines
from confide.privacy.audit.merkle import Frontier
from confide.privacy.digest import digest
from confide.privacy.dp.accounting import rdp_epsilon, run_epsilon
from confide.privacy.dp.events import PrivacyEvent, event_from_json, merge_events
from confide.privacy.sealing.transcript import transcript

__all__ = ["Evidence", "Finding", "PartyLog", "load_evidence", "verify"]

COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not hold: whose log, which entry (None: the whole log), and what it means."""

    party: str
    entry: int | None
    what: str

    def __str__(self) -> str:
        place = f"log of {self.party}" + (f", entry {self.entry}" if self.entry is not None else "")
        return f"{place}: {self.what}"


@dataclass(slots=True)
class PartyLog:
    """One party's log, parsed."""

    party: str
    entries: list[r.Record] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    #: Root after each number of entries; `roots[n]` is that of the first n.
    roots: list[bytes] = field(default_factory=list)

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

    @property
    def run(self) -> str:
        """The run's name."""
        return str(self.manifest["run"])


def verify(folder: Path) -> Evidence:
    """Check everything under `folder` (a run's output folder, or a folder of exported logs).

    Returns:
        The evidence with its findings; no finding means that it holds together.

    Raises:
        AuditError: There is no run to verify, or its first log cannot be read at all.
    """
    evidence = load_evidence(folder)
    found = evidence.findings
    steps: list[Callable[[], Iterator[Finding]]] = [
        *(partial(_times, log) for log in (evidence.coordinator, *evidence.sites.values())),
        partial(_seen_checkpoints, evidence),
        *(partial(_charges, evidence, site, log) for site, log in evidence.sites.items()),
        partial(_cohorts, evidence),
        partial(_models, evidence, folder),
        partial(_refusals, evidence),
    ]
    for step in steps:
        try:
            found += step()
        except (KeyError, TypeError, ValueError, IndexError, ConfideError) as error:
            # A manifest can be signed and still be nonsense; that is a finding, not a crash.
            found.append(Finding(COORDINATOR, 0, f"the manifest makes no sense ({type(error).__name__})"))
    found.sort(key=lambda f: (f.party != COORDINATOR, f.party, -1 if f.entry is None else f.entry))
    return evidence


def load_evidence(folder: Path) -> Evidence:
    """Steps 1 and 2.

    Raises:
        AuditError: There is no readable coordinator's log that starts with a run.
    """
    logs = folder / "logs" if (folder / "logs").is_dir() else folder
    path = logs / f"{COORDINATOR}{LOG_SUFFIX}"
    if not path.is_file():
        raise AuditError("there is no coordinator's log here", where=str(folder),
                         hint="give the output folder of a run, or a folder of exported logs")  # fmt: skip
    findings: list[Finding] = []
    coordinator = _read(path, COORDINATOR, findings)
    first = coordinator.entries[0] if coordinator.entries else None
    if not isinstance(first, r.RunCreated):
        why = f" ({findings[0]})" if findings else ""
        raise AuditError(f"the first entry is not a run{why}", where=str(path),
                         hint="the log is damaged from its start, or is no coordinator's log")  # fmt: skip
    try:
        manifest = json.loads(first.manifest)
        keys = {m["site"]: bytes.fromhex(m["public_key"]) for m in manifest["members"]}
        coordinator_key = bytes.fromhex(manifest["coordinator_key"])
        federation = str(manifest["federation"])
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(f"the run's manifest cannot be read ({type(error).__name__})", where=str(path)) from None
    evidence = Evidence(
        manifest, digest("manifest", first.manifest.encode()).hex(), first.software, coordinator, {}, findings
    )
    _check_signature(path, coordinator, f"confide/{federation}/{COORDINATOR}/coordinator", coordinator_key, findings)
    for site, key in keys.items():
        evidence.sites[site] = _site_log(logs / f"{site}{LOG_SUFFIX}", site, federation, key, evidence)
        local = folder / "sites" / site / f"local{LOG_SUFFIX}"
        if local.is_file():
            # A local log is there only when its own site verifies; it never travels.
            log = _read(local, f"{site} (local)", findings)
            _check_signature(local, log, f"confide/{federation}/{site}/local", key, findings, name=site)
    for extra in sorted(logs.glob(f"*{LOG_SUFFIX}")):
        if extra.stem != COORDINATOR and extra.stem not in keys:
            findings.append(Finding(extra.stem, None, "is no site of this run's roster"))
    return evidence


def _site_log(path: Path, site: str, federation: str, key: bytes, evidence: Evidence) -> PartyLog:
    if not path.is_file():
        evidence.findings.append(Finding(site, None, "the log is missing"))
        return PartyLog(site, roots=[Frontier().root()])
    log = _read(path, site, evidence.findings)
    _check_signature(path, log, f"confide/{federation}/{site}/federated", key, evidence.findings)
    for number, entry in enumerate(log.entries):
        if entry.run != evidence.run:
            evidence.findings.append(Finding(site, number, f"belongs to another run ({entry.run})"))
            break
    for number, joined in log.of(r.Joined):
        if joined.manifest != evidence.manifest_digest:
            evidence.findings.append(Finding(site, number, "joined another manifest than the coordinator's"))
    return log


def _read(path: Path, party: str, findings: list[Finding]) -> PartyLog:
    """Step 1: entries up to the first bad one."""
    data, log, frontier = path.read_bytes(), PartyLog(party), Frontier()
    log.roots.append(frontier.root())
    if not data.endswith(b"\n") and data:
        findings.append(Finding(party, data.count(b"\n"), "is not complete"))
    try:
        for record, leaf, at in read_lines(data, str(path)):
            frontier.append(leaf)
            log.entries.append(record)
            log.times.append(at)
            log.roots.append(frontier.root())
    except AuditError as error:
        findings.append(Finding(party, len(log.entries), error.what))
    return log


def _check_signature(
    path: Path, log: PartyLog, origin: str, key: bytes, findings: list[Finding], name: str | None = None
) -> None:
    try:
        note = path.with_suffix(CHECKPOINT_SUFFIX).read_bytes().decode("utf-8")
        checkpoint = parse_note(note, origin, name or log.party, key)
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
    elif log.roots[checkpoint.size] != checkpoint.root:
        findings.append(Finding(log.party, _first_difference(log, checkpoint), "is not what was signed"))
    elif checkpoint.size < len(log.entries):
        findings.append(Finding(log.party, checkpoint.size, "entries follow that no checkpoint covers"))


def _first_difference(log: PartyLog, checkpoint: Checkpoint) -> int | None:
    """A signed root names no entry; only other parties' checkpoints can narrow it down (step 4)."""
    return 0 if checkpoint.size == 1 else None


def _times(log: PartyLog) -> Iterator[Finding]:
    """Step 3."""
    for number in range(1, len(log.times)):
        if log.times[number] < log.times[number - 1]:
            yield Finding(log.party, number, "the clock went backwards")


def _seen_checkpoints(evidence: Evidence) -> Iterator[Finding]:
    """Step 4: earlier states that another party keeps; narrows an edit down to the entries between two of them."""
    claims: list[tuple[PartyLog, str, str, int]] = []
    for number, cohort in evidence.coordinator.of(r.Cohort):
        for site, seen in zip(cohort.cohort, cohort.checkpoints, strict=False):
            if site in evidence.sites:
                claims.append((evidence.sites[site], seen, COORDINATOR, number))
    for site, log in evidence.sites.items():
        for kind in (r.Joined, r.UpdateCommitted, r.Sealed):
            claims += [(evidence.coordinator, e.coordinator, site, number) for number, e in log.of(kind)]
    reported: set[str] = set()
    for log, seen, witness, number in sorted(claims, key=lambda c: _size(c[1])):
        size, root = _size(seen), seen.partition(":")[2]
        if log.party in reported:
            continue
        if not 0 <= size < len(log.roots):
            reported.add(log.party)
            yield Finding(log.party, len(log.entries), f"entries are missing that {witness} saw (its entry {number})")
        elif log.roots[size].hex() != root:
            reported.add(log.party)
            yield Finding(
                log.party,
                max(size - 1, 0),
                f"at or before this entry differs from what {witness} saw (its entry {number})",
            )


def _size(seen: str) -> int:
    text = seen.partition(":")[0]
    return int(text) if text.isascii() and text.isdigit() else -1


def _cohorts(evidence: Evidence) -> Iterator[Finding]:
    """Step 5."""
    manifest, roster = evidence.manifest, set(evidence.sites)
    rounds: set[int] = set()
    opened = {e.round for log in evidence.sites.values() for _, e in log.of(r.Opened)}
    for number, cohort in evidence.coordinator.of(r.Cohort):
        members = cohort.cohort
        if cohort.round in rounds:
            yield Finding(COORDINATOR, number, f"round {cohort.round} was sealed for a second cohort")
        rounds.add(cohort.round)
        if len(members) < manifest["min_sites"] or members != sorted(set(members)) or not set(members) <= roster:
            yield Finding(COORDINATOR, number, "a cohort that the run does not allow")
        expected = transcript(
            evidence.manifest_digest,
            manifest["roster_version"],
            0,
            cohort.round,
            dict(zip(members, cohort.statements, strict=False)),
        )
        if cohort.transcript != expected:
            yield Finding(COORDINATOR, number, "the transcript is not the hash of what was agreed")
        for site in members:
            log = evidence.sites.get(site)
            if log is None:
                continue
            sealed = [(n, e) for n, e in log.of(r.Sealed) if e.round == cohort.round]
            if cohort.round not in opened:
                continue  # abandoned, or interrupted on the way: nothing was counted
            if not any(e.round == cohort.round for _, e in log.of(r.UpdateCommitted)):
                yield Finding(site, None, f"no update was committed for round {cohort.round}, yet it was counted")
            if not sealed:
                yield Finding(site, None, f"nothing was sealed for round {cohort.round}, yet it was counted")
            for n, entry in sealed:
                if entry.transcript != cohort.transcript or entry.cohort != members:
                    yield Finding(site, n, f"sealed round {cohort.round} for another cohort than the coordinator's")
    for site, log in evidence.sites.items():
        seen: set[int] = set()
        for number, entry in log.of(r.Sealed):
            if entry.round in seen:
                yield Finding(site, number, f"sealed round {entry.round} twice")
            seen.add(entry.round)
            if entry.round not in rounds:
                yield Finding(
                    site, number, f"sealed round {entry.round}, of which the coordinator's log knows no cohort"
                )


def _charges(evidence: Evidence, site: str, log: PartyLog) -> Iterator[Finding]:
    """Step 6."""
    privacy = evidence.manifest["privacy"]
    if privacy["epsilon"] in ("Infinity", "inf", None):
        return
    charged: dict[int, list[tuple[int, PrivacyEvent]]] = {}
    settled = {e.charge for _, e in log.of(r.Settled)}
    by_role: dict[str, list[PrivacyEvent]] = {}
    for number, entry in log.of(r.Charged):
        try:
            event = event_from_json(entry.event)
        except Exception:  # an unreadable event is a finding, whatever is wrong with it
            yield Finding(site, number, "a charge that cannot be read")
            continue
        charged.setdefault(entry.round, []).append((number, event))
        if entry.charge not in settled:
            by_role.setdefault(event.role.value, []).append(event)
        if not _as_promised(event, evidence.manifest):
            yield Finding(site, number, "a charge with other parameters than the manifest's")
    for number, entry in log.of(r.UpdateCommitted):
        before = {e.role.value for n, e in charged.get(entry.round, []) if n < number}
        needed = {"train"} if entry.round <= evidence.manifest["rounds"] else set()
        needed |= {"held_out"} if entry.round in evidence.manifest["metric_rounds"] else set()
        if not needed <= before:
            yield Finding(site, number, f"an update of round {entry.round} that was not charged first")
    limit = float(privacy["epsilon"])
    for role, events in by_role.items():
        merged = merge_events(events)
        if len(merged) == 1 and run_epsilon(merged[0], privacy["delta"]) > limit * (1 + 1e-6):
            yield Finding(site, None, f"the charges for {role} cost more than the run's ε = {limit:g}")
        if rdp_epsilon(merged, privacy["delta"]) > privacy["site_epsilon_limit"] * (1 + 1e-6):
            yield Finding(site, None, f"the charges for {role} exceed the ledger's limit")


def _as_promised(event: PrivacyEvent, manifest: dict[str, Any]) -> bool:
    privacy = manifest["privacy"]
    if event.unit != privacy["unit"]:
        return False
    if event.role.value == "train":
        promised = (manifest["noise_multiplier"], privacy["sample_rate"], manifest["training"]["local_steps"])
    else:
        promised = (manifest["metrics_noise_multiplier"], 1.0, 1)
    return (event.noise_multiplier, event.sample_rate, event.steps) == promised


def _models(evidence: Evidence, folder: Path) -> Iterator[Finding]:
    """Step 7."""
    by_round: dict[int, dict[str, tuple[str, int]]] = {}
    for site, log in evidence.sites.items():
        for number, entry in log.of(r.Opened):
            by_round.setdefault(entry.round, {})[site] = (entry.model, number)
    for round_, models in sorted(by_round.items()):
        if len({model for model, _ in models.values()}) > 1:
            site, (_, number) = next(iter(models.items()))
            yield Finding(site, number, f"the sites opened round {round_} to different models")
    released = list(evidence.coordinator.of(r.ModelReleased))
    last = next(iter(by_round[max(by_round)].values()))[0] if by_round else evidence.manifest["initial_model"]
    for number, entry in released:
        if entry.model != last:
            yield Finding(COORDINATOR, number, "released another model than the sites opened last")
    path = folder / "model.safetensors"
    if path.is_file() and released:
        claimed = _weights_digest(path)
        if claimed != released[-1][1].model:
            yield Finding(COORDINATOR, released[-1][0], "model.safetensors does not hold the released model")


def _weights_digest(path: Path) -> str:
    """Digest of the weights in a safetensors file, in the order of the manifest's layout (the file's own card)."""
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        names = json.loads(header["__metadata__"]["confide"])["layout"]["names"]
        body = data[8 + size :]
        weights = b"".join(body[slice(*header[name]["data_offsets"])] for name in names)
    except (ValueError, KeyError, TypeError, IndexError):
        return hashlib.sha256(b"unreadable").hexdigest()
    return digest("model", weights).hex()


def _refusals(evidence: Evidence) -> Iterator[Finding]:
    """Step 8: what the coordinator received was sent."""
    for number, entry in evidence.coordinator.of(r.Refused):
        log = evidence.sites.get(entry.party)
        sent = {(e.round, e.step, e.reason) for _, e in log.of(r.Refused)} if log is not None else set()
        if (entry.round, entry.step, entry.reason) not in sent:
            yield Finding(COORDINATOR, number, f"a refusal by {entry.party} that its own log does not hold")
