"""Flower's Ray backend, with sites that stay where they are. Imported where Ray is installed only.

Flower hands every message to any actor that is free. A site's update lives in memory between two messages and must not
be anywhere else, so here each site has its actor for as long as the run lasts, and the actor keeps the site open.

This module, `ray_actors` and `ray_engine` are all of the simulator that uses private interfaces of Flower and Ray; they
are those of the pinned versions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flwr.server.superlink.fleet.vce.backend.raybackend as flower
import flwr.server.superlink.fleet.vce.vce_api as engine
import ray
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import PARTITION_ID_KEY
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from confide.clients.app import make_client_app
from confide.errors import ConfideError, ConfigError, PeerError
from confide.simulations.engines.apart import SitesApart
from confide.simulations.engines.ray_actors import Actors, Fitness

__all__ = ["PlacedGrid", "SitesApp", "Stay", "sites_stay"]

_UNAVAILABLE = 5  # Flower's own code for a node that does not answer
_LOOK_AGAIN = 2.0
#: Threads that wait for an answer each.
_MOST_WAITING = 256
#: The sites that this process has open, by the run's folder.
_here: dict[str, SitesApart] = {}


class SitesApp:
    """The ClientApp of a run's sites, as it travels to an actor: by the name of the run's folder.

    Args:
        folder: The run's, the same on every machine.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer for the site that the context names."""
        return make_client_app(self._site)(message, context)

    def _site(self, context: Context) -> Any:
        sites = _here.get(self.folder)
        if sites is None:
            sites = _here[self.folder] = SitesApart(Path(self.folder))
        return sites.site(sites.names[int(context.node_config[PARTITION_ID_KEY])])


def _let_go() -> Callable[..., None]:
    """Takes the place of what makes an app: the process lets all its sites go."""
    while _here:
        _here.popitem()[1].close()
    return lambda **_: None


class Stay:
    """What the thread of Flower's engine tells the one that drives the run."""

    def __init__(self) -> None:
        #: The node of each site.
        self.node_of: dict[str, int] = {}
        #: The sites' processes are there.
        self.begun = threading.Event()
        #: Nobody answers any more: from here on there is nothing to wait for.
        self.failed: BaseException | None = None
        #: Whoever could end processes does not answer.
        self.headless = False


class PlacedGrid(Grid):
    """Flower's grid, which knows besides where sites live (rounds that are drawn need not ask everybody), and when
    there is nothing to wait for any more.

    Args:
        grid: Flower's.
        stay: From `sites_stay`.
    """

    def __init__(self, grid: Grid, stay: Stay) -> None:
        self._grid, self._stay = grid, stay

    def node_of(self, site: str) -> int | None:
        """Where a site lives."""
        return self._stay.node_of.get(site)

    def set_run(self, run: Run) -> None:
        """Flower's interface."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's interface."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's interface."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Flower's interface."""
        return list(self._grid.get_node_ids())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Flower's interface."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Flower's interface.

        Raises:
            ConfideError: There is nobody left who could answer.
        """
        if self._stay.failed is not None:
            raise _as_ours(self._stay.failed)
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Flower's interface."""
        return self._grid.send_and_receive(messages, timeout=timeout)


@contextmanager
def sites_stay(folder: Path, names: Sequence[str], drop: Callable[[Message, str], bool]) -> Iterator[Stay]:
    """Within it Flower's engine has each site's messages answered by that site's actor.

    Args:
        folder: The run's.
        names: The sites, in the order of Flower's partitions.
        drop: Says of a message that its site cannot be reached.
    """
    stay = Stay()

    def register(*arguments: Any, **options: Any) -> dict[int, int]:
        made: dict[int, int] = changed["_register_nodes"](*arguments, **options)
        stay.node_of.update({names[partition]: node for node, partition in made.items()})
        return made

    # Flower's own pool has four threads more than this machine has cores, however many the cluster has.
    threads = partial(ThreadPoolExecutor, max_workers=min(len(names), _MOST_WAITING))
    backend = flower.RayBackend
    changed = {name: getattr(engine, name) for name in ("_register_nodes", "ThreadPoolExecutor")}
    ours = partial(_Backend, str(folder), tuple(names), drop, stay)
    setattr(flower, "RayBackend", ours)  # noqa: B010  # to type checkers a module's names are constants
    setattr(engine, "_register_nodes", register)  # noqa: B010
    setattr(engine, "ThreadPoolExecutor", threads)  # noqa: B010
    try:
        yield stay
    finally:
        setattr(flower, "RayBackend", backend)  # noqa: B010
        for name, before in changed.items():
            setattr(engine, name, before)


def _as_ours(error: BaseException) -> ConfideError:
    if isinstance(error, ConfideError):
        return error
    ours = PeerError(f"has ended ({type(error).__name__})", where="Flower's simulation engine",
                     hint="see ray.log; confide simulate --resume --out FOLDER goes on with this run")  # fmt: skip
    ours.__cause__ = error
    return ours


class _Backend(flower.RayBackend):
    """See the module."""

    def __init__(
        self,
        folder: str,
        names: tuple[str, ...],
        drop: Callable[[Message, str], bool],
        stay: Stay,
        config: dict[str, Any],
    ) -> None:
        super().__init__(config)
        self._names, self._drop, self._stay = names, drop, stay
        self._sites, self._fitness = partial(SitesApp, folder), Fitness(folder)
        self._actors: Actors | None = None

    @property
    def num_workers(self) -> int:
        """Threads that wait for an answer each: one a site, or all that there are might wait for one actor."""
        return min(len(self._names), _MOST_WAITING)

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        """Start the actors: no more than there are sites."""
        try:
            self._start(app_fn)
            pool: Any = self.pool
            kept, spare = pool.pool[: len(self._names)], pool.pool[len(self._names) :]
            pool.pool.clear()
            for actor in spare:
                ray.kill(actor)
            self._actors = Actors(kept, self.client_resources, self._fitness)
        except BaseException as error:
            self._stay.failed = error
            raise
        self._stay.begun.set()

    def _start(self, app_fn: Callable[[], ClientApp]) -> None:
        try:
            super().build(app_fn)
        except ValueError as error:  # Flower's word for a cluster without a core
            raise ConfigError("has no core for a site", where="Ray",
                              hint="start its nodes with --num-cpus of 1 at least") from error  # fmt: skip

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        """One message to the actor of its site; there it waits for its turn."""
        at = int(context.node_config[PARTITION_ID_KEY])
        if self._drop(message, self._names[at]):
            return Message(Error(code=_UNAVAILABLE, reason="node unavailable"), reply_to=message), context
        if self._actors is None:
            raise PeerError("has no processes", where="Ray")
        actor = self._actors.of(at)
        try:
            reference = actor.run.remote(self._sites, message, str(at), context)
            while not ray.wait([reference], timeout=_LOOK_AGAIN)[0]:
                if self._stay.headless:
                    raise PeerError("has lost its head", where="Ray")
            _, reply, left = ray.get(reference)
        except ray.exceptions.RayActorError:
            # The message is not sent again: what the site did with it nobody knows, and it has lost its update.
            self._actors.lost(actor)
            self._stay.failed = self._stay.failed or self._actors.failed
            raise
        return reply, left

    def terminate(self) -> None:
        """End the actors, and the engine; before the run's end that is the run's end."""
        self._stay.failed = self._stay.failed or PeerError("has ended before the run", where="Flower's engine")
        if self._actors is not None and not self._stay.headless:
            self._actors.close(_let_go)
        super().terminate()
