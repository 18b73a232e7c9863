"""The table, the consent file and the sites in them: everything read and checked before anything is written."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from confide.clients.data.preprocess import encoded_width, expand, require_columns
from confide.clients.data.records import SiteRecords
from confide.clients.data.source import read_table, resolve
from confide.clients.training.admission import admit_model
from confide.clients.training.models import build_model
from confide.config import Experiment, SchemaConfig
from confide.errors import ConfigError, DataError
from confide.privacy.consent import ImportedEvent
from confide.privacy.consent.imports import check_file, load_mapping, read_checked
from confide.simulations.partitions import split
from confide.simulations.scenario import in_scenario

__all__ = ["EXAMPLE", "Sources", "builtin_example", "experiment_file", "load_sources"]

#: What an experiment's name begins with where it is one of the package's own.
EXAMPLE = "example:"


def builtin_example(name: str = "rand_health") -> Path:
    """An experiment file that ships with the package.

    Raises:
        ConfigError: There is none of this name.
    """
    folder = Path(str(importlib.resources.files("confide.simulations.examples")))
    known = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in known:
        raise ConfigError("is no built-in example", where=f"{EXAMPLE}{name}", hint=f"there are {', '.join(known)}")
    return folder / f"{name}.toml"


def experiment_file(source: str | Path) -> Path:
    """The file that a user names: `example:NAME` for one that ships with the package, or a path."""
    name = str(source)
    return builtin_example(name.removeprefix(EXAMPLE)) if name.startswith(EXAMPLE) else Path(source)


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
    keys = data.keys
    table, where = read_table(path, text=keys), path.name
    require_columns(table, [*keys, data.label.column], where)
    schema = expand(experiment.schema_, list(table.columns), [*keys, data.label.column])
    learned = schema.unknown_bounds
    if bounds is not None:
        schema = schema.with_bounds({name: bounds(name) for name in learned})
    if data.label.column in schema.features:
        raise ConfigError("is a feature and the label", where=f"schema.features.{data.label.column}",
                          hint="leave it out of the features: a model would only copy it")  # fmt: skip
    inputs, outputs = encoded_width(schema), data.label.outputs
    admit_model(build_model(experiment.model, inputs, outputs), inputs, outputs)
    names, part_of = split(table, experiment, where)
    found = SiteRecords.split(
        table, part_of, len(names), schema=schema, label=data.label, subject=data.subject,
        unit=experiment.privacy.unit, where=where,
    )  # fmt: skip
    records = in_scenario(dict(zip(names, found, strict=True)), experiment, schema)
    consent = _consent(experiment, base)
    return Sources(experiment, schema, records, _populations(experiment, records), consent, learned)


def _consent(experiment: Experiment, base: Path) -> list[ImportedEvent] | None:
    """What the consent file says; None where consent is simulated."""
    asked = experiment.consent
    if asked.file is None:
        return None
    mapping = load_mapping(base / asked.mapping) if asked.mapping is not None else None
    return list(read_checked(check_file(base / asked.file, mapping=mapping, name=asked.format)))


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
            where = f"column {experiment.data.site!r}" if experiment.partition.kind == "natural" else "[partition]"
            raise DataError(f"site {name!r} has no records", where=where,
                            hint="drop it from sites.population, or check data.site")  # fmt: skip
    return found
