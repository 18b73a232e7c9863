"""What accuracy a person-level ε buys on RAND: confide against a pooled, non-private logistic regression.

Both sides see the same consenting persons and are scored on the same held-out persons, seed by seed. Exact metrics
are possible because the data are public; the ε of each cell holds for that cell alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from confide.config import load_experiment
from confide.simulations import simulate
from confide.simulations.sources import builtin_example, load_sources
from confide.simulations.world import World

EPSILONS = ("inf", "8", "4", "2", "1", "0.5")
SEEDS = (1, 2, 3, 4, 5)


def pooled_auc(overrides: list[str]) -> float:
    """AUC of a non-private logistic regression on the pooled records of the same consenting training persons."""
    path = builtin_example()
    sources = load_sources(load_experiment(path, overrides), path.parent)
    with tempfile.TemporaryDirectory() as scratch:
        world = World(sources, *(Path(scratch) / name for name in ("sites", "ledgers", "logs")))
        try:
            train = {n: s.participants(world.manifest).train for n, s in world.sites.items()}
            for round_ in range(1, world.manifest.rounds + 1):
                world.before_round(round_)
            held_out = {n: s.participants(world.manifest).held_out for n, s in world.sites.items()}
        finally:
            world.close()

    def gather(masks: dict[str, Any]) -> tuple[Any, Any]:
        batches = [sources.records[n].gather(sources.records[n].units_of(m)) for n, m in masks.items()]
        return np.concatenate([b.x.numpy() for b in batches]), np.concatenate([b.y.numpy() for b in batches])

    x, y = gather(train)
    held_x, held_y = gather(held_out)
    model = LogisticRegression(C=100.0, max_iter=5000).fit(x, y)
    return float(roc_auc_score(held_y, model.decision_function(held_x)))


def measure(profile: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """All cells; medians over seeds, and the median of the paired differences."""
    started = time.perf_counter()
    pooled = {seed: pooled_auc([f"run.seed={seed}", "sealing.profile=open"]) for seed in seeds}
    cells: dict[str, Any] = {}
    for epsilon in EPSILONS:
        aucs, seconds = {}, []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as scratch:
                result = simulate(
                    overrides=[f"privacy.epsilon={epsilon}", f"run.seed={seed}", f"sealing.profile={profile}"],
                    out=Path(scratch) / "out",
                )
            aucs[seed] = (result.metrics or {})["auc"]
            seconds.append(result.seconds)
            sys.stderr.write(f"epsilon {epsilon} seed {seed}: auc {aucs[seed]:.4f}, pooled {pooled[seed]:.4f}\n")
        cells[epsilon] = {
            "auc_median": round(statistics.median(aucs.values()), 4),
            "auc_all": [round(a, 4) for a in aucs.values()],
            "pooled_minus_confide_median": round(statistics.median(pooled[s] - aucs[s] for s in seeds), 4),
            "seconds_median": round(statistics.median(seconds), 1),
        }
    return {
        "data": "RAND HIE, six sites, 85 % consenting",
        "profile": profile,
        "seeds": len(seeds),
        "pooled_auc_median": round(statistics.median(pooled.values()), 4),
        "epsilon": cells,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--profile", default="sealed")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.profile, SEEDS[: arguments.seeds])))


if __name__ == "__main__":
    main()
