"""Which person lies at which site: by a column of the table, or dealt out to made-up sites.

Invariants:
1. A person's records stay together, at one site: it is there that her loss is accounted. Only where `overlap` says so
   do records of so many people lie at several sites, never at more than `privacy.max_sites_per_subject`, by which her
   loss is composed. A table that says otherwise is refused.
2. Every record lies at one site.
3. The same seed, table and options give the same sites, whatever else is in the experiment.

A person's class is that of her first record; a number is cut into ten equally frequent classes. These are choices about
a simulated world, made from its table: nothing of them is in any message.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from confide.clients.data.preprocess import labels
from confide.config import Experiment, PartitionConfig
from confide.errors import ConfigError, DataError
from confide.privacy.consent import canonical_subject

__all__ = ["split"]

Ints = NDArray[np.int64]
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
_CLASSES_OF_NUMBERS, _TRIES = 10, 1000


def split(table: pd.DataFrame, experiment: Experiment, where: str) -> tuple[list[str], Ints]:
    """The sites' names in order, and the place among them of each row's; int64 [rows].

    Args:
        table: With the subject's column, and, where the partition is natural, the site's.
        experiment: What is asked.
        where: The table's name, for errors.

    Raises:
        DataError: A site is missing or cannot be a name, or people lie at more sites than declared.
        ConfigError: So many sites of at least `min_subjects` people, or so large an overlap, cannot be made.
    """
    if experiment.partition.kind == "natural":
        return _natural(table, experiment, where)
    return _dealt(table, experiment, where)


def _natural(table: pd.DataFrame, experiment: Experiment, where: str) -> tuple[list[str], Ints]:
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
    _as_declared(homes, names, experiment, where)
    return names, part_of


def _as_declared(homes: pd.DataFrame, names: list[str], experiment: Experiment, where: str) -> None:
    """Do people lie at no more sites than the experiment says? `homes` has a row a person and site of hers.

    How many do is said of no data but public ones: it is a number of persons.
    """
    overlap, most = experiment.partition.overlap, experiment.privacy.max_sites_per_subject
    found = homes.groupby("person")["site"].size()
    if overlap == 0 and (found > 1).any():
        twice = homes[homes["person"] == found.index[found > 1][0]]["site"]
        raise DataError(
            f"one subject has records at sites {names[twice.iloc[0]]} and {names[twice.iloc[1]]}", where=where,
            hint="each person's loss is accounted at one site: give the person one site, or declare the share of such "
            "people with partition.overlap, and ε is composed over her sites",
        )  # fmt: skip
    if (found > most).any():
        raise DataError(f"one subject has records at more than {most} sites", where=where,
                        hint="raise privacy.max_sites_per_subject: ε is composed over so many")  # fmt: skip
    several = int((found > 1).sum())
    if several > overlap * len(found):
        share = f" ({several:,} of {len(found):,})" if experiment.data.public else ""
        raise DataError(f"more people have records at several sites than partition.overlap = {overlap:g} says{share}",
                        where=where, hint="raise partition.overlap, or give people one site")  # fmt: skip


def _dealt(table: pd.DataFrame, experiment: Experiment, where: str) -> tuple[list[str], Ints]:
    partition = experiment.partition
    subject = table[experiment.data.subject]
    if subject.isna().any():
        raise DataError("the subject is missing, so nobody's consent covers the row",
                        where=f"{where}, row {subject.isna().idxmax()}, column {subject.name!r}",
                        hint="leave such rows out of the table")  # fmt: skip
    codes, persons = pd.factorize(subject.map(canonical_subject), sort=True)
    if len(persons) < partition.sites * experiment.sites.min_subjects:
        raise ConfigError(
            f"{len(persons):,} people do not make {partition.sites:,} sites of at least "
            f"{experiment.sites.min_subjects}", where="partition.sites", hint="ask for fewer sites, or lower "
            "sites.min_subjects",
        )  # fmt: skip
    first = np.unique(codes, return_index=True)[1]
    classes = _classes(labels(table, experiment.data.label, where)[first], experiment.data.label.task)
    rng = np.random.default_rng(_seed(experiment.run.seed, partition))
    home = _enough(_DEALERS[partition.kind], classes, partition, experiment.sites.min_subjects, rng)
    width = max(2, len(str(partition.sites)))
    names = [f"site-{site + 1:0{width}d}" for site in range(partition.sites)]
    return names, _overlapping(codes.astype(np.int64), home, experiment)


def _overlapping(person: Ints, home: Ints, experiment: Experiment) -> Ints:
    """The site of each row, int64 [rows]: its person's home, but for the overlap's people, whose rows are dealt out to
    her home and others; each of her sites gets one at least, the home too.

    Args:
        person: Of each row.
        home: Of each person.
    """
    partition, part_of = experiment.partition, home[person]
    asked = round(partition.overlap * len(home))
    if asked == 0:
        return part_of
    able = np.flatnonzero(np.bincount(person, minlength=len(home)) > 1)
    if len(able) < asked:
        raise ConfigError(
            f"asks for {asked:,} people at several sites, and {len(able):,} have more than one record"
            if experiment.data.public else "asks for more people at several sites than have more than one record",
            where="partition.overlap", hint="lower it: a record lies at one site",
        )  # fmt: skip
    rng = np.random.default_rng(_seed(experiment.run.seed, partition, "overlap"))
    rows = np.argsort(person, kind="stable")
    starts = np.searchsorted(person[rows], np.arange(len(home) + 1))
    for one in rng.permutation(able)[:asked]:
        hers = rng.permutation(rows[starts[one] : starts[one + 1]])
        others = rng.permutation(np.delete(np.arange(partition.sites), home[one]))
        several = min(len(hers), experiment.privacy.max_sites_per_subject, partition.sites)
        part_of[hers] = np.resize(np.concatenate([home[one : one + 1], others[: several - 1]]), len(hers))
    return part_of


def _classes(y: NDArray[np.float32], task: str) -> Ints:
    if task != "regression":
        return y.astype(np.int64)
    ranks = np.argsort(np.argsort(y, kind="stable"), kind="stable")
    return ranks.astype(np.int64) * _CLASSES_OF_NUMBERS // len(y)


def _seed(seed: int, partition: PartitionConfig, *what: str) -> int:
    text = "/".join(("confide/partition", partition.kind, *what, str(seed)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _enough(
    deal: Callable[[Ints, PartitionConfig, np.random.Generator], Ints],
    classes: Ints,
    partition: PartitionConfig,
    fewest: int,
    rng: np.random.Generator,
) -> Ints:
    """The first deal that gives every site enough people, as is customary with Dirichlet's."""
    for _ in range(_TRIES):
        home = deal(classes, partition, rng)
        if np.bincount(home, minlength=partition.sites).min() >= fewest:
            return home
    raise ConfigError(
        f"no {partition.kind} partition with at least {fewest} people at every site was found in {_TRIES} tries",
        where="[partition]", hint="raise alpha, ask for fewer sites, or lower sites.min_subjects",
    )  # fmt: skip


def _deal_iid(classes: Ints, partition: PartitionConfig, rng: np.random.Generator) -> Ints:
    home = np.empty(len(classes), dtype=np.int64)
    home[rng.permutation(len(classes))] = np.arange(len(classes)) % partition.sites
    return home


def _deal_dirichlet(classes: Ints, partition: PartitionConfig, rng: np.random.Generator) -> Ints:
    home = np.empty(len(classes), dtype=np.int64)
    for label in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == label))
        home[members] = _shares(len(members), partition, rng)
    return home


def _deal_quantity(classes: Ints, partition: PartitionConfig, rng: np.random.Generator) -> Ints:
    home = np.empty(len(classes), dtype=np.int64)
    home[rng.permutation(len(classes))] = _shares(len(classes), partition, rng)
    return home


def _deal_shards(classes: Ints, partition: PartitionConfig, rng: np.random.Generator) -> Ints:
    # Shuffled within a class, so that a shard is not a run of the table.
    order = np.lexsort((rng.random(len(classes)), classes))
    owners = rng.permutation(np.repeat(np.arange(partition.sites), partition.shards_per_site))
    home = np.empty(len(classes), dtype=np.int64)
    for owner, shard in zip(owners, np.array_split(order, len(owners)), strict=True):
        home[shard] = owner
    return home


def _shares(people: int, partition: PartitionConfig, rng: np.random.Generator) -> Ints:
    """So many people in runs whose lengths are shared out by Dirichlet(alpha)."""
    ends = np.cumsum(rng.dirichlet(np.full(partition.sites, partition.alpha)))[:-1]
    return np.searchsorted(ends * people, np.arange(people), side="right").astype(np.int64)


_DEALERS = {"iid": _deal_iid, "dirichlet": _deal_dirichlet, "quantity": _deal_quantity, "shards": _deal_shards}
