"""Wrong input is refused by the command with one clear text and the right exit code, and leaves nothing behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest

from confide.config import SealingConfig
from confide.privacy.dp import Ledger, RenyiBudget, Role
from tests.cli.command import Answer, confide, files_under, to_toml
from tests.support import experiment_tree, people_table

OWN = """
from torch import nn

def net(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, outputs))
"""
CONSENT_HEADER = (
    "event_id,subject,purpose,type,effective_at,valid_until,notice_digest,lawful_basis,jurisdiction,"
    "evidence_ref,max_epsilon\n"
)


class Desk:
    """A folder with `people.csv` and `experiment.toml`, from which commands are run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "experiment.toml"

    def write(self, table: pd.DataFrame | None = None, **sections: dict[str, Any]) -> None:
        """The table, and an experiment over it with some sections changed."""
        (people_table() if table is None else table).to_csv(self.folder / "people.csv", index=False)
        self.file.write_text(to_toml(experiment_tree("people.csv", **sections)))

    def simulate(self, *arguments: str) -> Answer:
        """Run the experiment."""
        return confide("simulate", self.file, *arguments)

    def refused(self, *arguments: str) -> tuple[int, str]:
        """Run the experiment, which is to be refused and to leave every file as it was: the exit code and the text.

        The run is asked to make its results in `out` and ledgers in `ledgers`.
        """
        before = files_under(self.folder)
        answer = self.simulate("--out", "out", "--ledger", "ledgers", *arguments)
        assert answer.out == ""
        assert files_under(self.folder) == before
        return answer.code, answer.err.lstrip("\n")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk that is the current folder."""
    monkeypatch.chdir(tmp_path)
    desk = Desk(tmp_path)
    desk.write()
    return desk


def changed(row: int, **values: Any) -> pd.DataFrame:
    """The people's table with some values of one row (by position) changed."""
    table = people_table().astype(dict.fromkeys(values, object))
    for column, value in values.items():
        table.iloc[row, list(table.columns).index(column)] = value
    return table


def test_the_unchanged_experiment_runs_so_that_every_refusal_below_is_for_its_own_reason(desk: Desk) -> None:
    answer = desk.simulate("--out", "out", "--ledger", "ledgers")
    assert answer.code == 0
    assert (desk.folder / "out" / "model.safetensors").is_file()
    assert (desk.folder / "ledgers" / "ash" / "ledger.db").is_file()


# --- the experiment ------------------------------------------------------------------------------------------------


def test_an_experiment_that_does_not_exist(desk: Desk) -> None:
    desk.file = desk.folder / "none.toml"
    assert desk.refused() == (
        2,
        f"configuration error {desk.file}: there is no such file\n  → give the path of an experiment file\n",
    )


def test_an_experiment_that_is_not_toml(desk: Desk) -> None:
    desk.file.write_text("[run]\nname = tiny\n")
    assert desk.refused() == (
        2,
        f"configuration error {desk.file}: is not valid TOML: Invalid value (at line 2, column 8)\n"
        "  → mend that line and try again\n",
    )


def test_an_unknown_key(desk: Desk) -> None:
    desk.write(privacy={"epsilom": 3.0})
    assert desk.refused() == (
        2,
        f"configuration error {desk.file}: unknown key privacy.epsilom\n  → did you mean privacy.epsilon?\n",
    )


def test_an_unknown_key_on_the_command_line(desk: Desk) -> None:
    assert desk.refused("--set", "run.ruonds=2") == (
        2,
        f"configuration error {desk.file}: unknown key run.ruonds\n  → did you mean run.rounds?\n",
    )


def test_no_noise_on_private_data(desk: Desk) -> None:
    desk.write(data={"public": False}, privacy={"epsilon": float("inf")})
    assert desk.refused() == (
        2,
        f"configuration error {desk.file}: privacy.epsilon = inf needs data.public = true: without noise, what a "
        "site sends reveals its people\n  → mend the experiment, or override a key with --set section.key=value\n",
    )


def test_readable_updates_of_private_data(desk: Desk) -> None:
    desk.write(data={"public": False})
    others = sorted(set(get_args(SealingConfig.model_fields["profile"].annotation)) - {"open"})
    assert desk.refused() == (
        9,
        f"policy error policy of site ash: site.toml [policy] profiles allows {others}, the run asks for open\n"
        "  → change the run, or have the site's operator change the policy\n",
    )


def test_a_dry_run_refuses_what_the_run_would_refuse(desk: Desk) -> None:
    desk.write(data={"public": False})
    assert desk.simulate("--dry-run").code == desk.simulate("--out", "out").code == 9


def test_a_model_that_mixes_people(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    library = desk.folder / "library"
    library.mkdir()
    (library / "own_batch_norm.py").write_text(OWN)
    monkeypatch.syspath_prepend(library)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    desk.write(model={"kind": "own_batch_norm:net"})
    assert desk.refused() == (
        2,
        "configuration error model: layer '1' (BatchNorm1d) mixes the examples of a batch, so no person's influence "
        "can be bounded\n  → use LayerNorm or GroupNorm: they look at one example at a time\n",
    )


def test_a_label_that_is_also_a_feature(desk: Desk) -> None:
    desk.write(schema={"features": {"sick": {"kind": "category", "values": [0, 1]}}})
    assert desk.refused() == (
        2,
        "configuration error schema.features.sick: is a feature and the label\n"
        "  → leave it out of the features: a model would only copy it\n",
    )


# --- the table -----------------------------------------------------------------------------------------------------


def test_a_table_that_does_not_exist(desk: Desk) -> None:
    desk.write(data={"file": "none.csv"})
    assert desk.refused() == (
        3,
        f"data error {desk.folder / 'none.csv'}: there is no such file\n  → set data.file to a CSV or Parquet file\n",
    )


@pytest.mark.parametrize(
    ("sections", "missing", "nearest"),
    [
        ({"data": {"subject": "persons"}}, "persons", "person"),
        ({"data": {"site": "clinics"}}, "clinics", "clinic"),
        ({"data": {"label": {"column": "sik", "classes": [0, 1]}}}, "sik", "sick"),
        ({"schema": {"features": {"smokers": {"kind": "category", "values": [0, 1]}}}}, "smokers", "smoker"),
    ],
    ids=["subject", "site", "label", "feature"],
)
def test_a_column_that_does_not_exist(desk: Desk, sections: dict[str, Any], missing: str, nearest: str) -> None:
    desk.write(**sections)
    assert desk.refused() == (
        3,
        f"data error people.csv: there is no column '{missing}'\n  → did you mean '{nearest}'?\n",
    )


def test_a_label_outside_its_classes(desk: Desk) -> None:
    desk.write(changed(5, sick=2))
    assert desk.refused() == (
        3,
        "data error people.csv, row 7, column 'sick': the label is none of data.label.classes (got '2')\n"
        "  → add the class, or mend the row\n",
    )


def test_a_value_that_is_not_of_its_declared_kind(desk: Desk) -> None:
    desk.write(changed(3, age="young"))
    assert desk.refused() == (
        3,
        "data error people.csv, row 5, column 'age': the value is not a finite number (got 'young')\n"
        "  → mend the row, or declare a category\n",
    )


def test_a_missing_value_without_a_declared_treatment(desk: Desk) -> None:
    desk.write(changed(8, age=None))
    assert desk.refused() == (
        3,
        "data error people.csv, row 10, column 'age': the value is missing\n"
        '  → declare schema.missing = "midpoint", or a missing value for this feature\n',
    )


def test_a_row_without_a_person(desk: Desk) -> None:
    desk.write(changed(0, person=None))
    assert desk.refused() == (
        3,
        "data error people.csv, row 2, column 'person': the subject is missing, so nobody's consent covers the row\n"
        "  → leave such rows out of the table\n",
    )


def test_a_row_without_a_site(desk: Desk) -> None:
    desk.write(changed(1, clinic=None))
    assert desk.refused() == (
        3,
        "data error people.csv, row 3, column 'clinic': the site is missing\n  → every record belongs to a site\n",
    )


@pytest.mark.parametrize("name", ["../ash", "a/b", ".hidden", "ash\tbirch"])
def test_a_site_whose_name_could_be_a_path(desk: Desk, name: str) -> None:
    desk.write(changed(1, clinic=name))
    assert desk.refused() == (
        3,
        f"data error people.csv, column 'clinic': {name!r} cannot be a site's name\n"
        "  → use letters, digits, spaces, dots, dashes; at most 64\n",
    )


# --- sites and people ----------------------------------------------------------------------------------------------


def test_a_declared_site_without_records(desk: Desk) -> None:
    desk.write(sites={"population": {"default": 40, "elm": 40}})
    assert desk.refused() == (
        3,
        "data error column 'clinic': site 'elm' has no records\n"
        "  → drop it from sites.population, or check data.site\n",
    )


def test_a_site_without_a_declared_population(desk: Desk) -> None:
    desk.write(sites={"population": {"ash": 40, "birch": 40, "cedar": 40}})
    assert desk.refused() == (
        2,
        "configuration error sites.population: names neither site 'doum' nor a default\n"
        "  → declare each site's population: a public constant, never a count of the data\n",
    )


def test_a_site_with_too_few_consenting_people(desk: Desk) -> None:
    few = people_table()
    few = few[(few["clinic"] != "cedar") | few["person"].isin([f"cedar-{i}" for i in range(8)])]
    desk.write(few)
    assert desk.refused() == (
        3,
        "data error site cedar: fewer than 10 consenting subjects to train on\n"
        "  → lower sites.min_subjects if this is intended, or leave the site out\n",
    )


def test_fewer_than_three_sites(desk: Desk) -> None:
    desk.write(people_table(("ash", "birch")))
    assert desk.refused() == (
        2,
        "configuration error data.site: the data have 2 sites, fewer than sites.min_sites = 3\n"
        "  → a sum over fewer than three sites hides nobody\n",
    )


def test_a_person_at_two_sites(desk: Desk) -> None:
    desk.write(changed(0, person="birch-0"))
    assert desk.refused() == (
        3,
        "data error people.csv: one subject has records at sites ash and birch\n"
        "  → each person's loss is accounted at one site: give the person one site, or declare the share of such "
        "people with partition.overlap, and ε is composed over her sites\n",
    )


# --- consent -------------------------------------------------------------------------------------------------------


def consent_file(desk: Desk, *instants: str) -> Path:
    """A consent file whose lines differ in their instant only."""
    path = desk.folder / "consent.csv"
    lines = [f"e{i},ash-{i},research/test,given,{at},,,,,,\n" for i, at in enumerate(instants)]
    path.write_text(CONSENT_HEADER + "".join(lines))
    tree = experiment_tree("people.csv") | {"consent": {"file": "consent.csv"}}
    desk.file.write_text(to_toml(tree))
    return path


def test_a_consent_without_a_time_zone(desk: Desk) -> None:
    path = consent_file(desk, "2026-01-31T09:00:00+01:00", "2026-01-31T09:00:00", "2026-01-31")
    reason = "effective_at: has no time zone (write an offset, e.g. 2026-01-31T09:00:00+01:00)"
    assert desk.refused() == (
        4,
        f"consent error {path}: line 3, {reason}; line 4, {reason}\n"
        "  → nothing was imported; mend these lines and import again\n",
    )


def test_a_consent_file_that_does_not_exist(desk: Desk) -> None:
    consent_file(desk).unlink()
    assert desk.refused() == (
        4,
        f"consent error {desk.folder / 'consent.csv'}: there is no such file\n  → give the path of a consent file\n",
    )


# --- the budget ----------------------------------------------------------------------------------------------------


def test_a_budget_that_is_used_up(desk: Desk) -> None:
    desk.write(run={"rounds": 1}, privacy={"epsilon": 6.0})
    assert desk.simulate("--out", "first", "--ledger", "ledgers").code == 0
    charged, before = charges(desk), files_under(desk.folder / "first")
    answer = desk.simulate("--out", "out", "--ledger", "ledgers")
    assert (answer.code, answer.out) == (5, "")
    number = r"\d+\.\d+"
    assert re.fullmatch(
        f"budget error ledger {re.escape(str(Path('ledgers', 'ash', 'ledger.db')))}: the privacy budget does not "
        f"suffice: {number}% of it is left, {number}% was asked \\(RDP filter: limit ε = 8 at δ = 1e-05; "
        f"charged so far ε = {number}, with this run {number}\\)\n"
        "  → lower privacy.epsilon or run.rounds; a site's budget is never refilled\n",
        answer.err.lstrip("\n"),
    )
    assert not (desk.folder / "out").exists()
    assert charges(desk) == charged
    assert files_under(desk.folder / "first") == before


def charges(desk: Desk) -> list[object]:
    """What the first site's ledger holds."""
    ledger = Ledger(desk.folder / "ledgers" / "ash" / "ledger.db", RenyiBudget.for_limit(8.0, 1e-5), held_out=0.25)
    try:
        return [ledger.events(role) for role in Role]
    finally:
        ledger.close()


def test_a_ledger_of_another_limit(desk: Desk) -> None:
    assert desk.simulate("--out", "first", "--ledger", "ledgers").code == 0
    answer = desk.simulate("--out", "out", "--ledger", "ledgers", "--set", "privacy.site_epsilon_limit=9")
    assert answer.code == 5
    assert "was made with epsilon_limit = 8.0 (asked: 9.0)" in answer.err
    assert not (desk.folder / "out").exists()
    assert charges(desk)


def test_a_refused_run_adds_nothing_to_a_ledger_folder_that_was_there(desk: Desk) -> None:
    (desk.folder / "ledgers").mkdir()
    desk.write(data={"public": False})
    assert desk.simulate("--out", "out", "--ledger", "ledgers").code == 9
    assert files_under(desk.folder / "ledgers") == {}


# --- folders -------------------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_not_empty(desk: Desk) -> None:
    (desk.folder / "out").mkdir()
    (desk.folder / "out" / "thesis.txt").write_text("years of work")
    assert desk.refused() == (
        2,
        "configuration error --out out: is there already and is not an empty folder\n"
        "  → name a new folder: runs are never overwritten\n",
    )


def test_an_output_folder_that_is_a_file(desk: Desk) -> None:
    (desk.folder / "out").write_text("years of work")
    assert desk.refused() == (
        2,
        "configuration error --out out: is there already and is not an empty folder\n"
        "  → name a new folder: runs are never overwritten\n",
    )


def test_an_output_folder_that_cannot_be_made(desk: Desk) -> None:
    (desk.folder / "file").write_text("a file, not a folder")
    assert desk.refused("--out", "file/out") == (
        2,
        "configuration error --out file/out: cannot be made: Not a directory\n  → name a folder you may write to\n",
    )


def test_a_ledger_folder_that_cannot_be_made(desk: Desk) -> None:
    (desk.folder / "file").write_text("a file, not a folder")
    assert desk.refused("--ledger", "file/ledgers") == (
        2,
        "configuration error --ledger file/ledgers: cannot be made: Not a directory\n"
        "  → name a folder you may write to\n",
    )


def test_a_ledger_folder_that_is_a_file(desk: Desk) -> None:
    (desk.folder / "ledgers").write_text("a file, not a folder")
    assert desk.refused() == (
        2,
        "configuration error --ledger ledgers: cannot be made: File exists\n  → name a folder you may write to\n",
    )


def test_an_empty_output_folder_that_was_there_stays_and_stays_empty(desk: Desk) -> None:
    (desk.folder / "out").mkdir()
    desk.write(data={"public": False})
    assert desk.simulate("--out", "out").code == 9
    assert files_under(desk.folder / "out") == {}
    assert (desk.folder / "out").is_dir()


@pytest.mark.parametrize("arguments", [(), ("--out", "new/deep/out"), ("--out", "out", "--ledger", "new/deep/ledgers")])
def test_a_refused_run_leaves_no_parent_folders_either(desk: Desk, arguments: tuple[str, ...]) -> None:
    desk.write(data={"public": False})
    before = files_under(desk.folder)
    assert desk.simulate(*arguments).code == 9
    assert files_under(desk.folder) == before


def test_a_run_beside_the_same_experiment_never_overwrites_it(desk: Desk) -> None:
    assert desk.simulate("--set", "run.rounds=1").code == desk.simulate("--set", "run.rounds=1").code == 0
    assert len(list((desk.folder / "runs").iterdir())) == 2
    shutil.rmtree(desk.folder / "runs")
