"""Verify a run's logs offline, from files alone.

Steps (numbered in the code):
1. Every log parses line by line, in its one canonical form, and matches its signed checkpoint.
2. The coordinator's log starts with the run; every log is about that run, and signed by the key its manifest names;
   every site that joined did so under this manifest and under the roster that it names.
3. Times never go backwards inside a log.
4. What one party recorded of another's log (checkpoints in envelopes) is what that log held at that size.
5. Every cohort is at least `min_sites` of the roster; its transcript is the hash of what was agreed; every member
   committed to its update under the keys it agreed on and sealed under exactly this transcript, once; where the run
   retries, once an attempt, of which every member unlocked the opened one and no other. All of a cohort were shown the
   same state of the coordinator's log.
6. Every update has its charges before it, with the manifest's parameters; ε recomputed from them by two accountants is
   within what the manifest promises.
7. All sites opened each sum to the same model, and the released model is the last of these.
8. Every refusal received was sent, and in a run that ended every refusal sent was received.
9. A run that has ended does not go on, and a site that was told of an end was told the one in the coordinator's log.
10. Every log still holds the state that an independent witness has cosigned of it.
11. The run's members, and the keys that signed the logs, stand in the chain of rosters that lies beside them, which
every member has signed (`confide.protocol.rosterbook`).
12. No attack whose signed result lies beside the logs shows a larger loss than the manifest claims (`attacks`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from confide.errors import ConfideError
from confide.privacy.audit import records as r
from confide.privacy.audit.attacks import check_attacks
from confide.privacy.audit.charges import check_charges
from confide.privacy.audit.evidence import (
    COORDINATOR,
    Evidence,
    Finding,
    PartyLog,
    Rosters,
    broken,
    load_evidence,
    load_runs,
)
from confide.privacy.audit.witness import WitnessNotes
from confide.privacy.digest import digest
from confide.privacy.sealing.transcript import transcript

__all__ = ["COORDINATOR", "Evidence", "Finding", "PartyLog", "verify", "verify_runs"]

#: The released model, where it lies beside the logs.
MODEL = "model.safetensors"


def verify(
    folder: Path, witnesses: Sequence[WitnessNotes] = (), run: str | None = None, rosters: Rosters | None = None
) -> Evidence:
    """Check everything about one run under `folder` (a run's output folder, or a folder of exported logs).

    Args:
        folder: The logs.
        witnesses: What independent witnesses have cosigned of them.
        run: Its name; None where the logs hold one run only.
        rosters: The chain of rosters; None: keys are the manifest's word.

    Returns:
        The evidence with its findings; no finding means that it holds together.

    Raises:
        AuditError: There is no run to verify, none of this name, or its first log cannot be read at all.
    """
    return _check(load_evidence(folder, run, rosters), folder, witnesses, rosters)


def verify_runs(folder: Path, witnesses: Sequence[WitnessNotes] = (), rosters: Rosters | None = None) -> list[Evidence]:
    """The same for every run in the logs, oldest first; the logs are read once. A model beside them must be what one of
    the runs released.

    Raises:
        AuditError: There is no run to verify, or its first log cannot be read at all.
    """
    runs, path = load_runs(folder, rosters), folder / MODEL
    owners = [e.run for e in runs if path.is_file() and _holds_release(path, e)]
    return [_check(e, folder, witnesses, rosters, model=not owners or e.run in owners) for e in runs]


def _check(
    evidence: Evidence, folder: Path, witnesses: Sequence[WitnessNotes], rosters: Rosters | None, *, model: bool = True
) -> Evidence:
    found = evidence.findings
    steps: list[Callable[[], Iterator[Finding]]] = [
        *(partial(_times, log) for log in (evidence.coordinator, *evidence.sites.values(), *evidence.local)),
        partial(_seen_checkpoints, evidence),
        *(partial(check_charges, evidence, site, log) for site, log in evidence.sites.items()),
        partial(_cohorts, evidence),
        partial(_unlocked, evidence),
        partial(_models, evidence, folder / MODEL if model else None),
        partial(_refusals, evidence),
        partial(_ended, evidence),
        *(partial(_witnessed, evidence, witness) for witness in witnesses),
        *([partial(rosters.check, evidence)] if rosters is not None else []),
        partial(check_attacks, evidence, folder),
    ]
    for step in steps:
        try:
            found += step()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, ConfideError) as error:
            # A manifest can be signed and still be nonsense; that is a finding, not a crash.
            found.append(Finding(COORDINATOR, 0, f"the manifest makes no sense ({type(error).__name__})"))
    # The first bad entry of a log first; what no single entry shows comes after.
    found.sort(key=lambda f: (f.party != COORDINATOR, f.party, f.entry is None, f.entry or 0))
    return evidence


def _times(log: PartyLog) -> Iterator[Finding]:
    """Step 3."""
    for number in range(1, len(log.times)):
        if log.times[number] < log.times[number - 1]:
            yield Finding(log.party, number, "the clock went backwards", "low")


def _seen_checkpoints(evidence: Evidence) -> Iterator[Finding]:
    """Step 4: earlier states that another party keeps; narrows an edit down to the entries between two of them."""
    claims: list[tuple[PartyLog, str, str, int]] = []
    for number, cohort in evidence.coordinator.of(r.Cohort):
        for site, seen in zip(cohort.cohort, cohort.checkpoints, strict=False):
            if site in evidence.sites:
                claims.append((evidence.sites[site], seen, COORDINATOR, number))
    for number, released in evidence.coordinator.of(r.ModelReleased):
        for site, seen in zip(released.sites, released.checkpoints, strict=False):
            if site in evidence.sites:
                claims.append((evidence.sites[site], seen, COORDINATOR, number))
    for site, log in evidence.sites.items():
        for kind in (r.Joined, r.UpdateCommitted, r.Sealed, r.ToldEnded):
            claims += [(evidence.coordinator, e.coordinator, site, number) for number, e in log.of(kind)]
    reported: set[str] = set()
    for log, seen, witness, number in sorted(claims, key=lambda c: _size(c[1])):
        size, root = _size(seen), seen.partition(":")[2]
        if log.party in reported:
            continue
        if not 0 <= size <= log.tree.size and not log.complete:
            continue
        if not 0 <= size <= log.tree.size:
            reported.add(log.party)
            yield Finding(log.party, len(log.entries), f"entries are missing that {witness} saw (its entry {number})")
        elif log.tree.root(size).hex() != root:
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
    attempts: set[tuple[int, int]] = set()
    opened = {e.transcript for log in evidence.sites.values() for _, e in log.of(r.Opened)}
    counted = {e.round for log in evidence.sites.values() for _, e in log.of(r.Opened)}
    retries = bool(manifest["sealing"]["retry"])
    for number, cohort in evidence.coordinator.of(r.Cohort):
        members = cohort.cohort
        if (cohort.round, cohort.attempt) in attempts or (cohort.attempt and not retries):
            yield broken(COORDINATOR, number, f"round {cohort.round} was sealed for a second cohort")
        attempts.add((cohort.round, cohort.attempt))
        if len(cohort.checkpoints) != len(members):
            yield broken(COORDINATOR, number, "a cohort without the state of every member's log")
        if len(members) < manifest["min_sites"] or members != sorted(set(members)) or not set(members) <= roster:
            yield broken(COORDINATOR, number, "a cohort that the run does not allow")
        expected = transcript(
            evidence.manifest_digest,
            manifest["roster_version"],
            cohort.key_epoch,
            cohort.round,
            dict(zip(members, cohort.statements, strict=False)),
            cohort.attempt,
        )
        if cohort.transcript != expected:
            yield broken(COORDINATOR, number, "the transcript is not the hash of what was agreed")
        for site in members:
            log = evidence.sites.get(site)
            if log is None or not log.complete:
                continue
            sealed = [(n, e) for n, e in log.of(r.Sealed) if (e.round, e.attempt) == (cohort.round, cohort.attempt)]
            if cohort.round not in counted or (retries and cohort.transcript not in opened):
                continue  # abandoned, or interrupted on the way: nothing was counted
            agreed = [e.epoch for _, e in log.of(r.KeysAgreed)]
            if agreed and agreed[-1] != cohort.key_epoch:
                yield broken(site, None, f"agreed on other keys than those of round {cohort.round}'s cohort")
            if not any(e.round == cohort.round for _, e in log.of(r.UpdateCommitted)):
                yield broken(site, None, f"no update was committed for round {cohort.round}, yet it was counted")
            if not sealed:
                yield broken(site, None, f"nothing was sealed for round {cohort.round}, yet it was counted")
            for n, entry in sealed:
                if entry.transcript != cohort.transcript or entry.cohort != members:
                    yield broken(site, n, f"sealed round {cohort.round} for another cohort than the coordinator's")
        yield from _same_view(evidence, cohort)
    for site, log in evidence.sites.items():
        seen: set[tuple[int, int]] = set()
        for number, entry in log.of(r.Sealed):
            if (entry.round, entry.attempt) in seen or (entry.attempt and not retries):
                yield broken(site, number, f"sealed round {entry.round} twice")
            seen.add((entry.round, entry.attempt))
            if (entry.round, entry.attempt) not in attempts:
                yield broken(
                    site, number, f"sealed round {entry.round}, of which the coordinator's log knows no cohort"
                )


def _same_view(evidence: Evidence, cohort: r.Cohort) -> Iterator[Finding]:
    """Step 5: all of a cohort cosigned one state of the coordinator's log; whoever was shown another one is named."""
    shown = [
        (site, number, entry.coordinator)
        for site in cohort.cohort
        if site in evidence.sites
        for number, entry in evidence.sites[site].of(r.UpdateCommitted)
        if entry.round == cohort.round
    ]
    usual = Counter(state for _, _, state in shown).most_common(1)
    for site, number, state in shown:
        if state != usual[0][0]:
            yield broken(
                site, number, f"was shown another state of the coordinator's log than others of round {cohort.round}"
            )


def _unlocked(evidence: Evidence) -> Iterator[Finding]:
    """Step 5, where rounds may be retried: every member unlocked one attempt a round, and it is the one opened."""
    retries = bool(evidence.manifest["sealing"]["retry"])
    opened = {e.round: e.transcript for log in evidence.sites.values() for _, e in log.of(r.Opened)}
    cohorts = {e.transcript: e for _, e in evidence.coordinator.of(r.Cohort)}
    for site, log in evidence.sites.items():
        seen: set[int] = set()
        for number, entry in log.of(r.Unlocked):
            if entry.round in seen:
                yield broken(site, number, f"unlocked round {entry.round} twice")
            seen.add(entry.round)
            if entry.transcript != opened.get(entry.round, entry.transcript):
                yield broken(site, number, f"unlocked another attempt of round {entry.round} than was opened")
            of = cohorts.get(entry.transcript)
            if not retries or of is None or (of.round, of.attempt) != (entry.round, entry.attempt):
                yield broken(
                    site, number, f"unlocked in round {entry.round} what the coordinator's log knows nothing of"
                )
        for transcript_ in opened.values() if retries and log.complete else ():
            of = cohorts.get(transcript_)
            if of is not None and site in of.cohort and of.round not in seen:
                yield broken(site, None, f"did not unlock round {of.round}, yet it was counted")


def _models(evidence: Evidence, path: Path | None) -> Iterator[Finding]:
    """Step 7."""
    opened: dict[int, dict[str, tuple[int, r.Opened]]] = {}
    agreed = {e.round: e.transcript for _, e in evidence.coordinator.of(r.Cohort)}
    for site, log in evidence.sites.items():
        start = next(log.of_run(), None)
        if start is not None and not isinstance(start[1], r.Joined | r.Refused):
            yield broken(site, start[0], "the log does not start with joining the run")
        for number, entry in log.of(r.Opened):
            opened.setdefault(entry.round, {})[site] = (number, entry)
            if entry.transcript != agreed.get(entry.round):
                yield broken(site, number, f"opened round {entry.round} under another transcript than its cohort's")
    last = evidence.manifest["initial_model"]
    for round_, found in sorted(opened.items()):
        last = Counter(e.model for _, e in found.values()).most_common(1)[0][0]
        for site, (number, entry) in found.items():
            if entry.model != last:
                yield broken(site, number, f"opened round {round_} to another model than most sites")
    released = list(evidence.coordinator.of(r.ModelReleased))
    for party, log in ((COORDINATOR, evidence.coordinator), *evidence.sites.items()):
        for number, entry in log.of(r.ModelReleased):
            if (_named(entry) if opened else entry.model) != last:
                yield broken(party, number, "released another model than the sites opened last")
            if party != COORDINATOR and not released:
                yield broken(
                    COORDINATOR, None, f"does not tell of the model that {party} released (its entry {number})"
                )
    if path is None or not path.is_file():
        return
    if not released:
        yield broken(COORDINATOR, None, f"tells of no release, yet there is a {MODEL}")
    elif not _holds_release(path, evidence):
        yield broken(COORDINATOR, released[-1][0], f"{MODEL} does not hold the released model")


def _holds_release(path: Path, evidence: Evidence) -> bool:
    """Are the weights in a file what the run released?"""
    released = [entry.model for _, entry in evidence.coordinator.of(r.ModelReleased)]
    return bool(released) and _weights_digest(path, evidence.manifest) == released[-1]


def _named(entry: r.ModelReleased) -> str:
    """What the sites called the released model: they name models under keys, and give one away with the model."""
    try:
        return hmac.digest(bytes.fromhex(entry.key), bytes.fromhex(entry.model), hashlib.sha256).hex()
    except ValueError:
        return "no model"


def _weights_digest(path: Path, manifest: dict[str, Any]) -> str:
    """Digest of the weights in a safetensors file, in the order of the manifest's layout."""
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        names = manifest["layout"]["names"]
        body = data[8 + size :]
        weights = b"".join(body[slice(*header[name]["data_offsets"])] for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return hashlib.sha256(b"unreadable").hexdigest()
    return digest("model", weights).hex()


def _refusals(evidence: Evidence) -> Iterator[Finding]:
    """Step 8: what the coordinator received was sent, and what was sent was received."""
    received = {(e.party, e.round, e.step, e.reason): n for n, e in evidence.coordinator.of(r.Refused)}
    # Without an end the coordinator may have stopped before it could note what it received.
    ended = any(entry.status == "finished" for _, entry in evidence.coordinator.of(r.RunEnded))
    sent: set[tuple[str, int, str, str]] = set()
    for site, log in evidence.sites.items():
        for number, entry in log.of(r.Refused):
            sent.add((site, entry.round, entry.step, entry.reason))
            if ended and (site, entry.round, entry.step, entry.reason) not in received:
                yield broken(site, number, "a refusal that the coordinator's log does not hold")
    for refusal, number in received.items():
        if refusal not in sent:
            yield broken(COORDINATOR, number, f"a refusal by {refusal[0]} that its own log does not hold")


def _ended(evidence: Evidence) -> Iterator[Finding]:
    """Step 9."""
    said: set[str] = set()
    for number, entry in evidence.coordinator.of_run():
        if said and isinstance(entry, r.Cohort | r.RoundAbandoned | r.MetricsReleased | r.ModelReleased | r.RunEnded):
            yield broken(COORDINATOR, number, "goes on with a run that it has ended")
        if isinstance(entry, r.RunEnded):
            said.add(entry.status)
    for site, log in evidence.sites.items():
        over = False
        for number, told in log.of_run():
            if isinstance(told, r.ToldEnded) and told.status not in said and evidence.coordinator.complete:
                yield broken(site, number, f"was told that the run has {told.status}, which the coordinator's log does "
                             "not hold")  # fmt: skip
            if over and isinstance(told, r.Charged | r.UpdateCommitted | r.Sealed | r.Opened | r.ModelReleased):
                yield broken(site, number, "goes on with a run that it was told is over")
            over = over or isinstance(told, r.ToldEnded)


def _witnessed(evidence: Evidence, witness: WitnessNotes) -> Iterator[Finding]:
    """Step 10: what no party can take back together with its own files."""
    for log in (evidence.coordinator, *evidence.sites.values()):
        if log.checkpoint is None:
            continue  # a finding of its own
        try:
            seen = witness.of(log.checkpoint.origin, log.party, log.keys)
        except ConfideError as error:
            yield Finding(log.party, None, f"the note of witness {witness.name} {error.what}")
            continue
        if seen is None:
            yield Finding(log.party, None, f"witness {witness.name} has never seen this log", "low")
        elif seen.checkpoint.size > log.tree.size or log.tree.root(seen.checkpoint.size) != seen.checkpoint.root:
            yield Finding(
                log.party, None,
                f"is not the log that witness {witness.name} cosigned with {seen.checkpoint.size} entries: it was cut, "
                "rolled back or swapped",
            )  # fmt: skip
