"""The end of runs that release nothing: logged first, then told to those who joined, until each has answered.

Sites that joined a run keep its keys until they know that it is over. Whoever cannot be reached is told as soon as it
is there, while other runs go on, also by another process: a run's requests and replies lie in the store. Runs in a
simulation are not ended in this way: one that failed there may be resumed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Literal

from flwr.serverapp import Grid

from confide.errors import AuditError, ConfigError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.protocol import messages as m
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.server.exchange import Exchange, Interrupted
from confide.server.grid import LinkGrid
from confide.server.link import Link
from confide.server.runs import RunStore

__all__ = ["Endings", "Status", "log_end", "tell_end"]

Status = Literal["stopped", "failed"]
#: Seconds that an answer is waited for: all that a site does is to destroy keys. Busy, it is asked again later.
_ANSWER_SECONDS = 10.0
_FIRST_WAIT, _LONGEST_WAIT, _IDLE_SECONDS = 5.0, 600.0, 0.5


def log_end(run: str, status: Status, log: Log, store: RunStore) -> None:
    """Note that a run is over, once; before anybody is told. A run that nobody was invited to never was."""
    held = store.load(run)
    if held is not None and store.invited(run):
        store.open(run, *held, log).append_once(audit.RunEnded(run=run, status=status))


def tell_end(
    grid: Grid, identity: Identity, run: str, status: Status, log: Log, store: RunStore, nodes: Mapping[str, int],
    timeout: float | None = _ANSWER_SECONDS, between: Callable[[], None] = lambda: None,
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
        between: Called again and again meanwhile; what it raises ends the waiting.

    Returns:
        Who has not answered yet. One who says no has answered.
    """
    held = store.load(run)
    if held is None:
        raise ConfigError("there is no such run", where=f"run {run[:128]}")
    journal = store.open(run, *held, log)
    exchange = Exchange(grid, identity, Manifest.from_bytes(held[0]), log, journal, timeout, between)
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
    """Who does not know yet (None: nobody has looked), who of them was asked last and is still there, and when those
    are asked again."""

    sites: frozenset[str] | None = None
    asked: frozenset[str] = frozenset()
    due: float = 0.0
    wait: float = _FIRST_WAIT


class Endings:
    """The ends that a service's sites still have to be told of.

    Args:
        identity: The coordinator's name and signing key.
        store: All runs.
        open_log: Opens the coordinator's log, in the thread that tells.
    """

    def __init__(self, identity: Identity, store: RunStore, open_log: Callable[[], Log]) -> None:
        self._identity, self._store, self._open_log = identity, store, open_log
        self._untold: dict[str, _Untold] = {run: _Untold() for run in store.untold()}
        self._lock = threading.Lock()

    def note(self, run: str) -> None:
        """A run has just ended, and its end is logged. For any thread."""
        if run in self._store.untold():
            with self._lock:
                self._untold[run] = _Untold()

    def serve(self, link: Link, ending: threading.Event) -> None:
        """Tell whoever is there, as long as the service lives.

        Raises:
            StorageError: The store does not take what must be durable.
        """

        def between() -> None:
            if ending.is_set():
                raise Interrupted

        with closing(self._open_log()) as log, suppress(Interrupted):
            while not ending.wait(_IDLE_SECONDS):
                self.tell(link, log, between)

    def tell(self, link: Link, log: Log, between: Callable[[], None] = lambda: None) -> None:
        """Tell whoever is there now and does not know yet; who has just come is not kept waiting.

        Raises:
            StorageError: The store does not take what must be durable.
        """
        with self._lock:
            runs = list(self._untold.items())
        for run, untold in runs:
            nodes = {link.sites[node]: node for node in link.online() if node in link.sites}
            there = frozenset(nodes) if untold.sites is None else untold.sites & nodes.keys()
            untold.asked &= there
            if there - untold.asked:
                untold.wait = _FIRST_WAIT
            elif not there or time.monotonic() < untold.due:
                continue
            status = self._store.status(run)
            if status in ("stopped", "failed"):
                ended: Status = "stopped" if status == "stopped" else "failed"
                untold.sites, untold.asked = self._tell(run, ended, link, log, nodes, between), there
                untold.due, untold.wait = time.monotonic() + untold.wait, min(2 * untold.wait, _LONGEST_WAIT)
            if not untold.sites:
                with self._lock:
                    del self._untold[run]

    def _tell(
        self, run: str, status: Status, link: Link, log: Log, nodes: Mapping[str, int], between: Callable[[], None]
    ) -> frozenset[str]:
        grid = LinkGrid(link)
        try:
            # A log that was put back cannot be signed on: then nobody is told anything.
            with suppress(AuditError, ConfigError):
                log.refresh()
                return tell_end(grid, self._identity, run, status, log, self._store, nodes, between=between)
            return frozenset()
        finally:
            grid.close()
