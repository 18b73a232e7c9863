"""Before the training: the run that learns the bounds which an experiment leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from confide.clients.app import make_client_app
from confide.errors import PeerError
from confide.privacy.files import write_atomically
from confide.privacy.flushing import flush_commits
from confide.protocol.bounds import learned_bounds
from confide.server.app import make_server_app
from confide.server.coordinator import Coordinator, Released
from confide.server.runs import RunStore
from confide.simulations.engines.grid import NODE_CONFIG_SITE, LocalGrid
from confide.simulations.world import World

__all__ = ["STATISTICS", "learn_bounds", "read_learned"]

#: The folder of the statistics run inside a run's.
STATISTICS = "statistics"
_FILE = "learned.json"


def learn_bounds(world: World, folder: Path, store: RunStore) -> dict[str, tuple[float, float]]:
    """Execute a statistics run; bounds by column, also written to `learned.json`.

    Args:
        world: Sites whose schema has unknown bounds.
        folder: Where the run's evidence lies.
        store: The coordinator's run store.

    Raises:
        DataError: A column cannot be told from the noise.
        PeerError: A release was abandoned.
    """
    released = list[Released]()

    def site_of(context: Context) -> Any:
        return world.sites[str(context.node_config[NODE_CONFIG_SITE])]

    def start(grid: Grid) -> Coordinator:
        return Coordinator(grid, world.coordinator, world.manifest, world.initial, world.log, store=store)

    app = make_server_app(start, released.append)
    grid = LocalGrid(make_client_app(site_of), world.sites)
    app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    first = next((o.metrics for o in released[0].outcomes if o.metrics_round == 1), None)
    second = released[0].metrics if released[0].metrics_round == 2 else None
    if first is None or second is None:
        raise PeerError("the statistics were not released", where=f"run {world.manifest.run}",
                        hint="see the sites' logs, or declare the bounds")  # fmt: skip
    found = learned_bounds(world.manifest, first, second)
    flush_commits()
    world.export()  # the bounds say that this run is over: its evidence lies there before they do
    tree = {"run_id": world.manifest.run, "bounds": found}
    write_atomically(folder / _FILE, (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode())
    return found


def read_learned(folder: Path) -> dict[str, tuple[float, float]] | None:
    """What a statistics run in this folder has learned; None where it is not over."""
    path = folder / _FILE
    if not path.is_file():
        return None
    return {name: (low, high) for name, (low, high) in json.loads(path.read_text())["bounds"].items()}
