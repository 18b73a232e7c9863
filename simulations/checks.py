"""What `confide data check` finds. For the holder of the data, on the holder's screen: exact, and never sent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from confide.clients.data.preprocess import canonical_value
from confide.clients.data.source import read_table, resolve
from confide.config import NumberFeature, load_experiment
from confide.simulations.sources import EXAMPLE, experiment_file, load_sources

__all__ = ["EXAMPLE", "check_experiment", "describe_table"]

_FEW = 12


def check_experiment(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read everything a run would read.

    Raises:
        ConfideError: What a run would refuse outright, with the row and column.
    """
    path = experiment_file(path)
    experiment = load_experiment(path, overrides)
    base = path.resolve().parent
    sources = load_sources(experiment, base)
    file = resolve(experiment.data.file, base)
    table = read_table(file, text=experiment.data.keys)
    refusals, sites = [], []
    for name, records in sources.records.items():
        small = len(records.persons) < experiment.sites.min_subjects
        if small:
            refusals.append(f"site {name}: fewer than sites.min_subjects = {experiment.sites.min_subjects} subjects")
        sites.append({
            "site": name, "subjects": len(records.persons), "records": records.size,
            "population": sources.population[name],
            "remark": "below min_subjects" if small else "",
        })  # fmt: skip
    if len(sites) < experiment.sites.min_sites:
        refusals.append(f"{len(sites)} sites, fewer than sites.min_sites = {experiment.sites.min_sites}")
    features = []
    for name, feature in sources.schema.features.items():
        column = table[name]
        if isinstance(feature, NumberFeature):
            values = pd.to_numeric(column, errors="coerce")
            if feature.bounds is None:
                outside, text = 0, "to be learned"
            else:
                low, high = feature.bounds
                outside, text = int(((values < low) | (values > high)).sum()), f"[{low:g}, {high:g}]"
        else:
            known = {canonical_value(v) for v in feature.values}
            outside = int((~column.dropna().map(canonical_value).isin(known)).sum())
            text = ", ".join(map(str, feature.values[:_FEW])) + ("…" if len(feature.values) > _FEW else "")
        features.append({
            "name": name, "kind": feature.kind, "range": text, "missing": int(column.isna().sum()), "outside": outside,
        })  # fmt: skip
    return {
        "file": str(file),
        "rows": len(table),
        "subjects": sum(s["subjects"] for s in sites),
        "label": experiment.data.label.column,
        "task": experiment.data.label.task,
        "inputs": next(iter(sources.records.values())).inputs,
        "features": features,
        "sites": sites,
        "refusals": refusals,
    }


def describe_table(path: Path) -> dict[str, Any]:
    """Columns of a table, with a schema line to start from.

    Raises:
        DataError: It cannot be read.
    """
    table = read_table(path)
    columns = []
    for name in table.columns:
        column = table[name]
        distinct = int(column.nunique())
        columns.append({
            "name": name, "type": str(column.dtype), "missing": int(column.isna().sum()), "distinct": distinct,
            "suggestion": _suggest(column, distinct),
        })  # fmt: skip
    return {"file": str(path), "rows": len(table), "columns": columns}


def _suggest(column: pd.Series[Any], distinct: int) -> str:
    if distinct <= _FEW and distinct > 0:
        values = sorted(column.dropna().unique().tolist(), key=str)
        shown = ", ".join(
            json.dumps(v, ensure_ascii=False) if isinstance(v, str) else canonical_value(v) for v in values
        )
        return f'{{ kind = "category", values = [{shown}] }}'
    if pd.api.types.is_numeric_dtype(column) and distinct:
        return f'{{ kind = "number", bounds = [{column.min():g}, {column.max():g}] }}'
    return "an identifier, a date or free text: leave it out"
