"""One run that the service has taken, in a thread of its own: from the store to `result.json`.

It shares the link, the run store and the log's file with the service's other runs, and nothing else: its coordinator,
its Flower run and its hold of the log are its own. So the state of the log that it shows the sites moves with its own
entries only, whatever others append: all of a cohort are shown the same one.

What ends a run is its own: a failure, a stop. Where the service ends (`Interrupted`) the run is left as a kill would
leave it. Everything else, a disk that takes nothing above all, ends the service.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

import numpy as np
from flwr.serverapp import Grid

from confide.errors import AuditError, ConfideError, ConfigError, StorageError
from confide.privacy.audit.log import Log
from confide.privacy.files import write_atomically
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.rosterbook import write_rosters
from confide.server.coordinator import Coordinator
from confide.server.ending import Endings, Status, log_end
from confide.server.exchange import Interrupted
from confide.server.federation import FederationFolder
from confide.server.grid import LinkGrid
from confide.server.link import Link
from confide.server.outcome import failed, finished
from confide.server.process import drive
from confide.server.runs import RunStore
from confide.server.settings import RESULT, RUNS, ServiceConfig

__all__ = ["Shared", "TakenRun"]

_STOPPED = "stopped by confide run stop"


class _StopRun(Interrupted):
    """Somebody wants the run stopped."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the runs of a service have in common.

    Args:
        config: The service.
        identity: The coordinator's name and signing key.
        store: Where runs lie.
        open_log: Opens the coordinator's log, in the thread that uses it.
        endings: Is told which runs have ended without a release.
        link: The way to the sites.
        ending: Set when the service ends.
    """

    config: ServiceConfig
    identity: Identity
    store: RunStore
    open_log: Callable[[], Log]
    endings: Endings
    link: Link
    ending: threading.Event


class TakenRun:
    """See the module.

    Args:
        shared: What runs have in common.
        run: The run, in the store.
    """

    def __init__(self, shared: Shared, run: str) -> None:
        self._shared, self._store, self._run = shared, shared.store, run

    def drive(self) -> None:
        """Begin, or go on from where an earlier process has come to, and end.

        Raises:
            Interrupted: The service ends.
            StorageError: The disk or the store does not take what must be durable.
        """
        with closing(self._shared.open_log()) as log:
            self._drive(log)

    def _drive(self, log: Log) -> None:
        shared, store, run = self._shared, self._store, self._run
        held = store.load(run)
        if held is None:
            return
        manifest, place = Manifest.from_bytes(held[0]), shared.config.folder / RUNS / run
        place.mkdir(parents=True, exist_ok=True)
        shared.config.tell(f"run {run}: round {min(store.next_round(run), manifest.rounds)} of {manifest.rounds}")
        if (ended := store.status(run)) in ("stopped", "failed"):
            # It was over before anybody took it, or an earlier process noted that and died before it wrote down why.
            self._over("stopped" if ended == "stopped" else "failed", log)
            why = _STOPPED if ended == "stopped" else "failed; the coordinator was killed before it wrote down why"
            self._end(failed(manifest, ended, why, {}), log)
            return
        coordinator: list[Coordinator] = []

        def start(grid: Grid) -> Coordinator:
            weights = np.frombuffer(held[1], dtype="<f4").astype(np.float32)
            made = Coordinator(
                grid, shared.identity, manifest, weights, log, before_round=lambda _: self._go_on(),
                timeout=shared.config.timeout, store=store, between=self._go_on,
            )  # fmt: skip
            coordinator.append(made)
            return made

        try:
            self._go_on()
            released = drive(LinkGrid(shared.link), start)
            if not manifest.statistics:
                shared.config.finish(place, manifest, released)
        except _StopRun:
            result = failed(manifest, "stopped", _STOPPED, {})
            self._over("stopped", log)
        except StorageError:
            raise
        except ConfideError as error:
            result = failed(manifest, "failed", str(error), coordinator[0].refusals if coordinator else {})
            self._over("failed", log)
        else:
            result = finished(manifest, released)
        self._end(result, log)

    def _go_on(self) -> None:
        """Nothing, as long as the run may. Once its model was asked for, a stop comes too late: sites have logged that
        they released it."""
        if self._shared.ending.is_set():
            raise Interrupted
        if self._store.status(self._run) in ("stopping", "stopped") and not self._store.releasing(self._run):
            raise _StopRun

    def _over(self, status: Status, log: Log) -> None:
        """It ends without a release: that is logged before anybody is told."""
        self._store.mark(self._run, status, only=("waiting", "running", "stopping"))
        with suppress(AuditError, ConfigError):  # a log or manifest that is not the run's is why it failed
            log_end(self._run, status, log, self._store)
            self._shared.endings.note(self._run)

    def _end(self, result: dict[str, object], log: Log) -> None:
        place = self._shared.config.folder / RUNS / self._run
        try:
            (place / "logs").mkdir(exist_ok=True)
            log.export(place / "logs" / "coordinator.log")
            write_rosters(place / "logs", FederationFolder(self._shared.config.folder).state.chain)
            write_atomically(place / RESULT, json.dumps(result, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(place),
                               hint="free space, then start the service again") from None  # fmt: skip
        self._shared.config.tell(f"run {self._run}: {result['status']}")
