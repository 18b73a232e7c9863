"""Where the sites of a simulated run live: the engines. Coordinator, sites, messages and the run's folder are the same
on all of them; only Flower's `Grid` differs, and so the processes. See ADR 24.

`local` is the runner's own; the others have the sites in other processes, where `apart.py` opens them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from confide.config import Experiment
from confide.errors import ConfigError
from confide.server.app import make_server_app
from confide.server.coordinator import Coordinator, Released, RoundOutcome
from confide.simulations.engines.grouping import Grouping
from confide.simulations.keeping import Keeping
from confide.simulations.place import LOCAL, Place
from confide.simulations.scenario import Unreachable
from confide.simulations.sources import Sources
from confide.simulations.world import World

__all__ = ["Drive", "Engine", "engine_of", "find_engine", "run_over", "use_engine"]

RAY, DEPLOYMENT = "ray", "deployment"
#: As `--engine` takes them.
_ENGINES = (LOCAL, RAY, DEPLOYMENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """One run that is to be driven to its end.

    Args:
        folder: The run's.
        keeping: What it is resumed from.
        world: Its sites, all of them checked.
        start: Makes that coordinator on a grid; it tells `after_round` by itself.
        recall: Told of the rounds of earlier processes, before the first one.
        after_round: Told of each round, in its order.
        unreachable: Says of a message that its site cannot be reached.
        grouping: Which sites train at once.
    """

    folder: Path
    keeping: Keeping
    world: World
    start: Callable[[Grid], Coordinator]
    recall: Callable[[Iterable[RoundOutcome]], None]
    after_round: Callable[[RoundOutcome], None]
    unreachable: Unreachable
    grouping: Grouping


class Engine(Protocol):
    """Has the sites in other processes."""

    @property
    def name(self) -> str:
        """As `--engine` takes it."""

    def check(self, experiment: Experiment, sites: int) -> None:
        """Refuse what cannot run here.

        Raises:
            ConfigError: Says why.
        """

    def prepare(self, keeping: Keeping, sources: Sources) -> None:
        """Before the world is made: have its parties make their keys, where that is not the world's own affair."""

    def drive(self, drive: Drive) -> Released:
        """Run to the end, from wherever an earlier process has come to. Nothing that was started outlives it, and the
        world's sites are open again.

        Raises:
            ConfideError: As `Coordinator.run`.
        """


def find_engine(name: str, ray_address: str | None = None) -> Engine | None:
    """The engine of a name; None for `local`.

    Raises:
        ConfigError: There is none, or what it needs is not installed.
    """
    if ray_address is not None and name != RAY:
        raise ConfigError("is for --engine ray", where="--ray-address", hint="name both, or neither")
    if name == RAY:
        from confide.simulations.engines.ray_engine import RayEngine

        return RayEngine(ray_address)
    if name == DEPLOYMENT:
        from confide.simulations.engines.deployment import DeploymentEngine

        return DeploymentEngine()
    if name != LOCAL:
        raise ConfigError(f"{name[:40]!r} is none", where="--engine", hint=f"there are {', '.join(_ENGINES)}")
    return None


def use_engine(place: Place, engine: Engine | None) -> None:
    """Have a run's sites live there."""
    if engine is not None:
        place.engine, place.prepare = engine.name, engine.prepare


def engine_of(place: Place, asked: str | None, ray_address: str | None) -> Engine | None:
    """The engine that a run was begun with, for who resumes it.

    Raises:
        ConfigError: Another one was asked for.
    """
    if asked not in (None, place.engine):
        raise ConfigError(
            f"this run was begun with --engine {place.engine}", where=f"--engine {asked}",
            hint="leave the option out: a run goes on with its own engine",
        )  # fmt: skip
    engine = find_engine(place.engine, ray_address)
    use_engine(place, engine)
    return engine


def run_over(grid: Grid, start: Callable[[Grid], Coordinator]) -> Released:
    """The ServerApp that is deployed, over a grid."""
    released: list[Released] = []
    app = make_server_app(start, released.append)
    app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    return released[0]
