"""The coordinator as a process of its own: one link, one run.

The same `ServerApp` and the same `Coordinator` as in a simulation; only the grid differs. A coordinator that was killed
is simply started again: its nodes find the link again by themselves, the link knows them by their keys, and which
confide run goes on is for the caller's `start` to say. Flower's own run is a new one each time and means nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from confide.logfiles import PrivateLog
from confide.server.app import make_server_app
from confide.server.coordinator import Coordinator, Released
from confide.server.grid import LinkGrid
from confide.server.link import Link, LinkConfig

__all__ = ["CoordinatorConfig", "drive", "log_file", "run_coordinator"]


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """One coordinator's process.

    Args:
        link: Where it listens and to whom.
        folder: Its own, for its log file.
        min_nodes: The fewest nodes to begin with: the run's `min_sites`.
        wait: Seconds to wait for them.
        wait_for_all: Seconds to wait for the whole roster before fewer do.
        listening: Called with the port once it is listened on.
    """

    link: LinkConfig
    folder: Path
    min_nodes: int
    wait: float = 600.0
    wait_for_all: float = 60.0
    listening: Callable[[int], None] = lambda _: None


def run_coordinator(config: CoordinatorConfig, start: Callable[[Grid], Coordinator]) -> Released:
    """Listen, wait for the nodes, and drive one run to its end.

    Args:
        config: See there.
        start: Makes the coordinator of the run, new or resumed, on the grid.

    Raises:
        ConfigError: The link cannot listen.
        PeerError: Too few nodes came, or too few sites took part.
        SealingError: Sites disagree, or a reply is not authentic.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    with log_file(config.folder / "server.log"), Link(config.link) as link:
        config.listening(link.port)
        grid = LinkGrid(link)
        grid.wait_for_nodes(config.min_nodes, config.wait, all_within=config.wait_for_all)
        return drive(grid, start)


def drive(grid: LinkGrid, start: Callable[[Grid], Coordinator]) -> Released:
    """Drive one run to its end over a link that listens; the grid is closed then.

    Raises:
        PeerError: Too few sites took part.
        SealingError: Sites disagree, or a reply is not authentic.
    """
    released: list[Released] = []
    try:
        app = make_server_app(start, released.append)
        run = grid.run.run_id
        app(grid, Context(run_id=run, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    finally:
        grid.close()
    return released[0]


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """What the link, Flower and this package say goes to a file, and not to the terminal."""
    handler = PrivateLog(path)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = ("flwr", "uvicorn", "confide")
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    for name in names:
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [handler], False
    try:
        yield
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
        handler.close()
