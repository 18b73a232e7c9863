"""Where a run lives, and what it was made from: the same for one that begins and one that is resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from confide.clients.data.source import files_of
from confide.config import Experiment, load_experiment
from confide.errors import ConfigError, StorageError
from confide.privacy.files import write_atomically
from confide.simulations.keeping import KEPT, Keeping, digest_of_files
from confide.simulations.planning import Source, load_source
from confide.simulations.sources import Sources, load_sources
from confide.simulations.world import World

__all__ = [
    "LOCAL", "Place", "attached_place", "difference", "experiment_text", "finished_result", "inputs_digest",
    "new_place", "resumed_place",
]  # fmt: skip

#: Everything in one process.
LOCAL = "local"
_EXPERIMENT, _STATUS, _RESULT = "experiment.json", "status.json", "result.json"


class Place:
    """A run's folders.

    Args:
        folder: The output folder.
        ledgers: The sites' ledgers.
        keeping: What the run is resumed from.
        earlier: The folder of the run after which this one trains anew, with its registries as they are now.
        engine: Where its sites run.
    """

    def __init__(
        self, folder: Path, ledgers: Path, keeping: Keeping, earlier: Path | None = None, engine: str = LOCAL
    ) -> None:
        self.folder, self.ledgers, self.keeping, self.earlier = folder, ledgers, keeping, earlier
        self.engine = engine
        #: Processes that have the sites, where the engine is the local one; None: as many as are of use.
        self.workers: int | None = 1
        #: Called before a world that is kept is made.
        self.prepare: Callable[[Keeping, Sources], None] = lambda _keeping, _sources: None
        self._made_from: tuple[Experiment, Path] | None = None

    def world(self, sources: Sources, *, kept: bool = True) -> World:
        """The run's sites: those that are there, or new ones; `kept` where the run is to be resumed with them."""
        if self.keeping.manifest is None:  # whatever lies here was never wholly made, and nothing has happened in it
            self.keeping.clear_but_facts()
            for name in ("sites", "logs"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if kept:
            self.prepare(self.keeping, sources)
        keeping = self.keeping if kept else None
        carried = self.earlier / "sites" if self.earlier is not None else None
        return World(sources, self.folder / "sites", self.ledgers, self.folder / "logs", keeping, carried)

    def begin(self, experiment: Experiment, base: Path) -> None:
        """From here on the run can be resumed."""
        self._made_from = experiment, base
        facts = {
            "base": str(base.absolute()), "ledgers": str(self.ledgers.absolute()),
            "inputs": inputs_digest(experiment, base),
            "earlier": str(self.earlier.absolute()) if self.earlier is not None else "", "engine": self.engine,
        }  # fmt: skip
        write_atomically(self.folder / _EXPERIMENT, experiment_text(experiment))
        self.keeping.note(facts)  # last: where it lies, everything else does

    def resume(self, experiment: Experiment, base: Path) -> None:
        """The run was begun with these."""
        self._made_from = experiment, base

    def sources(self, bounds: Callable[[str], tuple[float, float]] | None = None) -> Sources:
        """What the run was made from, read again."""
        if self._made_from is None:
            raise ValueError("nothing was begun here")
        return load_sources(*self._made_from, bounds=bounds)

    @contextmanager
    def part(self, folder: Path) -> Iterator[Place]:
        """A run before this one, with the same ledgers, in a folder of its own."""
        with new_place(folder, self.ledgers, self.earlier) as place:
            yield place


@contextmanager
def new_place(folder: Path, ledgers: Path, earlier: Path | None = None) -> Iterator[Place]:
    """For as long as this process works on it."""
    keeping = Keeping(folder / KEPT)
    try:
        yield Place(folder, ledgers, keeping, earlier)
    finally:
        keeping.close()


@contextmanager
def resumed_place(
    source: Source, overrides: Sequence[str], out: str | Path | None, ledger: str | Path | None
) -> Iterator[Place]:
    """The place of a run that was begun by an earlier process.

    Raises:
        ConfigError: There is none, it is another experiment's, its data have changed, it has ended, or another process
            works on it.
    """
    if out is None:
        raise ConfigError("needs the folder of the run", where="--resume", hint="name it with --out")
    folder = Path(out)
    if finished_result(folder) is not None:
        raise ConfigError("is finished: there is nothing to resume", where=str(folder), hint="read result.json there")
    kept = folder / KEPT
    facts, path = None, folder / _EXPERIMENT
    if path.is_file() and kept.is_dir():
        keeping = Keeping(kept)
        facts = keeping.facts()
        if facts is None:
            keeping.close()
    if facts is None:
        raise ConfigError(
            "holds no run that can be resumed", where=f"--out {folder}",
            hint="name the folder of an interrupted run; without --resume a new one is begun",
        )  # fmt: skip
    try:
        written = load_experiment(json.loads(path.read_text()))
        base = Path(facts["base"])
        if source is not None or overrides:
            asked, _ = load_source(source, overrides)
            if experiment_text(asked) != experiment_text(written):
                raise ConfigError(
                    f"holds a run of another experiment ({difference(asked, written)} differs)",
                    where=f"--out {folder}", hint="resume it without naming an experiment, or begin in a new folder",
                )  # fmt: skip
        if ledger is not None and Path(ledger).absolute() != Path(facts["ledgers"]):
            raise ConfigError(f"holds a run whose ledgers are in {facts['ledgers']}", where=f"--out {folder}",
                              hint="leave --ledger out: a run stays with its ledgers")  # fmt: skip
        if inputs_digest(written, base) != facts["inputs"]:
            raise ConfigError("the data or the consent file are not those that the run was begun with",
                              where=f"--out {folder}", hint="put them back, or begin in a new folder")  # fmt: skip
        earlier = Path(facts["earlier"]) if facts.get("earlier") else None
        place = Place(folder, Path(facts["ledgers"]), keeping, earlier, facts.get("engine", LOCAL))
        place.resume(written, base)
        yield place
    finally:
        keeping.close()


def attached_place(folder: Path) -> Place:
    """A run's place, for a process that works for the one that holds it.

    Raises:
        StorageError: No run is under way there.
    """
    if not (folder / KEPT).is_dir():
        raise StorageError("holds no run that is under way", where=str(folder))
    keeping = Keeping(folder / KEPT, attached=True)
    if (facts := keeping.facts()) is None:
        raise StorageError("holds no run that was begun", where=str(folder))
    earlier = Path(facts["earlier"]) if facts.get("earlier") else None
    place = Place(folder, Path(facts["ledgers"]), keeping, earlier, facts.get("engine", LOCAL))
    place.resume(load_experiment(json.loads((folder / _EXPERIMENT).read_text())), Path(facts["base"]))
    return place


def finished_result(folder: Path) -> dict[str, Any] | None:
    """The result of a run that has ended; None where there is none."""
    try:
        status = json.loads((folder / _STATUS).read_text())
        if status.get("status") != "finished":
            return None
        found: dict[str, Any] = json.loads((folder / _RESULT).read_text())
    except (OSError, ValueError, AttributeError):
        return None
    if (folder / KEPT).is_dir():  # its process came to its end before it could tidy up
        keeping = Keeping(folder / KEPT)
        keeping.destroy()
        keeping.close()
    return found


def experiment_text(experiment: Experiment) -> bytes:
    """The experiment as it lies in a run's folder."""
    return experiment.model_dump_json(by_alias=True, indent=2).encode()


def difference(one: Experiment, other: Experiment) -> str:
    """The first section that is not the same."""
    left, right = (json.loads(experiment_text(e)) for e in (one, other))
    return next((f"[{name}]" for name in left if left[name] != right.get(name)), "something")


def inputs_digest(experiment: Experiment, base: Path) -> str:
    """Names the content of the files that the run reads."""
    files = files_of(experiment.data.file, base)
    files += [base / name for name in (experiment.consent.file, experiment.consent.mapping) if name is not None]
    return digest_of_files(files)
