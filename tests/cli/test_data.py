"""`confide data check`: what a table holds and what a run would refuse, for the holder of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.cli.command import confide, files_under, to_toml
from tests.support import people_table


@pytest.fixture
def folder(make_experiment: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `people.csv` and `experiment.toml` over it."""
    (tmp_path / "experiment.toml").write_text(to_toml(make_experiment()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(folder: Path, table: pd.DataFrame) -> None:
    """Replace the people's table."""
    table.to_csv(folder / "people.csv", index=False)


def test_an_experiments_table_is_counted_exactly(folder: Path) -> None:
    table, before = people_table(), files_under(folder)
    answer = confide("data", "check", "experiment.toml", "--json")
    assert (answer.code, answer.err, answer.out.count("\n")) == (0, "", 1)
    found = answer.last_line
    assert (found["rows"], found["subjects"], found["inputs"]) == (len(table), 160, 3)
    assert (found["label"], found["task"], found["refusals"]) == ("sick", "binary", [])
    assert found["sites"] == [
        {"site": site, "subjects": 40, "records": int((table["clinic"] == site).sum()), "population": 40, "remark": ""}
        for site in ("ash", "birch", "cedar", "doum")
    ]
    assert found["features"] == [
        {"name": "age", "kind": "number", "range": "[0, 100]", "missing": 0, "outside": 0},
        {"name": "smoker", "kind": "category", "range": "0, 1", "missing": 0, "outside": 0},
    ]
    assert files_under(folder) == before


def test_an_experiments_table_is_shown_for_people(folder: Path) -> None:
    answer = confide("data", "check", "experiment.toml")
    assert answer.code == 0
    for line in ("The table can be read as declared", "subjects 160", "label sick (binary)", "model inputs 3",
                 "age number [0, 100] 0 0", "smoker category 0, 1 0 0", "ash 40 "):  # fmt: skip
        assert line in answer.words
    assert "would be refused" not in answer.words


def test_values_outside_bounds_and_missing_ones_are_counted(folder: Path) -> None:
    table = people_table()
    table["age"] = [-1.0, 101.0, float("nan"), *table["age"][3:]]
    table.loc[3, "smoker"] = 2
    change(folder, table)
    features = confide("data", "check", "experiment.toml", "--set", "schema.missing='midpoint'", "--json").last_line[
        "features"
    ]
    assert [(f["missing"], f["outside"]) for f in features] == [(1, 2), (0, 1)]


def test_what_a_run_would_refuse_is_told_with_the_reason(folder: Path) -> None:
    arguments = ("data", "check", "experiment.toml", "--set", "sites.population.default=50")
    table = people_table()
    change(folder, table[(table["clinic"] != "cedar") | table["person"].isin(["cedar-1", "cedar-2"])])
    refusals = ["site cedar: fewer than sites.min_subjects = 10 subjects"]
    answer = confide(*arguments, "--json").last_line
    assert answer["refusals"] == refusals
    assert [s["remark"] for s in answer["sites"]] == ["", "", "below min_subjects", ""]
    assert f"would be refused: {refusals[0]}" in confide(*arguments).words
    change(folder, people_table(("ash", "birch")))
    assert confide(*arguments, "--json").last_line["refusals"] == ["2 sites, fewer than sites.min_sites = 3"]


@pytest.mark.parametrize(
    ("column", "text"),
    [("age", "row 2, column 'age': the value is not a finite number (got 'x')"),
     ("sick", "row 2, column 'sick': the label is none of data.label.classes (got 'x')")],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_row(folder: Path, column: str, text: str) -> None:
    table = people_table().astype({column: object})
    table.loc[0, column] = "x"
    change(folder, table)
    answer = confide("data", "check", "experiment.toml", "--json")
    assert answer.code == 3
    assert text in answer.err
    assert answer.last_line["error"]["exit_code"] == 3


def test_any_table_is_described_with_a_schema_line_to_start_from(folder: Path) -> None:
    answer = confide("data", "check", "people.csv", "--json")
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    table, found = people_table(), answer.last_line
    assert (found["rows"], [c["name"] for c in found["columns"]]) == (len(table), list(table.columns))
    columns = {c["name"]: c for c in found["columns"]}
    assert columns["smoker"]["suggestion"] == '{ kind = "category", values = [0, 1] }'
    assert columns["ward"]["suggestion"] == '{ kind = "category", values = ["east", "north", "south"] }'
    assert columns["person"]["suggestion"].startswith("an identifier")
    low, high = table["age"].min(), table["age"].max()
    assert columns["age"]["suggestion"] == f'{{ kind = "number", bounds = [{low:g}, {high:g}] }}'
    assert columns["age"]["distinct"] == table["age"].nunique()


def test_every_suggested_schema_line_is_accepted(folder: Path) -> None:
    columns = confide("data", "check", "people.csv", "--json").last_line["columns"]
    for column in columns:
        if column["suggestion"].startswith("{") and column["name"] not in ("sick", "clinic"):
            assignment = f"schema.features.{column['name']}={column['suggestion']}"
            answer = confide("data", "check", "experiment.toml", "--set", assignment, "--json")
            assert answer.code == 0, (assignment, answer.err)
            feature = next(f for f in answer.last_line["features"] if f["name"] == column["name"])
            assert feature["outside"] == 0


def test_a_described_table_warns_that_bounds_must_be_public(folder: Path) -> None:
    answer = confide("data", "check", "people.csv")
    assert answer.code == 0
    assert "Bounds must be public knowledge" in answer.words
    assert "smoker int64 0 2" in answer.words


def test_names_with_brackets_are_shown_whole(folder: Path) -> None:
    change(folder, pd.DataFrame({"age [years]": [1, 2], "dose [red]": [3, 4]}))
    answer = confide("data", "check", "people.csv")
    assert "age [years]" in answer.words
    assert "dose [red]" in answer.words


def test_a_value_with_a_quote_makes_a_suggestion_that_is_still_toml(folder: Path) -> None:
    import tomllib

    change(folder, pd.DataFrame({"size": ['5"', "6\\", "7"]}))
    (column,) = confide("data", "check", "people.csv", "--json").last_line["columns"]
    assert tomllib.loads(f"x = {column['suggestion']}")["x"]["values"] == ['5"', "6\\", "7"]


def test_parquet_is_described_too(folder: Path) -> None:
    people_table().to_parquet(folder / "people.parquet")
    assert len(confide("data", "check", "people.parquet", "--json").last_line["columns"]) == 7


def test_a_file_that_does_not_exist_is_named(folder: Path) -> None:
    for name in ("none.csv", "none.parquet"):
        answer = confide("data", "check", name)
        assert (answer.code, answer.out) == (3, "")
        assert name in answer.err
    assert confide("data", "check", "none.toml").code == 2
