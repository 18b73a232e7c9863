"""Kills `confide simulate`, with SIGKILL, when an action comes by for the n-th time. Run as a program by `test_resume`.

Each command runs in a process of its own, forked from one that has imported everything and made a run before: to start
an interpreter takes far longer than these runs do.

Jobs come as lines of JSON on stdin; how each process ended lies in its job's folder.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from confide.cli.main import main as confide
from confide.clients.run import SiteRun
from confide.server.journal import Journal
from confide.simulations import keeping, runner, simulate
from tests.forked import answer_jobs
from tests.support import experiment_tree, write_people

_OWNERS = {"Journal": Journal, "SiteRun": SiteRun, "Keeping": keeping.Keeping, "runner": runner}
#: Seconds after which a process that hangs is ended.
_PATIENCE = 180


def _kill_after(action: str, nth: int) -> None:
    """Have this process die as soon as an action was done for the n-th time."""
    owner, _, name = action.rpartition(".")
    real, count = getattr(_OWNERS[owner], name), 0

    def around(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        done = real(*args, **kwargs)
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(_OWNERS[owner], name, around)


def _job(job: dict[str, Any]) -> None:
    """Run the command up to the point; how that ended."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(_PATIENCE)
        _kill_after(job["at"], job["nth"])
        sys.argv = ["confide", *job["arguments"]]
        try:
            confide()
        except SystemExit as stop:
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
    _, status = os.waitpid(pid, 0)
    (Path(job["folder"]) / "ended").write_text(str(os.waitstatus_to_exitcode(status)))


def main(warm: Path, at_once: int) -> None:
    """Answer each line of jobs with a line of their exit codes."""
    torch.set_num_threads(1)
    warm.mkdir(parents=True)
    simulate(experiment_tree(str(write_people(warm))), out=warm / "out")  # what is slow for the first time is done once
    answer_jobs(_job, at_once, 2 * _PATIENCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
