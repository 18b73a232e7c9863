"""A coordinator's service in a thread, over a real link, and real sites opened from their folders, each in a thread
that plays its SuperNode and its executor. Nothing is a process of its own, so that a test can hold what it wants to.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message

from benchmarks.deployment_demo import WORDS, ok
from confide.cli.server import write_model
from confide.clients.assembly import open_site
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import stored_entries
from confide.protocol.flower import from_records, to_records
from confide.protocol.keyfiles import read_key
from confide.server.federation import FederationFolder
from confide.server.runs import RunStore
from confide.server.service import Service, ServiceConfig, run_store
from tests.attacks.federation import header_of
from tests.integration.deployed import wait_until
from tests.integration.staged import Staged
from tests.server.nodes import NodeClient

#: Seconds after which something that does not happen is a failure.
PATIENCE = 180.0
#: One site at a time: OpenSSL derives keys from passphrases in threads of its own, and two at once may never end.
_ONE = threading.Lock()
SHORT: dict[str, Any] = {"run": {"rounds": 2, "report_metrics_every": 2}, "privacy": {"epsilon": 1.0}}


class PlayedSite:
    """One site and its node; ends with `end`, once the link is gone or lets it go.

    Args:
        folder: The site's.
        port: The link's.
        before: Called with (site, run, step, round) before a request is answered: what to wait for, if anything.
    """

    def __init__(self, folder: Path, port: int, before: Callable[[str, str, str, int], threading.Event | None]) -> None:
        self._folder, self._port, self._before = folder, port, before
        self.name, self.error = folder.name, list[BaseException]()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._live, name=folder.name, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Let it go after what it is at."""
        self._ending.set()

    def join(self) -> None:
        """Wait until it has gone."""
        self._thread.join(timeout=PATIENCE)
        assert self.error == []

    def _live(self) -> None:
        with _ONE:
            key = load_ssh_private_key(read_key(self._folder / "keys" / "node.key", WORDS), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            site = open_site(str(self._folder), WORDS)
        try:
            node = None
            while not self._ending.is_set():
                try:
                    node = node or NodeClient(self._port, self._folder / "ca.crt", key).activate()
                    message = node.look()
                    if message is not None:
                        self._answer(site, node, message)
                except httpx.HTTPError:  # the link is gone, or has ended the run
                    node = None
                    self._ending.wait(0.1)
        except BaseException as error:
            self.error.append(error)
        finally:
            site.close()

    def _answer(self, site: Any, node: NodeClient, message: Message) -> None:
        step = message.metadata.message_type.rpartition(".")[2]
        request = from_records(message.content)
        header = header_of(request)
        held, deadline = self._before(self.name, header.run, step, header.round), time.monotonic() + PATIENCE
        while held is not None and not held.wait(5.0):
            assert time.monotonic() < deadline, f"{self.name} is held for ever"
            with suppress(httpx.HTTPError):
                node.live()
        with _ONE:
            answer = site.handle(step, request)
        node.push(Message(to_records(answer), reply_to=message))


class Served:
    """See the module.

    Args:
        made: The provisioned federation.
        options: Of the service.
    """

    def __init__(self, made: Staged, **options: Any) -> None:
        self.made, self._options = made, options
        self.fed = made.fed
        self.told: list[str] = []
        #: (site, run, step, round) of every request that was about to be answered.
        self.asked: list[tuple[str, str, str, int]] = []
        self._held: dict[tuple[str, str, str], threading.Event] = {}
        self.sites: dict[str, PlayedSite] = {}
        self.error: BaseException | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    # --- service and sites ----------------------------------------------------------------------------------------

    def start(self, **options: Any) -> None:
        """Start the service."""
        self._end.clear()
        self.error = None
        values = {"finish": write_model, "tell": self.told.append, **self._options, **options}
        service = Service(ServiceConfig(folder=self.fed, store=run_store(self.fed), **values), WORDS)

        def live() -> None:
            try:
                service.run(self._end)
            except BaseException as error:
                self.error = error

        before = len(self.told)
        self._thread = threading.Thread(target=live, name="service", daemon=True)
        self._thread.start()
        self.until(lambda: any(event.startswith("listening") for event in self.told[before:]) or self.error is not None,
                   "the service listens")  # fmt: skip

    def join(self) -> BaseException | None:
        """Wait for the service's end; what it ended with."""
        assert self._thread is not None
        self._thread.join(timeout=PATIENCE)
        assert not self._thread.is_alive()
        return self.error

    def stop(self) -> None:
        """End the service, as its operator would."""
        self._end.set()
        assert self.join() is None

    def come(self, *sites: str) -> None:
        """These sites are there."""
        port = int(FederationFolder(self.fed).state.endpoint.rpartition(":")[2])
        self.sites |= {name: PlayedSite(self.made.sites[name], port, self._before) for name in sites}

    def _before(self, site: str, run: str, step: str, round_: int) -> threading.Event | None:
        self.asked.append((site, run, step, round_))
        return self._held.get((site, run, step))

    def hold(self, site: str, run: str, step: str) -> threading.Event:
        """Have a site wait before it answers this step of a run, until the event is set."""
        self._held[site, run, step] = threading.Event()
        return self._held[site, run, step]

    def close(self) -> None:
        """End everything."""
        for held in self._held.values():
            held.set()
        for site in self.sites.values():
            site.end()
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=PATIENCE)
        for site in self.sites.values():
            site.join()

    # --- runs -----------------------------------------------------------------------------------------------------

    def submit(self, name: str, **sections: dict[str, Any]) -> str:
        """Put a run into the store."""
        return self.made.start_run(name, **{**SHORT, **sections})

    def ask_to_stop(self, run: str) -> None:
        """`confide run stop`."""
        ok("run", "stop", run, "--federation", self.fed)

    def status(self, run: str) -> str:
        """What the store says of a run."""
        store = RunStore(run_store(self.fed))
        try:
            return str(store.status(run))
        finally:
            store.close()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that must happen."""
        try:
            wait_until(condition, what, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}; told: {self.told}; asked: {self.asked[-20:]}; {self.error!r}") from None

    def until_asked(self, site: str, run: str, step: str) -> None:
        """Wait until a site is about to answer a step."""
        self.until(lambda: any(a[:3] == (site, run, step) for a in list(self.asked)), f"{site} is asked to {step}")

    def result(self, run: str) -> dict[str, Any]:
        """What a run ended with."""
        path = self.fed / "runs" / run / "result.json"
        self.until(path.exists, f"run {run} ends")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def ended(self, run: str) -> bool:
        """Has it?"""
        return (self.fed / "runs" / run / "result.json").exists()

    def entries(self, party: str, kind: type[audit.Record], run: str) -> list[Any]:
        """A party's log entries of a kind, of a run."""
        return self.made.entries(party, kind, run)

    def order(self) -> list[str]:
        """Whose entries stand in the coordinator's log, in their order."""
        return [entry.run for entry, _ in stored_entries(self.fed / "coordinator.db")]


def copied(made: Staged, folder: Path) -> Staged:
    """A federation as it was when it was provisioned, in a folder of its own."""
    shutil.copytree(made.folder, folder)
    found = Staged(folder, made.names, made.people)
    return found


@contextmanager
def served(made: Staged, **options: Any) -> Iterator[Served]:
    """A federation with nothing started; nothing of it outlives the block."""
    one = Served(made, **options)
    try:
        yield one
    finally:
        one.close()
