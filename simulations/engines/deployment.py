"""`--engine deployment`: the run as a deployed federation of this machine. A federation is founded beside the run, its
coordinator and every site's agent are processes of their own, and talk over TLS on the loopback interface.

What is simulated still: whose records lie where, who consents, and the officers (`apart.py`), all of which the
executors read from the run's folder. The policy of its sites is the simulation's, not a `site.toml`'s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from confide.config import Experiment
from confide.errors import ConfideError, ConfigError, PeerError
from confide.server.coordinator import Released
from confide.simulations.engines.apart import forget_seen
from confide.simulations.engines.engine import Drive
from confide.simulations.engines.processes import outcome_from_json, raised, released_from_json
from confide.simulations.engines.provisioning import found_parties, provision
from confide.simulations.keeping import Keeping
from confide.simulations.sources import Sources

__all__ = ["MOST_SITES", "DeploymentEngine"]

#: Each site is three processes: an agent, Flower's SuperNode, and an executor with torch in it.
MOST_SITES = 12
_LOOK_AGAIN = 0.5
#: Seconds for processes to end by themselves: an agent waits for its site's last request.
_GRACE = 45.0
_MODULE = "confide.simulations.engines.processes"


class DeploymentEngine:
    """See the module."""

    name = "deployment"

    def check(self, experiment: Experiment, sites: int) -> None:
        """Refuse what has no place among real processes.

        Raises:
            ConfigError: There are too many sites, or the scenario has messages get lost.
        """
        if sites > MOST_SITES:
            raise ConfigError(f"has {MOST_SITES} sites at most, this experiment has {sites}",
                              where="--engine deployment",
                              hint="each is three processes; --engine ray has as many as there are cores")  # fmt: skip
        scenario = experiment.scenario
        if scenario.stragglers or scenario.dropouts or scenario.latecomers:
            raise ConfigError("loses no messages: [scenario] stragglers, dropouts and latecomers are for the others",
                              where="--engine deployment", hint="leave them out, or use another engine")  # fmt: skip

    def prepare(self, keeping: Keeping, sources: Sources) -> None:
        """Found the federation, or find it again."""
        keeping.parties = found_parties(keeping) or provision(keeping, sources.population)

    def drive(self, drive: Drive) -> Released:
        """Run to the end; see `Engine`."""
        world = drive.world
        world.let_go()
        logs = drive.keeping.folder / "federation"
        processes = _Processes(drive.folder.absolute(), logs)
        try:
            released = _follow(drive, processes)
        finally:
            processes.end()
            world.take_back()
        forget_seen(world.folder, world.sites)
        return released


def _follow(drive: Drive, processes: _Processes) -> Released:
    """What the coordinator says, until it has released."""
    initial = drive.world.initial.astype("<f4").tobytes().hex()
    for tree in processes.coordinator(initial=initial):
        if "port" in tree:
            for name in drive.world.sites:
                processes.agent(name, tree["port"])
        elif "before" in tree:
            drive.recall(map(outcome_from_json, tree["before"]))
        elif "round" in tree:
            drive.after_round(outcome_from_json(tree["round"]))
            processes.go_on()
        elif "released" in tree:
            return released_from_json(tree["released"], drive.keeping)
        else:
            raise raised(tree)
    raise PeerError("the coordinator's process has ended", where="--engine deployment",
                    hint=f"what it has said lies in {drive.keeping.folder / 'federation'}")  # fmt: skip


class _Processes:
    """What was started, each with a pipe: however this process ends, they notice.

    Args:
        folder: The run's.
        logs: Where what they say besides goes.
    """

    def __init__(self, folder: Path, logs: Path) -> None:
        self.folder, self._logs = folder, logs
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._said: Queue[dict[str, Any] | None] = Queue()

    def coordinator(self, **order: Any) -> Iterator[dict[str, Any]]:
        """Start the coordinator; what it says.

        Raises:
            ConfideError: An agent has ended before its time.
        """
        process = self._coordinator = self._start("coordinator", "coordinator", order)
        if process.stdout is not None:
            threading.Thread(target=self._listen, args=(process.stdout,), daemon=True).start()
        while (tree := self._next()) is not None:
            yield tree

    def go_on(self) -> None:
        """Have the coordinator begin the next round."""
        if self._coordinator is not None:
            _say(self._coordinator, {})

    def agent(self, name: str, port: int) -> None:
        """Start a site's agent."""
        self._agents[name] = self._start("agent", name, {"name": name, "port": port})

    def end(self) -> None:
        """End them all: the coordinator first, which would else give up a round for want of sites."""
        coordinator = [self._coordinator] if self._coordinator is not None else []
        for processes in (coordinator, list(self._agents.values())):
            for process in processes:
                if process.stdin is not None:
                    with suppress(OSError):
                        process.stdin.close()
            deadline = time.monotonic() + _GRACE
            for process in processes:
                try:
                    process.wait(timeout=max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()  # its own processes notice by their pipes
                    process.wait()
        for process in self._agents.values():
            if process.stdout is not None:
                process.stdout.close()

    def _start(self, role: str, name: str, order: dict[str, Any]) -> subprocess.Popen[bytes]:
        """In a session of its own: a terminal's Ctrl-C is for this process to act on."""
        path = os.pathsep.join(filter(None, sys.path))  # it finds this package where this process has found it
        with (self._logs / f"{name}.err").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                [sys.executable, "-m", _MODULE, role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        _say(process, {"folder": str(self.folder), **order})
        return process

    def _listen(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._said.put(json.loads(line))
        self._said.put(None)
        pipe.close()

    def _next(self) -> dict[str, Any] | None:
        while True:
            try:
                return self._said.get(timeout=_LOOK_AGAIN)
            except Empty:
                for name, process in self._agents.items():
                    if process.poll() is not None:
                        raise _why(name, process) from None


def _why(name: str, process: subprocess.Popen[bytes]) -> ConfideError:
    said = process.stdout.read().splitlines() if process.stdout is not None else []
    if said:
        return raised(json.loads(said[-1]))
    return PeerError(f"the agent's process has ended with code {process.returncode}", where=f"site {name}",
                     hint="what it has said lies in the run's folder, in resume/federation")  # fmt: skip


def _say(process: subprocess.Popen[bytes], tree: dict[str, Any]) -> None:
    """Where the process is gone, that is noticed elsewhere."""
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.write(json.dumps(tree).encode() + b"\n")
            process.stdin.flush()
