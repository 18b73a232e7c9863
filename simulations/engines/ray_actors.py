"""The processes of Ray's that the sites of a run live in: started, found fit, and replaced when they die.

Invariants:
1. A site has one process at a time: what has gone is told to end before another takes its sites.
2. No wait is without a bound. A process that does not come leaves its sites to the others; where none is left the run
   ends with an error, and can be resumed.
3. A process answers for sites only if its software is this one's and it finds this very run where the run lies.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from flwr.simulation.ray_transport.ray_actor import ClientAppActor

from confide.errors import ConfideError, ConfigError, PeerError
from confide.server.software import software_versions
from confide.simulations.keeping import KEPT

__all__ = ["Actors", "Fitness"]

_log = logging.getLogger(__name__)
#: Flower's actor, which Ray has made another kind of thing of than its type says.
_ACTOR: Any = ClientAppActor
#: Seconds for processes to start (each imports torch), and for one to let go of its sites.
_START_SECONDS, _CLOSING_SECONDS = 60.0, 60.0
#: Seconds for which a process that did not come is the last that was asked for, where there are others.
_IN_VAIN_SECONDS = 300.0
_ADVICE = "confide simulate --resume --out FOLDER goes on once the cluster has free cores; its log and ray.log say more"


class Fitness:
    """Asks a process what it runs and whether it finds the run; travels there as an app does.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self) -> Any:
        """Takes the place of what makes an app; the reply is (software, the run that lies there)."""
        return lambda **_: self.report()

    def report(self) -> tuple[dict[str, str], str]:
        """What the process that this is called in runs, and a digest of the run that it finds."""
        try:
            found = hashlib.sha256((Path(self._folder) / KEPT / "manifest.json").read_bytes()).hexdigest()
        except OSError:
            found = ""
        return software_versions(), found


class Actors:
    """The processes of one run's sites.

    Args:
        actors: Those that were started.
        resources: What each of them takes.
        fitness: Asks one.
    """

    def __init__(self, actors: Sequence[Any], resources: Any, fitness: Fitness) -> None:
        self._resources, self._fitness, self._lock = resources, fitness, threading.Lock()
        self._actors = self._fit(list(actors))
        #: Why nobody answers for the sites any more.
        self.failed: ConfideError | None = None
        #: Until when no replacement is asked for, where one has not come.
        self._in_vain = 0.0
        if not self._actors:
            raise PeerError("none of its cores is free", where="Ray", hint=_ADVICE)

    def of(self, at: int) -> Any:
        """The process of the site with this number."""
        return self._actors[at % len(self._actors)]

    def lost(self, gone: Any) -> None:
        """A process has ended: another one takes its sites, and opens them from their disks.

        Args:
            gone: As `of` has named it.
        """
        with self._lock:
            if self.failed is not None or not any(actor is gone for actor in self._actors):
                return  # somebody else has seen to it
            _end(gone)
            others = [actor for actor in self._actors if actor is not gone]
            new = self._replacement() if not others or time.monotonic() >= self._in_vain else None
            if new is None and not others:
                self.failed = PeerError("the last process of its sites has ended, and no other one could be started",
                                        where="Ray", hint=_ADVICE)  # fmt: skip
                return
            spare = [others[n % len(others)] for n in range(len(self._actors))] if new is None else []
            self._actors = [(new or spare[n]) if a is gone else a for n, a in enumerate(self._actors)]
        _log.warning("a process has ended; its sites are in %s", "a new one" if new is not None else "the others")

    def close(self, let_go: Any) -> None:
        """Have the sites closed, then their processes ended, and wait for it: Ray would let them end later.

        Args:
            let_go: Has a process close what it has open; travels there as an app does.
        """
        with self._lock:  # nobody puts another one in the place of one that has just ended
            actors, self._actors = list({id(actor): actor for actor in self._actors}.values()), []
        _ask(actors, let_go)
        for actor in actors:
            _end(actor)
        _ask(actors, let_go)  # answered with an error, once they have ended

    def _replacement(self) -> Any:
        """A new process that is fit; None where none comes. A node takes many processes with it when it dies, and what
        each of them waited for in vain would add up."""
        try:
            if (new := next(iter(self._fit([_ACTOR.options(**self._resources).remote()])), None)) is not None:
                return new
        except (ConfideError, ray.exceptions.RayError) as error:
            _log.warning("a new process is of no use: %s", type(error).__name__)
        self._in_vain = time.monotonic() + _IN_VAIN_SECONDS
        return None

    def _fit(self, actors: list[Any]) -> list[Any]:
        """Those that come in time; the others' cores are somebody else's, and they are told not to wait for them.

        Raises:
            ConfigError: A machine is not as this one.
        """
        asked = {actor.run.remote(self._fitness, None, "", None): actor for actor in actors}
        came, late = ray.wait(list(asked), num_returns=len(asked), timeout=_START_SECONDS)
        for reference in late:
            _end(asked[reference])
        try:
            for reference in came:
                self._compare(reference)
        except BaseException:
            for actor in actors:
                _end(actor)
            raise
        if late:
            _log.warning("%d of %d processes did not start in time", len(late), len(asked))
        return [asked[reference] for reference in asked if reference in came]

    def _compare(self, reference: Any) -> None:
        try:
            _, (software, run), _ = ray.get(reference)
        except Exception as error:  # whatever it is, that process can answer for no site
            _log.warning("a process did not start: %s", type(error).__name__, exc_info=True)
            raise ConfigError("a process could not be started with this confide", where="Ray",
                              hint="install the same confide, Python and Ray on every machine of the "
                              "cluster; ray.log says more") from error  # fmt: skip
        here, mine = self._fitness.report()
        differs = next((name for name in here if software.get(name) != here[name]), None)
        if differs is not None:
            raise ConfigError(
                f"a machine of the cluster has another {differs} than this one", where="Ray",
                hint="install the same confide, Python and Ray on every machine of the cluster",
            )  # fmt: skip
        if not run or run != mine:
            raise ConfigError("a machine of the cluster does not find the run", where="Ray",
                              hint="the run's folder, its ledgers and the data have to lie at the same path on every "
                              "machine: name one on a shared file system with --out")  # fmt: skip


def _ask(actors: Sequence[Any], app: Any) -> None:
    asked = [actor.run.remote(app, None, "", None) for actor in actors]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=_CLOSING_SECONDS)


def _end(actor: Any) -> None:
    """As kill -9 does; nothing happens to what has ended."""
    ray.kill(actor)
