"""Records are grouped by the person they belong to, whatever order they stand in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.clients.data.records import Batch, SiteRecords
from confide.config import LabelConfig, NumberFeature, SchemaConfig
from confide.errors import DataError
from confide.privacy.consent import canonical_subject

SCHEMA = SchemaConfig(features={"x": NumberFeature(kind="number", bounds=(0, 1000))})
LABEL = LabelConfig(column="y", bounds=(0, 1000))
#: Rows (person, x); x also identifies the row.
ROWS = st.lists(st.sampled_from(["ada", "bob", "cyd", "dot", "eve"]), min_size=1, max_size=30)


def table(persons: list[Any]) -> pd.DataFrame:
    """One row a person named, numbered by x and y."""
    return pd.DataFrame({"who": persons, "x": range(len(persons)), "y": range(len(persons))})


def build(data: pd.DataFrame, unit: str = "subject") -> SiteRecords:
    """The site's records."""
    return SiteRecords.build(data, schema=SCHEMA, label=LABEL, subject="who", unit=unit, where="t.csv")


def rows_of(batch: Batch) -> list[int]:
    """Which rows of `table` stand in a batch."""
    return [round((float(v) + 1) / 2 * 1000) for v in batch.x[:, 0]]


@given(persons=ROWS, data=st.data())
def test_gathered_records_are_those_of_a_naive_group_by(persons: list[str], data: st.DataObject) -> None:
    records = build(table(persons))
    naive = {who: [i for i, p in enumerate(persons) if p == who] for who in sorted(set(persons))}
    assert records.persons == list(naive)
    chosen = data.draw(st.lists(st.integers(0, len(naive) - 1), unique=True))
    batch = records.gather(np.array(chosen, dtype=np.int64))
    groups = list(naive.values())
    expected = [row for unit in chosen for row in groups[unit]]
    assert rows_of(batch) == expected
    assert [round(float(v) * 1000) for v in batch.y] == expected
    assert batch.owner.tolist() == [k for k, unit in enumerate(chosen) for _ in groups[unit]]
    assert batch.records_of.tolist() == [len(groups[unit]) for unit in chosen]


@given(persons=ROWS)
def test_with_records_as_units_every_record_stands_alone_and_keeps_its_person(persons: list[str]) -> None:
    records = build(table(persons), unit="record")
    assert len(records.person_of) == len(persons)
    batch = records.gather(np.arange(len(persons), dtype=np.int64))
    assert batch.records_of.tolist() == [1] * len(persons)
    assert batch.owner.tolist() == list(range(len(persons)))
    assert [records.persons[p] for p in records.person_of] == [persons[row] for row in rows_of(batch)]


@given(persons=ROWS, data=st.data(), unit=st.sampled_from(["subject", "record"]))
def test_marking_persons_selects_all_their_records_and_nobody_elses(
    persons: list[str], data: st.DataObject, unit: str
) -> None:
    records = build(table(persons), unit)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(records.persons), max_size=len(records.persons))))
    marked = {p for p, m in zip(records.persons, mask, strict=True) if m}
    found = rows_of(records.gather(records.units_of(mask)))
    assert sorted(found) == [i for i, p in enumerate(persons) if p in marked]


def test_gathering_nobody_gives_an_empty_batch() -> None:
    batch = build(table(["ada", "bob"])).gather(np.zeros(0, dtype=np.int64))
    assert (batch.x.shape, batch.y.shape, batch.records_of.shape) == ((0, 1), (0,), (0,))


@pytest.mark.parametrize("spellings", [[7, 7.0, "7"], ["7", " 7 ", 7], [np.int64(7), np.float64(7.0), "7"]], ids=str)
def test_one_person_spelt_in_several_ways_is_one_person(spellings: list[Any]) -> None:
    assert {canonical_subject(s) for s in spellings} == {"7"}
    records = build(table(pd.Series(spellings, dtype=object).tolist()))
    assert records.persons == ["7"]
    assert rows_of(records.gather(np.array([0]))) == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["int64", "int32", "float64", "float32", "Int64", "str"])
def test_a_persons_name_does_not_depend_on_the_columns_type(dtype: str) -> None:
    data = table([7, 12])
    data["who"] = data["who"].astype(dtype)
    assert sorted(build(data).persons) == ["12", "7"]


@given(st.integers(-(2**53), 2**53))
def test_a_whole_number_names_one_person(value: int) -> None:
    assert canonical_subject(value) == canonical_subject(float(value)) == canonical_subject(str(value))


@pytest.mark.parametrize("different", [(7, 7.5), ("a", "A"), ("7", "07"), (1, -1)], ids=str)
def test_different_people_are_not_merged(different: tuple[Any, Any]) -> None:
    records = build(table(list(different)))
    assert len(records.persons) == 2


def test_a_row_without_a_subject_is_refused_with_its_row() -> None:
    data = table(["ada", None, "bob"]).set_axis([2, 3, 4])
    with pytest.raises(DataError) as caught:
        build(data)
    assert str(caught.value) == (
        "t.csv, row 3, column 'who': the subject is missing, so nobody's consent covers the row\n"
        "  → leave such rows out of the table"
    )


def test_a_table_without_the_subject_column_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        build(table(["ada"]).rename(columns={"who": "whom"}))
    assert str(caught.value) == "t.csv: there is no column 'who'\n  → did you mean 'whom'?"


def test_a_site_knows_the_width_of_its_features() -> None:
    assert build(table(["ada", "bob"])).inputs == 1
