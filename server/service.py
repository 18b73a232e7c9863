"""The coordinator's service: it stays, admits the nodes of the complete roster, and takes the runs of its store one
after the other, oldest first. Killed at any point and started again, it goes on with the run that it was in.

A run's folder (`runs/NAME`) gets, when it ends, what is released: the model, the coordinator's log, and `result.json`,
which is written last: as long as it is missing the run has not ended.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid

from confide.errors import AuditError, ConfideError, ConfigError, StorageError
from confide.privacy.audit.log import Log
from confide.privacy.files import write_atomically
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.roster import Roster
from confide.protocol.rosterbook import write_rosters
from confide.server.certificates import expiry, host_of
from confide.server.coordinator import Coordinator, Released
from confide.server.ending import Endings, Status
from confide.server.federation import AUTHORITY, SERVER_CERTIFICATE, SERVER_KEY, FederationFolder
from confide.server.grid import LinkGrid
from confide.server.link import Link, LinkConfig
from confide.server.outcome import failed, finished
from confide.server.process import drive, log_file
from confide.server.runs import RunStore

__all__ = ["LOGS", "RESULT", "RUNS", "Service", "ServiceConfig", "run_store"]

_log = logging.getLogger(__name__)
#: Names in the federation's folder.
RUNS, LOGS, STORE = "runs", "coordinator.db", "runs.db"
RESULT = "result.json"
_IDLE_SECONDS, _DAY = 0.5, 86_400.0
_UNDER_WAY = ("running", "stopping")


class _StopRun(Exception):
    """Somebody wants the run stopped."""


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """The service.

    Args:
        folder: The federation's.
        store: The run store's URL.
        finish: Writes the released model into a run's folder.
        host: Address to bind; None: the endpoint's own host. The port is the endpoint's.
        wait_for_all: Seconds that a run waits for all its sites; then the smallest cohort is enough to begin.
        timeout: Seconds to wait for the replies of a step, where the run's manifest does not say.
        tell: Called with each event of note, for the operator.
    """

    folder: Path
    store: str
    finish: Callable[[Path, Manifest, Released], None]
    host: str | None = None
    wait_for_all: float = 60.0
    timeout: float = 3600.0
    tell: Callable[[str], None] = lambda _: None


def run_store(folder: Path, url: str | None = None) -> str:
    """The URL of a federation's run store."""
    return url or f"sqlite:///{(folder / STORE).absolute()}"


class Service:
    """See the module.

    Args:
        config: See there.
        passphrase: Of the coordinator's key.

    Raises:
        ConfigError: There is no federation, or another service works in its folder.
    """

    def __init__(self, config: ServiceConfig, passphrase: str | None) -> None:
        self._config, self._folder = config, config.folder
        federation = FederationFolder(config.folder)
        self._endpoint = federation.state.endpoint
        host_of(self._endpoint)
        self._identity: Identity = federation.identity(passphrase)
        self._name = federation.state.name
        self._warn_at = 0.0

    def run(self) -> None:
        """Serve until the process is told to end.

        Raises:
            ConfigError: The link cannot listen.
            StorageError: The disk or the store does not take what must be durable.
        """
        with self._alone(), log_file(self._folder / "server.log"):
            store = RunStore(self._config.store)
            log = self._identity.open_log(self._folder / LOGS, "coordinator", self._name)
            endings = Endings(self._identity, store, log)
            try:
                if self._roster() is None:
                    self._config.tell("waiting for a complete roster: confide federation show says who is missing")
                while True:
                    roster = self._roster()
                    if roster is None:
                        time.sleep(_IDLE_SECONDS)
                    else:
                        self._serve(roster, store, log, endings)
            finally:
                log.close()
                store.close()

    def _serve(self, roster: Roster, store: RunStore, log: Log, endings: Endings) -> None:
        """As long as this roster is the complete one, and this certificate the newest."""
        with Link(self._link(roster)) as link:
            self._config.tell(f"listening on port {link.port} for the {len(roster.members)} sites of {roster.where}")
            write_atomically(self._folder / "server.port", str(link.port).encode())
            shown = self._certificate()
            while self._roster() == roster and self._certificate() == shown:
                self._warn()
                endings.tell(link)
                run = self._next(store)
                if run is None:
                    time.sleep(_IDLE_SECONDS)
                else:
                    self._take(run, link, store, log, endings)

    def _next(self, store: RunStore) -> str | None:
        """A run under way before one that waits; a finished one whose result is missing counts as under way."""
        waiting = None
        for run, status in store.runs().items():
            ended = (self._folder / RUNS / run / RESULT).is_file()
            if status in _UNDER_WAY or (status == "finished" and not ended):
                return run
            if status == "waiting" and waiting is None:
                waiting = run
        return waiting

    def _take(self, run: str, link: Link, store: RunStore, log: Log, endings: Endings) -> None:
        held = store.load(run)
        if held is None:
            return
        manifest, place = Manifest.from_bytes(held[0]), self._folder / RUNS / run
        place.mkdir(parents=True, exist_ok=True)
        self._config.tell(f"run {run}: round {store.next_round(run)} of {manifest.rounds}")
        coordinator: list[Coordinator] = []

        def start(grid: Grid) -> Coordinator:
            weights = np.frombuffer(held[1], dtype="<f4").astype(np.float32)
            made = Coordinator(
                grid, self._identity, manifest, weights, log, before_round=lambda _: _go_on(store, run),
                timeout=self._config.timeout, store=store,
            )  # fmt: skip
            coordinator.append(made)
            return made

        try:
            if store.status(run) != "finished":  # what is released already needs nobody any more
                self._wait_for_sites(manifest, link, store)
            released = drive(link, LinkGrid(link), start)
            if not manifest.statistics:
                self._config.finish(place, manifest, released)
        except _StopRun:
            result = failed(manifest, "stopped", "stopped by confide run stop", {})
            self._over(run, "stopped", store, endings)
        except StorageError:
            raise
        except ConfideError as error:
            result = failed(manifest, "failed", str(error), coordinator[0].refusals if coordinator else {})
            self._over(run, "failed", store, endings)
        else:
            result = finished(manifest, released)
        self._end(run, place, result, log)

    def _over(self, run: str, status: Status, store: RunStore, endings: Endings) -> None:
        """It ends without a release: that is logged before anybody is told, and told between runs."""
        store.mark(run, status, only=("waiting", *_UNDER_WAY))
        with suppress(AuditError, ConfigError):  # a log or manifest that is not the run's is why it failed
            endings.note(run, status)

    def _end(self, run: str, place: Path, result: dict[str, object], log: Log) -> None:
        try:
            (place / "logs").mkdir(exist_ok=True)
            log.export(place / "logs" / "coordinator.log")
            write_rosters(place / "logs", FederationFolder(self._folder).state.chain)
            write_atomically(place / RESULT, json.dumps(result, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(place),
                               hint="free space, then start the service again") from None  # fmt: skip
        self._config.tell(f"run {run}: {result['status']}")

    def _wait_for_sites(self, manifest: Manifest, link: Link, store: RunStore) -> None:
        """Until all of the run's sites are there or, after a while, enough of them."""
        members, begun = {m.site for m in manifest.members}, time.monotonic()
        while True:
            _go_on(store, manifest.run)
            there = members & {link.sites[node] for node in link.online() if node in link.sites}
            patient = time.monotonic() - begun < self._config.wait_for_all
            if there == members or (len(there) >= manifest.min_sites and not patient):
                return
            time.sleep(_IDLE_SECONDS / 2)

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


def _go_on(store: RunStore, run: str) -> None:
    if store.status(run) in ("stopping", "stopped"):
        raise _StopRun
