"""`confide.simulate`: from an experiment to a trained model, through the deployed code.

Everything that can be wrong with the input is found before the output folder is made. Interrupted, the folder says so,
everything charged stays charged, and the run can be resumed from there: a new run and a resumed one are executed alike.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch

from confide.errors import ConfideError, ConfigError, PeerError, StorageError
from confide.privacy.flushing import GroupCommit
from confide.simulations.earlier import earlier_run, ledgers_of, retraining
from confide.simulations.engines.engine import Engine, engine_of, find_engine, use_engine
from confide.simulations.execution import Ending, Execution, Told
from confide.simulations.folders import run_folders, write_json
from confide.simulations.keeping import KEPT
from confide.simulations.place import LOCAL, Place, new_place, resumed_place
from confide.simulations.planning import Source, any_bounds, load_source
from confide.simulations.result import Progress, Result
from confide.simulations.sources import load_sources
from confide.simulations.statistics import STATISTICS, learn_bounds, read_learned
from confide.simulations.world import World

__all__ = ["simulate"]


def simulate(
    experiment: Source = None,
    *,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    ledger: str | Path | None = None,
    resume: bool = False,
    retrain_after: str | Path | None = None,
    engine: str | None = None,
    ray_address: str | None = None,
    workers: int | None = 1,
    progress: Callable[[Progress], None] = lambda _: None,
    ending: Callable[[Result], None] = lambda _: None,
) -> Result:
    """Run an experiment.

    Args:
        experiment: A TOML file, the same as nested mappings, an `Experiment`, or None for the built-in RAND example.
        overrides: `section.key=value` assignments that win over the file.
        out: Output folder; must not hold anything yet. Default: `runs/<run id>`.
        ledger: Folder of the sites' ledgers. Runs that name the same one compose; default: a new one in `out`.
        resume: Go on with the run in `out`, wherever its process came to its end; without an experiment, with the one
            that it was begun with.
        retrain_after: Output folder of a finished run: train anew from its initial model, with whom its registries hold
            now, charged to its ledgers. Without an experiment, with its own.
        engine: Where the sites run: `local` (this process), `ray` (Flower's simulation engine), or `deployment` (real
            processes over TLS on this machine). Default: `local`; a resumed run stays with its own.
        ray_address: Of a Ray cluster, for `ray`; default: processes of this machine.
        workers: With the engine `local`: processes that have the sites between them; None: as many as cores, where
            there are more than a few sites. It changes nothing but the time that a run takes.
        progress: Called as each round ends.
        ending: Called with the result when everything of it is written, before the folder says that the run is
            finished: what it keeps is there whenever the run is.

    Raises:
        ConfideError: Wrong input (nothing was written), or the run could not go on.
    """
    started = time.perf_counter()
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} is no number of processes", where="--workers", hint="1 or more")
    if workers not in (None, 1) and engine not in (None, LOCAL):
        raise ConfigError("is for --engine local", where="--workers", hint="name one of the two")
    if resume:
        with GroupCommit(), resumed_place(experiment, list(overrides), out, ledger) as place, _one_thread():
            place.workers, apart = workers, engine_of(place, engine, ray_address)
            if apart is not None and workers not in (None, 1):
                raise ConfigError("is for --engine local, and this run was begun with another", where="--workers",
                                  hint="leave it out")  # fmt: skip
            return _execute(place, apart, progress, ending, started)
    apart = find_engine(engine or LOCAL, ray_address)
    earlier = Path(retrain_after) if retrain_after is not None else None
    if earlier is not None:
        ledger = ledgers_of(earlier, earlier_run(earlier), ledger)
        loaded, base = retraining(experiment, overrides, earlier)
    else:
        loaded, base = load_source(experiment, overrides)
    sources = load_sources(loaded, base, bounds=any_bounds)
    if apart is not None:
        apart.check(loaded, len(sources.records))
    with (
        run_folders(loaded, out, ledger) as (folder, ledgers),
        _one_thread(),
        GroupCommit(),
        new_place(folder, ledgers, earlier) as place,
    ):
        use_engine(place, apart)
        place.workers = workers
        # Where bounds are learned first, this world is only asked whether the run may be.
        world = place.world(sources, kept=not sources.learned)
        with _told(folder, world):
            world.check()
            place.begin(loaded, base)
            write_json(folder / "status.json", {"status": "running", "run_id": world.manifest.run})
            if not sources.learned:
                return _run(place, world, apart, progress, ending, started)
        return _execute(place, apart, progress, ending, started)


def _execute(place: Place, engine: Engine | None, progress: Told, ending: Ending, started: float) -> Result:
    """Run what was begun in a place, from wherever it has come to."""
    sources = place.sources(any_bounds)
    if sources.learned:
        sources = place.sources(_learned_bounds(place).__getitem__)
    world = place.world(sources)
    with _told(place.folder, world):
        write_json(place.folder / "status.json", {"status": "running", "run_id": world.manifest.run})
        return _run(place, world, engine, progress, ending, started)


def _run(place: Place, world: World, engine: Engine | None, progress: Told, ending: Ending, started: float) -> Result:
    with closing(place.keeping.store()) as store:
        after = earlier_run(place.earlier) if place.earlier is not None else None
        result = Execution(world, place, engine, progress, ending, started, store, after).execute()
    place.keeping.destroy()
    return result


def _learned_bounds(place: Place) -> dict[str, tuple[float, float]]:
    """The bounds that a statistics run learns, in a folder of its own; found there if it is over."""
    part = place.folder / STATISTICS
    if (found := read_learned(part)) is not None:
        if (part / KEPT).is_dir():
            with place.part(part) as inner:
                inner.keeping.destroy()
        return found
    with place.part(part) as inner:
        world = inner.world(place.sources())
        with _told(place.folder, world), closing(inner.keeping.store()) as store:
            bounds = learn_bounds(world, part, store)
        inner.keeping.destroy()
    return bounds


@contextmanager
def _told(folder: Path, world: World) -> Iterator[None]:
    """Where it ends before its time, the folder says so, and the logs so far lie there."""
    try:
        yield
    except BaseException as error:
        with suppress(ConfideError, sqlite3.Error):  # the first error is the one to tell
            world.export()
        if (folder / "status.json").exists():
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # the first error is the one to tell
                write_json(folder / "status.json", {"status": status, "run_id": world.manifest.run})
        if isinstance(error, OSError):
            raise StorageError(f"cannot be written: {error.strerror}", where=str(error.filename or folder),
                               hint="free space and start again: what was durable is kept") from error  # fmt: skip
        lost = next(
            (s.last_refusal for s in world.sites.open.values() if isinstance(s.last_refusal, StorageError)), None
        )
        if isinstance(error, PeerError) and lost is not None:
            raise lost from error
        raise
    finally:
        world.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small steps are faster without torch's thread pool; the caller's setting comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
