"""Who lies where: every kind of partition, over random tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.config import Experiment, load_experiment
from confide.errors import ConfigError, DataError
from confide.simulations import partitions
from tests.support import experiment_tree

KINDS = ["iid", "dirichlet", "quantity", "shards"]


WARD = {"column": "ward", "classes": [0, 1, 2, 3]}


def experiment(min_subjects: int = 1, seed: int = 1, label: dict[str, Any] = WARD, **partition: Any) -> Experiment:
    tree = experiment_tree(
        "people.csv", sites={"min_subjects": min_subjects, "population": {"default": 10_000}}, run={"seed": seed},
        partition=partition,
    )  # fmt: skip
    tree["data"] |= {"label": label}
    del tree["data"]["site"]
    return load_experiment(tree)


def people(count: int, seed: int = 0, classes: int = 4) -> pd.DataFrame:
    """One to three rows a person, shuffled."""
    rng = np.random.default_rng(seed)
    person = rng.permutation(np.repeat(np.arange(count), rng.integers(1, 4, count)))
    ward = rng.integers(0, classes, count)
    return pd.DataFrame({
        "person": [f"p{i}" for i in person], "age": rng.uniform(0, 100, len(person)),
        "smoker": rng.integers(0, 2, len(person)), "ward": ward[person], "cost": ward[person] + rng.random(len(person)),
    })  # fmt: skip


def split(table: pd.DataFrame, asked: Experiment, where: str) -> dict[str, pd.DataFrame]:
    names, part_of = partitions.split(table, asked, where)
    return {name: table[part_of == place] for place, name in enumerate(names)}


def sizes(parts: dict[str, pd.DataFrame]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([part["person"].nunique() for part in parts.values()])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), count=st.integers(40, 150), sites=st.integers(3, 6), seed=st.integers(0, 50),
    alpha=st.floats(0.3, 100), shards=st.integers(1, 3),
)  # fmt: skip
def test_every_record_lies_at_one_site_and_a_persons_together(
    kind: str, count: int, sites: int, seed: int, alpha: float, shards: int
) -> None:
    table = people(count, seed)
    asked = experiment(seed=seed, kind=kind, sites=sites, alpha=alpha, shards_per_site=shards)
    parts = split(table, asked, "people.csv")
    assert list(parts) == [f"site-{i:02d}" for i in range(1, sites + 1)]
    rows = np.concatenate([part.index.to_numpy() for part in parts.values()])
    assert sorted(rows) == sorted(table.index)
    homes = [set(part["person"]) for part in parts.values()]
    assert sum(map(len, homes)) == len(set().union(*homes)) == count
    assert sizes(parts).min() >= 1
    again = split(table, asked, "people.csv")
    assert all(again[name].equals(part) for name, part in parts.items())


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_deals_others_and_the_order_of_rows_does_not_matter(kind: str) -> None:
    table = people(200)
    one, other = (split(table, experiment(kind=kind, sites=4, seed=s), "t") for s in (1, 2))
    assert set(one["site-01"]["person"]) != set(other["site-01"]["person"])
    sorted_first = table.sort_values("person", kind="stable")
    assert set(split(sorted_first, experiment(kind=kind, sites=4), "t")["site-01"]["person"]) == set(
        one["site-01"]["person"]
    )


def test_iid_is_even() -> None:
    parts = split(people(203), experiment(kind="iid", sites=5), "t")
    assert sorted(sizes(parts)) == [40, 40, 41, 41, 41]


def _skew(parts: dict[str, pd.DataFrame]) -> float:
    """Mean distance of a site's shares of the classes from everybody's."""
    everybody = pd.concat(parts.values()).drop_duplicates("person")["ward"].value_counts(normalize=True)
    shares = [part.drop_duplicates("person")["ward"].value_counts(normalize=True) for part in parts.values()]
    return float(np.mean([share.sub(everybody, fill_value=0).abs().sum() for share in shares]))


def test_dirichlets_alpha_sets_the_skew_of_labels() -> None:
    table = people(2000)
    skews = [_skew(split(table, experiment(kind="dirichlet", sites=5, alpha=a), "t")) for a in (0.3, 3.0, 1000.0)]
    assert skews[0] > 2 * skews[1] > 4 * skews[2]


def test_quantity_skews_sizes_and_not_labels() -> None:
    table = people(3000)
    uneven = split(table, experiment(kind="quantity", sites=4, alpha=0.5, min_subjects=40), "t")
    even = split(table, experiment(kind="quantity", sites=4, alpha=10_000.0), "t")
    assert sizes(uneven).max() > 2 * sizes(uneven).min()
    assert sizes(even).max() < 1.2 * sizes(even).min()
    assert _skew(uneven) < 0.3


def test_shards_give_each_site_few_classes() -> None:
    parts = split(people(800), experiment(kind="shards", sites=8, shards_per_site=1), "t")
    assert max(part["ward"].nunique() for part in parts.values()) <= 2
    assert sizes(parts).max() - sizes(parts).min() <= 1


def test_a_number_is_skewed_by_its_tenths() -> None:
    label = {"column": "cost", "bounds": [0, 5]}
    parts = split(people(1000), experiment(kind="shards", sites=10, shards_per_site=1, label=label), "t")
    spread = [part.drop_duplicates("person")["cost"].std() for part in parts.values()]
    assert max(spread) < 0.5 < people(1000)["cost"].std()


def test_too_few_people_and_impossible_skews_are_said() -> None:
    with pytest.raises(ConfigError, match="do not make 5 sites"):
        split(people(49), experiment(kind="iid", sites=5, min_subjects=10), "t")
    with pytest.raises(ConfigError, match="no quantity partition"):
        split(people(50), experiment(kind="quantity", sites=5, alpha=0.01, min_subjects=9), "t")


def test_a_row_without_a_person_is_refused() -> None:
    table = people(100)
    table.loc[7, "person"] = None
    with pytest.raises(DataError, match="subject is missing"):
        split(table, experiment(kind="iid", sites=3), "t")


def test_a_natural_partition_needs_its_column_and_the_others_none() -> None:
    tree = experiment_tree("people.csv")
    del tree["data"]["site"]
    with pytest.raises(ConfigError, match=r"data\.site is missing"):
        load_experiment(tree)
    assert load_experiment(tree, ["partition.kind=iid"]).data.keys == ["person"]
    with pytest.raises(ConfigError, match=r"did you mean partition\.alpha"):
        load_experiment(tree, ["partition.kind=iid", "partition.alhpa=1"])


def test_two_homes_are_refused_where_the_table_says_so() -> None:
    table = people(100).assign(clinic="ash")
    table.loc[table.index[:20], "clinic"] = "birch"
    natural = load_experiment(
        experiment_tree("people.csv", data={"label": {"column": "ward", "classes": [0, 1, 2, 3]}})
    )
    with pytest.raises(DataError, match="records at sites"):
        split(table, natural, "t")
