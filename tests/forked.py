"""What programs have in common that kill processes: jobs that are forked from one that is warm, and functions that are
wrapped from outside."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have `around(the real one, *arguments)` stand in for a function, in this process."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(real, *args, **kwargs))


def answer_jobs(act: Callable[[Job], None], at_once: int, patience: int) -> None:
    """Answer each line of jobs on stdin with a line of their exit codes.

    Args:
        act: Does one job, in a process of its own; what it says goes to `errors.txt` in the job's new `folder`.
        at_once: As many jobs run side by side.
        patience: Seconds after which a job that hangs is ended.
    """
    gc.collect()
    gc.freeze()  # what is there already need not be looked at, and so not be copied, in every fork
    for line in sys.stdin:
        jobs, running, codes = json.loads(line), dict[int, int](), dict[int, int]()
        for number, job in enumerate(jobs):
            while len(running) >= at_once:
                pid, status = os.wait()
                codes[running.pop(pid)] = status
            running[_fork(act, job, patience)] = number
        while running:
            pid, status = os.wait()
            codes[running.pop(pid)] = status
        sys.stdout.write(json.dumps([codes[i] for i in range(len(jobs))]) + "\n")
        sys.stdout.flush()


def _fork(act: Callable[[Job], None], job: Job, patience: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        folder = Path(job["folder"])
        folder.mkdir(parents=True)
        errors = os.open(folder / "errors.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        signal.alarm(patience)
        act(job)
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
