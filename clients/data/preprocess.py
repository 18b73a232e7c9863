"""From raw columns to numbers, using public bounds and vocabularies only: declared, or bought from the ledger as noised
statistics (`confide.privacy.dp.statistics`); never a statistic of the data as they are.

Values outside the bounds are clipped and categories outside the vocabulary get no hot column, so that no single
value can stop a run. What cannot be *read* as its declared kind is refused, once, before joining.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import is_bool_dtype, is_numeric_dtype, is_object_dtype, is_string_dtype

from confide.config import CategoryFeature, LabelConfig, NumberFeature, SchemaConfig
from confide.config.experiment import canonical_value as _canonical
from confide.errors import DataError

__all__ = ["canonical_value", "encoded_width", "expand", "features", "labels", "require_columns", "unscaled_columns"]

Floats = NDArray[np.float32]


def canonical_value(value: Any) -> str:
    """One spelling for a category, also where pandas hands out numpy's scalars."""
    return _canonical(value.item() if isinstance(value, np.generic) else value)


def require_columns(table: pd.DataFrame, names: Sequence[str], where: str) -> None:
    """All of these columns exist.

    Raises:
        DataError: One does not; names the nearest that does.
    """
    for name in names:
        if name not in table.columns:
            near = difflib.get_close_matches(name, list(table.columns), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"columns there: {', '.join(list(table.columns)[:20])}"
            raise DataError(f"there is no column {name!r}", where=where, hint=hint)


def expand(schema: SchemaConfig, columns: Sequence[str], keys: Sequence[str]) -> SchemaConfig:
    """Replace patterns (`pixel*`) by the columns they match, in natural order, leaving out the key columns."""
    found: dict[str, NumberFeature | CategoryFeature] = {}
    for name, feature in schema.features.items():
        if name in columns or not any(c in name for c in "*?["):
            found[name] = feature
            continue
        matches = sorted((c for c in columns if fnmatch.fnmatchcase(c, name) and c not in keys), key=_natural)
        if not matches:
            raise DataError(f"no column matches {name!r}", where="schema.features", hint="mend the pattern")
        found.update({m: feature for m in matches if m not in schema.features})
    return schema.model_copy(update={"features": found})


def encoded_width(schema: SchemaConfig) -> int:
    """Number of model inputs."""
    return sum(1 if isinstance(f, NumberFeature) else len(f.values) for f in schema.features.values())


def unscaled_columns(schema: SchemaConfig) -> list[int]:
    """Which encoded columns hold numbers whose bounds are still to be learned, in the schema's order."""
    found, at = [], 0
    for feature in schema.features.values():
        if isinstance(feature, NumberFeature):
            found += [at] if feature.bounds is None else []
        at += 1 if isinstance(feature, NumberFeature) else len(feature.values)
    return found


def features(table: pd.DataFrame, schema: SchemaConfig, where: str) -> Floats:
    """Encoded features, float32 [rows, encoded_width].

    Raises:
        DataError: A column is missing, or a value is missing or unreadable (row and column named).

    A number whose bounds are still to be learned stays as it is, NaN where it is missing.
    """
    require_columns(table, list(schema.features), where)
    found, at = np.empty((len(table), encoded_width(schema)), dtype=np.float32), 0
    # Each block at once where it belongs: side by side in float64 they would take three times as much.
    for name, feature in schema.features.items():
        if isinstance(feature, NumberFeature):
            block = _number(table[name], feature, schema.missing, where)[:, None]
        else:
            block = _category(table[name], feature, schema.missing, where)
        found[:, at : at + block.shape[1]] = block
        at += block.shape[1]
    return found


def labels(table: pd.DataFrame, label: LabelConfig, where: str) -> Floats:
    """Labels, float32 [rows]: 0/1, class index, or the value scaled to [0, 1].

    Raises:
        DataError: A label is missing, unreadable, or outside its classes.
    """
    require_columns(table, [label.column], where)
    column = table[label.column]
    missing = column.isna()
    if missing.any():
        _refuse(column, missing, "the label is missing", where, "leave such rows out of the table")
    if label.classes is not None:
        codes = _codes(column, [canonical_value(v) for v in label.classes], where)
        if (codes < 0).any():
            _refuse(column, pd.Series(codes < 0, index=column.index), "the label is none of data.label.classes", where,
                    "add the class, or mend the row", show=True)  # fmt: skip
        return codes.astype(np.float32)
    values = _numeric(column, where)
    if label.at_least is not None:
        return (values >= label.at_least).astype(np.float32)
    low, high = label.bounds or (0.0, 1.0)
    return ((np.clip(values, low, high) - low) / (high - low)).astype(np.float32)


def _number(column: pd.Series[Any], feature: NumberFeature, missing: str, where: str) -> NDArray[np.float64]:
    values = _numeric(column, where)
    empty = np.isnan(values)
    if feature.bounds is None:  # for the statistics run only: nothing is trained on what is not scaled
        if empty.any() and feature.missing is None and missing == "refuse":
            _refuse_missing(column, where)
        return values
    low, high = feature.bounds
    if empty.any():
        if feature.missing is not None:
            values = np.where(empty, feature.missing, values)
        elif missing == "midpoint":
            values = np.where(empty, (low + high) / 2, values)
        else:
            _refuse_missing(column, where)
    return (np.clip(values, low, high) - low) / (high - low) * 2 - 1


def _category(column: pd.Series[Any], feature: CategoryFeature, missing: str, where: str) -> NDArray[np.float64]:
    empty = column.isna()
    if empty.any() and feature.missing is None and missing == "refuse":
        _refuse_missing(column, where)
    vocabulary = [canonical_value(v) for v in feature.values]
    codes = _codes(column, vocabulary, where)
    if feature.missing is not None and canonical_value(feature.missing) in vocabulary:
        codes = np.where(empty, vocabulary.index(canonical_value(feature.missing)), codes)
    return np.asarray(codes[:, None] == np.arange(len(vocabulary)), dtype=np.float64)


def _codes(column: pd.Series[Any], vocabulary: list[str], where: str) -> NDArray[np.int64]:
    """Index of each value in the vocabulary; −1 outside it or missing."""
    positions = {value: i for i, value in enumerate(vocabulary)}
    try:
        codes, uniques = pd.factorize(column)
    except TypeError:
        everywhere = pd.Series(True, index=column.index)
        _refuse(column, everywhere, "the value is a list", where, "leave the column out", show=True)
    lookup = np.array([positions.get(canonical_value(u), -1) for u in uniques] + [-1], dtype=np.int64)
    return lookup[codes]


def _numeric(column: pd.Series[Any], where: str) -> NDArray[np.float64]:
    if not (is_numeric_dtype(column) or is_bool_dtype(column) or is_string_dtype(column) or is_object_dtype(column)):
        _refuse(column, pd.Series(True, index=column.index), "the value is not a finite number", where,
                f"the column holds {column.dtype}: turn it into a number, or leave it out", show=True)  # fmt: skip
    values = pd.to_numeric(column, errors="coerce").astype("float64")
    unreadable = (values.isna() & column.notna()) | np.isinf(values)
    if unreadable.any():
        _refuse(column, unreadable, "the value is not a finite number", where, "mend the row, or declare a category",
                show=True)  # fmt: skip
    return np.asarray(values, dtype=np.float64)


def _refuse_missing(column: pd.Series[Any], where: str) -> None:
    _refuse(column, column.isna(), "the value is missing", where,
            'declare schema.missing = "midpoint", or a missing value for this feature')  # fmt: skip


def _refuse(
    column: pd.Series[Any], bad: pd.Series[bool], what: str, where: str, hint: str, *, show: bool = False
) -> None:
    position = int(np.argmax(np.asarray(bad)))
    got = f" (got {str(column.iloc[position])[:40]!r})" if show else ""
    row = column.index[position]
    raise DataError(f"{what}{got}", where=f"{where}, row {row}, column {column.name!r}", hint=hint)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]
