"""σ, q, the number of steps and the normaliser of a run never depend on what is left of anybody's budget.

Otherwise a remaining budget, which depends on persons, would show in public parameters; and a person's own filter holds
only because everything but her own participation is the same without her (`privacy/dp/personal.py`, invariant 2).
"""

from __future__ import annotations

import csv
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

import confide
from confide.clients.training.stacked import Chain
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role, SecureRandom, rdp_epsilon
from confide.protocol.manifest import Manifest
from tests.clients.watching import Watch, watch_runs
from tests.support import SITES, experiment_tree, write_people

LIMIT, DELTA, PEOPLE, HELD_OUT = 8.0, 1e-5, 40, 0.25
HISTORY = {
    role: PrivacyEvent(role=role, unit="subject", noise_multiplier=6.0, sample_rate=1.0, steps=30, max_grad_norm=1.0)
    for role in Role
}


@dataclass
class Seen:
    """What the sites computed with."""

    manifest: Manifest
    #: Per local step: σ, clip, expected batch size (the normaliser), rate of the draw.
    steps: list[tuple[float, float, float, float]] = field(default_factory=list)
    #: Per local step: how many could be drawn. Depends on persons; never leaves.
    eligible: list[int] = field(default_factory=list)
    charges: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def schedule(self) -> dict[str, Any]:
        """All that must be the same."""
        m = self.manifest
        return {
            "noise_multiplier": m.noise_multiplier, "metrics_noise_multiplier": m.metrics_noise_multiplier,
            "sample_rate": m.privacy.sample_rate, "max_grad_norm": m.privacy.max_grad_norm, "rounds": m.rounds,
            "metric_rounds": m.metric_rounds, "local_steps": m.training.local_steps,
            "populations": {s.site: s.population for s in m.members}, "all_charges": m.all_charges(),
            "steps": self.steps, "charges": self.charges,
        }  # fmt: skip


def half_used(ledgers: Path) -> None:
    """Every site's ledger, charged with an earlier history that nobody is noted for: it counts for everybody."""
    for site in SITES:
        (ledgers / site).mkdir(parents=True)
        with closing(
            Ledger(ledgers / site / "ledger.db", RenyiBudget.for_limit(LIMIT, DELTA), "subject", HELD_OUT)
        ) as ledger:
            for role, event in HISTORY.items():
                ledger.reserve(f"earlier/1/{role.value}", event)
            assert 0.3 < ledger.used() < 0.6


def write_consents(path: Path, limits: bool) -> None:
    """Everybody gave; with limits, a quarter has none and the others' end before, during or just after the run."""
    spent = rdp_epsilon([HISTORY[Role.TRAIN]], DELTA)
    own = ["", 0.999 * spent, 1.12 * spent, 1.3 * spent] if limits else [""] * 4
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["event_id", "subject", "purpose", "type", "effective_at", "max_epsilon"])
        for site in SITES:
            for i in range(PEOPLE):
                row = [f"{site}-{i}/given", f"{site}-{i}", "research/test", "given", "2023-01-01T00:00Z", own[i % 4]]
                out.writerow(row)


def run(folder: Path, *, used: bool, limits: bool) -> Seen:
    """The same experiment; only what is left of budgets differs."""
    folder.mkdir()
    if used:
        half_used(folder / "ledgers")
    write_consents(folder / "consents.csv", limits)
    tree = experiment_tree(
        str(write_people(folder, people=PEOPLE)), run={"rounds": 4}, sites={"min_subjects": 3},
        data={"held_out": HELD_OUT}, privacy={"epsilon": 3.0, "site_epsilon_limit": LIMIT},
    )  # fmt: skip
    tree["consent"] = {"file": str(folder / "consents.csv")}
    watch, optimizers, draws = Watch(), list[DPOptimizer](), list[tuple[float, int]]()
    step, draw = DPOptimizer.step, SecureRandom.poisson_sample

    def seen_step(self: DPOptimizer, *args: Any) -> Any:
        optimizers.append(self)
        return step(self, *args)

    def seen_draw(self: SecureRandom, eligible: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
        draws.append((rate, len(eligible)))
        return draw(self, eligible, rate)

    with pytest.MonkeyPatch.context() as patch:
        watch_runs(patch, watch)
        patch.setattr(Chain, "of", lambda _: None)  # as any model but a chain is trained
        patch.setattr(DPOptimizer, "step", seen_step)
        patch.setattr(SecureRandom, "poisson_sample", seen_draw)
        confide.simulate(tree, out=folder / "out", ledger=folder / "ledgers")
    assert watch.world is not None
    seen = Seen(watch.world.manifest)
    assert len(optimizers) == len(draws)
    for optimizer, (rate, eligible) in zip(optimizers, draws, strict=True):
        o = optimizer
        seen.steps.append((o.noise_multiplier, o.max_grad_norm, o.expected_batch_size, rate))
        seen.eligible.append(eligible)
    for site in SITES:
        with closing(sqlite3.connect(folder / "ledgers" / site / "ledger.db")) as db:
            rows = db.execute(
                "SELECT charge, event FROM entry WHERE charge NOT LIKE 'earlier/%' ORDER BY seq"
            ).fetchall()
        seen.charges[site] = [(charge.partition("/")[2], event) for charge, event in rows]
    return seen


def test_the_schedule_is_the_same_whatever_is_left_of_the_sites_or_anybodys_budget(tmp_path: Path) -> None:
    fresh = run(tmp_path / "fresh", used=False, limits=False)
    used = run(tmp_path / "used", used=True, limits=False)
    limited = run(tmp_path / "limited", used=True, limits=True)
    assert used.schedule() == fresh.schedule()
    assert limited.schedule() == fresh.schedule()
    manifest = fresh.manifest
    assert len(fresh.steps) == len(SITES) * manifest.rounds * manifest.training.local_steps > 0
    normaliser = manifest.privacy.sample_rate * PEOPLE
    assert set(fresh.steps) == {(manifest.noise_multiplier, 1.0, normaliser, manifest.privacy.sample_rate)}
    # The control: the budgets did bite, at the start and again on the way, where they may: in who is drawn from.
    per_round = [sum(part) for part in np.array_split(limited.eligible, manifest.rounds)]
    assert used.eligible == fresh.eligible
    assert sum(limited.eligible) < 0.8 * sum(fresh.eligible)
    assert per_round[-1] < per_round[0]
    assert min(limited.eligible) > 0
