"""The folders that a run writes to: new ones, and taken away again where nothing came of the run."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from confide.config import Experiment
from confide.errors import ConfigError
from confide.privacy.database import copy_database
from confide.privacy.dp.statement import LEDGER
from confide.privacy.files import write_atomically
from confide.simulations.keeping import KEPT

__all__ = ["copy_ledgers", "fresh_folder", "run_folders", "write_json"]


@contextmanager
def run_folders(
    experiment: Experiment, out: str | Path | None, ledger: str | Path | None
) -> Iterator[tuple[Path, Path]]:
    """The output and ledger folders; what was made for a run that never started is taken away again."""
    folder = Path(out) if out is not None else fresh_folder(Path("runs"), experiment.run.name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        begun = "; --resume goes on with the one that was begun there" if (folder / KEPT).is_dir() else ""
        raise ConfigError("is there already and is not an empty folder", where=f"--out {folder}",
                          hint=f"name a new folder: runs are never overwritten{begun}")  # fmt: skip
    ledgers = Path(ledger) if ledger is not None else folder / "ledgers"
    made = [_topmost_missing(path) for path in (folder, ledgers) if not path.exists()]
    before = set(ledgers.rglob("*")) if ledgers.is_dir() else set()
    try:
        for option, path in (("--out", folder), ("--ledger", ledgers)):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot be made: {error.strerror}", where=f"{option} {path}",
                                  hint="name a folder you may write to") from None  # fmt: skip
        yield folder, ledgers
    except BaseException:
        if not (folder / "status.json").exists():
            for part in ("sites", "logs", KEPT):
                shutil.rmtree(folder / part, ignore_errors=True)
            _remove_new(ledgers, before)
            for path in made:
                if not any(path.rglob(LEDGER)):  # another run's, by now
                    shutil.rmtree(path, ignore_errors=True)
        raise


def _topmost_missing(path: Path) -> Path:
    path = path.absolute()
    while not path.parent.exists():
        path = path.parent
    return path


def _remove_new(folder: Path, before: set[Path]) -> None:
    """A ledger made for a run that was refused would fix its limits for ever; one that holds charges by now is
    another run's, which came in between."""
    new = sorted(set(folder.rglob("*")) - before, reverse=True) if folder.is_dir() else []
    kept = {path.parent for path in new if path.name == LEDGER and not _abandoned(path)}
    for path in new:
        if path not in kept and path.parent not in kept:
            path.rmdir() if path.is_dir() else path.unlink()


def _abandoned(ledger: Path) -> bool:
    """Does a ledger hold no charge, and has nobody else got it open? SQLite leaves write-ahead mode for the only
    connection that there is, and for no other."""
    try:
        with closing(sqlite3.connect(ledger, timeout=0, isolation_level=None)) as db:
            (mode,) = db.execute("PRAGMA journal_mode=DELETE").fetchone()
            return mode == "delete" and db.execute("SELECT 1 FROM entry").fetchone() is None
    except sqlite3.Error:
        return False


def fresh_folder(parent: Path, name: str) -> Path:
    """A path that does not exist, named after the moment."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(1, 1000))):
        path = parent / f"{name}-{stamp}{suffix}"
        if not path.exists():
            return path
    raise ConfigError("holds too many runs of this second", where=str(parent), hint="name a folder with --out")


def write_json(path: Path, tree: Any) -> None:
    """Write atomically; infinities are an error, because JSON has none."""
    write_atomically(path, (json.dumps(tree, indent=2, allow_nan=False, default=str) + "\n").encode())


def copy_ledgers(source: Path, target: Path) -> None:
    """A folder of ledgers as they are now, also while a run charges them.

    A database that this process has open must not be copied as a file: to close it would drop SQLite's locks on it.
    """
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        elif path.suffix == ".db":
            try:
                copy_database(path, place)
            except sqlite3.Error:  # it is none, or its log cannot be read where it lies: whoever opens the copy sees
                for end in ("", "-wal"):
                    place.with_name(place.name + end).unlink(missing_ok=True)
                    if (part := path.with_name(path.name + end)).exists():
                        shutil.copy2(part, place.with_name(part.name))
        elif not path.name.endswith(("-wal", "-shm")) and not path.name.startswith("."):  # what is half written
            shutil.copy2(path, place)
