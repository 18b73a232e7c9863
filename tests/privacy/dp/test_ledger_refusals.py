"""What a ledger does not know it refuses: events, units, rows, genesis; and opening one to read it changes nothing."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from confide.errors import BudgetError
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role
from confide.privacy.dp.events import event_to_json
from tests.privacy.dp.test_ledger import CHARGE_THEN_HANG, rows

BUDGET = RenyiBudget.for_limit(4.0, 1e-5)


def event(steps: int = 10, sigma: float = 2.0) -> PrivacyEvent:
    return PrivacyEvent(
        role=Role.TRAIN, unit="subject", noise_multiplier=sigma, sample_rate=0.2, steps=steps, max_grad_norm=1.0
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path, BUDGET)) as made:
        yield made


# --- what is not known is never charged, and nothing is charged on top of it ----------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"mechanism": "laplace"}, {"unit": "household"}, {"noise_multiplier": 0.0}, {"noise_multiplier": math.nan},
        {"sample_rate": 0.0}, {"sample_rate": 1.5}, {"steps": -1}, {"steps": 2.5}, {"steps": True},
        {"max_grad_norm": 0.0},
    ],
)  # fmt: skip
def test_an_event_of_another_mechanism_or_unit_or_out_of_range_cannot_be_made(changed: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        replace(event(), **changed)


def test_a_charge_per_another_unit_is_refused_before_anything_is_written(ledger: Ledger, path: Path) -> None:
    """A record's loss added to a person's would be believed to be the person's."""
    ledger.reserve("a", event())
    before = path.read_bytes(), rows(path), ledger.charges()
    for refuse in (lambda e: ledger.reserve("b", e), lambda e: ledger.check([event(1), e])):
        with pytest.raises(BudgetError, match="a charge per record does not fit a ledger per subject"):
            refuse(replace(event(), unit="record"))
    assert (path.read_bytes(), rows(path), ledger.charges()) == before
    ledger.reserve("b", event())  # the control: the ledger's own unit


def append_by_hand(path: Path, charge: str, kind: str, text: str) -> None:
    """A row that follows from the one before, as another version, or whoever knows the chain, would write it."""
    with closing(sqlite3.connect(path)) as db, db:
        seq, tip = db.execute("SELECT seq, chain FROM entry ORDER BY seq DESC LIMIT 1").fetchone()
        chain = hashlib.sha256(tip + f"{seq + 1}\n{charge}\n{kind}\n{text}".encode()).digest()
        db.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?)", (seq + 1, charge, kind, text, chain))


def all_rows(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT * FROM entry ORDER BY seq").fetchall()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("reserve", event_to_json(event()).replace("poisson_gaussian", "laplace")),
        ("reserve", event_to_json(event()).replace('"subject"', '"record"')),
        ("reserve", event_to_json(event())[:-1] + ',"tau":1}'),
        ("reserve", event_to_json(event()).replace("add_or_remove_one", "substitute_one")),
        ("reserve", event_to_json(event()).replace('"neighbours":"add_or_remove_one",', "")),
        ("reserve", '{"mechanism":"of tomorrow"}'),
        ("settle", event_to_json(event(1, sigma=4.0))),  # less noise was reserved than is settled
        ("settle", event_to_json(event(11))),
        ("expire", event_to_json(event(3))),  # what expires stands as it was reserved
    ],
)
def test_a_ledger_that_holds_what_it_cannot_read_refuses_every_further_charge(
    ledger: Ledger, path: Path, kind: str, text: str
) -> None:
    """Whether it was open when the row came, or is opened afterwards; the file stays as it is."""
    ledger.reserve("a", event())
    append_by_hand(path, "b" if kind == "reserve" else "a", kind, text)
    before = all_rows(path)
    for number in range(3):
        with pytest.raises(BudgetError) as refused:
            ledger.reserve(f"more-{number}", event(1))
        assert str(path) in str(refused.value)
        with pytest.raises(BudgetError):
            ledger.settle("a", 0)
    for open_ in (lambda: Ledger(path, BUDGET), lambda: Ledger.open(path)):
        with pytest.raises(BudgetError):
            open_()
    assert all_rows(path) == before


def test_the_control_a_row_by_hand_that_can_be_read_is_counted(ledger: Ledger, path: Path) -> None:
    ledger.reserve("a", event())
    append_by_hand(path, "b", "reserve", event_to_json(event(3)))
    ledger.reserve("c", event(1))
    assert ledger.events(Role.TRAIN) == [event(14)]


# --- opened to be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["subject", "record"])
def test_an_existing_ledger_says_itself_what_it_was_made_with(path: Path, unit: Any) -> None:
    budget = RenyiBudget.for_limit(3.0, 1e-6)
    with closing(Ledger(path, budget, unit, held_out=0.1)) as made:
        made.reserve("a", replace(event(), unit=unit))
        with closing(Ledger.open(path)) as found:
            assert (found.budget, found.unit, found.held_out) == (budget, unit, 0.1)
            assert found.charges() == made.charges()
            assert (found.used(), found.epsilon(Role.TRAIN)) == (made.used(), made.epsilon(Role.TRAIN))


def test_a_ledger_that_is_not_there_is_not_made_by_opening_it(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="there is no such privacy ledger"):
        Ledger.open(tmp_path / "ledger.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"limits": ["99.0"]},
        {"orders": [], "limits": []},
        {"orders": ["1.0"]},
        {"limits": ["nan"]},
        {"delta": "0.0"},
        {"held_out": "1.5"},
        {"unit": "household"},
        {"version": 2},
        {"more": 1},
    ],
)
def test_a_genesis_that_does_not_keep_its_own_promise_is_refused(
    tmp_path: Path, path: Path, changed: dict[str, Any]
) -> None:
    """No charge follows it, so no chain tells: only what it says can."""
    Ledger(path, BUDGET).close()
    with closing(sqlite3.connect(path)) as db, db:
        (text,) = db.execute("SELECT content FROM genesis").fetchone()
        db.execute("DROP TRIGGER genesis_no_update")
        db.execute("UPDATE genesis SET content = ?", (json.dumps({**json.loads(text), **changed}, sort_keys=True),))
    with pytest.raises(BudgetError, match="is not a readable privacy ledger"):
        Ledger.open(path)


def test_what_a_killed_site_left_in_its_write_ahead_log_is_read_too(path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHARGE_THEN_HANG, str(path)], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "reserved\n"
        child.kill()
    log = path.with_name("ledger.db-wal").read_bytes()
    assert log  # the control: the charge is not in the file itself yet
    with closing(Ledger.open(path)) as found:
        assert found.events(Role.TRAIN) == [event()]
    assert path.with_name("ledger.db-wal").read_bytes() == log
