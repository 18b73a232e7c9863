"""Chunks over all cores: worker processes take shares of the work where that pays, and the caller takes one itself.

SEAL's bindings hold the interpreter's lock, so threads do not help. Workers are plain `python -m` processes over a
socket pair: nothing of the caller's main module is imported, nothing is forked from a process that has threads. They
are started when the first large vector comes and are used once they report ready; until then the caller works alone.
A job holds keys: it lives in a worker only until its last share is done.

Invariant: one call at a time has the workers; a second one (another thread, or a call within a call) works alone.
"""

from __future__ import annotations

import atexit
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import connection
from typing import Any, TypeVar

__all__ = ["PAYS_FROM", "main", "run_jobs", "stop_workers"]

#: Chunks from which starting and feeding workers costs less than it saves.
PAYS_FROM = 48
_SHARE = 8
_MOST = 8  # processes, the caller included: more memory would buy little
_READY, _FORGET = b"ready", None
_turn = threading.Lock()

_R = TypeVar("_R")
Job = Callable[[int, Any], _R]


def run_jobs(job: Job[_R], items: Iterable[Any], count: int) -> Iterator[_R]:
    """`job(number, item)` for each item, in order, a few at a time.

    Args:
        job: Picklable; it is handed to the workers once.
        items: Read as they are needed.
        count: How many there are.
    """
    numbered = iter(enumerate(items))
    if count < PAYS_FROM or not _turn.acquire(blocking=False):
        yield from (job(n, item) for n, item in numbered)
        return
    try:
        yield from _run_shared(job, numbered)
    finally:
        _turn.release()


def _run_shared(job: Job[_R], numbered: Iterator[tuple[int, Any]]) -> Iterator[_R]:
    pool = _pool()
    busy: list[_Worker] = []
    try:
        while True:
            for worker in pool:
                if worker not in busy and worker.is_ready():
                    worker.send(job)
                    busy.append(worker)
            shares = [share for _ in range(len(busy) + 1) if (share := list(itertools.islice(numbered, _SHARE)))]
            if not shares:
                return
            # The caller's own share comes last in order, and is worked on while the others are.
            at_work = list(zip(busy, shares, strict=False))[: len(shares) - 1]
            for worker, share in at_work:
                worker.send(share)
            own = [job(n, item) for n, item in shares[-1]]
            for worker, share in at_work:
                yield from worker.results(job, share)
            yield from own
    finally:
        for worker in busy:
            worker.forget()


class _Worker:
    """One process and the way to it. A worker that dies is never asked again; its share is done here instead."""

    def __init__(self) -> None:
        self._end, theirs = connection.Pipe()
        self._ready = False
        self._owed = 0
        code = "from confide.privacy.sealing.workers import main; main()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and code; -P: nothing from the working directory
            [sys.executable, "-P", "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()

    def is_ready(self) -> bool:
        """Has it started, and is it alive?"""
        if self._process.poll() is not None:
            return False
        with suppress(EOFError, OSError):
            if not self._ready and self._end.poll():
                self._ready = self._end.recv_bytes() == _READY
        return self._ready

    def send(self, message: Any) -> None:
        with suppress(OSError):
            self._end.send(message)
        if isinstance(message, list):
            self._owed += 1

    def results(self, job: Job[_R], share: list[tuple[int, Any]]) -> list[_R]:
        outcome = self._take_back()
        if outcome is None:
            return [job(n, item) for n, item in share]
        if isinstance(outcome, BaseException):
            raise outcome
        return list(outcome)

    def forget(self) -> None:
        """The end of a call. What is still owed is waited for, so that the job and its keys are let go of now."""
        while self._owed:
            self._take_back()
        self.send(_FORGET)

    def _take_back(self) -> Any:
        """One answer; None where it died."""
        try:
            answer = self._end.recv()
        except BaseException as error:
            self._process.kill()  # also where half an answer may have been read
            self._owed = 0
            if isinstance(error, (EOFError, OSError)):
                return None
            raise
        self._owed -= 1
        return answer

    def stop(self) -> None:
        self._end.close()  # the worker ends when its way is closed
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_workers: list[_Worker] = []


def _pool() -> list[_Worker]:
    if not _workers:
        cores = len(os.sched_getaffinity(0))
        _workers.extend(_Worker() for _ in range(min(cores, _MOST) - 1))
        atexit.register(stop_workers)
    return _workers


def stop_workers() -> None:
    """End all workers; the next large vector starts new ones."""
    while _workers:
        _workers.pop().stop()


def main() -> None:
    """A worker's life: a job, shares of it, and then to forget it."""
    way = connection.Connection(int(sys.argv[1]))
    job: Any = None
    with suppress(EOFError, OSError, KeyboardInterrupt):
        way.send_bytes(_READY)
        while True:
            message = way.recv()
            if not isinstance(message, list):
                job = message
                continue
            try:
                answer: Any = [job(n, item) for n, item in message]
            except Exception as error:
                answer = error
            way.send(answer)
            answer = None  # an exception's traceback holds the job
