"""`confide.sweep`: one experiment at every point of a grid, to see what accuracy which ε buys.

Invariants:
1. On data that are not declared public a sweep is a release of all its cells: whoever compares them learns more than
   any one of their ε says. So either all cells are charged to one set of ledgers, composed, and all of them fit before
   the first one runs; or it is refused before anything is read or written.
2. Every cell is checked as far as a run is before it starts, before the first one runs.
3. Each cell is one `simulate`; what finished stays when a later cell does not, and a resumed sweep runs only what is
   not finished. Where cells are charged, no finished cell is ever run, and so charged, again.
4. Where the best cell is told, the watermark stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from confide.errors import ConfideError, ConfigError, StorageError
from confide.privacy.dp import Ledger
from confide.privacy.dp.statement import LEDGER
from confide.simulations.folders import fresh_folder, write_json
from confide.simulations.planning import Source
from confide.simulations.result import Progress, Result
from confide.simulations.sweeps.axes import values_of
from confide.simulations.sweeps.cells import read_cell
from confide.simulations.sweeps.check import Quote, check_cells, quote, refuse_uncharged
from confide.simulations.sweeps.cost import ask, give_keys, still_to_charge
from confide.simulations.sweeps.memory import cores
from confide.simulations.sweeps.page import write_sweep_figure, write_sweep_page
from confide.simulations.sweeps.place import Job, SweepPlan, load_plan, locked, resumed_plan
from confide.simulations.sweeps.result import Cell, Sweep
from confide.simulations.sweeps.tables import write_tables
from confide.simulations.sweeps.workers import run_beside, run_in_turn

__all__ = ["SweepProgress", "plan_sweep", "sweep"]


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """Where a sweep is. `round` as a round of the cell ends, `result` as the cell ends; neither while it is checked.
    `kept` is a cell that an earlier process has finished."""

    cell: int
    cells: int
    label: str
    round: Progress | None = None
    result: Result | None = None
    state: Literal["checking", "waiting", "running", "finished", "kept"] = "checking"


def sweep(
    experiment: Source = None,
    *,
    over: Iterable[str] = (),
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    ledger: str | Path | None = None,
    workers: int | None = 1,
    resume: bool = False,
    progress: Callable[[SweepProgress], None] = lambda _: None,
) -> Sweep:
    """Run an experiment at every combination of values.

    Args:
        experiment: As for `simulate`.
        over: Axes, `section.key=v1,v2,…` each. Cells that differ only in `run.seed` are repetitions of one point.
        overrides: `section.key=value` assignments for every cell.
        out: Output folder; must not hold anything yet. Default: `runs/<name>-sweep-<time>`.
        ledger: Folder of the sites' ledgers, shared by all cells: what they cost is composed. Without one every cell
            has ledgers of its own, which is for public data only.
        workers: Cells that run beside each other, in processes of their own; 1: one after the other, in this process;
            None: as many as cores, and memory by what the first cell took, allow. A script that asks for more than one
            needs `if __name__ == "__main__":` (the processes are started by `multiprocessing`, afresh).
        resume: Go on with the sweep in `out`: finished cells are kept, one that was interrupted is resumed as
            `simulate` does it, the others run. Without an experiment and axes, with those it was begun with.
        progress: Called as cells are checked, as they begin, as rounds end and as cells end.

    Returns:
        All cells. `sweep.json`, `index.html`, the tables `results.*` and `rounds.*` and, with an axis of ε,
        `figures/frontier.svg` tell the same.

    Raises:
        PolicyError: The data of a cell are not declared public, and no ledger is named (nothing was written).
        BudgetError: The ledgers do not hold all cells together (nothing was written, nothing was charged).
        ConfideError: Wrong input (nothing was written), or a cell could not go on; the message names the cell.
    """
    started = time.perf_counter()
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} is not a number of processes", where="--workers", hint="at least 1, or auto")
    if resume:
        found = resumed_plan(experiment, over, overrides, out, ledger)
        refuse_uncharged(found)
    else:
        found = _begun(load_plan(experiment, over, overrides, lambda name: _folder(out, name), ledger), progress)
    with locked(found.folder):
        return _Run(found, progress, started).execute(workers)


def plan_sweep(
    experiment: Source = None,
    *,
    over: Iterable[str] = (),
    overrides: Iterable[str] = (),
    ledger: str | Path | None = None,
    progress: Callable[[SweepProgress], None] = lambda _: None,
) -> Quote:
    """What a sweep would do and cost; writes nothing.

    Raises:
        ConfideError: Wrong input.
    """
    found = load_plan(experiment, over, overrides, lambda name: _folder(None, name), ledger)
    refuse_uncharged(found)
    return quote(found, lambda job: progress(SweepProgress(job.number, len(found.jobs), job.point.label)))


def _folder(out: str | Path | None, name: str) -> Path:
    return Path(out) if out is not None else fresh_folder(Path("runs"), f"{name}-sweep")


def _begun(found: SweepPlan, progress: Callable[[SweepProgress], None]) -> SweepPlan:
    """A sweep whose cells have been checked, and whose folder says what it is made from."""
    refuse_uncharged(found)
    folder = found.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("is there already and is not an empty folder", where=f"--out {folder}",
                          hint="name a new folder: sweeps are never overwritten; --resume goes on with one that was "
                          "interrupted")  # fmt: skip
    found, keys = check_cells(found, lambda job: progress(SweepProgress(job.number, len(found.jobs), job.point.label)))
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        found.write()
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}", where=f"--out {folder}",
                          hint="name a folder you may write to") from None  # fmt: skip
    if found.ledgers is not None:
        try:
            give_keys(keys, found.ledgers)
        except OSError as error:
            raise ConfigError(f"cannot be made: {error.strerror}", where=f"--ledger {found.ledgers}",
                              hint="name a folder you may write to") from None  # fmt: skip
    return found


class _Run:
    """The cells of a checked sweep: what is finished, and what is not yet."""

    def __init__(self, found: SweepPlan, progress: Callable[[SweepProgress], None], started: float) -> None:
        self._plan, self._progress, self._started = found, progress, started
        self._cells: dict[int, Cell] = {}
        self._running: dict[int, str] = {}
        self._beside = 1

    def execute(self, workers: int | None) -> Sweep:
        try:
            for job in self._plan.jobs:
                if (cell := read_cell(job)) is not None:
                    self._cells[job.number] = cell
                    self._tell(job, "kept", result=cell.result)
                else:
                    self._tell(job, "waiting")
            self._write("running")
            self._ask()
            open_ = [job for job in self._plan.jobs if job.number not in self._cells]
            if workers == 1 or (workers is None and min(cores(), len(open_)) == 1):
                run_in_turn(open_, self._began, self._told)
            elif open_:
                run_beside(open_, None if workers is None else min(workers, len(open_)), self._began, self._told)
            found = self._sweep()
            write_sweep_figure(found)
            write_tables(found)
            write_sweep_page(found)
            self._write("finished", found)
        except BaseException as error:
            with suppress(OSError, ConfideError):  # the first error is the one to tell
                self._gather()
                write_tables(self._sweep())
                self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            if isinstance(error, OSError):
                raise StorageError(f"cannot be written: {error.strerror}", where=str(error.filename or self._folder),
                                   hint="free space and go on with --resume") from error  # fmt: skip
            raise
        return found

    def _ask(self) -> None:
        """Do the ledgers still hold what is not charged yet? Others may have used them since the sweep was begun."""
        plan = self._plan
        open_ = [job for job in plan.jobs if job.number not in self._cells]
        if plan.ledgers is None or plan.cost is None or not open_:
            return
        left = {}
        for site in plan.cost.ledgers:
            if (path := plan.ledgers / site / LEDGER).is_file():  # the first cell makes it
                with closing(Ledger.open(path)) as ledger:
                    left[site] = [e for job in open_ for e in still_to_charge(job.charges, job.folder, ledger)]
        ask(left, plan.ledgers, plan.ledgers, len(open_))

    @property
    def _folder(self) -> Path:
        return self._plan.folder

    def _gather(self) -> None:
        """What finished while the others were being stopped."""
        for job in self._plan.jobs:
            if job.number not in self._cells and (cell := read_cell(job)) is not None:
                self._cells[job.number] = cell
                self._running.pop(job.number, None)

    def _began(self, job: Job) -> None:
        self._running[job.number] = job.point.label
        self._beside = max(self._beside, len(self._running))
        self._write_status("running")
        self._tell(job, "running")

    def _told(self, job: Job, round_: Progress | None) -> None:
        if round_ is not None:
            self._tell(job, "running", round_=round_)
            return
        cell = read_cell(job)
        if cell is None:
            raise ConfigError("has ended and left no record", where=str(job.folder),
                              hint="leave the folder alone while a sweep is running")  # fmt: skip
        self._cells[job.number] = cell
        del self._running[job.number]
        self._write("running")
        self._tell(job, "finished", result=cell.result)

    def _tell(
        self, job: Job, state: Literal["waiting", "running", "finished", "kept"], *, round_: Progress | None = None,
        result: Result | None = None,
    ) -> None:  # fmt: skip
        self._progress(SweepProgress(job.number, len(self._plan.jobs), job.point.label, round_, result, state))

    def _sweep(self) -> Sweep:
        return Sweep(
            name=self._plan.name,
            axes=values_of(self._plan.axes),
            cells=tuple(self._cells[number] for number in sorted(self._cells)),
            seconds=round(time.perf_counter() - self._started, 3),
            out=self._folder,
            cost=self._plan.cost,
            beside=self._beside,
        )

    def _write(self, status: str, found: Sweep | None = None) -> None:
        """What is finished so far, and how the sweep stands."""
        write_json(self._folder / "sweep.json", (found or self._sweep()).to_json())
        self._write_status(status)

    def _write_status(self, status: str) -> None:
        running = "; ".join(self._running[number] for number in sorted(self._running)) or None
        tree = {"status": status, "cells": len(self._plan.jobs), "finished": len(self._cells), "cell": running}
        write_json(self._folder / "status.json", tree)
