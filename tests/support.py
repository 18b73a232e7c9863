"""A small federation for tests: four sites, a few dozen people each, a table that a model can learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SITES = ("ash", "birch", "cedar", "doum")


def people_table(sites: tuple[str, ...] = SITES, people: int = 40, seed: int = 0) -> pd.DataFrame:
    """One to three records a person; `sick` depends on `age` and `smoker`."""
    rng = np.random.default_rng(seed)
    rows = []
    for site in sites:
        for i in range(people):
            age, smoker = rng.uniform(0, 100), int(rng.random() < 0.4)
            for _ in range(int(rng.integers(1, 4))):
                score = (age - 50) / 15 + 2 * smoker - 1 + rng.normal()
                rows.append(
                    {
                        "person": f"{site}-{i}",
                        "clinic": site,
                        "age": round(age, 2),
                        "smoker": smoker,
                        "sick": int(score > 0),
                        "cost": round(float(np.clip(50 + 10 * score, 0, 100)), 2),
                        "ward": ["north", "east", "south"][int(np.clip(score + 1, 0, 2))],
                    }
                )
    return pd.DataFrame(rows)


def experiment_tree(file: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A complete experiment over `people_table`; `sections` are merged over it key by key."""
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "purpose": "research/test", "rounds": 3, "seed": 1, "report_metrics_every": 2},
        "data": {
            "file": file,
            "subject": "person",
            "site": "clinic",
            "label": {"column": "sick", "classes": [0, 1]},
            "public": True,
            "held_out": 0.25,
        },
        "schema": {
            "features": {
                "age": {"kind": "number", "bounds": [0, 100]},
                "smoker": {"kind": "category", "values": [0, 1]},
            }
        },
        "sites": {"min_sites": 3, "min_subjects": 10, "population": {"default": 40}},
        "consent": {"simulate": {"fraction": 0.9}},
        "model": {"kind": "logistic"},
        "training": {"local_steps": 4, "learning_rate": 0.5},
        "privacy": {"epsilon": 4.0, "sample_rate": 0.3, "site_epsilon_limit": 8.0},
        "sealing": {"profile": "open"},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def write_people(folder: Path, name: str = "people.csv", **kwargs: Any) -> Path:
    """The table as a file."""
    path = folder / name
    table = people_table(**kwargs)
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path
