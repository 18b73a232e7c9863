"""`confide.sweep`: one experiment at every point of a grid, to see what accuracy which ε buys.

Invariants:
1. Only on data that are declared public. On other data a sweep is a release of all its cells: whoever compares them
   learns more than any one of their ε says. It is refused before anything is read or written.
2. Every cell is checked as far as a run is before it starts, before the first one runs.
3. Each cell is one `simulate` with a ledger of its own; what finished stays when a later cell does not.
4. Where the best cell is told, the watermark stands beside it.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confide.config import Experiment, parse_assignment
from confide.errors import ConfideError, ConfigError, PolicyError, StorageError
from confide.simulations.folders import fresh_folder, write_json
from confide.simulations.planning import Source, load_source
from confide.simulations.result import Progress, Result
from confide.simulations.runner import simulate
from confide.simulations.sources import load_sources
from confide.simulations.sweep_page import write_sweep_figure, write_sweep_page
from confide.simulations.sweep_result import Cell, Sweep
from confide.simulations.world import World

__all__ = ["SweepProgress", "sweep"]


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """Where a sweep is. `round` as a round of the cell ends, `result` as the cell ends; neither while it is checked."""

    cell: int
    cells: int
    label: str
    round: Progress | None = None
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class _Point:
    """A point of the grid: its assignments as text, in the order of the axes."""

    texts: Mapping[str, str]

    @property
    def label(self) -> str:
        return ", ".join(f"{key}={text}" for key, text in self.texts.items())

    @property
    def assignments(self) -> list[str]:
        return [f"{key}={text}" for key, text in self.texts.items()]

    def folder(self, number: int) -> str:
        """`001-epsilon-0.5`: the number makes it unique, the rest is for people."""
        words = "-".join(f"{key.rpartition('.')[2]}-{text}" for key, text in self.texts.items())
        return f"{number:03d}-{re.sub(r'[^A-Za-z0-9.+_-]+', '-', words)[:80]}".rstrip("-.")


def sweep(
    experiment: Source = None,
    *,
    over: Iterable[str],
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    progress: Callable[[SweepProgress], None] = lambda _: None,
) -> Sweep:
    """Run an experiment on public data at every combination of values.

    Args:
        experiment: As for `simulate`.
        over: Axes, `section.key=v1,v2,…` each. Cells that differ only in `run.seed` are repetitions of one point.
        overrides: `section.key=value` assignments for every cell.
        out: Output folder; must not hold anything yet. Default: `runs/<name>-sweep-<time>`.
        progress: Called as cells are checked, as rounds end and as cells end.

    Returns:
        All cells. `sweep.json`, `index.html` and, with an axis of ε, `figures/frontier.svg` tell the same.

    Raises:
        PolicyError: The data of a cell are not declared public (nothing was written).
        ConfideError: Wrong input (nothing was written), or a cell could not go on; the message names the cell.
    """
    started = time.perf_counter()
    fixed = list(overrides)
    axes = _axes(over, fixed)
    points = [_Point(dict(zip(axes, texts, strict=True))) for texts in itertools.product(*axes.values())]
    loaded = [_load(experiment, fixed, point) for point in points]
    _refuse_private([e for e, _ in loaded])
    folder = Path(out) if out is not None else fresh_folder(Path("runs"), f"{loaded[0][0].run.name}-sweep")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("is there already and is not an empty folder", where=f"--out {folder}",
                          hint="name a new folder: sweeps are never overwritten")  # fmt: skip
    for number, (point, (cell, base)) in enumerate(zip(points, loaded, strict=True), 1):
        progress(SweepProgress(number, len(points), point.label))
        _check(cell, base, point)
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}", where=f"--out {folder}",
                          hint="name a folder you may write to") from None  # fmt: skip
    values = {key: [parse_assignment(f"{key}={text}")[1] for text in texts] for key, texts in axes.items()}
    run = _Run(experiment, fixed, points, folder, progress, loaded[0][0].run.name, values, started)
    return run.execute()


class _Run:
    """The cells of a checked sweep, one after the other."""

    def __init__(
        self,
        experiment: Source,
        overrides: list[str],
        points: Sequence[_Point],
        folder: Path,
        progress: Callable[[SweepProgress], None],
        name: str,
        axes: dict[str, list[Any]],
        started: float,
    ) -> None:
        self._experiment, self._overrides, self._points = experiment, overrides, points
        self._folder, self._progress, self._name = folder, progress, name
        self._axes, self._started = axes, started
        self._cells: list[Cell] = []
        self._current: str | None = None

    def execute(self) -> Sweep:
        try:
            self._write("running")
            for number, point in enumerate(self._points, 1):
                self._current = point.label
                self._cells.append(self._cell(number, point))
                self._current = None
                self._write("running")
            found = self._sweep()
            write_sweep_figure(found)
            write_sweep_page(found)
            self._write("finished", found)
        except BaseException as error:
            with suppress(OSError):  # the first error is the one to tell
                self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            if isinstance(error, OSError):
                raise StorageError(f"cannot be written: {error.strerror}", where=str(error.filename or self._folder),
                                   hint="free space and start again in a new folder") from error  # fmt: skip
            raise
        return found

    def _cell(self, number: int, point: _Point) -> Cell:
        def at(*, round_: Progress | None = None, result: Result | None = None) -> None:
            self._progress(SweepProgress(number, len(self._points), point.label, round_, result))

        try:
            result = simulate(
                self._experiment,
                overrides=[*self._overrides, *point.assignments],
                out=self._folder / "cells" / point.folder(number),
                progress=lambda round_: at(round_=round_),
            )
        except ConfideError as error:
            _name_cell(error, point)
            raise
        at(result=result)
        values = {key: parse_assignment(text)[1] for key, text in zip(point.texts, point.assignments, strict=True)}
        return Cell(number=number, label=point.label, values=values, result=result)

    def _sweep(self) -> Sweep:
        return Sweep(
            name=self._name,
            axes=self._axes,
            cells=tuple(self._cells),
            seconds=round(time.perf_counter() - self._started, 3),
            out=self._folder,
        )

    def _write(self, status: str, found: Sweep | None = None) -> None:
        """What is finished so far, and how the sweep stands."""
        write_json(self._folder / "sweep.json", (found or self._sweep()).to_json())
        tree = {"status": status, "cells": len(self._points), "finished": len(self._cells), "cell": self._current}
        write_json(self._folder / "status.json", tree)


def _axes(over: Iterable[str], overrides: Sequence[str]) -> dict[str, list[str]]:
    """The axes in the order given: key → values as text.

    Raises:
        ConfigError: An axis is malformed, empty, said twice, or holds a value twice.
    """
    axes: dict[str, list[str]] = {}
    given = {".".join(parse_assignment(text)[0]) for text in overrides}
    for text in over:
        key, equals, raw = text.partition("=")
        key = ".".join(part.strip() for part in key.split("."))
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{text!r} is not an axis", where="--over", hint="write it as section.key=v1,v2")
        values = [value.strip() for value in _split(raw)]
        if not all(values):
            raise ConfigError(f"{text!r} holds an empty value", where="--over",
                              hint="write it as section.key=v1,v2, without a comma too many")  # fmt: skip
        if key in axes or key in given:
            other = "--over" if key in axes else "--set"
            raise ConfigError(f"{key} is given twice", where="--over", hint=f"say it once: it is in {other} already")
        parsed = [parse_assignment(f"{key}={value}")[1] for value in values]
        twice = next((v for i, v in enumerate(parsed) if _among(v, parsed[:i])), None)
        if twice is not None:
            raise ConfigError(f"{key} = {twice!r} is given twice", where="--over",
                              hint="name each value once; repeat a point with --over run.seed=1,2,3")  # fmt: skip
        axes[key] = values
    if not axes:
        raise ConfigError("names no axis", where="--over", hint="for example --over privacy.epsilon=0.5,1,2")
    return axes


def _among(value: Any, others: Sequence[Any]) -> bool:
    """Equality as TOML means it: 1 is 1.0 but not true."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in others)


def _split(raw: str) -> list[str]:
    """At the commas outside brackets and quotes: `[64,32],[16]` is two lists."""
    parts, depth, quote = [""], 0, ""
    for character in raw:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _load(experiment: Source, overrides: list[str], point: _Point) -> tuple[Experiment, Path]:
    try:
        return load_source(experiment, [*overrides, *point.assignments])
    except ConfideError as error:
        _name_cell(error, point)
        raise


def _refuse_private(cells: Iterable[Experiment]) -> None:
    if all(cell.data.public for cell in cells):
        return
    raise PolicyError(
        "is not true: on such data a sweep is a release of all its cells, and choosing among them costs a person more "
        "than the ε of any one",
        where="data.public",
        hint="set data.public = true if anybody may see every row; otherwise run single experiments with "
        "confide simulate --ledger DIR, each charged to the one ledger",
    )


def _check(experiment: Experiment, base: Path, point: _Point) -> None:
    """Everything that `simulate` would find wrong before it starts; leaves nothing behind."""
    try:
        sources = load_sources(experiment, base)
        with tempfile.TemporaryDirectory() as scratch:
            sites, ledgers, logs = (Path(scratch) / name for name in ("sites", "ledgers", "logs"))
            world = World(sources, sites, ledgers, logs)
            try:
                world.check()
            finally:
                world.close()
    except ConfideError as error:
        _name_cell(error, point)
        raise


def _name_cell(error: ConfideError, point: _Point) -> None:
    """Let the error tell which cell it is about."""
    error.where = f"cell {point.label}: {error.where}" if error.where else f"cell {point.label}"
