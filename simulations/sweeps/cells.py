"""One cell of a sweep: run it, go on with it, or keep it; and its record, from which it is read again.

A cell is finished once its run is. Its record `cell.json` is written just before: there is no moment at which a run
that was charged has ended and nobody can read what came of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from confide.errors import ConfigError
from confide.simulations.folders import write_json
from confide.simulations.keeping import KEPT, Keeping
from confide.simulations.place import experiment_text, finished_result
from confide.simulations.result import Progress, Result, json_number
from confide.simulations.runner import simulate
from confide.simulations.sweeps.place import Job
from confide.simulations.sweeps.result import Cell

__all__ = ["read_cell", "run_cell"]

_RECORD, _EXPERIMENT = "cell.json", "experiment.json"
_RESULT = TypeAdapter(Result)


def run_cell(job: Job, progress: Callable[[Progress], None]) -> None:
    """Run a cell to its end, from wherever an earlier process left it.

    Raises:
        ConfideError: It could not go on, or another process works on it.
    """
    folder = job.folder

    def record(result: Result) -> None:
        write_json(folder / _RECORD, _plain(_RESULT.dump_python(result, mode="json", exclude={"out"})))

    if _resumable(job):
        simulate(job.experiment, out=folder, resume=True, progress=progress, ending=record)
    else:
        if job.ledgers is not None and finished_result(folder) is not None:
            raise ConfigError("has ended and its record is gone: to run it again would be charged again",
                              where=str(folder), hint="restore cell.json, or remove that folder")  # fmt: skip
        if folder.exists():  # begun, but not so far that it could go on; or ended before its record was written
            if (folder / KEPT).is_dir():
                Keeping(folder / KEPT).close()  # nobody else works on it
            shutil.rmtree(folder)
        simulate(job.experiment, out=folder, ledger=job.ledgers, progress=progress, ending=record)


def _resumable(job: Job) -> bool:
    if finished_result(job.folder) is not None or not (job.folder / _EXPERIMENT).is_file():
        return False
    if not (job.folder / KEPT).is_dir():
        return False
    keeping = Keeping(job.folder / KEPT)
    try:
        return keeping.facts() is not None
    finally:
        keeping.close()


def read_cell(job: Job) -> Cell | None:
    """A finished cell; None where it is not finished.

    Raises:
        ConfigError: What lies there is another experiment's, or not a record.
    """
    path = job.folder / _RECORD
    if not path.is_file():
        return None
    try:
        ended = finished_result(job.folder)
        tree = json.loads(path.read_text())
        result = _RESULT.validate_python({**tree, "out": job.folder})
        same = (job.folder / _EXPERIMENT).read_bytes() == experiment_text(job.experiment.experiment)
    except (OSError, ValueError, TypeError, ValidationError):
        raise ConfigError("is no record of a cell", where=str(path),
                          hint="remove that cell's folder: it will be run again") from None  # fmt: skip
    if ended is None:
        return None  # its process was killed while it ended
    if not same or ended.get("run_id") != result.run_id:
        raise ConfigError("is not the run of this cell", where=str(job.folder),
                          hint="remove that folder: the cell will be run again")  # fmt: skip
    return Cell(
        number=job.number,
        label=job.point.label,
        values=job.point.values,
        result=result,
        uplink_bytes=job.size.uplink if job.size else None,
        downlink_bytes=job.size.downlink if job.size else None,
    )


def _plain(value: Any) -> Any:
    """JSON has no infinity; reading, pydantic takes the text for the number."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else json_number(value)
