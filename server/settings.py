"""What a coordinator's service is told, and where things lie in its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from confide.protocol.manifest import Manifest
from confide.server.coordinator import Released

__all__ = ["AT_ONCE", "LOGS", "MOST_AT_ONCE", "RESULT", "RUNS", "STORE", "ServiceConfig", "run_store"]

#: Names in the federation's folder; in a run's, what is written last.
RUNS, LOGS, STORE = "runs", "coordinator.db", "runs.db"
RESULT = "result.json"
#: Runs under way at once: what is usual, and the most. Each holds one sum and one payload in memory.
AT_ONCE, MOST_AT_ONCE = 4, 16


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """The service.

    Args:
        folder: The federation's.
        store: The run store's URL.
        finish: Writes the released model into a run's folder.
        host: Address to bind; None: the endpoint's own host. The port is the endpoint's.
        at_once: How many runs may be under way at once; more wait.
        wait_for_all: Seconds that a run waits for all its sites; then the smallest cohort is enough to begin.
        timeout: Seconds to wait for the replies of a step, where the run's manifest does not say.
        tell: Called with each event of note, for the operator; by one thread at a time.
    """

    folder: Path
    store: str
    finish: Callable[[Path, Manifest, Released], None]
    host: str | None = None
    at_once: int = AT_ONCE
    wait_for_all: float = 60.0
    timeout: float = 3600.0
    tell: Callable[[str], None] = lambda _: None


def run_store(folder: Path, url: str | None = None) -> str:
    """The URL of a federation's run store."""
    return url or f"sqlite:///{(folder / STORE).absolute()}"
