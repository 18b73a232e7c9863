"""The table, the consent file and the sites in them: everything read and checked before anything is written."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from confide.clients.data.preprocess import encoded_width, expand, require_columns
from confide.clients.data.records import SiteRecords
from confide.clients.data.source import read_table, resolve
from confide.clients.training.admission import admit_model
from confide.clients.training.models import build_model
from confide.config import Experiment, SchemaConfig
from confide.errors import ConfigError, DataError
from confide.privacy.consent import (
    ImportedEvent,
    canonical_subject,
    read_csv,
)

__all__ = ["Sources", "builtin_example", "load_sources"]

_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")


def builtin_example(name: str = "rand_health") -> Path:
    """An experiment file that ships with the package."""
    return Path(str(importlib.resources.files("confide.simulations.examples") / f"{name}.toml"))


@dataclass(frozen=True, slots=True)
class Sources:
    """Everything read and checked before anything is written."""

    experiment: Experiment
    schema: SchemaConfig
    records: Mapping[str, SiteRecords]
    population: Mapping[str, int]
    consent: list[ImportedEvent] | None
    #: Numbers whose bounds are learned, whether or not they are known by now.
    learned: tuple[str, ...] = ()


def load_sources(
    experiment: Experiment, base: Path, bounds: Callable[[str], tuple[float, float]] | None = None
) -> Sources:
    """Read the table and the consent file, encode, split by site.

    Args:
        experiment: What is asked.
        base: Folder that relative paths start from.
        bounds: The bounds of a number that the experiment wants learned; None where they are still to be.

    Raises:
        DataError: The table, a column or a value is not what the schema declares.
        ConsentError: The consent file is not unambiguous.
        ConfigError: A site has no declared population, or the model is not admitted.
    """
    data = experiment.data
    path = resolve(data.file, base)
    table, where = read_table(path, text=(data.subject, data.site)), path.name
    require_columns(table, [data.subject, data.site, data.label.column], where)
    schema = expand(experiment.schema_, list(table.columns), [data.subject, data.site, data.label.column])
    learned = schema.unknown_bounds
    if bounds is not None:
        schema = schema.with_bounds({name: bounds(name) for name in learned})
    if data.label.column in schema.features:
        raise ConfigError("is a feature and the label", where=f"schema.features.{data.label.column}",
                          hint="leave it out of the features: a model would only copy it")  # fmt: skip
    inputs, outputs = encoded_width(schema), data.label.outputs
    admit_model(build_model(experiment.model, inputs, outputs), inputs, outputs)
    names, part_of = _split(table, experiment, where)
    found = SiteRecords.split(
        table, part_of, len(names), schema=schema, label=data.label, subject=data.subject,
        unit=experiment.privacy.unit, where=where,
    )  # fmt: skip
    records = dict(zip(names, found, strict=True))
    consent = read_csv(base / experiment.consent.file) if experiment.consent.file is not None else None
    return Sources(experiment, schema, records, _populations(experiment, records), consent, learned)


def _split(table: pd.DataFrame, experiment: Experiment, where: str) -> tuple[list[str], NDArray[np.int64]]:
    """The sites' names in order, and the place among them of each row's."""
    column = table[experiment.data.site]
    if column.isna().any():
        raise DataError("the site is missing", where=f"{where}, row {column.isna().idxmax()}, column {column.name!r}",
                        hint="every record belongs to a site")  # fmt: skip
    codes, uniques = pd.factorize(column.map(canonical_subject), sort=True)
    names, part_of = [str(name) for name in uniques], codes.astype(np.int64)
    for name in names:
        if not _SITE_NAME.fullmatch(name):
            raise DataError(f"{name[:80]!r} cannot be a site's name", where=f"{where}, column {column.name!r}",
                            hint="use letters, digits, spaces, dots, dashes; at most 64")  # fmt: skip
    subjects = table[experiment.data.subject]
    homes = pd.DataFrame({"site": part_of, "person": subjects.where(subjects.isna(), subjects.map(canonical_subject))})
    homes = homes.dropna().drop_duplicates().sort_values("site", kind="stable")
    twice = homes[homes["person"].duplicated()]
    if len(twice):
        first = homes[homes["person"] == twice["person"].iloc[0]]["site"]
        raise DataError(
            f"one subject has records at sites {names[first.iloc[0]]} and {names[first.iloc[1]]}",
            where=where,
            hint="each person's loss is accounted at one site; give the person one site",
        )
    return names, part_of


def _populations(experiment: Experiment, parts: Mapping[str, object]) -> dict[str, int]:
    found = {}
    for name in parts:
        population = experiment.sites.population_of(name)
        if population is None:
            raise ConfigError(
                f"names neither site {name!r} nor a default",
                where="sites.population",
                hint="declare each site's population: a public constant, never a count of the data",
            )
        found[name] = population
    for name in experiment.sites.population:
        if name != "default" and name not in parts:
            raise DataError(f"site {name!r} has no records", where=f"column {experiment.data.site!r}",
                            hint="drop it from sites.population, or check data.site")  # fmt: skip
    return found
