"""Watches a simulated run through the one door by which records are read, round by round."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from confide.clients.data.records import Batch, SiteRecords
from confide.clients.training.trainer import LocalTrainer
from confide.privacy.dp.events import event_from_json
from confide.simulations.world import World

TrainCall = Callable[[], NDArray[np.float64]]


@dataclass(frozen=True)
class Reading:
    """Whose records were read, in which round, for what: `train`, `metric`, or `exact` (public data only)."""

    round: int
    purpose: str
    site: str
    attempt: int
    persons: frozenset[str]


@dataclass
class Watch:
    """What was seen so far. `on_train(watch, site, call)` may act around a site's training."""

    readings: list[Reading] = field(default_factory=list)
    on_read: Callable[[Watch, str], None] = lambda _watch, _site: None
    on_train: Callable[[Watch, str, TrainCall], NDArray[np.float64]] = lambda _watch, _site, call: call()
    on_round: Callable[[Watch], None] = lambda _watch: None
    round: int = 0
    purpose: str = "exact"
    attempts: dict[tuple[int, str], int] = field(default_factory=dict)
    world: World | None = None

    def of(self, purpose: str | None = None, *, rounds: range = range(100), site: str | None = None) -> set[str]:
        """Everybody whose records were read so."""
        return {
            person
            for r in self.readings
            if purpose in (None, r.purpose) and r.round in rounds and site in (None, r.site)
            for person in r.persons
        }

    def site_of(self, records: SiteRecords) -> str:
        assert self.world is not None
        return next(name for name, site in self.world.sites.items() if site.records is records)


def watch_runs(patch: pytest.MonkeyPatch, watch: Watch) -> Watch:
    """Have the watch see every run from here on, until the patch is undone."""
    gather, train, metric_sum = SiteRecords.gather, LocalTrainer.train, LocalTrainer.metric_sum
    before_round = World.before_round

    def seen_gather(self: SiteRecords, units: NDArray[np.int64]) -> Batch:
        site = watch.site_of(self)
        watch.on_read(watch, site)
        persons = frozenset(self.persons[self.person_of[u]] for u in units)
        attempt = watch.attempts.get((watch.round, site), 0)
        watch.readings.append(Reading(watch.round, watch.purpose, site, attempt, persons))
        return gather(self, units)

    def during(purpose: str, call: Callable[[], Any]) -> Any:
        watch.purpose = purpose
        try:
            return call()
        finally:
            watch.purpose = "exact"

    def seen_train(self: LocalTrainer, weights: Any, eligible: Any) -> Any:
        site = watch.site_of(self._records)
        key = (watch.round, site)
        watch.attempts[key] = watch.attempts.get(key, 0) + 1
        return watch.on_train(watch, site, lambda: during("train", lambda: train(self, weights, eligible)))

    def seen_before_round(self: World, round_: int) -> None:
        watch.world, watch.round = self, round_
        before_round(self, round_)
        watch.on_round(watch)

    patch.setattr(SiteRecords, "gather", seen_gather)
    patch.setattr(LocalTrainer, "train", seen_train)
    patch.setattr(LocalTrainer, "metric_sum", lambda s, w, e: during("metric", lambda: metric_sum(s, w, e)))
    patch.setattr(World, "before_round", seen_before_round)
    return watch


def ledger_rows(ledgers: Path, site: str) -> list[tuple[str, str, int]]:
    """(charge without the run's name, kind, steps) in a site's ledger file, read by somebody else."""
    with closing(sqlite3.connect(f"file:{ledgers / site / 'ledger.db'}?mode=ro", uri=True)) as db:
        found = db.execute("SELECT charge, kind, event FROM entry ORDER BY seq").fetchall()
    return [(charge.partition("/")[2], kind, event_from_json(text).steps) for charge, kind, text in found]
