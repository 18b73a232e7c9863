"""A table is read from CSV, Parquet or an installed package; what cannot be read is said with its place."""

from __future__ import annotations

import contextlib
import gzip
import importlib.metadata
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.clients.data.source import read_source, read_table, resolve
from confide.config.site import SourceConfig
from confide.errors import DataError

TABLE = pd.DataFrame({"who": ["a", "b", "c"], "age": [1.5, np.nan, 3.0], "n": [1, 2, 3]})
CSV = b"who,age,n\na,1.5,1\nb,,2\nc,3.0,3\n"


def refusal(path: Path) -> DataError:
    """The error with which a file is refused."""
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert (caught.value.exit_code, caught.value.where) == (3, str(path))
    return caught.value


# --- places --------------------------------------------------------------------------------------------------------


def test_a_relative_path_starts_at_the_experiments_folder(tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_bytes(CSV)
    assert resolve("people.csv", tmp_path) == tmp_path / "people.csv"
    assert resolve(str(tmp_path / "people.csv"), Path("/elsewhere")) == tmp_path / "people.csv"


@pytest.mark.parametrize("name", ["none.csv", ".", "none/none.csv"])
def test_a_file_that_does_not_exist_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        resolve(name, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / name}: there is no such file\n  → set data.file to a CSV or Parquet file"
    )


def test_a_file_inside_an_installed_package_is_found() -> None:
    path = resolve("package:statsmodels/datasets/randhie/src/randhie.csv", Path("/elsewhere"))
    assert path.read_bytes().startswith(b'"plan"') or b"zper" in path.read_bytes()[:2000]


@pytest.mark.parametrize(
    ("distribution", "command"),
    [
        ("statsmodels", "pip install 'statsmodels>=0.15'"),
        ("mlxtend", "pip install 'mlxtend>=0.24'"),
        ("some-hospital-data", "pip install 'some-hospital-data'"),
    ],
)
def test_a_package_that_is_not_installed_is_answered_with_the_command_that_installs_it(
    distribution: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError) as caught:
        resolve(f"package:{distribution}/data/x.csv", tmp_path)
    assert str(caught.value) == (
        f"package:{distribution}/data/x.csv: the data package {distribution} is not installed\n  → run: {command}"
    )


def test_a_package_without_the_file_is_answered_with_the_version_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        resolve("package:statsmodels/datasets/none.csv", tmp_path)
    assert str(caught.value) == (
        "package:statsmodels/datasets/none.csv: the installed statsmodels does not hold this file\n"
        "  → run: pip install 'statsmodels>=0.15'"
    )


@pytest.mark.parametrize("file", ["package:", "package:/x.csv", "package: /x.csv"])
def test_a_package_without_a_name_is_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        resolve(file, tmp_path)
    assert caught.value.where == file


# --- tables --------------------------------------------------------------------------------------------------------


def write(table: pd.DataFrame, path: Path) -> Path:
    """The table in the format of the path's name."""
    if path.suffix in (".parquet", ".pq"):
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.CSV", "t.csv.gz", "t.tsv", "t.txt", "t.parquet", "t.pq"])
def test_every_format_gives_the_same_table(name: str, tmp_path: Path) -> None:
    found = read_table(write(TABLE, tmp_path / name))
    pd.testing.assert_frame_equal(found.reset_index(drop=True), TABLE)


def test_rows_are_counted_as_an_editor_counts_lines_in_csv_and_from_one_in_parquet(tmp_path: Path) -> None:
    assert list(read_table(write(TABLE, tmp_path / "t.csv")).index) == [2, 3, 4]
    assert list(read_table(write(TABLE, tmp_path / "t.parquet")).index) == [1, 2, 3]


def test_rows_after_a_blank_line_keep_their_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"who,n\na,1\n\nb,2\n")
    table = read_table(tmp_path / "t.csv").dropna(how="all")
    assert dict(zip(table["who"], table.index, strict=True)) == {"a": 2, "b": 4}


def test_a_byte_order_mark_and_spaces_around_names_are_not_part_of_the_names(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfwho , n\na,1\n")
    assert list(read_table(tmp_path / "t.csv").columns) == ["who", "n"]


def test_an_index_inside_a_parquet_file_is_not_taken_for_line_numbers(tmp_path: Path) -> None:
    TABLE.set_index(pd.Index([70, 80, 90])).to_parquet(tmp_path / "t.parquet")
    assert list(read_table(tmp_path / "t.parquet").index) == [1, 2, 3]


@pytest.mark.parametrize("name", ["t.xlsx", "t.pkl", "t.json", "t"])
def test_another_format_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CSV)
    assert str(refusal(tmp_path / name)) == (
        f"{tmp_path / name}: is neither .csv nor .parquet, nor *-images-idx3-ubyte.gz\n  → convert it to one of these"
    )


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"who,n\n")
    assert refusal(tmp_path / "t.csv").what == "holds no rows"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"")
    assert refusal(tmp_path / "t.csv").what == "cannot be read as a table: No columns to parse from file"


@pytest.mark.parametrize("header", [b"who,who", b"who, who"])
def test_a_column_named_twice_is_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(header + b"\na,1\n")
    error = refusal(tmp_path / "t.csv")
    assert (error.what, error.hint) == ("names the column 'who' twice", "rename one of them")


@pytest.mark.parametrize("rows", [b"a,1\nb,2,3\n", b"a,1,9\nb,2,9\n"], ids=["one row", "all rows"])
def test_a_row_with_more_fields_than_the_header_is_refused_and_never_shifted(rows: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"who,n\n" + rows)
    assert "cannot be read as a table" in refusal(tmp_path / "t.csv").what


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("who,n\nZoë,1\n".encode("latin-1"))
    assert refusal(tmp_path / "t.csv").what.startswith("cannot be read as a table: 'utf-8' codec can't decode")


COMPRESSED = gzip.compress(CSV * 100, mtime=0)
DAMAGED = {
    "not gzip": ("t.csv.gz", CSV),
    "cut gzip": ("t.csv.gz", COMPRESSED[: len(COMPRESSED) // 2]),
    "broken gzip": ("t.csv.gz", COMPRESSED[:20] + b"\xff\xff\xff" + COMPRESSED[23:]),
    "empty gzip": ("t.csv.gz", b""),
    "not parquet": ("t.parquet", CSV),
    "empty parquet": ("t.parquet", b""),
    "cut parquet": ("t.parquet", b"PAR1" + bytes(64)),
    "binary": ("t.csv", bytes(range(256))),
}


@pytest.mark.parametrize(("name", "content"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path / name)
    assert error.what.startswith(("cannot be read as a table: ", "holds no rows"))
    assert "\n" not in error.what


def test_a_folder_is_not_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    assert refusal(tmp_path / "t.csv").what.startswith("cannot be read as a table: ")


@given(content=st.binary(max_size=120))
def test_whatever_a_csv_holds_it_is_a_table_or_a_data_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    try:
        rows = len(read_table(path))
    except DataError:
        rows = 0
    assert rows <= content.count(b"\n") + content.count(b"\r") + 1


# --- a site's own source ----------------------------------------------------------------------------------------------


def test_a_site_reads_the_same_table_from_a_file_and_from_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.DataFrame({"person": ["007", "7", None], "age": [1.5, 2.0, 3.0]})
    table.to_csv(tmp_path / "d.csv", index=False)
    with contextlib.closing(sqlite3.connect(tmp_path / "d.db")) as db:
        table.to_sql("visits", db, index=False)
    monkeypatch.setenv("OUR_DATABASE", f"sqlite:///{tmp_path / 'd.db'}")
    file = read_source(SourceConfig(file="d.csv", subject="person"), tmp_path)
    query = "SELECT * FROM visits"
    base = read_source(SourceConfig(url="env:OUR_DATABASE", query=query, subject="person"), tmp_path)
    for read in (file, base):
        assert list(read.person.dropna()) == ["007", "7"], "identifiers as they are written"
        assert read.person.isna().sum() == 1, "and nobody is called None"
    assert list(file.age) == list(base.age)


@pytest.mark.parametrize(
    ("url", "query"),
    [("sqlite:////no/such/folder/secret.db", "SELECT 1"), ("sqlite://", "SELECT secret FROM nothing"),
     ("nonsense:secret", "SELECT 1"), ("postgresql+nodriver://u:secret@h/d", "SELECT 1"), ("env:NOT_SET_ANYWHERE", "x"),
     ("sqlite://", "SELECT 1 AS p WHERE 0")],
)  # fmt: skip
def test_a_database_that_cannot_be_read_says_so_without_its_address(tmp_path: Path, url: str, query: str) -> None:
    with pytest.raises(DataError) as refused:
        read_source(SourceConfig(url=url, query=query, subject="p"), tmp_path)
    assert "secret" not in str(refused.value)
