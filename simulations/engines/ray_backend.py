"""Flower's Ray backend, with sites that stay where they are. Imported where Ray is installed only.

Flower hands every message to any actor that is free. A site's update lives in memory between two messages and must not
be anywhere else, so here each site has its actor for as long as the run lasts, and the actor keeps the site open.

This module and `ray_engine` are all of the simulator that uses Flower's private interfaces; they are those of the
pinned version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from flwr.simulation.ray_transport.ray_actor import ClientAppActor
from flwr.supercore.run import Run

from confide.clients.app import make_client_app
from confide.simulations.engines.apart import SitesApart

__all__ = ["PlacedGrid", "SitesApp", "sites_stay"]

_log = logging.getLogger(__name__)
_UNAVAILABLE = 5  # Flower's own code for a node that does not answer
_CLOSING_SECONDS = 60.0
#: Flower's actor, which Ray has made another kind of thing of than its type says.
_ACTOR: Any = ClientAppActor
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


class PlacedGrid(Grid):
    """Flower's grid, which knows besides where sites live: rounds that are drawn need not ask everybody.

    Args:
        grid: Flower's.
        node_of: The node of a site.
    """

    def __init__(self, grid: Grid, node_of: Mapping[str, int]) -> None:
        self._grid, self._node_of = grid, node_of

    def node_of(self, site: str) -> int | None:
        """Where a site lives."""
        return self._node_of.get(site)

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
        """Flower's interface."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Flower's interface."""
        return self._grid.send_and_receive(messages, timeout=timeout)


@contextmanager
def sites_stay(folder: Path, names: Sequence[str], drop: Callable[[Message, str], bool]) -> Iterator[Mapping[str, int]]:
    """Within it Flower's engine has each site's messages answered by that site's actor.

    Args:
        folder: The run's.
        names: The sites, in the order of Flower's partitions.
        drop: Says of a message that its site cannot be reached.

    Yields:
        The node of each site, once the engine has begun.
    """
    places: dict[str, int] = {}

    def register(*arguments: Any, **options: Any) -> dict[int, int]:
        made: dict[int, int] = register_nodes(*arguments, **options)
        places.update({names[partition]: node for node, partition in made.items()})
        return made

    backend, register_nodes = flower.RayBackend, engine._register_nodes
    changed = partial(_Backend, str(folder), tuple(names), drop)
    setattr(flower, "RayBackend", changed)  # noqa: B010  # to type checkers a module's names are constants
    setattr(engine, "_register_nodes", register)  # noqa: B010
    try:
        yield places
    finally:
        setattr(flower, "RayBackend", backend)  # noqa: B010
        setattr(engine, "_register_nodes", register_nodes)  # noqa: B010


class _Backend(flower.RayBackend):
    """See the module."""

    def __init__(
        self, folder: str, names: tuple[str, ...], drop: Callable[[Message, str], bool], config: dict[str, Any]
    ) -> None:
        super().__init__(config)
        self._names, self._drop, self._sites = names, drop, partial(SitesApp, folder)
        self._actors: list[Any] = []

    @property
    def num_workers(self) -> int:
        """Threads that wait for an answer each: one a site, or all that there are might wait for one actor."""
        return len(self._names)

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        """Start the actors: no more than there are sites."""
        super().build(app_fn)
        pool: Any = self.pool
        self._actors, spare = pool.pool[: len(self._names)], pool.pool[len(self._names) :]
        pool.pool, pool.num_actors = self._actors, len(self._actors)
        for actor in spare:
            ray.kill(actor)

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        """One message to the actor of its site; there it waits for its turn."""
        at = int(context.node_config[PARTITION_ID_KEY])
        if self._drop(message, self._names[at]):
            return Message(Error(code=_UNAVAILABLE, reason="node unavailable"), reply_to=message), context
        place = at % len(self._actors)
        actor = self._actors[place]
        try:
            _, reply, left = ray.get(actor.run.remote(self._sites, message, str(at), context))
        except ray.exceptions.RayActorError:
            # Whatever is in its place opens its sites again from their disks, as a restarted executor does.
            _log.warning("the process of some sites has ended, and is started again")
            if self._actors[place] is actor:
                self._actors[place] = _ACTOR.options(**self.client_resources).remote()
            raise
        return reply, left

    def _ask_all(self) -> None:
        asked = [actor.run.remote(_let_go, None, "", None) for actor in self._actors]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=_CLOSING_SECONDS)

    def terminate(self) -> None:
        """Have the sites closed, then their processes ended, and wait for it: Ray would let them end later."""
        self._ask_all()
        for actor in self._actors:
            ray.kill(actor)
        self._ask_all()  # answered with an error, once they have ended
        self._actors.clear()
        if self.pool is not None:
            self.pool.pool.clear()
        super().terminate()
