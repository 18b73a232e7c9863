"""Processes that use one ledger at the same time: together they are never admitted to more than the budget."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from pathlib import Path

import pytest

from confide.privacy.dp import Ledger, RenyiBudget, Role
from confide.privacy.dp.personal import PersonalLosses
from tests.clients.conftest import Stage
from tests.clients.killing import PIECE, SHARED


def told(folder: Path, kind: str = "admitted") -> dict[int, list[str]]:
    """What each process told."""
    return {int(f.name.rpartition("-")[2]): f.read_text().splitlines() for f in folder.glob(f"{kind}-*")}


def admitted(folder: Path) -> set[str]:
    """Charges that some process was told to be admitted."""
    return {line for lines in told(folder).values() for line in lines if not line.startswith("refused")}


def ends(folder: Path) -> list[int]:
    """How each process ended, as `waitpid` tells it."""
    return json.loads((folder / "ends.json").read_text())


def test_processes_that_charge_at_the_same_time_share_one_budget(stage: Stage) -> None:
    (folder,) = stage.play({"together": "reserve until refused", "processes": 4})
    assert ends(folder) == [0, 0, 0, 0]
    lines = told(folder)
    assert all("does not suffice" in lines[number][-1] for number in range(4))
    with closing(Ledger(folder / "ledger.db", SHARED)) as ledger:
        assert set(ledger.charges()) == admitted(folder)
        assert ledger.used() <= 1.0 < ledger.used([PIECE]), "all of it, and no more"
    assert sum(len(told) > 1 for told in lines.values()) > 1, "the control: they did take turns"


@pytest.mark.parametrize("broken", [False, True], ids=["as it is", "with a look at the budget before the lock"])
def test_one_of_four_processes_gets_the_last_piece(stage: Stage, broken: bool) -> None:
    folders = stage.play(*[{"together": "take the last", "processes": 4, "broken": broken}] * 6)
    for folder in folders:
        assert ends(folder) == [0, 0, 0, 0]
        with closing(Ledger(folder / "ledger.db", SHARED)) as ledger:
            assert set(ledger.charges()) == admitted(folder) | {"before"}
            assert (ledger.used() > 1.0) == broken
        assert len(admitted(folder)) == (4 if broken else 1)


def test_a_process_that_is_killed_in_the_middle_of_a_charge_holds_nobody_up(stage: Stage) -> None:
    """It had the lock, its row was written, and three others were waiting."""
    (folder,) = stage.play({"together": "reserve until refused", "processes": 4, "one dies": True})
    assert ends(folder) == [signal.SIGKILL, 0, 0, 0]
    assert told(folder)[0] == ["0/1", "0/2"]
    with closing(Ledger(folder / "ledger.db", SHARED)) as ledger:
        assert set(ledger.charges()) == admitted(folder)
        assert ledger.used() <= 1.0 < ledger.used([PIECE])


def test_two_runs_at_the_same_time_with_one_ledger_do_not_exceed_its_limit(stage: Stage) -> None:
    """Each of them alone is admitted; both are not."""
    alone, together = stage.play(*({"together": "run a federation", "processes": n} for n in (1, 2)))
    assert told(alone, "said") == {0: ["finished"]}, "the control: there is enough for one"
    assert ends(together) == [0, 0]
    said = {lines[0].partition(":")[0] for lines in told(together, "said").values()}
    assert said <= {"finished", "BudgetError", "PeerError"}
    assert said != {"finished"}
    for site in (together / "ledgers").iterdir():
        with closing(Ledger(site / "ledger.db", RenyiBudget.for_limit(3.0, 1e-5), held_out=0.25)) as ledger:
            assert 0 < ledger.used() <= 1.0
            assert max(ledger.epsilon(role) for role in Role) <= 3.0


@pytest.mark.parametrize("later", [[b"new"], [b"newer"]], ids=["the same person", "somebody else"])
def test_persons_that_two_processes_enrol_at_the_same_time_have_places_of_their_own(
    tmp_path: Path, later: list[bytes]
) -> None:
    def open_() -> PersonalLosses:
        return PersonalLosses(tmp_path / "personal.db")

    with closing(open_()) as one, closing(open_()) as other:
        places = {b"new": int(one.enrol([b"new"])[0])}
        found = int(other.enrol(later)[0])
        assert (found == places[b"new"]) == (later == [b"new"])
        with closing(open_()) as read:
            assert read.enrol(later).tolist() == [found]
