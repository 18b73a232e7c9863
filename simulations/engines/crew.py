"""Processes that have a simulation's sites between them, and what they are asked beside the protocol.

Each is forked from the process that simulates once everything is read, has whole groups of sites (see `grouping`), and
keeps those open that it was asked for. Its databases commit together, as in one process: before anything is shown, the
simulating process has all of them flush.

Invariants:
1. A site is open in one process only, the same one from the first message to the last.
2. What a process is asked it answers in that order.
3. A process whose parent is gone ends by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from confide.clients.app import make_client_app
from confide.errors import ConfideError, StorageError
from confide.privacy.flushing import GroupCommit, flush_commits
from confide.simulations.engines.grid import NODE_CONFIG_SITE, context_of, off_the_wire, on_the_wire
from confide.simulations.engines.grouping import Grouping
from confide.simulations.engines.together import answer_together
from confide.simulations.world import World

__all__ = ["Ask", "Crew"]

#: One site's message: node, site, and the message in its wire form.
Ask = tuple[int, str, bytes]
_ENDING_SECONDS = 60.0


class Crew:
    """The processes.

    Args:
        world: The sites, none of them open here.
        grouping: Which of them belong together.
        count: How many processes there are.
    """

    def __init__(self, world: World, grouping: Grouping, count: int) -> None:
        #: Which process has a group.
        self.dealt = grouping.dealt([float(n) for n in world.sources.population.values()], count)
        self._numbers = {name: i for i, name in enumerate(world.sites)}
        self._grouping, self._answers, self._gone = grouping, dict[int, Any](), set[int]()
        self._told, self._asked = threading.Condition(), 0
        self._ends: list[Connection] = []
        # Forked, so that nobody reads the data again; the parent has no thread of torch's.
        fork = multiprocessing.get_context("fork")
        self._processes = []
        for number in range(count):
            ours, theirs = fork.Pipe()
            self._ends.append(ours)
            process = fork.Process(
                target=_work, args=(theirs, tuple(self._ends), world), name=f"confide sites {number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
        for number, end in enumerate(self._ends):
            threading.Thread(target=self._listen, args=(number, end), daemon=True).start()

    def __len__(self) -> int:
        return len(self._ends)

    def process_of(self, group: int) -> int:
        """Who has a group of sites."""
        return self.dealt[group]

    def ask(self, process: int, asks: Sequence[Ask]) -> int:
        """Have sites answer, all at once; the number under which `answer` has what they say."""
        return self._send(process, "answer", (asks,))

    def answer(self, process: int, number: int) -> Any:
        """What a process says, once it does.

        Raises:
            StorageError: The process is gone.
            ConfideError: What the process has met.
        """
        with self._told:
            self._told.wait_for(lambda: number in self._answers or process in self._gone)
            if number not in self._answers:
                raise StorageError(
                    "a process that had sites of this run has ended", where=f"process {self._processes[process].pid}",
                    hint="what was durable is kept: free memory or disk, then resume the run",
                )  # fmt: skip
            good, found = self._answers.pop(number)
        if not good:
            raise found
        return found

    def look(self, name: str) -> tuple[float, NDArray[np.float32] | None]:
        """The share of the latest sum that was clipped, and the weights, at one site."""
        process = self.dealt[self._grouping.of(self._numbers[name])]
        found = self.answer(process, self._send(process, "look", (name,)))
        return cast("tuple[float, NDArray[np.float32]]", found)

    def held_out(self) -> Mapping[str, NDArray[np.bool_]]:
        """By site that is open, whose metrics may be asked for."""
        return dict(sorted((name, mask) for part in self._all("held_out") for name, mask in part.items()))

    def before_round(self, round_: int) -> None:
        """The officers of all sites record what the round brings."""
        self._all("before_round", round_)

    def flush(self) -> None:
        """What all sites have committed is on the disk."""
        self._all("flush")

    def finish(self) -> dict[str, tuple[float, float]]:
        """Have all sites' logs exported and the sites closed; see `World.spent`."""
        return {name: spent for part in self._all("finish") for name, spent in part.items()}

    def lost(self) -> StorageError | None:
        """What a site's disk did not take last, if anything."""
        with suppress(ConfideError):
            return next((error for error in self._all("lost") if error is not None), None)
        return None

    def close(self) -> None:
        """End the processes, and wait for it. Sites that are open are closed."""
        for end in self._ends:
            with suppress(OSError):
                end.send(None)
        for process in self._processes:
            process.join(_ENDING_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for end in self._ends:
            end.close()

    def _all(self, what: str, *given: Any) -> list[Any]:
        numbers = [self._send(process, what, given) for process in range(len(self))]
        return [self.answer(process, number) for process, number in enumerate(numbers)]

    def _send(self, process: int, what: str, given: tuple[Any, ...]) -> int:
        self._asked += 1
        with suppress(OSError):  # of one that is gone, `answer` says so
            self._ends[process].send((self._asked, what, given))
        return self._asked

    def _listen(self, process: int, end: Connection) -> None:
        while True:
            try:
                number, good, found = end.recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                with self._told:
                    self._gone.add(process)
                    self._told.notify_all()
                return
            with self._told:
                self._answers[number] = good, found
                self._told.notify_all()


def _work(end: Connection, others: Sequence[Connection], world: World) -> None:
    """A process's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this one in order
    for other in others:
        other.close()  # the parent's ends: held open here, nobody would notice that it is gone
    torch.set_num_threads(1)
    with GroupCommit():
        calls = _Sites(world)
        while True:
            try:
                order = end.recv()
                if order is None:
                    break
                number, what, given = order
                end.send((number, *_tried(getattr(calls, what), given)))
            except (EOFError, OSError):
                break
        with suppress(Exception):
            world.sites.close()
    os._exit(0)  # what was inherited is the parent's to close


def _tried(call: Callable[..., Any], given: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, call(*given)
    except (ConfideError, OSError) as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return False, error
    except Exception as error:  # whatever it is, the parent is not kept waiting; its text may hold data
        sys.stderr.write("".join(traceback.format_tb(error.__traceback__)))
        return False, RuntimeError(f"a process of this simulation met {type(error).__name__}")


class _Sites:
    """What a process is asked."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._app = make_client_app(lambda context: world.sites[str(context.node_config[NODE_CONFIG_SITE])])

    def answer(self, asks: Sequence[Ask]) -> list[bytes]:
        if len(asks) == 1:
            return [self._one(*asks[0])]
        return answer_together([partial(self._one, *ask) for ask in asks])

    def look(self, name: str) -> tuple[float, NDArray[np.float32]]:
        model = self._world.sites[name].current_model(self._world.manifest.run)
        return model.saturated, model.weights

    def held_out(self) -> dict[str, NDArray[np.bool_]]:
        world = self._world
        return {name: site.participants(world.manifest).held_out for name, site in world.sites.open.items()}

    def before_round(self, round_: int) -> None:
        self._world.before_round(round_)

    def flush(self) -> None:
        flush_commits()

    def finish(self) -> dict[str, tuple[float, float]]:
        self._world.export_sites()
        spent = self._world.spent()
        self._world.close_sites()
        flush_commits()  # before anything of it is shown
        return spent

    def lost(self) -> StorageError | None:
        refused = (site.last_refusal for site in self._world.sites.open.values())
        return next((error for error in refused if isinstance(error, StorageError)), None)

    def _one(self, node: int, site: str, data: bytes) -> bytes:
        return on_the_wire(self._app(message=off_the_wire(data), context=context_of(node, site)))
