"""`--workers N`: the local engine with its sites in several processes of this machine, one for each core.

The same run: messages, order of sums, stacks and draws are those of one process, so that with a seed the model is the
same to the bit, and a run that was begun with so many processes is resumed with any other number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from confide.config import Experiment
from confide.errors import PeerError
from confide.server.coordinator import Released
from confide.simulations.engines.crew import Ask, Crew
from confide.simulations.engines.engine import Drive, run_over
from confide.simulations.engines.grid import SimulatedGrid, off_the_wire, on_the_wire
from confide.simulations.engines.grouping import Grouping
from confide.simulations.keeping import Keeping
from confide.simulations.place import LOCAL
from confide.simulations.sources import Sources

__all__ = ["CrewGrid", "WorkersEngine"]

#: Orders that a process has at once: it is never idle, and no more replies than these wait.
_AHEAD = 2


class WorkersEngine:
    """See the module.

    Args:
        count: How many processes.
    """

    name = LOCAL

    def __init__(self, count: int) -> None:
        self._count = count

    def check(self, experiment: Experiment, sites: int) -> None:
        """Whatever runs in one process runs here."""

    def prepare(self, keeping: Keeping, sources: Sources) -> None:
        """The world makes its own parties."""

    def drive(self, drive: Drive) -> Released:
        """Run to the end; see `Engine`."""
        world = drive.world
        world.sites.close()
        crew = Crew(world, drive.grouping, self._count)
        try:
            world.elsewhere = crew
            released = run_over(CrewGrid(crew, world.sites, drive.unreachable, drive.grouping), drive.start)
            world.elsewhere = _Seen(crew.held_out())
            world.note_spent(crew.finish())
        except BaseException as error:
            lost = crew.lost() if isinstance(error, PeerError) else None
            crew.close()
            world.elsewhere = None
            world.open_again()
            if lost is not None:
                raise lost from error
            raise
        crew.close()
        return released


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was seen of the sites before they were closed."""

    masks: Mapping[str, NDArray[np.bool_]]

    def held_out(self) -> Mapping[str, NDArray[np.bool_]]:
        return self.masks

    def look(self, name: str) -> tuple[float, NDArray[np.float32] | None]:
        return 0.0, None

    def before_round(self, round_: int) -> None:
        """There is none any more."""

    def flush(self) -> None:
        """Everything is on the disk."""


@dataclass(slots=True)
class _Order:
    """Messages that a process answers at once."""

    identifiers: list[str]
    asks: list[Ask]
    number: int = 0


class CrewGrid(SimulatedGrid):
    """Nodes live in several processes; each has orders enough, and replies are given in the order in which they are
    pulled.

    Args:
        crew: The processes.
        sites: Name of the site on each node.
        drop: Says of a message that its node is down.
        grouping: Which nodes train at once.
    """

    def __init__(
        self, crew: Crew, sites: Iterable[str], drop: Callable[[Message, str], bool], grouping: Grouping
    ) -> None:
        super().__init__(sites, drop, grouping)
        self._crew = crew
        self._waiting: list[deque[_Order]] = [deque() for _ in range(len(crew))]
        self._sent: list[deque[_Order]] = [deque() for _ in range(len(crew))]
        #: Which process a message is for that was not answered yet.
        self._at: dict[str, int] = {}

    def _reply(self, identifier: str) -> Message | None:
        if self._outbox:
            self._deal_out()
        process = self._at.get(identifier)
        while process is not None and identifier not in self._ready:
            self._send()
            order = self._sent[process][0]
            replies = self._crew.answer(process, order.number)
            self._sent[process].popleft()
            for name, data in zip(order.identifiers, replies, strict=True):
                self.bytes_up += len(data)
                self._ready[name] = off_the_wire(data)
                del self._at[name]
        self._send()
        return self._ready.pop(identifier, None)

    def _deal_out(self) -> None:
        """Orders from everything that was asked: whoever trains at once in one of them, the others by themselves."""
        stacks: dict[int, list[list[str]]] = {}
        orders: list[tuple[int, list[str]]] = []
        for identifier, message in self._outbox.items():
            group = self._group(message)
            if not self._trains_in_stack(message):
                orders.append((group, [identifier]))
                continue
            stack = stacks.setdefault(group, [[]])
            if len(stack[-1]) >= self._grouping.stack:
                stack.append([])
            if not stack[-1]:
                orders.append((group, stack[-1]))
            stack[-1].append(identifier)
        for group, identifiers in orders:
            self._order(self._crew.process_of(group), identifiers)
        self._outbox.clear()

    def _order(self, process: int, identifiers: list[str]) -> None:
        order = _Order([], [])
        for identifier in identifiers:
            message = self._outbox[identifier]
            if (dropped := self._dropped(message)) is not None:
                self._ready[identifier] = dropped
                continue
            node, data = message.metadata.dst_node_id, on_the_wire(message)
            self.bytes_down += len(data)
            order.identifiers.append(identifier)
            order.asks.append((node, self._site_of[node], data))
            self._at[identifier] = process
        if order.asks:
            self._waiting[process].append(order)

    def _send(self) -> None:
        for process, waiting in enumerate(self._waiting):
            while waiting and len(self._sent[process]) < _AHEAD:
                order = waiting.popleft()
                order.number = self._crew.ask(process, order.asks)
                order.asks = []
                self._sent[process].append(order)
