"""Where a sweep lives, and what it was made from: the same for one that begins and one that is resumed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confide.config import Experiment, load_experiment
from confide.errors import ConfideError, ConfigError
from confide.privacy.dp import PrivacyEvent
from confide.privacy.dp.events import event_from_json, event_to_json
from confide.privacy.sealing import Size
from confide.simulations.folders import write_json
from confide.simulations.place import difference, experiment_text, inputs_digest
from confide.simulations.planning import Rooted, Source, load_source
from confide.simulations.sweeps.axes import AxisPoint, name_cell, points_of, read_axes
from confide.simulations.sweeps.cost import SweepCost

__all__ = ["Job", "SweepPlan", "finished_sweep", "load_plan", "locked", "resumed_plan"]

#: Written once, before the first cell runs; whoever works on the sweep holds a lock on it.
RECORD = "made_from.json"


@dataclass(frozen=True, slots=True)
class Job:
    """A cell that is to run, or has run: all that a process needs to know.

    Attributes:
        number: From 1, in the order of the grid.
        point: Its values on the axes.
        experiment: The whole of it, with the folder that its relative paths start from.
        folder: Of its run.
        size: Bytes a site sends and receives for one training round's sum; None before the cell was checked.
        charges: What the whole run charges a site; empty before the cell was checked.
        ledgers: The sites' ledgers, shared by all cells; None: the cell has its own.
    """

    number: int
    point: AxisPoint
    experiment: Rooted
    folder: Path
    size: Size | None = None
    charges: tuple[PrivacyEvent, ...] = ()
    ledgers: Path | None = None


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """All cells of a sweep, in the order of the grid; `cost` once they were checked and where they share ledgers."""

    name: str
    axes: Mapping[str, Sequence[str]]
    jobs: tuple[Job, ...]
    folder: Path
    ledgers: Path | None = None
    cost: SweepCost | None = None

    def write(self) -> None:
        """From here on the sweep can be resumed."""
        cells = [
            {
                "experiment": json.loads(experiment_text(job.experiment.experiment)),
                "base": str(job.experiment.base.absolute()),
                "inputs": inputs_digest(job.experiment.experiment, job.experiment.base),
                "uplink_bytes": job.size.uplink if job.size else None,
                "downlink_bytes": job.size.downlink if job.size else None,
                "charges": [event_to_json(event) for event in job.charges],
            }
            for job in self.jobs
        ]
        tree = {
            "name": self.name, "axes": {key: list(texts) for key, texts in self.axes.items()}, "cells": cells,
            "ledgers": None if self.ledgers is None else str(self.ledgers),
            "cost": None if self.cost is None else self.cost.to_json(),
        }  # fmt: skip
        write_json(self.folder / RECORD, tree)


def load_plan(
    source: Source, over: Iterable[str], overrides: Iterable[str], out: Callable[[str], Path],
    ledger: str | Path | None = None,
) -> SweepPlan:  # fmt: skip
    """What is asked. `out` names the folder, from the experiment's name.

    Raises:
        ConfideError: An axis or a cell is not what it may be.
    """
    fixed = list(overrides)
    axes = read_axes(over, fixed)
    points = points_of(axes)
    loaded = [_load(source, fixed, point) for point in points]
    name = loaded[0].experiment.run.name
    folder, ledgers = out(name), None if ledger is None else Path(ledger).absolute()
    return SweepPlan(name, axes, tuple(
        Job(number, point, rooted, folder / "cells" / point.folder(number), ledgers=ledgers)
        for number, (point, rooted) in enumerate(zip(points, loaded, strict=True), 1)
    ), folder, ledgers)  # fmt: skip


def resumed_plan(
    source: Source, over: Iterable[str], overrides: Iterable[str], out: str | Path | None,
    ledger: str | Path | None = None,
) -> SweepPlan:  # fmt: skip
    """The sweep that an earlier process began in a folder.

    Raises:
        ConfigError: There is none, it is over other axes or of another experiment than named, its data have changed,
            its ledgers lie elsewhere, or it has ended.
    """
    if out is None:
        raise ConfigError("needs the folder of the sweep", where="--resume", hint="name it with --out")
    folder = Path(out)
    if finished_sweep(folder) is not None:
        raise ConfigError("is finished: there is nothing to resume", where=str(folder), hint="read sweep.json there")
    tree = _record(folder)
    axes: dict[str, list[str]] = tree["axes"]
    points = points_of(axes)
    ledgers = None if tree.get("ledgers") is None else Path(tree["ledgers"])
    if ledger is not None and Path(ledger).absolute() != ledgers:
        raise ConfigError(
            "holds a sweep whose cells have ledgers of their own" if ledgers is None else
            f"holds a sweep whose ledgers are in {ledgers}", where=f"--out {folder}",
            hint="leave --ledger out: a sweep stays with its ledgers",
        )  # fmt: skip
    jobs = []
    for number, (point, kept) in enumerate(zip(points, tree["cells"], strict=True), 1):
        rooted = Rooted(load_experiment(kept["experiment"]), Path(kept["base"]))
        size = Size(kept["uplink_bytes"], kept["downlink_bytes"]) if kept["uplink_bytes"] is not None else None
        charges = tuple(event_from_json(text) for text in kept.get("charges", ()))
        jobs.append(Job(number, point, rooted, folder / "cells" / point.folder(number), size, charges, ledgers))
    _compare(source, list(over), list(overrides), axes, jobs, folder)
    for job, kept in zip(jobs, tree["cells"], strict=True):
        if inputs_digest(job.experiment.experiment, job.experiment.base) != kept["inputs"]:
            raise ConfigError("the data or the consent file are not those that the sweep was begun with",
                              where=f"--out {folder}", hint="put them back, or begin in a new folder")  # fmt: skip
    cost = None if tree.get("cost") is None else SweepCost.from_json(tree["cost"])
    return SweepPlan(tree["name"], axes, tuple(jobs), folder, ledgers, cost)


def _compare(
    source: Source, over: list[str], overrides: list[str], axes: Mapping[str, list[str]], jobs: list[Job], folder: Path
) -> None:
    """Is what is asked now what was asked then? What is not said is not compared."""
    begin = "resume it without naming an experiment or axes, or begin in a new folder"
    if over and (asked := read_axes(over, overrides)) != axes:
        other = next((key for key in (*asked, *axes) if asked.get(key) != axes.get(key)), "their order")
        raise ConfigError(f"holds a sweep over other axes ({other} differs)", where=f"--out {folder}", hint=begin)
    if source is None and not overrides:
        return
    for job in jobs:
        now = _load(source, overrides, job.point).experiment
        then = job.experiment.experiment
        if experiment_text(now) != experiment_text(then):
            raise ConfigError(
                f"holds a sweep of another experiment ({difference(now, then)} differs in cell {job.point.label})",
                where=f"--out {folder}", hint=begin,
            )  # fmt: skip


def _record(folder: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        raise ConfigError(
            "holds no sweep that can be resumed", where=f"--out {folder}",
            hint="name the folder of an interrupted sweep; without --resume a new one is begun",
        ) from None  # fmt: skip
    return tree


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """For as long as this process works on the sweep.

    Raises:
        ConfigError: Another one does.
    """
    handle = os.open(folder / RECORD, os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError:
            raise ConfigError("another process works on this sweep", where=str(folder),
                              hint="wait until it ends, or end it first") from None  # fmt: skip
        yield
    finally:
        os.close(handle)


def finished_sweep(folder: Path) -> dict[str, Any] | None:
    """What `sweep.json` says of a sweep that has ended; None where there is none."""
    with suppress(OSError, ValueError, AttributeError):
        if json.loads((folder / "status.json").read_text()).get("status") == "finished":
            found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
            return found if "cells" in found else None
    return None


def _load(source: Source, overrides: list[str], point: AxisPoint) -> Rooted:
    try:
        experiment: Experiment
        experiment, base = load_source(source, [*overrides, *point.assignments])
    except ConfideError as error:
        name_cell(error, point.label)
        raise
    return Rooted(experiment, base)
