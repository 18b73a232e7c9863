"""`confide site ledger`: what a site's operator is told of a real run's charges, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.clients.data.source import read_table
from confide.errors import BudgetError
from confide.privacy.consent import SiteKey
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role, rdp_epsilon, run_epsilon
from confide.privacy.dp.personal import PersonalLosses
from tests.cli.command import confide, files_under, to_toml
from tests.support import SITES, experiment_tree, write_people

DELTA = 1e-5
TITLE = "Privacy ledger of ash: for the site only, these numbers do not leave it"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of four sites' ledgers after two runs of the command that share it."""
    folder = tmp_path_factory.mktemp("site")
    tree = experiment_tree(str(write_people(folder)), privacy={"epsilon": 2.0})
    (folder / "experiment.toml").write_text(to_toml(tree))
    for number in range(2):
        arguments = ("--out", folder / f"run-{number}", "--ledger", folder / "ledgers")
        assert confide("simulate", folder / "experiment.toml", *arguments).code == 0
    return folder / "ledgers"


@pytest.fixture
def ledgers(simulated: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(simulated, tmp_path / "ledgers"))


def edit(path: Path, statement: str) -> None:
    """As somebody would who gets at the file."""
    with closing(sqlite3.connect(path)) as db, db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
        db.execute(statement)


def site(folder: Path) -> dict[str, Any]:
    """The one site that `--json` tells of."""
    answer = confide("site", "ledger", folder, "--json")
    assert (answer.code, answer.err, answer.out.count("\n")) == (0, "", 1)
    (found,) = answer.last_line["sites"]
    assert isinstance(found, dict)
    return found


def event(steps: int, role: Role = Role.TRAIN, sigma: float = 4.0) -> PrivacyEvent:
    return PrivacyEvent(
        role=role, unit="subject", noise_multiplier=sigma, sample_rate=0.2, steps=steps, max_grad_norm=1.0
    )


# --- what is told ----------------------------------------------------------------------------------------------------


def test_it_tells_the_same_numbers_as_the_ledger_and_looking_changes_no_file(simulated: Path) -> None:
    before = files_under(simulated)
    answer = confide("site", "ledger", simulated / "ash")
    found = site(simulated / "ash")
    assert files_under(simulated) == before, "nothing was made, nothing was changed, not even for a moment's log"
    ledger = Ledger.open(simulated / "ash" / "ledger.db")
    assert (answer.code, answer.err) == (0, "")
    for role in Role:
        told = next(r for r in found["roles"] if r["role"] == role.value)
        charges = [e for e in ledger.charges().values() if e.role is role]
        assert told == {
            "role": role.value, "epsilon": ledger.epsilon(role), "used": ledger.budget.used(ledger.events(role)),
            "charges": len(charges), "open_charges": 0,  # they have expired with their run: they stand whole
        }  # fmt: skip
        assert (
            f"{role.value.replace('_', ' ')} {told['epsilon']:.3f} {told['used']:.1%} {len(charges)} 0" in answer.words
        )
    for line in (
        TITLE, "unit subject; neighbours: add or remove one subject", "limit ε = 8 at δ = 1e-05",
        "RDP filter: sound although later runs are chosen after seeing earlier ones",
        "PRV: this run alone, its parameters fixed beforehand",
    ):  # fmt: skip
        assert line in answer.words
    ledger.close()


def test_each_run_is_told_with_what_it_cost_alone(simulated: Path) -> None:
    """Against what the runs themselves said."""
    results = [json.loads((simulated.parent / f"run-{n}" / "result.json").read_text()) for n in range(2)]
    found = site(simulated / "ash")["runs"]
    assert [r["run"] for r in found] == [r["run_id"] for r in results]
    for told, result in zip(found, results, strict=True):
        assert told["epsilon"] == result["epsilon"]["per_site"]["ash"]
        assert told["rounds"] == [1, 2, 3, 4]
        train, held_out = told["roles"]
        assert (train["role"], train["steps"], train["sample_rate"]) == ("train", 12, 0.3)
        assert (held_out["role"], held_out["steps"], held_out["sample_rate"]) == ("held_out", 2, 1.0)
        line = f"{told['run']} 4 (1–4) train {train['noise_multiplier']:g} 0.3 12 {told['epsilon']:.3f}"
        assert line in confide("site", "ledger", simulated / "ash").words


def test_the_persons_are_told_as_a_distribution_and_nobody_of_them(simulated: Path) -> None:
    found, folder = site(simulated / "ash")["persons"], simulated / "ash"
    ledger, losses = Ledger.open(folder / "ledger.db"), PersonalLosses.open(folder / "personal.db")
    epsilons = sorted(losses.epsilons(ledger.charges(), DELTA))
    assert found["enrolled"] == len(epsilons) == 40
    assert found["never_exposed"] == sum(e == 0 for e in epsilons) > 0, "those who do not consent"
    assert list(found["quantiles"]) == ["0", "25", "50", "75", "90", "100"]
    for percent, value in found["quantiles"].items():
        assert value in epsilons
        assert sum(e <= value for e in epsilons) >= int(percent) / 100 * len(epsilons)
    assert sum(n for _, _, n in found["histogram"]) == 40 - found["never_exposed"]
    assert found["quantiles"]["100"] == found["at_most"] == pytest.approx(max(ledger.epsilon(r) for r in Role))
    assert (found["recorded"], found["unnoted_charges"], found["uncharged_notes"]) == (True, 0, 0)
    key, said = SiteKey.load_or_create(folder / "site.key", b""), confide("site", "ledger", folder)
    told = said.out + said.err + confide("site", "ledger", folder, "--json").out
    persons = {p for p in read_table(simulated.parent / "people.csv")["person"] if p.startswith("ash-")}
    assert len(persons) == 40
    for person in persons:
        assert person not in told
        assert key.locator(person).hex()[:16] not in told
    ledger.close()
    losses.close()


def test_a_folder_of_several_sites_is_told_site_by_site(simulated: Path) -> None:
    answer = confide("site", "ledger", simulated)
    assert [line.split()[3] for line in answer.out.splitlines() if line.startswith("Privacy ledger of")] == [
        f"{name}:" for name in SITES
    ]
    assert [s["site"] for s in confide("site", "ledger", simulated, "--json").last_line["sites"]] == list(SITES)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_no_line_is_broken_within_a_number(simulated: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = confide("site", "ledger", simulated).out.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert sum(line.startswith("tiny-") and "train" in line for line in lines) == 2 * len(SITES)


def test_a_run_whose_parameters_changed_on_the_way_has_no_epsilon_of_its_own(tmp_path: Path) -> None:
    """And a settled charge counts at what is left of it, a name of another form as a run of its own."""
    ledger = Ledger(tmp_path / "ledger.db", RenyiBudget.for_limit(8.0, DELTA))
    ledger.reserve("steady/1/train", event(10))
    ledger.reserve("steady/3/train", event(10))
    ledger.settle("steady/3/train", 4)
    ledger.reserve("mixed/1/train", event(1))
    ledger.reserve("mixed/2/train", event(1, sigma=8.0))
    ledger.reserve("statistics", event(2))
    ledger.close()
    found = site(tmp_path)
    assert [(r["run"], r["rounds"], r["epsilon"]) for r in found["runs"]] == [
        ("steady", [1, 3], run_epsilon(event(14), DELTA)),
        ("mixed", [1, 2], None),
        ("statistics", [], run_epsilon(event(2), DELTA)),
    ]
    assert found["runs"][1]["roles"] == [{"role": "train", "steps": 2, "noise_multiplier": None, "sample_rate": None}]
    assert (found["roles"][0]["charges"], found["roles"][0]["open_charges"]) == (5, 4)
    words = confide("site", "ledger", tmp_path).words
    assert "steady 2 (1, 3) train 4 0.2 14" in words
    assert "mixed 2 (1–2) train mixed mixed 2 —" in words


def test_a_ledger_without_a_charge_says_so(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.db", RenyiBudget.for_limit(8.0, DELTA)).close()
    PersonalLosses(tmp_path / "personal.db").close()
    assert "nothing was charged yet" in confide("site", "ledger", tmp_path).words
    assert site(tmp_path)["persons"]["at_most"] == 0.0


# --- a record of persons that does not match the ledger --------------------------------------------------------------


def test_without_a_record_of_persons_everybody_counts_as_held_by_everything(ledgers: Path) -> None:
    (ledgers / "ash" / "personal.db").unlink()
    before = files_under(ledgers)
    found, words = site(ledgers / "ash"), confide("site", "ledger", ledgers / "ash").words
    assert found["persons"]["recorded"] is False
    assert found["persons"]["at_most"] == max(r["epsilon"] for r in found["roles"]) > 0
    assert found["persons"]["unnoted_charges"] == sum(r["charges"] for r in found["roles"])
    assert "personal.db is missing" in words
    assert files_under(ledgers) == before


def test_a_record_that_is_newer_than_the_ledger_makes_nobody_fresh(ledgers: Path) -> None:
    """It was lost, and the next run made a new one: the charges before it count for everybody of their role."""
    path = ledgers / "ash" / "personal.db"
    path.unlink()
    losses = PersonalLosses(path)
    losses.enrol([bytes([i]) * 32 for i in range(6)])
    losses.close()
    found = site(ledgers / "ash")
    worst = max(r["epsilon"] for r in found["roles"])
    assert found["persons"]["enrolled"] == 6
    assert found["persons"]["never_exposed"] == 0
    assert list(found["persons"]["quantiles"].values()) == pytest.approx([worst] * 6)
    words = confide("site", "ledger", ledgers / "ash").words
    assert "10 charges have no note of whom they held" in words


def test_an_older_copy_of_the_ledger_is_noticed_by_what_persons_were_held_by(ledgers: Path) -> None:
    edit(ledgers / "ash" / "ledger.db", "DELETE FROM entry WHERE seq > 5")
    assert site(ledgers / "ash")["persons"]["uncharged_notes"] == 5
    assert "every ε here is too low" in confide("site", "ledger", ledgers / "ash").words


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_holds_no_ledger_is_refused_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    before = files_under(tmp_path)
    for name, what in (("none", "no such folder"), ("file", "no such folder"), ("empty", "neither holds a privacy")):
        answer = confide("site", "ledger", tmp_path / name)
        assert (answer.code, answer.out) == (2, "")
        assert what in answer.err
        assert "→ name a site's ledger folder" in answer.err
    assert files_under(tmp_path) == before


GENESIS = "UPDATE genesis SET content = "


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE entry SET event = replace(event, '\"steps\":4', '\"steps\":1') WHERE seq = 2", "was edited"),
        ("DELETE FROM entry WHERE seq = 2", "was edited"),
        ("UPDATE entry SET event = replace(event, 'poisson_gaussian', 'laplace')", "unknown privacy event 'laplace'"),
        ("DELETE FROM genesis", "not a readable privacy ledger"),
        (GENESIS + "'{}'", "not a readable privacy ledger"),
        (GENESIS + "'nonsense'", "not a readable privacy ledger"),
        (GENESIS + """replace(content, '"version": 1', '"version": 2')""", "not a readable privacy ledger"),
        (GENESIS + """replace(content, '"epsilon_limit": "8.0"', '"epsilon_limit": "4.0"')""", "not a readable"),
        (GENESIS + """replace(content, '"epsilon_limit": "8.0"', '"epsilon_limit": "80.0"')""", "was edited"),
        (GENESIS + """replace(content, '"unit": "subject"', '"unit": "record"')""", "does not fit a ledger per record"),
        ("DROP TABLE entry", "not a readable privacy ledger"),
    ],
)
def test_a_damaged_ledger_is_refused_and_left_as_it_is(ledgers: Path, statement: str, what: str) -> None:
    edit(ledgers / "ash" / "ledger.db", statement)
    before = files_under(ledgers)
    for arguments in ((), ("--json",)):
        answer = confide("site", "ledger", ledgers / "ash", *arguments)
        assert answer.code == 5
        assert what in answer.err
        assert "ledger.db" in answer.err or "privacy ledger" in answer.err
    assert "budget error" in answer.err
    assert "→" in answer.err
    assert answer.last_line["error"]["exit_code"] == 5
    assert files_under(ledgers) == before


@pytest.mark.parametrize("name", ["ledger.db", "personal.db"])
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(ledgers: Path, name: str) -> None:
    (ledgers / "ash" / name).write_bytes(b"this was something once, now it is only bytes on a disk" * 100)
    before = files_under(ledgers)
    answer = confide("site", "ledger", ledgers / "ash")
    assert (answer.code, answer.out) == (5, "")
    assert name in answer.err
    assert files_under(ledgers) == before


def test_it_can_be_read_while_the_site_writes_and_is_seen_up_to_the_last_charge(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db", RenyiBudget.for_limit(8.0, DELTA))
    for number in range(3):
        ledger.reserve(f"run/{number}/train", event(5))
        assert site(tmp_path)["roles"][0]["epsilon"] == rdp_epsilon([event(5 * (number + 1))], DELTA)
    ledger.close()
    assert os.listdir(tmp_path) == ["ledger.db"]


def test_what_is_opened_to_be_read_takes_no_charge(simulated: Path) -> None:
    """The command cannot spend by mistake."""
    before, folder = files_under(simulated), simulated / "ash"
    ledger, losses = Ledger.open(folder / "ledger.db"), PersonalLosses.open(folder / "personal.db")
    with pytest.raises(BudgetError, match="cannot be written"):
        ledger.reserve("new/1/train", event(1))
    with pytest.raises(BudgetError, match="cannot be written"):
        losses.hold("new/1/train", np.array([0]))
    ledger.close()
    losses.close()
    assert files_under(simulated) == before


# --- confide site recover ---------------------------------------------------------------------------------------------


def test_recover_refuses_what_is_no_ledger_and_what_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    log = tmp_path / "site.log"
    log.write_text("not an entry\n")
    assert confide("site", "recover", tmp_path / "empty", "--log", log).code == 2
    assert not list((tmp_path / "empty").iterdir()), "nothing is made"
    ledger = Ledger(tmp_path / "ledger.db", RenyiBudget.for_limit(8.0, 1e-5))
    ledger.close()
    refused = confide("site", "recover", tmp_path, "--log", log)
    assert refused.code == 7
    assert "entry 0" in refused.err
    assert confide("site", "recover", tmp_path, "--log", tmp_path / "nowhere.log").code == 2
