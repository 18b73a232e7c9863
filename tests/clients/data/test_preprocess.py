"""Columns become numbers by public bounds and vocabularies only; what is not as declared is named by row and column."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.clients.data.preprocess import canonical_value, encoded_width, expand, features, labels, require_columns
from confide.config import CategoryFeature, LabelConfig, NumberFeature, SchemaConfig
from confide.errors import DataError

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def number(low: float = 0, high: float = 10, missing: float | None = None) -> NumberFeature:
    """A number between bounds."""
    return NumberFeature(kind="number", bounds=(low, high), missing=missing)


def category(*values: bool | int | float | str, missing: bool | int | float | str | None = None) -> CategoryFeature:
    """One of some values."""
    return CategoryFeature(kind="category", values=values, missing=missing)


def column(values: Any, first_row: int = 2, **kwargs: Any) -> pd.DataFrame:
    """A table with one column `a`, its rows counted as `read_table` does."""
    series = values if isinstance(values, pd.Series) else pd.Series(values, **kwargs)
    return pd.DataFrame({"a": series.set_axis(range(first_row, first_row + len(series)))})


def encode(values: Any, feature: NumberFeature | CategoryFeature, missing: str = "refuse", **kwargs: Any) -> list[Any]:
    """Encoded rows of one column."""
    schema = SchemaConfig.model_validate({"missing": missing, "features": {"a": feature}})
    return features(column(values, **kwargs), schema, "t.csv").tolist()


def refused(values: Any, feature: NumberFeature | CategoryFeature, **kwargs: Any) -> str:
    """The text with which a column is refused."""
    with pytest.raises(DataError) as caught:
        encode(values, feature, **kwargs)
    assert caught.value.exit_code == 3
    assert not caught.value.shareable
    return str(caught.value)


# --- numbers -------------------------------------------------------------------------------------------------------


def test_numbers_are_scaled_from_their_bounds_to_plus_minus_one() -> None:
    assert encode([0, 5, 10], number()) == [[-1.0], [0.0], [1.0]]


def test_numbers_outside_the_bounds_are_clipped_and_stop_nothing() -> None:
    assert encode([-1e30, -1, 11, 1e300], number()) == [[-1.0], [-1.0], [1.0], [1.0]]


@given(values=st.lists(FINITE, min_size=1), bounds=st.tuples(FINITE, FINITE).filter(lambda b: b[0] < b[1]))
def test_an_encoded_number_is_always_within_plus_minus_one(values: list[float], bounds: tuple[float, float]) -> None:
    encoded = np.array(encode(values, number(*bounds)))
    assert np.all(np.abs(encoded) <= 1)


@given(values=st.lists(FINITE, min_size=2, max_size=20))
def test_one_persons_value_changes_nobody_elses_encoding(values: list[float]) -> None:
    assert encode(values, number())[1:] == encode([*values[:1], *values[1:]][1:], number())
    assert encode([9e9, *values[1:]], number())[1:] == encode(values, number())[1:]


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(["1", "2"]),
        pd.Series([True, False]).map({True: 1, False: 2}),
        pd.Series([1, 2], dtype="Int64"),
        pd.Series(["1", "2"], dtype="category"),
        pd.Series([Decimal("1.0"), Decimal("2.0")]),
        pd.Series([1.0, 2.0], dtype="float32"),
    ],
    ids=lambda s: str(s.dtype),
)
def test_a_number_is_read_however_the_file_holds_it(values: pd.Series[Any]) -> None:
    assert np.allclose(encode(values, number()), [[-0.8], [-0.6]])


@pytest.mark.parametrize("bad", ["many", "1,5", "inf", "", " ", "1e400"])
def test_a_value_that_is_no_finite_number_is_named_by_row_and_column(bad: str) -> None:
    assert refused(["1", "2", bad, "x"], number()) == (
        f"t.csv, row 4, column 'a': the value is not a finite number (got {bad!r})\n"
        "  → mend the row, or declare a category"
    )


def test_only_the_beginning_of_a_long_unreadable_value_is_shown() -> None:
    assert "(got " + repr("x" * 40) + ")" in refused(["x" * 1000], number())


@pytest.mark.parametrize(
    "values",
    [pd.Series(pd.to_datetime(["2020-01-01", None])), pd.Series(pd.to_timedelta(["1D", "2D"]))],
    ids=["instants", "durations"],
)
def test_a_time_is_not_a_number(values: pd.Series[Any]) -> None:
    assert "the value is not a finite number" in refused(values, number(), missing="midpoint")


# --- missing values ------------------------------------------------------------------------------------------------


def test_a_missing_number_without_a_declared_treatment_is_named_by_row_and_column() -> None:
    assert refused([1.0, np.nan, np.nan], number()) == (
        "t.csv, row 3, column 'a': the value is missing\n"
        '  → declare schema.missing = "midpoint", or a missing value for this feature'
    )


def test_a_missing_category_without_a_declared_treatment_is_named_by_row_and_column() -> None:
    assert refused(["x", None], category("x", "y")).startswith("t.csv, row 3, column 'a': the value is missing\n")


def test_a_missing_number_becomes_the_midpoint_of_the_public_bounds() -> None:
    assert encode([np.nan, 10], number(), missing="midpoint") == [[0.0], [1.0]]


def test_a_features_own_stand_in_wins_over_the_midpoint() -> None:
    assert encode([np.nan, 10], number(missing=0), missing="midpoint") == [[-1.0], [1.0]]
    assert encode([np.nan, 10], number(missing=99), missing="refuse") == [[1.0], [1.0]]  # clipped as any value


def test_a_missing_category_has_no_hot_column_or_the_declared_one() -> None:
    assert encode(["x", None], category("x", "y"), missing="midpoint") == [[1.0, 0.0], [0.0, 0.0]]
    assert encode(["x", None], category("x", "y", missing="y")) == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", ["Int64", "boolean"])
def test_a_missing_value_in_a_nullable_column_is_missing(dtype: str) -> None:
    assert encode([1, None], number(0, 2), missing="midpoint", dtype=dtype) == [[0.0], [0.0]]
    assert encode([1, None], category(0, 1), missing="midpoint", dtype=dtype) == [[0.0, 1.0], [0.0, 0.0]]


# --- categories ----------------------------------------------------------------------------------------------------


def test_a_category_has_one_hot_column_and_an_unknown_one_has_none() -> None:
    assert encode(["y", "x", "z"], category("x", "y")) == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("values", [[0, 1], [0.0, 1.0], [False, True], ["0", "1"], [" 0", "1 "]], ids=str)
@pytest.mark.parametrize("declared", [(0, 1), (False, True), ("0", "1"), (0.0, 1.0)], ids=str)
def test_a_category_is_found_however_table_and_schema_spell_it(values: list[Any], declared: tuple[Any, ...]) -> None:
    assert encode(values, category(*declared)) == [[1.0, 0.0], [0.0, 1.0]]


def test_a_boolean_column_with_gaps_is_still_boolean() -> None:
    values = pd.Series([True, None, False], dtype=object)
    assert encode(values, category(False, True), missing="midpoint") == [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("declared", [("False", "True"), ("false", "true")])
def test_a_boolean_column_is_found_under_the_words_for_it(declared: tuple[str, str]) -> None:
    assert encode([False, True], category(*declared)) == [[1.0, 0.0], [0.0, 1.0]]


def test_a_list_is_no_category() -> None:
    assert "t.csv, row 2, column 'a'" in refused([["x"], ["y"]], category("x", "y"))


@given(st.integers(-(2**53), 2**53))
def test_an_integer_has_one_spelling(value: int) -> None:
    assert {canonical_value(v) for v in (value, float(value), str(value), np.int64(value), np.float64(value))} == {
        str(value)
    }


# --- the whole table -----------------------------------------------------------------------------------------------


def test_features_stand_in_the_schemas_order_with_the_declared_width() -> None:
    schema = SchemaConfig(features={"b": category("x", "y", "z"), "a": number()})
    table = pd.DataFrame({"a": [10], "b": ["y"], "c": ["ignored"]})
    encoded = features(table, schema, "t.csv")
    assert encoded.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert encoded.dtype == np.float32
    assert encoded_width(schema) == 4


def test_a_column_that_is_not_there_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        require_columns(pd.DataFrame({"age": [1], "sex": [1]}), ["age", "agee"], "t.csv")
    assert str(caught.value) == "t.csv: there is no column 'agee'\n  → did you mean 'age'?"


def test_a_column_that_resembles_nothing_is_answered_with_those_there() -> None:
    with pytest.raises(DataError) as caught:
        features(pd.DataFrame({"age": [1], "sex": [1]}), SchemaConfig(features={"weight": number()}), "t.csv")
    assert str(caught.value) == "t.csv: there is no column 'weight'\n  → columns there: age, sex"


# --- patterns ------------------------------------------------------------------------------------------------------


def names(schema: dict[str, NumberFeature | CategoryFeature], columns: list[str], keys: list[str] | None = None) -> Any:
    """Features after patterns are expanded."""
    return expand(SchemaConfig(features=schema), columns, keys or []).features


def test_a_pattern_is_expanded_in_natural_order_without_the_keys() -> None:
    columns = ["pixel10", "id", "pixel2", "pixel1", "label", "pixel", "pixel3"]
    found = names({"pixel*": number()}, columns, ["pixel3"])
    assert list(found) == ["pixel", "pixel1", "pixel2", "pixel10"]


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1).flatmap(st.permutations))
def test_natural_order_is_numeric_order_whatever_the_files_order(order: list[int]) -> None:
    found = names({"p*": number()}, [f"p{i}" for i in order])
    assert list(found) == [f"p{i}" for i in sorted(order)]


def test_a_column_named_by_itself_keeps_its_own_declaration() -> None:
    found = names({"p*": number(0, 1), "p2": number(0, 5)}, ["p1", "p2", "p3"])
    assert {name: feature.bounds for name, feature in found.items()} == {"p1": (0, 1), "p2": (0, 5), "p3": (0, 1)}


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        names({"pixle*": number()}, ["pixel1", "pixel2"])
    assert str(caught.value) == "schema.features: no column matches 'pixle*'\n  → mend the pattern"


@pytest.mark.parametrize("name", ["age [years]", "really?", "a*b"])
def test_a_column_whose_name_looks_like_a_pattern_can_be_named(name: str) -> None:
    assert list(names({name: number()}, [name, "other"])) == [name]


# --- labels --------------------------------------------------------------------------------------------------------


def label(**kind: Any) -> LabelConfig:
    """A label in column `a`."""
    return LabelConfig(column="a", **kind)


def test_a_threshold_label_is_one_from_the_threshold_on() -> None:
    assert labels(column([1, 2, 3, 4]), label(at_least=3), "t.csv").tolist() == [0, 0, 1, 1]


def test_a_class_label_is_its_position_among_the_classes() -> None:
    found = labels(column(["mid", "low", "high"]), label(classes=("low", "mid", "high")), "t.csv")
    assert (found.tolist(), found.dtype) == ([1, 0, 2], np.float32)


def test_a_regression_label_is_clipped_and_scaled_to_the_unit_interval() -> None:
    assert labels(column([-5, 0, 25, 100, 500]), label(bounds=(0, 100)), "t.csv").tolist() == [0, 0, 0.25, 1, 1]


def test_a_label_outside_its_classes_is_named_by_row_and_column() -> None:
    with pytest.raises(DataError) as caught:
        labels(column(["no", "yes", "maybe"]), label(classes=("no", "yes")), "t.csv")
    assert str(caught.value) == (
        "t.csv, row 4, column 'a': the label is none of data.label.classes (got 'maybe')\n"
        "  → add the class, or mend the row"
    )


@pytest.mark.parametrize("kind", [{"at_least": 1.0}, {"classes": (1, 2)}, {"bounds": (0.0, 9.0)}], ids=str)
def test_a_missing_label_is_named_by_row_and_column(kind: dict[str, Any]) -> None:
    text = "t.csv, row 3, column 'a': the label is missing\n  → leave such rows out of the table"
    with pytest.raises(DataError, match=f"^{re.escape(text)}$"):
        labels(column([1.0, np.nan]), label(**kind), "t.csv")


def test_an_unreadable_label_is_named_by_row_and_column() -> None:
    with pytest.raises(DataError, match=r"^t\.csv, row 3, column 'a': the value is not a finite number \(got 'x'\)"):
        labels(column(["1", "x"]), label(at_least=1.0), "t.csv")


@pytest.mark.parametrize("values", [[False, True], [0, 1], [0.0, 1.0], ["0", "1"]], ids=str)
def test_boolean_classes_are_found_however_the_table_spells_them(values: list[Any]) -> None:
    assert labels(column(values), label(classes=(False, True)), "t.csv").tolist() == [0, 1]
