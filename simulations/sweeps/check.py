"""All cells of a sweep, checked as far as `simulate` would before it starts; where they are charged, all together.

Nothing is left behind: sites are made in a folder that goes, over copies of the ledgers.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from confide.errors import ConfideError, ConfigError, PolicyError
from confide.privacy.dp import person_epsilon
from confide.privacy.dp.events import merge_events
from confide.privacy.sealing import make_profile
from confide.protocol.manifest import Manifest
from confide.simulations.folders import copy_ledgers
from confide.simulations.planning import any_bounds
from confide.simulations.result import json_number
from confide.simulations.sources import load_sources
from confide.simulations.sweeps.axes import name_cell
from confide.simulations.sweeps.cost import SweepCost, ask, keys_in, people_digest, total
from confide.simulations.sweeps.place import Job, SweepPlan
from confide.simulations.world import World

__all__ = ["Quote", "check_cells", "quote", "refuse_uncharged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quote:
    """What a sweep would do and cost.

    Attributes:
        cells: Number, values on the axes, and what that run alone would cost a person, of each.
        cost: All of them together; None where each has ledgers of its own (public data).
    """

    name: str
    cells: list[dict[str, Any]]
    cost: SweepCost | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        cost = None if self.cost is None else self.cost.to_json()
        return {"name": self.name, "cells": self.cells, "cost": cost}


@dataclass(frozen=True, slots=True)
class _Checked:
    job: Job
    manifest: Manifest
    people: str


def check_cells(found: SweepPlan, told: Callable[[Job], None]) -> tuple[SweepPlan, dict[str, bytes]]:
    """The plan with what each cell takes and charges, and with what all of them cost; and the keys of the sites that
    share ledgers.

    Raises:
        BudgetError: The ledgers do not hold all cells together.
        ConfideError: A cell is not what `simulate` would take; the message names it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        checked = _check_all(found, Path(scratch), told)
        found = replace(found, jobs=tuple(c.job for c in checked))
        if found.ledgers is None:
            return found, {}
        ledgers = Path(scratch) / "ledgers"
        cost = _cost(found, checked, ledgers)
        charges = merge_events(event for c in checked for event in c.job.charges)
        ask(dict.fromkeys(cost.ledgers, charges), ledgers, found.ledgers, len(checked))
        return replace(found, cost=cost), keys_in(ledgers)


def quote(found: SweepPlan, told: Callable[[Job], None]) -> Quote:
    """What `check_cells` would find, without refusing a sweep that does not fit; nothing is written.

    Raises:
        ConfideError: A cell is not what `simulate` would take; the message names it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        checked = _check_all(found, Path(scratch), told)
        cost = None if found.ledgers is None else _cost(found, checked, Path(scratch) / "ledgers")
    cells = [
        {"cell": c.job.number, "values": {k: json_number(v) for k, v in c.job.point.values.items()},
         "epsilon": json_number(_epsilon(c))}
        for c in checked
    ]  # fmt: skip
    return Quote(name=found.name, cells=cells, cost=cost)


def refuse_uncharged(found: SweepPlan) -> None:
    """On data that are not public, either all cells are charged to one set of ledgers or nothing runs.

    Raises:
        PolicyError: They are not.
    """
    if found.ledgers is not None or all(job.experiment.experiment.data.public for job in found.jobs):
        return
    raise PolicyError(
        "is not true: on such data a sweep is a release of all its cells, and choosing among them costs a person more "
        "than the ε of any one",
        where="data.public",
        hint="set data.public = true if anybody may see every row; otherwise name the sites' ledgers: --ledger DIR. "
        "All cells are then charged to them, composed, as single experiments are by confide simulate --ledger DIR",
    )


def _check_all(found: SweepPlan, scratch: Path, told: Callable[[Job], None]) -> list[_Checked]:
    if found.ledgers is not None and found.ledgers.is_dir():
        copy_ledgers(found.ledgers, scratch / "ledgers")
    checked = list[_Checked]()
    for job in found.jobs:
        told(job)
        # Where cells share ledgers they share the copies, too: what one fixes there, the next must live with.
        ledgers = scratch / "ledgers" if found.ledgers is not None else scratch / f"ledgers-{job.number}"
        checked.append(_check(job, scratch / f"cell-{job.number}", ledgers))
        shutil.rmtree(scratch / f"cell-{job.number}")
        if found.ledgers is not None and checked[-1].people != checked[0].people:
            raise ConfigError(
                "has other people at its sites than the first cell: what she has lost would stand in no one ledger",
                where=f"cell {job.point.label}",
                hint="keep the partition, and its seed, out of the axes of a sweep that is charged",
            )
    return checked


def _check(job: Job, folder: Path, ledgers: Path) -> _Checked:
    """Everything that `simulate` would find wrong before it starts; what a round's sum takes, what the run costs."""
    try:
        sources = load_sources(job.experiment.experiment, job.experiment.base, bounds=any_bounds)
        world = World(sources, folder / "sites", ledgers, folder / "logs")
        try:
            world.check()
            manifest = world.manifest
            profile = make_profile(manifest.sealing, len(manifest.members), gather=manifest.single_updates)
            charges = merge_events([*world.statistics_charges, *manifest.all_charges()])
            size = profile.size(manifest.vector_size(1))
            return _Checked(replace(job, size=size, charges=tuple(charges)), manifest, people_digest(sources))
        finally:
            world.close()
    except ConfideError as error:
        name_cell(error, job.point.label)
        raise


def _cost(found: SweepPlan, checked: list[_Checked], ledgers: Path) -> SweepCost:
    if found.ledgers is None:
        raise ValueError("nothing is composed where every cell has ledgers of its own")
    return total([c.job.charges for c in checked], [c.manifest for c in checked], ledgers, found.ledgers)


def _epsilon(checked: _Checked) -> float:
    privacy = checked.manifest.privacy
    return person_epsilon(checked.job.charges, privacy.delta) if privacy.protects else float("inf")
