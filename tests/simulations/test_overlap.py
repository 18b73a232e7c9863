"""People whose records lie at several sites: dealt out as declared, refused otherwise, accounted over all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import confide
from confide.clients.past import manifests_of
from confide.config import load_experiment
from confide.errors import ConfigError, DataError
from confide.privacy.audit.report import write_report
from confide.privacy.dp import Ledger, Role, person_epsilon
from confide.protocol.manifest import Manifest
from confide.simulations import partitions
from tests.cli import command
from tests.simulations.test_partitions import KINDS, experiment, people, split
from tests.support import experiment_tree, people_table

DELTA = 1e-5


def sites_of(parts: dict[str, pd.DataFrame]) -> pd.Series:
    """How many sites each person lies at."""
    return pd.concat([pd.Series(part["person"].unique()) for part in parts.values()]).value_counts()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), count=st.integers(40, 120), sites=st.integers(3, 6), seed=st.integers(0, 50),
    overlap=st.floats(0.01, 0.4), most=st.integers(2, 5),
)  # fmt: skip
def test_so_many_people_lie_at_several_sites_and_every_record_at_one(
    kind: str, count: int, sites: int, seed: int, overlap: float, most: int
) -> None:
    table = people(count, seed)
    asked = load_experiment(
        experiment(kind=kind, sites=sites, seed=seed, alpha=5.0).model_dump(by_alias=True, exclude_none=True),
        [f"partition.overlap={overlap}", f"privacy.max_sites_per_subject={most}"],
    )
    parts = split(table, asked, "people.csv")
    assert sorted(i for part in parts.values() for i in part.index) == sorted(table.index)
    found, records = sites_of(parts), table["person"].value_counts()
    assert (found > 1).sum() == round(overlap * count)
    several = found[found > 1]
    assert (several == np.minimum(np.minimum(records[several.index], most), sites)).all()
    again = split(table, asked, "people.csv")
    assert all(part.equals(again[name]) for name, part in parts.items())
    # Who lies at one site lies where she would without any overlap.
    alone = split(table, experiment(kind=kind, sites=sites, seed=seed, alpha=5.0), "people.csv")
    for name, part in parts.items():
        here = part[part["person"].isin(found[found == 1].index)]
        assert set(here["person"]) <= set(alone[name]["person"])
        assert set(alone[name]["person"]) <= set(part["person"])  # nobody leaves her home altogether


def test_an_overlap_of_people_with_one_record_is_refused() -> None:
    table = people(100).drop_duplicates("person")
    asked = experiment(kind="iid", sites=4, overlap=0.1)
    with pytest.raises(ConfigError, match="10 people at several sites, and 0 have more than one record"):
        partitions.split(table, asked, "t")
    private = asked.model_copy(update={"data": asked.data.model_copy(update={"public": False})})
    with pytest.raises(ConfigError, match="more people at several sites than have") as refused:
        partitions.split(table, private, "t")
    assert "0" not in str(refused.value)


def natural(**privacy: Any) -> dict[str, Any]:
    tree = experiment_tree("people.csv", data={"label": {"column": "ward", "classes": [0, 1, 2, 3]}})
    tree["privacy"] |= privacy
    return tree


def two_homes(people_there: int, sites: int = 2) -> pd.DataFrame:
    """A hundred people with three records each, the first of whom lie at several sites."""
    rows = np.repeat(np.arange(100), 3)
    names = np.array(["ash", "birch", "cedar"])
    at = np.where(rows < people_there, np.tile(np.arange(3) % sites, 100), rows % 3)
    return pd.DataFrame({"person": [f"p{i}" for i in rows], "clinic": names[at], "ward": rows % 4})


def test_a_table_with_people_at_several_sites_is_taken_only_as_far_as_declared() -> None:
    table = two_homes(10)
    for settings_ in ([], ["partition.overlap=0.09"]):
        with pytest.raises(DataError, match=r"records at sites ash and birch|10 of 100") as refused:
            partitions.split(table, load_experiment(natural(), settings_), "people.csv")
        assert "partition.overlap" in str(refused.value)
    names, part_of = partitions.split(table, load_experiment(natural(), ["partition.overlap=0.1"]), "people.csv")
    assert names == ["ash", "birch", "cedar"]
    assert np.array(names)[part_of].tolist() == table["clinic"].tolist()
    with pytest.raises(DataError, match="at more than 2 sites"):
        partitions.split(two_homes(10, sites=3), load_experiment(natural(), ["partition.overlap=0.1"]), "people.csv")
    three = load_experiment(natural(max_sites_per_subject=3), ["partition.overlap=0.1"])
    partitions.split(two_homes(10, sites=3), three, "people.csv")


def test_overlap_alone_means_two_sites_and_one_site_contradicts_it() -> None:
    assert load_experiment(natural(), ["partition.overlap=0.1"]).privacy.max_sites_per_subject == 2
    assert load_experiment(natural()).privacy.max_sites_per_subject == 1
    with pytest.raises(ConfigError, match="max_sites_per_subject = 1 says"):
        load_experiment(natural(max_sites_per_subject=1), ["partition.overlap=0.1"])


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds; a fifth of the people lie at two sites."""
    base = tmp_path_factory.mktemp("overlap")
    table = people_table(people=60)
    table.to_csv(base / "people.csv", index=False)
    tree = experiment_tree(str(base / "people.csv"), run={"rounds": 2, "report_metrics_every": 1})
    tree["partition"] = {"kind": "iid", "sites": 4, "overlap": 0.2}
    confide.simulate(tree, out=base / "out", ledger=base / "ledgers")
    return base


def manifest_of(folder: Path) -> Manifest:
    run = json.loads((folder / "result.json").read_text())["run_id"]
    return manifests_of(folder / "sites" / "site-01" / "state.db", [run])[run]


def test_the_run_costs_what_two_sites_cost_and_says_so_everywhere(overlapping: Path) -> None:
    out = overlapping / "out"
    told, manifest = json.loads((out / "result.json").read_text()), manifest_of(out)
    assert manifest.privacy.max_sites_per_subject == told["composed_sites"] == 2
    charges = manifest.all_charges()
    assert {e.sites for e in charges} == {2}
    assert told["epsilon"]["max"] == person_epsilon(charges, DELTA) <= 4.0
    each = told["epsilon"]["per_site"]
    assert all(told["epsilon"]["max"] / 2 < e < told["epsilon"]["max"] for e in each.values())
    ledger = Ledger.open(overlapping / "ledgers" / "site-01" / "ledger.db")
    for role in Role:
        assert ledger.events(role) == [e for e in charges if e.role is role]
    ledger.close()
    write_report(out, out / "report.html")
    for page in ("index.html", "report.html"):
        text = re.sub(r"\s+", " ", (out / page).read_text())
        assert "composed over up to 2 sites of a person" in text
    assert "lie at one site only" not in (out / "report.html").read_text()
    assert "composed over up to 2 sites" in (out / "model.safetensors").read_bytes().decode("latin-1")
    verified = command.confide("audit", "verify", out)
    assert verified.code == 0


def test_more_sites_a_person_mean_more_noise_for_the_same_epsilon(
    make_experiment: Callable[..., dict[str, Any]],
) -> None:
    tree = make_experiment(partition={"kind": "iid", "sites": 4})
    found = [confide.plan(tree, overrides=o) for o in ([], ["partition.overlap=0.1"],
             ["partition.overlap=0.1", "privacy.max_sites_per_subject=3"])]  # fmt: skip
    assert [p.composed_sites for p in found] == [1, 2, 3]
    assert found[0].noise_multiplier < found[1].noise_multiplier < found[2].noise_multiplier
    assert found[0].metrics_noise_multiplier < found[1].metrics_noise_multiplier < found[2].metrics_noise_multiplier
    assert all(3.8 < p.epsilon <= 4.0 for p in found)
    by_record = confide.plan(tree, overrides=["partition.overlap=0.1", "privacy.unit=record"])
    assert by_record.composed_sites == 1  # a record lies at one site
    said = json.loads(json.dumps(found[1].to_json()))
    assert said["composed_sites"] == 2


def test_one_person_at_two_sites_is_told_of_both(overlapping: Path) -> None:
    """Each site tells its own share, counted twice, and what the run costs her over both."""
    table = pd.read_csv(overlapping / "people.csv")
    tree = json.loads((overlapping / "out" / "experiment.json").read_text())
    names, part_of = partitions.split(table, load_experiment(tree), "people.csv")
    homes = pd.DataFrame({"person": table["person"], "site": np.array(names)[part_of]}).drop_duplicates()
    twice = homes[homes["person"].duplicated(keep=False)].groupby("person")["site"].apply(list)
    whole, seen = person_epsilon(manifest_of(overlapping / "out").all_charges(), DELTA), 0
    for person, sites in list(twice.items())[:6]:
        for site in sites:
            asked = command.confide("audit", "exposure", person, overlapping / "out", "--site", site, "--json",
                                    "--out", overlapping / "her.html", "--ledger", overlapping / "ledgers")  # fmt: skip
            assert asked.code == 0, asked.err
            answer = asked.last_line
            assert answer["sites"] == 2
            for run in answer["runs"]:
                assert run["epsilon"] == pytest.approx(whole)
                seen += 1
    assert seen
    assert "may lie at up to 2 sites" in (overlapping / "her.html").read_text()
