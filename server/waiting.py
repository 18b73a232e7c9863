"""Which run of the store is taken next.

Runs that were under way when an earlier process died come before those that wait, older ones before younger ones. A run
whose sites are not there is passed over: it holds nobody up, and takes nobody's place.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from confide.protocol.manifest import Manifest
from confide.server.runs import RunStore
from confide.server.settings import RESULT, RUNS

__all__ = ["Waiting"]


@dataclass(slots=True)
class _Asked:
    """For whom a run is, and since when it could have begun if they had been there."""

    sites: frozenset[str]
    min_sites: int
    since: float


class Waiting:
    """The runs of a service that nobody drives.

    Args:
        folder: The federation's.
        store: Where runs lie.
        wait_for_all: Seconds that a run waits for all its sites; then the smallest cohort is enough to begin.
    """

    def __init__(self, folder: Path, store: RunStore, wait_for_all: float) -> None:
        self._folder, self._store, self._wait_for_all = folder, store, wait_for_all
        self._asked: dict[str, _Asked] = {}

    def next(self, going: Collection[str], there: Collection[str], *, room: bool) -> str | None:
        """The run to take now; None: there is none.

        Args:
            going: Runs that are driven already.
            there: Sites that can be reached now.
            room: May another run begin? One that only has to be ended needs none.
        """
        runs = {run: status for run, status in self._store.runs().items() if run not in going}
        for run, status in runs.items():
            # Neither asks a site for anything more; one that is releasing already is no longer stopped.
            stops = status == "stopping" and not self._store.releasing(run)
            if stops or (status in ("finished", "stopped", "failed") and not self._ended(run)):
                return run
        if not room:
            return None
        begun = [run for run, status in runs.items() if status in ("running", "stopping")]
        waiting = [run for run, status in runs.items() if status == "waiting"]
        found = next((run for run in (*begun, *waiting) if self._can_begin(run, frozenset(there))), None)
        self._asked = {run: asked for run, asked in self._asked.items() if run in runs and run != found}
        return found

    def _can_begin(self, run: str, there: frozenset[str]) -> bool:
        """Are all of the run's sites there or, after a while, enough of them?"""
        if run not in self._asked:
            held = self._store.load(run)
            if held is None:
                return False
            manifest = Manifest.from_bytes(held[0])
            members = frozenset(m.site for m in manifest.members)
            self._asked[run] = _Asked(members, manifest.min_sites, time.monotonic())
        asked = self._asked[run]
        patient = time.monotonic() - asked.since < self._wait_for_all
        return asked.sites <= there or (len(asked.sites & there) >= asked.min_sites and not patient)

    def _ended(self, run: str) -> bool:
        return (self._folder / RUNS / run / RESULT).is_file()
