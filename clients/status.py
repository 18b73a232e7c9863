"""What a site has done lately, from its own files; reads only, also while the site's agent runs. Stays at the site."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from confide.clients.assembly import SiteFolder
from confide.privacy.audit import records as r
from confide.privacy.audit.log import stored_entries
from confide.privacy.dp.statement import RoleStatement, is_ledger_folder, read_statement

__all__ = ["RefusalSeen", "RunSeen", "SiteStatus", "read_status"]

_LATEST = 5


@dataclass(frozen=True, slots=True)
class RunSeen:
    """A run, as this site's own log has it. Times: microseconds since 1970.

    Attributes:
        state: `under way`, `ended` (its keys are destroyed), `called off` (so is it by the coordinator's word) or
            `stopped` (something was not authentic).
        round: The latest round that this site trained or evaluated for.
        sealed: In how many rounds it sealed.
    """

    run: str
    joined: int
    latest: int
    state: str
    round: int
    sealed: int


@dataclass(frozen=True, slots=True)
class RefusalSeen:
    """A refusal with its whole reason, which never left the site."""

    at: int
    run: str
    step: str
    reason: str


@dataclass(frozen=True, slots=True)
class SiteStatus:
    """See the module; runs and refusals are the latest ones, oldest first."""

    site: str
    federation: str
    agent_running: bool
    runs: list[RunSeen]
    refusals: list[RefusalSeen]
    ledger: list[RoleStatement]
    epsilon_limit: float


def read_status(folder: Path) -> SiteStatus:
    """Of the site in a folder.

    Raises:
        ConfigError: There is none.
        AuditError: A log cannot be read.
    """
    place = SiteFolder.read(folder)
    statement = read_statement(place.ledger) if is_ledger_folder(place.ledger) else None
    return SiteStatus(
        site=place.config.name, federation=place.config.federation, agent_running=_locked(folder / "agent.lock"),
        runs=_runs(place.federated_log)[-_LATEST:], refusals=_refusals(place.local_log)[-_LATEST:],
        ledger=statement.roles if statement is not None else [],
        epsilon_limit=place.config.policy.ledger_epsilon_limit,
    )  # fmt: skip


def _runs(log: Path) -> list[RunSeen]:
    found: dict[str, RunSeen] = {}
    for entry, at in stored_entries(log) if log.is_file() else ():
        before = found.get(entry.run)
        if before is None and not isinstance(entry, r.Joined):
            continue  # a refusal to join
        before = before or RunSeen(entry.run, at, at, "under way", 0, 0)
        state, round_, sealed = before.state, before.round, before.sealed
        if isinstance(entry, r.UpdateCommitted):
            round_ = max(round_, entry.round)
        elif isinstance(entry, r.Sealed):
            sealed += 1
        elif isinstance(entry, r.KeysDestroyed):
            state = "ended" if state == "under way" else state
        elif isinstance(entry, r.ToldEnded):
            state = "called off" if state == "under way" else state
        elif isinstance(entry, r.RunStopped):
            state = "stopped"
        found[entry.run] = RunSeen(entry.run, before.joined, at, state, round_, sealed)
    return list(found.values())


def _refusals(log: Path) -> list[RefusalSeen]:
    entries = stored_entries(log) if log.is_file() else []
    return [RefusalSeen(at, e.run, e.step, e.reason) for e, at in entries if isinstance(e, r.LocalRefusal)]


def _locked(path: Path) -> bool:
    """Does an agent hold the folder?"""
    if not path.is_file():
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
