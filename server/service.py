"""The coordinator's service: it stays, admits the nodes of the complete roster, and takes the runs of its store,
several at once. Killed at any point and started again, it goes on with those that it was in.

A run's folder (`runs/NAME`) gets, when it ends, what is released: the model, the coordinator's log, and `result.json`,
which is written last: as long as it is missing the run has not ended.

Which run is taken is `waiting`'s to say, `taken` drives one, `ending` tells sites of runs that released nothing. See
ADR 22.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from confide.errors import ConfigError
from confide.privacy.audit.log import Log
from confide.privacy.files import write_atomically
from confide.protocol.identity import Identity
from confide.protocol.roster import Roster
from confide.server.certificates import expiry, host_of
from confide.server.ending import Endings
from confide.server.federation import AUTHORITY, SERVER_CERTIFICATE, SERVER_KEY, FederationFolder
from confide.server.link import Link, LinkConfig
from confide.server.process import log_file
from confide.server.runs import RunStore
from confide.server.settings import AT_ONCE, LOGS, MOST_AT_ONCE, RESULT, RUNS, ServiceConfig, run_store
from confide.server.taken import Shared, TakenRun
from confide.server.waiting import Waiting
from confide.server.worker import Worker

__all__ = ["AT_ONCE", "LOGS", "MOST_AT_ONCE", "RESULT", "RUNS", "Service", "ServiceConfig", "run_store"]

_log = logging.getLogger(__name__)
_IDLE_SECONDS, _DAY = 0.5, 86_400.0
#: Seconds that a thread has to end: it may be adding a large payload, or waiting for a disk.
_PATIENCE = 60.0


class Service:
    """See the module.

    Args:
        config: See there.
        passphrase: Of the coordinator's key.

    Raises:
        ConfigError: There is no federation, or another service works in its folder.
    """

    def __init__(self, config: ServiceConfig, passphrase: str | None) -> None:
        if not 1 <= config.at_once <= MOST_AT_ONCE:
            raise ConfigError(f"cannot have {config.at_once} runs under way at once", where="service",
                              hint=f"from 1 to {MOST_AT_ONCE}; more of them wait")  # fmt: skip
        said = threading.Lock()

        def tell(event: str) -> None:
            with said:
                config.tell(event)

        self._config, self._folder = replace(config, tell=tell), config.folder
        federation = FederationFolder(config.folder)
        self._endpoint = federation.state.endpoint
        host_of(self._endpoint)
        self._identity: Identity = federation.identity(passphrase)
        self._name = federation.state.name
        self._warn_at = 0.0

    def run(self, end: threading.Event | None = None) -> None:
        """Serve until the process is told to end.

        Args:
            end: Set by whoever wants the service to end; else it is for ever. No run ends with it.

        Raises:
            ConfigError: The link cannot listen.
            StorageError: The disk or the store does not take what must be durable.
        """
        end = end or threading.Event()
        with self._alone(), log_file(self._folder / "server.log"):
            store = RunStore(self._config.store)
            try:
                self._open_log().close()  # what is wrong with it is said before anybody is let in
                endings = Endings(self._identity, store, self._open_log)
                if self._roster() is None:
                    self._config.tell("waiting for a complete roster: confide federation show says who is missing")
                while not end.is_set():
                    roster = self._roster()
                    if roster is None:
                        end.wait(_IDLE_SECONDS)
                    else:
                        self._serve(roster, store, endings, end)
            finally:
                store.close()

    def _serve(self, roster: Roster, store: RunStore, endings: Endings, end: threading.Event) -> None:
        """As long as roster and certificate are the newest; then until no run is under way."""
        ending, shown = threading.Event(), self._certificate()
        with Link(self._link(roster)) as link:
            self._config.tell(f"listening on port {link.port} for the {len(roster.members)} sites of {roster.where}")
            write_atomically(self._folder / "server.port", str(link.port).encode())
            shared = Shared(config=self._config, identity=self._identity, store=store, open_log=self._open_log,
                            endings=endings, link=link, ending=ending)  # fmt: skip
            telling = Worker("endings", partial(endings.serve, link, ending))
            going: dict[str, Worker] = {}
            try:
                self._take_runs(shared, telling, going, end, lambda: self._shows(roster, shown))
            finally:
                ending.set()
                for worker in (telling, *going.values()):
                    worker.join(_PATIENCE)

    def _take_runs(
        self, shared: Shared, telling: Worker, going: dict[str, Worker], end: threading.Event,
        unchanged: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Until the link is out of date and nobody uses it. What ends a worker ends this, too."""
        waiting, current = Waiting(self._folder, shared.store, self._config.wait_for_all), True
        while (current or going) and not end.is_set():
            over = [run for run, worker in going.items() if not worker.alive]
            for worker in (telling, *going.values()):
                if worker.error is not None:
                    raise worker.error
            for run in over:
                del going[run]
            if current and not unchanged():
                current = False
                if going:
                    self._config.tell(f"the roster or the certificate has changed: it is used once the {len(going)} "
                                      "runs under way have ended; others wait")  # fmt: skip
            if current:
                self._warn()
            while (found := self._next(shared, waiting, going, current)) is not None:
                going[found] = Worker(f"run {found}", TakenRun(shared, found).drive)
            end.wait(_IDLE_SECONDS)

    def _next(self, shared: Shared, waiting: Waiting, going: dict[str, Worker], current: bool) -> str | None:
        link = shared.link
        there = {link.sites[node] for node in link.online() if node in link.sites}
        return waiting.next(going, there, room=current and len(going) < self._config.at_once)

    def _shows(self, roster: Roster, certificate: bytes) -> bool:
        """Are these still the newest?"""
        return (self._roster(), self._certificate()) == (roster, certificate)

    def _open_log(self) -> Log:
        return self._identity.open_log(self._folder / LOGS, "coordinator", self._name)

    def _link(self, roster: Roster) -> LinkConfig:
        host, _, port = self._endpoint.rpartition(":")
        return LinkConfig(
            host=self._config.host or host.strip("[]"), port=int(port), certificate=self._folder / SERVER_CERTIFICATE,
            key=self._folder / SERVER_KEY, nodes={m.site: m.node_key for m in roster.members},
        )  # fmt: skip

    def _certificate(self) -> bytes:
        """Written after its key: a new one can be used at once."""
        return (self._folder / SERVER_CERTIFICATE).read_bytes()

    def _warn(self) -> None:
        """Once a day, while a certificate comes to its end."""
        if time.monotonic() < self._warn_at:
            return
        self._warn_at = time.monotonic() + _DAY
        now = dt.datetime.now(dt.UTC)
        if (said := expiry(self._certificate(), (self._folder / AUTHORITY).read_bytes(), now)) is not None:
            _log.warning(said)
            self._config.tell(said)

    def _roster(self) -> Roster | None:
        return FederationFolder(self._folder).state.roster

    @contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(self._folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
            except BlockingIOError:
                raise ConfigError("another coordinator works in this folder", where=str(self._folder),
                                  hint="end it first") from None  # fmt: skip
            yield
        finally:
            with suppress(OSError):
                os.close(descriptor)
