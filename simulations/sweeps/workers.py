"""Cells of a sweep beside each other: worker processes, each started afresh, each running one cell at a time.

Invariants:
1. Whatever ends the sweep (an error, Ctrl-C, a killed worker), all workers are ended with it; a cell that finished in
   the meantime counts.
2. A worker whose parent is gone stops by itself: its cell says that it was interrupted, and can be resumed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from typing import Any, NoReturn

from confide.environment import silence_third_parties
from confide.errors import ConfideError, PeerError
from confide.simulations.result import Progress
from confide.simulations.sweeps.axes import name_cell
from confide.simulations.sweeps.cells import run_cell
from confide.simulations.sweeps.memory import available_bytes, cores, peak_bytes, workers_within
from confide.simulations.sweeps.place import Job

__all__ = ["run_beside", "run_in_turn"]

#: Seconds that a cell gets to say in its folder that it was interrupted.
_PATIENCE = 60.0
_CONTEXT = multiprocessing.get_context("spawn")

Told = Callable[[Job, Progress | None], None]


def run_in_turn(jobs: Sequence[Job], began: Callable[[Job], None], told: Told) -> None:
    """Run cells in this process, one after the other. `told` gets their rounds, and None as one has ended.

    Raises:
        ConfideError: A cell could not go on; the message names it.
    """
    for job in jobs:
        began(job)
        try:
            run_cell(job, lambda progress, job=job: told(job, progress))  # type: ignore[misc]  # a default for a lambda
        except ConfideError as error:
            name_cell(error, job.point.label)
            raise
        told(job, None)


def run_beside(jobs: Sequence[Job], workers: int | None, began: Callable[[Job], None], told: Told) -> None:
    """The same in `workers` processes; None: as many as cores, and memory by what the first cell takes, allow.

    Raises:
        ConfideError: A cell could not go on, or its process was killed; the message names it.
    """
    pool = _Pool(list(jobs), workers, began, told)
    try:
        pool.run()
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.kill()


class _Worker:
    """A process, and the cell that it has in hand."""

    def __init__(self) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(theirs,), daemon=True)
        with _no_interrupt():  # inherited: until the worker can say so in a folder, Ctrl-C waits
            self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.ready = False

    def give(self, job: Job | None) -> None:
        self.job = job
        with suppress(OSError):  # it has ended; what it says next, or does not, tells why
            self.connection.send(job)


class _Pool:
    def __init__(self, jobs: list[Job], workers: int | None, began: Callable[[Job], None], told: Told) -> None:
        self._pending, self._began, self._told = jobs, began, told
        self._asked, self._available = workers, available_bytes()
        self._peak = 0
        self._workers: list[_Worker] = []
        self._leaving: list[_Worker] = []  # they have been told to end, and nobody waits for it yet

    def run(self) -> None:
        while self._pending or any(w.job for w in self._workers):
            self._hand_out()
            for worker in self._speaking():
                self._hear(worker)

    def stop(self) -> None:
        """End all workers; each cell under way says in its folder that it was interrupted."""
        for worker in self._workers:
            worker.connection.close()  # nobody listens any more: nothing blocks a worker
            if worker.job is not None and worker.ready and worker.process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(worker.process.pid, signal.SIGINT)
            else:
                worker.process.terminate()
        end = time.monotonic() + _PATIENCE
        for worker in self._workers:
            worker.process.join(max(0.0, end - time.monotonic()))

    def kill(self) -> None:
        """Whatever is still there; who has been told to end may do so."""
        end = time.monotonic() + _PATIENCE
        for worker in self._leaving:
            worker.process.join(max(0.0, end - time.monotonic()))
        for worker in (*self._leaving, *self._workers):
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def _hand_out(self) -> None:
        """Cells to workers: a worker more where one is allowed, one less where it is not any more."""
        allowed = self._allowed()
        while self._pending and sum(w.job is not None for w in self._workers) < allowed:
            worker = next((w for w in self._workers if w.job is None), None)
            if worker is None:
                self._workers.append(worker := _Worker())
            worker.give(self._pending.pop(0))
            self._began(worker.job)  # type: ignore[arg-type]  # it was given one
        for worker in [w for w in self._workers if w.job is None]:
            worker.give(None)
            self._workers.remove(worker)
            self._leaving.append(worker)

    def _allowed(self) -> int:
        if self._asked is not None:
            return self._asked
        # Until a cell has ended nobody knows what one takes.
        return workers_within(cores(), self._available, self._peak) if self._peak else 1

    def _speaking(self) -> list[_Worker]:
        by_connection = {w.connection: w for w in self._workers}
        return [by_connection[c] for c in connection.wait(list(by_connection))]  # type: ignore[index]

    def _hear(self, worker: _Worker) -> None:
        job = worker.job
        if job is None:
            raise RuntimeError("a worker without a cell has nothing to say")
        try:
            kind, said = worker.connection.recv()
        except (EOFError, OSError):
            self._lost(worker, job)
        if kind == "ready":
            worker.ready = True
        elif kind == "round":
            self._told(job, said)
        elif kind == "done":
            self._peak, worker.job = max(self._peak, said), None
            self._told(job, None)
        else:
            if isinstance(said, ConfideError):
                name_cell(said, job.point.label)
            raise said

    def _lost(self, worker: _Worker, job: Job) -> NoReturn:
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        hint = "its memory may have been needed elsewhere: take fewer --workers" if worker.ready else (
            'a script that runs cells in processes needs `if __name__ == "__main__":` around what it does'
        )  # fmt: skip
        raise PeerError(f"its process {how}", where=f"cell {job.point.label}",
                        hint=f"{hint}; --resume keeps the cells that are finished")  # fmt: skip


def _work(ours: Any) -> None:
    """A worker's life: a cell at a time, until it gets none."""
    silence_third_parties()
    signal.signal(signal.SIGINT, _first_interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with suppress(KeyboardInterrupt, EOFError, OSError):  # the parent has said so, or is gone
        ours.send(("ready", None))
        while (job := ours.recv()) is not None:
            ours.send(_outcome(job, ours))


def _outcome(job: Job, ours: Any) -> tuple[str, Any]:
    def told(progress: Progress) -> None:
        try:
            ours.send(("round", progress))
        except OSError:
            raise KeyboardInterrupt from None

    try:
        run_cell(job, told)
    except Exception as error:  # whatever it is, the parent raises it
        return "failed", _portable(error)
    return "done", peak_bytes()


def _portable(error: Exception) -> Exception:
    """The error, or what can be said of one that cannot leave its process."""
    if isinstance(error, ConfideError):
        return error
    told = "".join(traceback.format_exception(error))
    return RuntimeError(f"a worker failed\n{told}")


def _first_interrupt(*_: object) -> NoReturn:
    """The terminal and the parent may both say it: once is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _no_interrupt() -> Iterator[None]:
    resource_tracker.ensure_running()  # where it is started later, it lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
