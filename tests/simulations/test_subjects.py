"""A person in the table is the person in the consent file, and nobody else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from confide.config import load_experiment
from confide.simulations.sources import Sources, load_sources
from tests.support import experiment_tree, people_table


def sources(folder: Path, identifiers: list[str]) -> Sources:
    """The people's table with the first persons' identifiers replaced."""
    table = people_table()
    numbered = {person: str(10**6 + i) for i, person in enumerate(table["person"].unique())}
    numbered |= dict(zip(numbered, identifiers, strict=False))
    table["person"] = table["person"].map(numbered)
    table.to_csv(folder / "people.csv", index=False)
    return load_sources(load_experiment(experiment_tree("people.csv")), folder)


@pytest.mark.parametrize(
    "identifiers", [["007", "7"], ["1" * 25, "1" * 24 + "2"], ["1e3", "1000"], ["9007199254740993", "9007199254740992"]]
)
def test_different_identifiers_in_a_csv_stay_different_people(identifiers: list[str], tmp_path: Path) -> None:
    """Merged, one person's consent would open the other's records."""
    found = sources(tmp_path, identifiers).records["ash"].persons
    assert set(identifiers) <= set(found)
