"""The end of runs that release nothing: logged first, then told to those who joined, until each has answered.

Sites that joined a run keep its keys until they know that it is over. Whoever cannot be reached is told later, also by
another process: a run's requests and replies lie in the store. Runs in a simulation are not ended in this way: one that
failed there may be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from flwr.serverapp import Grid

from confide.errors import AuditError, ConfigError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.protocol import messages as m
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.server.exchange import Exchange
from confide.server.grid import LinkGrid
from confide.server.link import Link
from confide.server.runs import RunStore

__all__ = ["Endings", "Status", "log_end", "tell_end"]

Status = Literal["stopped", "failed"]
#: Seconds that an answer is waited for: all that a site does is to destroy keys. Busy, it is asked again later.
_ANSWER_SECONDS = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 600.0


def log_end(run: str, status: Status, log: Log, store: RunStore) -> None:
    """Note that a run is over, once; before anybody is told. A run that nobody was invited to never was."""
    held = store.load(run)
    if held is not None and store.invited(run):
        store.open(run, *held, log).append_once(audit.RunEnded(run=run, status=status))


def tell_end(
    grid: Grid, identity: Identity, run: str, status: Status, log: Log, store: RunStore, nodes: Mapping[str, int],
    timeout: float | None = _ANSWER_SECONDS,
) -> frozenset[str]:  # fmt: skip
    """Tell those who joined a run that it is over.

    Args:
        grid: Flower's way to the nodes.
        identity: The coordinator's name and signing key.
        run: The run, in the store.
        status: How it ended.
        log: The coordinator's log.
        store: Where the run lies.
        nodes: Which sites can be reached now, and where.
        timeout: Seconds to wait for their answers.

    Returns:
        Who has not answered yet. One who says no has answered.
    """
    held = store.load(run)
    if held is None:
        raise ConfigError("there is no such run", where=f"run {run[:128]}")
    journal = store.open(run, *held, log)
    exchange = Exchange(grid, identity, Manifest.from_bytes(held[0]), log, journal, timeout)
    place = exchange.address("end")
    journal.append_once(audit.RunEnded(run=run, status=status))
    members = journal.replies(exchange.address("join"))
    exchange.nodes = {site: node for site, node in nodes.items() if site in members}
    exchange.refusals.clear()
    body = m.EndRequest(status=status)
    told = exchange.ask(place, lambda: {s: exchange.sign(place, s, body) for s in sorted(members)}, m.EndReply)
    return frozenset(members) - set(told) - set(exchange.refusals)


@dataclass(slots=True)
class _Untold:
    """When to try again; `sites` is None as long as nobody has looked who they are."""

    sites: frozenset[str] | None = None
    due: float = 0.0
    wait: float = _FIRST_WAIT


class Endings:
    """The ends that a service's sites still have to be told of.

    Args:
        identity: The coordinator's name and signing key.
        store: All runs.
        log: The coordinator's log.
    """

    def __init__(self, identity: Identity, store: RunStore, log: Log) -> None:
        self._identity, self._store, self._log = identity, store, log
        self._untold: dict[str, _Untold] = {run: _Untold() for run in store.untold()}

    def note(self, run: str, status: Status) -> None:
        """A run has just ended."""
        log_end(run, status, self._log, self._store)
        if run in self._store.untold():
            self._untold[run] = _Untold()

    def tell(self, link: Link) -> None:
        """Tell whoever is there now and does not know yet.

        Raises:
            StorageError: The store does not take what must be durable.
        """
        nodes = {link.sites[node]: node for node in link.online() if node in link.sites}
        for run, untold in list(self._untold.items()):
            there = bool(nodes) if untold.sites is None else not untold.sites.isdisjoint(nodes)
            if not there or time.monotonic() < untold.due:
                continue
            status = self._store.status(run)
            if status in ("stopped", "failed"):
                untold.sites = self._tell(run, "stopped" if status == "stopped" else "failed", link, nodes)
                untold.due, untold.wait = time.monotonic() + untold.wait, min(2 * untold.wait, _LONGEST_WAIT)
            if not untold.sites:
                del self._untold[run]

    def _tell(self, run: str, status: Status, link: Link, nodes: Mapping[str, int]) -> frozenset[str]:
        try:
            # A log that was put back cannot be signed on: then nobody is told anything.
            with suppress(AuditError, ConfigError):
                return tell_end(LinkGrid(link), self._identity, run, status, self._log, self._store, nodes)
            return frozenset()
        finally:
            link.close_run()
