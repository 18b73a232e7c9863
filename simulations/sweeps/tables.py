"""A sweep as tidy tables, CSV and Parquet: `results.*` has a row a cell, `rounds.*` a row a cell and round.

Columns: `cell` and `setting` (cells that differ only in their seed share one), the axes by their full keys, then what
was measured. `exact.*` metrics are the simulator's own (public data only), `released.*` what a deployment would see.
ε = ∞ is `inf`; what is not known is empty.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from confide.privacy.files import write_atomically
from confide.simulations.sweeps.result import Cell, Sweep

__all__ = ["results_table", "rounds_table", "write_tables"]


def write_tables(sweep: Sweep) -> list[Path]:
    """Write both tables in both formats; returns their paths."""
    written = []
    for name, table in (("results", results_table(sweep)), ("rounds", rounds_table(sweep))):
        for suffix, data in ((".csv", table.to_csv(index=False).encode()), (".parquet", table.to_parquet(index=False))):
            write_atomically(sweep.out / f"{name}{suffix}", data)
            written.append(sweep.out / f"{name}{suffix}")
    return written


def results_table(sweep: Sweep) -> pd.DataFrame:
    """A row a finished cell; where all of them were charged together, with what they cost so."""
    rows, whole = [], {} if sweep.cost is None else {"epsilon_of_sweep": sweep.cost.epsilon}
    for head, cell in _heads(sweep):
        result = cell.result
        rows.append({
            **head, "run_id": result.run_id, "profile": result.profile, "unit": result.unit, "epsilon":
            result.epsilon.max, **whole, "delta": result.delta, "rounds": result.rounds, "rounds_abandoned":
            result.rounds_abandoned, **_metrics("exact", result.metrics), **_metrics("released",
            result.released_metrics), "bytes_per_parameter": result.bytes_per_parameter, "uplink_bytes":
            cell.uplink_bytes, "downlink_bytes": cell.downlink_bytes, "seconds": result.seconds,
            "folder": f"cells/{result.out.name}",
        })  # fmt: skip
    return _table(rows, sweep)


def rounds_table(sweep: Sweep) -> pd.DataFrame:
    """A row a finished cell and round, from round 0 (nothing trained yet) on."""
    rows = []
    for head, cell in _heads(sweep):
        path = cell.result.out / "rounds.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else ():
            tree = json.loads(line)
            rows.append({
                **head, "round": tree["round"], "epsilon": float(tree["epsilon"]), "abandoned": tree["abandoned"],
                **_metrics("exact", tree["metrics"]), **_metrics("released", tree["released_metrics"]),
            })  # fmt: skip
    return _table(rows, sweep)


def _heads(sweep: Sweep) -> list[tuple[dict[str, Any], Cell]]:
    return [
        ({"cell": cell.number, "setting": number, **cell.values}, cell)
        for cell, number in sorted(
            ((cell, number) for number, group in enumerate(sweep.groups, 1) for cell in group),
            key=lambda pair: pair[0].number,
        )
    ]


def _metrics(kind: str, found: Any) -> dict[str, float | None]:
    return {f"{kind}.{name}": value for name, value in (found or {}).items()}


def _table(rows: list[dict[str, Any]], sweep: Sweep) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    for key, values in sweep.axes.items():
        if key not in table:
            continue
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            whole = all(isinstance(v, int) for v in values)
            table[key] = table[key].astype("int64" if whole else "float64")
        elif not all(isinstance(v, bool) for v in values):  # a column has one type in Parquet
            table[key] = [v if isinstance(v, str) else json.dumps(v, default=str) for v in table[key]]
    measured = [c for c in table if str(c).startswith(("exact.", "released."))]
    return table.astype(dict.fromkeys(measured, "float64"))
