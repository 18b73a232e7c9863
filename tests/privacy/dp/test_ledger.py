"""The ledger: on the disk before anything leaves, a filter for every sequence, and refusing what was edited."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import BudgetError
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role, rdp_epsilon
from confide.privacy.dp.events import event_from_json, event_to_json

BUDGET = RenyiBudget.for_limit(4.0, 1e-5)


def event(steps: int = 10, sigma: float = 2.0, q: float = 0.2, role: Role = Role.TRAIN) -> PrivacyEvent:
    return PrivacyEvent(
        role=role, unit="subject", noise_multiplier=sigma, sample_rate=q, steps=steps, max_grad_norm=1.0
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def open_ledger(path: Path) -> Iterator[Callable[..., Ledger]]:
    opened: list[Ledger] = []

    def open_(budget: RenyiBudget = BUDGET, unit: str = "subject") -> Ledger:
        opened.append(Ledger(path, budget, unit))
        return opened[-1]

    yield open_
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_ledger: Callable[..., Ledger]) -> Ledger:
    return open_ledger()


def rows(path: Path) -> list[tuple[str, str, int]]:
    """(charge, kind, steps) as they lie in the file, read by somebody else."""
    with closing(sqlite3.connect(path)) as db:
        found = db.execute("SELECT charge, kind, event FROM entry ORDER BY seq").fetchall()
    return [(charge, kind, event_from_json(text).steps) for charge, kind, text in found]


CHARGE_THEN_HANG = """
import sys, time
from pathlib import Path
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role
ledger = Ledger(Path(sys.argv[1]), RenyiBudget.for_limit(4.0, 1e-5))
ledger.reserve("run/1/train", PrivacyEvent(
    role=Role.TRAIN, unit="subject", noise_multiplier=2.0, sample_rate=0.2, steps=10, max_grad_norm=1.0))
print("reserved", flush=True)
time.sleep(60)
"""


def test_a_charge_survives_a_kill_the_moment_after_it_was_made(path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHARGE_THEN_HANG, str(path)], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "reserved\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    with closing(Ledger(path, BUDGET)) as reopened:
        assert reopened.events(Role.TRAIN) == [event()]
        assert list(reopened.open_charges("run/1/")) == ["run/1/train"]


def test_every_commit_waits_for_the_disk(ledger: Ledger) -> None:
    """A process that is killed loses nothing either way; a machine that loses power would without this."""
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_charge_is_in_the_file_when_reserve_returns(ledger: Ledger, path: Path) -> None:
    ledger.reserve("a", event())
    assert rows(path) == [("a", "reserve", 10)]


def test_charges_are_there_again_after_reopening_and_leave_the_same_share(
    ledger: Ledger, open_ledger: Callable[..., Ledger]
) -> None:
    ledger.reserve("a", event(10))
    ledger.reserve("b", event(5))
    ledger.reserve("c", event(1, 8.0, 1.0, Role.HELD_OUT))
    ledger.settle("b", 2)
    before, epsilon = ledger.used(), ledger.epsilon(Role.TRAIN)
    ledger.close()
    again = open_ledger()
    assert again.used() == before > 0
    assert again.epsilon(Role.TRAIN) == epsilon == rdp_epsilon([event(12)], 1e-5)
    assert again.events(Role.HELD_OUT) == [event(1, 8.0, 1.0, Role.HELD_OUT)]


def test_a_refusal_says_what_is_left_and_what_was_asked_and_charges_nothing(ledger: Ledger, path: Path) -> None:
    ledger.reserve("a", event(20))
    left, asked = 1 - ledger.used(), BUDGET.used([event(10_000)])
    with pytest.raises(BudgetError) as refused:
        ledger.reserve("b", event(10_000))
    text = str(refused.value)
    shares = [float(x) for x in re.findall(r"([\d.]+)%", text)]
    assert shares == [pytest.approx(100 * left, abs=0.06), pytest.approx(100 * asked, rel=0.01)]
    assert f"charged so far ε = {ledger.epsilon(Role.TRAIN):.2f}" in text
    assert "limit ε = 4 at δ = 1e-05" in text
    assert rows(path) == [("a", "reserve", 20)]
    ledger.reserve("c", event(1))  # and a smaller charge is still admitted


def test_a_refused_charge_leaves_the_ledger_usable_and_unlocked(
    ledger: Ledger, open_ledger: Callable[..., Ledger]
) -> None:
    with pytest.raises(BudgetError):
        ledger.reserve("big", event(10**6))
    other = open_ledger()
    other.reserve("a", event())
    ledger.reserve("b", event())
    assert ledger.events(Role.TRAIN) == [event(20)]


def test_roles_compose_in_parallel_because_a_person_holds_one(ledger: Ledger) -> None:
    most = 0
    while BUDGET.admits([event(most + 1)]):
        most += 1
    ledger.reserve("train", event(most))
    ledger.reserve("held out", event(most, role=Role.HELD_OUT))
    assert ledger.used() <= 1.0
    for role in Role:
        with pytest.raises(BudgetError, match="does not suffice"):
            ledger.reserve(f"one more for {role}", event(1, role=role))


def test_a_charge_settles_downwards_only(ledger: Ledger, path: Path) -> None:
    ledger.reserve("a", event(10))
    for steps in (11, -1):
        with pytest.raises(BudgetError, match="cannot be settled"):
            ledger.settle("a", steps)
    with pytest.raises(BudgetError, match="cannot be settled"):
        ledger.settle("unknown", 0)
    ledger.settle("a", 4)
    assert ledger.events(Role.TRAIN) == [event(4)]
    for steps in (0, 5):
        with pytest.raises(BudgetError, match="settled already"):
            ledger.settle("a", steps)
    assert rows(path) == [("a", "reserve", 10), ("a", "settle", 4)]


def test_repeating_what_was_done_changes_nothing(ledger: Ledger, path: Path) -> None:
    for _ in range(3):
        ledger.reserve("a", event(10))
    assert ledger.events(Role.TRAIN) == [event(10)]
    for _ in range(3):
        ledger.settle("a", 4)
    assert rows(path) == [("a", "reserve", 10), ("a", "settle", 4)]
    assert list(ledger.open_charges("a")) == []


def test_the_same_charge_with_other_parameters_is_refused(ledger: Ledger) -> None:
    ledger.reserve("a", event(10))
    for other in (event(11), event(10, sigma=3.0), event(10, role=Role.HELD_OUT)):
        with pytest.raises(BudgetError, match="exists with other parameters"):
            ledger.reserve("a", other)


def test_an_expired_charge_stands_whole_for_ever(ledger: Ledger, path: Path) -> None:
    ledger.reserve("a/1", event(10))
    ledger.reserve("a/2", event(10))
    ledger.reserve("b/1", event(10))
    ledger.settle("a/2", 4)
    used = ledger.used()
    for _ in range(2):
        ledger.expire("a/")
    assert ledger.used() == used
    assert rows(path)[3:] == [("a/2", "settle", 4), ("a/1", "expire", 10)]
    with closing(Ledger(path, BUDGET)) as reopened:
        for opened in (ledger, reopened):
            assert list(opened.open_charges("")) == ["b/1"]
            assert opened.stands("a/1")
            with pytest.raises(BudgetError, match="has expired"):
                opened.settle("a/1", 0)
            assert opened.used() == used
    ledger.settle("b/1", 0)
    assert ledger.used() < used, "the control: one that has not expired is given back"
    assert not ledger.stands("b/")


def test_a_charge_that_was_settled_cannot_be_drawn_on_again(ledger: Ledger) -> None:
    """Else: reserve, settle to nothing, 'reserve' again for free, release."""
    ledger.reserve("a", event(10))
    ledger.settle("a", 0)
    assert ledger.used() == 0.0
    with pytest.raises(BudgetError, match="settled"):
        ledger.reserve("a", event(10))


def test_a_charge_of_nothing_is_refused(ledger: Ledger) -> None:
    with pytest.raises(BudgetError, match="at least one step"):
        ledger.reserve("a", event(0))


@pytest.mark.parametrize("statement", ["UPDATE entry SET kind = 'settle'", "DELETE FROM entry", "DELETE FROM genesis"])
def test_the_database_refuses_to_change_an_entry(ledger: Ledger, path: Path, statement: str) -> None:
    ledger.reserve("a", event())
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE entry SET event = replace(event, '\"steps\":10', '\"steps\":1') WHERE seq = 2",
        'UPDATE entry SET event = replace(event, \'"noise_multiplier":"2.0"\', \'"noise_multiplier":"20.0"\')',
        "UPDATE entry SET charge = 'z' WHERE seq = 1",
        "UPDATE entry SET chain = zeroblob(32) WHERE seq = 3",
        "DELETE FROM entry WHERE seq = 1",
        "DELETE FROM entry WHERE seq = 2",
        "UPDATE entry SET seq = 9 WHERE seq = 3",
        "UPDATE entry SET event = '{}' WHERE seq = 1",
        'UPDATE genesis SET content = replace(content, \'"epsilon_limit": "4.0"\', \'"epsilon_limit": "40.0"\')',
    ],
)
def test_an_edited_ledger_is_refused_when_it_is_opened(
    ledger: Ledger, open_ledger: Callable[..., Ledger], path: Path, edit: str
) -> None:
    for name in "abc":
        ledger.reserve(name, event())
    ledger.close()
    open_ledger().close()  # control: untouched, it opens
    with closing(sqlite3.connect(path)) as db, db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
        assert db.execute(edit).rowcount >= 1
    with pytest.raises(BudgetError):
        open_ledger()


def test_a_file_that_is_no_ledger_is_refused_and_not_replaced(path: Path) -> None:
    content = b"this was a privacy ledger once, now it is only bytes on a disk" * 100
    path.write_bytes(content)
    with pytest.raises(BudgetError, match="is not a readable privacy ledger"):
        Ledger(path, BUDGET)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("budget", "unit", "what"),
    [
        (RenyiBudget.for_limit(8.0, 1e-5), "subject", "epsilon_limit = 4.0"),
        (RenyiBudget.for_limit(4.0, 1e-6), "subject", "delta = 1e-05"),
        (BUDGET, "record", "unit = subject"),
    ],
)
def test_a_ledger_keeps_the_limit_delta_and_unit_it_was_made_with(
    ledger: Ledger, open_ledger: Callable[..., Ledger], budget: RenyiBudget, unit: str, what: str
) -> None:
    ledger.reserve("a", event())
    with pytest.raises(BudgetError, match="fixed for the ledger's lifetime") as refused:
        open_ledger(budget, unit)
    assert what in str(refused.value)
    assert open_ledger().events(Role.TRAIN) == [event()]


_SPEND_ALL = """
import sys, time
from pathlib import Path
from confide.errors import BudgetError
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role
ledger = Ledger(Path(sys.argv[1]), RenyiBudget.for_limit(4.0, 1e-5))
event = PrivacyEvent(
    role=Role.TRAIN, unit="subject", noise_multiplier=8.0, sample_rate=0.2, steps=10, max_grad_norm=1.0)
print("ready", flush=True)
sys.stdin.readline()
admitted = 0
try:
    while True:
        ledger.reserve(f"{sys.argv[2]}/{admitted}", event)
        admitted += 1
        time.sleep(0.002)  # lets the other one in
except BudgetError as error:
    print(admitted, "does not suffice" in str(error), flush=True)
"""


def test_two_processes_that_charge_at_the_same_time_never_overspend(path: Path) -> None:
    command = [sys.executable, "-c", _SPEND_ALL, str(path)]
    pipe = subprocess.PIPE
    writers = [subprocess.Popen([*command, name], stdin=pipe, stdout=pipe, text=True) for name in "ab"]
    admitted = []
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        output, _ = writer.communicate(timeout=60)
        count, refused_for_budget = output.split()
        assert refused_for_budget == "True"
        admitted.append(int(count))
    assert min(admitted) > 0  # both did write
    with closing(Ledger(path, BUDGET)) as ledger:
        assert sum(e.steps for e in ledger.events(Role.TRAIN)) == 10 * sum(admitted)
        assert ledger.used() <= 1.0 < ledger.used([event(10, sigma=8.0)])


CHARGES = st.tuples(
    st.integers(1, 150),
    st.sampled_from([0.5, 1.0, 3.0, 20.0]),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.sampled_from(Role),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CHARGES, st.none() | st.integers(0, 150)), max_size=10))
def test_no_sequence_of_charges_and_settlements_spends_more_than_the_budget(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[tuple[int, float, float, Role], int | None]]
) -> None:
    path, held = tmp_path_factory.mktemp("ledger") / "ledger.db", dict[str, PrivacyEvent]()
    with closing(Ledger(path, BUDGET)) as ledger:
        for i, (charge, settle_to) in enumerate(steps):
            asked = event(*charge)
            mine = [e for e in held.values() if e.role is asked.role]
            try:
                ledger.reserve(str(i), asked)
            except BudgetError:
                assert not BUDGET.admits([*mine, asked])  # refused only where it must be
                continue
            held[str(i)] = asked
            if settle_to is not None and settle_to <= asked.steps:
                ledger.settle(str(i), settle_to)
                held[str(i)] = event(settle_to, *charge[1:])
    with closing(Ledger(path, BUDGET)) as ledger:
        assert ledger.used() <= 1.0
        for role in Role:
            mine = [e for e in held.values() if e.role is role]
            assert BUDGET.used(mine) == pytest.approx(BUDGET.used(ledger.events(role)))
            assert BUDGET.used(mine) <= 1.0
            assert ledger.epsilon(role) <= 4.0 * (1 + 1e-9)


@given(CHARGES)
def test_an_event_reads_back_as_it_was_written(charge: tuple[int, float, float, Role]) -> None:
    assert event_from_json(event_to_json(event(*charge))) == event(*charge)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"role":"train"}',
        event_to_json(event()).replace("poisson_gaussian", "laplace"),
        event_to_json(event()).replace('"subject"', '"household"'),
        event_to_json(event()).replace('"0.2"', '"1.2"'),
        event_to_json(event()).replace('"2.0"', '"nan"'),
        event_to_json(event()).replace('"2.0"', '"0.0"'),
        event_to_json(event())[:-1] + ',"tau":1}',
    ],
)
def test_an_event_that_cannot_be_understood_is_never_counted_as_nothing(text: str) -> None:
    with pytest.raises(BudgetError):
        event_from_json(text)
