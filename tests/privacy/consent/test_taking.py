"""Taking the snapshot of a round: one question, of which the present is durable first; and whatever comes between."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import bindparam, select, update

from confide.errors import AuditError, ConsentError
from confide.privacy.consent import ConsentEvent, EventType, Registry, SiteKey, now_micros, storage
from confide.privacy.consent.bulk import driver
from confide.privacy.consent.present import Present
from confide.privacy.consent.roll import Roll
from confide.privacy.consent.statements import Change, Query
from confide.privacy.consent.tables import CLOCK
from tests.privacy.consent.conftest import KEY, raw
from tests.privacy.test_full_disk import no_space

PURPOSE = "research/test"


def make(event_id: str, pseudonym: bytes, kind: EventType = EventType.GIVEN, at: int = 10) -> ConsentEvent:
    return ConsentEvent(event_id=event_id, pseudonym=pseudonym, purpose=PURPOSE, type=kind, effective_at=at)


def present(recorded: int) -> int:
    return max(now_micros(), recorded)


def taken_at(address: Path | str) -> int:
    """What another program finds on record."""
    with raw(address) as db:
        ((latest,),) = db.execute("SELECT latest FROM consent_clock").fetchall()
        return int(latest)


@pytest.fixture
def people(registry: Registry) -> dict[str, bytes]:
    names = registry.enrol(["ann", "bob"])
    registry.append([make("a", names["ann"]), make("b", names["bob"])])
    return names


def test_what_is_taken_is_the_snapshot_of_its_instant_and_on_record(
    registry: Registry, address: Path | str, people: dict[str, bytes]
) -> None:
    before = registry.latest_recorded()
    told: list[int] = []

    def instant(recorded: int) -> int:
        told.append(recorded)
        return present(recorded)

    snapshot, names = registry.take(PURPOSE, instant, registry.roll(["ann", "bob", "nobody"]))
    assert told == [before]
    assert names == people
    assert set(snapshot.participants) == set(people.values())
    assert snapshot == registry.snapshot(PURPOSE, snapshot.as_of, snapshot.sequence)
    assert taken_at(address) == snapshot.as_of == registry.latest_recorded() >= before


def test_it_is_on_record_before_anything_is_told(
    registry: Registry, address: Path | str, people: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at by another program, at the moment at which the answer is made."""
    seen: list[tuple[int, int]] = []
    real = Present.snapshot

    def look(self: Present, connection: Any, purpose: str, as_of: int, sequence: int | None) -> Any:
        seen.append((as_of, taken_at(address)))
        return real(self, connection, purpose, as_of, sequence)

    monkeypatch.setattr(Present, "snapshot", look)
    registry.take(PURPOSE, present, registry.roll(people))
    ((asked, recorded),) = seen
    assert recorded == asked


def test_a_withdrawal_between_two_questions_counts_in_the_second(registry: Registry, people: dict[str, bytes]) -> None:
    roll = registry.roll(people)
    first, _ = registry.take(PURPOSE, present, roll)
    registry.append([make("c", people["ann"], EventType.WITHDRAWN, registry.now())])
    second, _ = registry.take(PURPOSE, present, roll)
    assert set(first.participants) - set(second.participants) == {people["ann"]}
    assert second.as_of >= first.as_of


WITHDRAW = """
import sys
from pathlib import Path
from confide.privacy.consent import ConsentEvent, EventType, Registry, SiteKey
registry = Registry(sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1]), SiteKey(b"k" * 32))
ann = registry.pseudonyms(["ann"])["ann"]
registry.append([ConsentEvent(event_id="gone", pseudonym=ann, purpose="research/test", type=EventType.WITHDRAWN,
                              effective_at=registry.now())])
registry.close()
"""


def test_a_withdrawal_that_another_process_recorded_after_the_question_began_counts(
    registry: Registry, address: Path | str, people: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the two transactions: the state that is read is the later one."""
    real = Registry._put_forward

    def then_withdrawn(self: Registry, instant: Callable[[int], int]) -> int:
        at = real(self, instant)
        subprocess.run([sys.executable, "-c", WITHDRAW, str(address)], check=True, timeout=60)
        return at

    monkeypatch.setattr(Registry, "_put_forward", then_withdrawn)
    snapshot, _ = registry.take(PURPOSE, lambda recorded: present(recorded) + 60_000_000, registry.roll(people))
    assert set(snapshot.participants) == {people["bob"]}
    assert snapshot.sequence == 3


def test_nobody_records_anything_while_the_instant_is_chosen(
    registry: Registry, address: Path | str, people: dict[str, bytes]
) -> None:
    """So no decision can be on record as of an instant that the snapshot is said to lie behind."""
    done = threading.Event()

    def withdraw() -> None:
        with closing(Registry(address, KEY)) as other:
            other.append([make("c", people["ann"], EventType.WITHDRAWN, other.now())])
        done.set()

    thread = threading.Thread(target=withdraw)
    early: list[bool] = []

    def instant(recorded: int) -> int:
        thread.start()
        early.append(done.wait(0.5))
        return present(recorded)

    snapshot, _ = registry.take(PURPOSE, instant, registry.roll(people))
    thread.join()
    assert early == [False]
    assert done.is_set()  # the control: afterwards it comes through
    with raw(address) as db:
        ((recorded,),) = db.execute("SELECT recorded_at FROM consent_event WHERE event_id = 'c'").fetchall()
    assert recorded >= snapshot.as_of
    assert snapshot.sequence == 2 or people["ann"] not in snapshot.participants


def test_an_instant_that_is_refused_takes_and_records_nothing(
    registry: Registry, address: Path | str, people: dict[str, bytes]
) -> None:
    before = taken_at(address)

    def refuse(recorded: int) -> int:
        raise AuditError("the clock was set back", where="clock", hint="set it right")

    with pytest.raises(AuditError, match="set back"):
        registry.take(PURPOSE, refuse, registry.roll(people))
    assert taken_at(address) == before
    snapshot, _ = registry.take(PURPOSE, present, registry.roll(people))  # and it can be asked again
    assert taken_at(address) == snapshot.as_of > before


def test_where_it_cannot_be_recorded_nothing_is_told(
    registry: Registry, address: Path | str, people: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PATIENCE", 1.0)
    with closing(Registry(address, KEY)) as other:
        with registry._storage.writing(), pytest.raises(ConsentError, match="cannot be written"):
            other.take(PURPOSE, present, other.roll(people))
        assert set(other.take(PURPOSE, present, other.roll(people))[0].participants) == set(people.values())


def test_a_disk_that_takes_no_more_tells_nothing_and_later_answers_again(tmp_path: Path) -> None:
    with closing(Registry(tmp_path / "consent.db", KEY)) as registry:
        names = registry.enrol(["ann"])
        registry.append([make("a", names["ann"])])
        before = taken_at(tmp_path / "consent.db")
        with no_space(), pytest.raises(ConsentError, match="cannot be written"):
            registry.take(PURPOSE, present, registry.roll(names))
        assert registry._storage._idle == []  # what has failed is not used again
        assert taken_at(tmp_path / "consent.db") == before
        snapshot, _ = registry.take(PURPOSE, present, registry.roll(names))
        assert set(snapshot.participants) == set(names.values())
        assert taken_at(tmp_path / "consent.db") == snapshot.as_of > before


# --- transactions on SQLite -------------------------------------------------------------------------------------------


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[storage.Storage]:
    with closing(storage.Storage(tmp_path / "consent.db")) as found:
        yield found


PUT = Change(update(CLOCK).values(latest=bindparam("at")))
GET = Query(select(CLOCK.c.latest))


def read(lite: storage.Storage) -> int:
    with lite.reading() as connection:
        return int(GET.rows(connection)[0][0])


@pytest.mark.parametrize("through", ["driver", "sqlalchemy", "both"])
def test_a_transaction_is_whole_or_undone_whoever_runs_its_statements(lite: storage.Storage, through: str) -> None:
    def change(connection: Any, at: int) -> None:
        if through != "sqlalchemy":
            PUT.apply(connection, at=at)
        if through != "driver":
            connection.execute(update(CLOCK).values(latest=at))

    with lite.writing() as connection:
        change(connection, 5)
    assert read(lite) == 5

    def fail() -> None:
        with lite.writing() as connection:
            change(connection, 6)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert read(lite) == 5
    with lite.writing() as connection:
        change(connection, 7)
    assert read(lite) == 7


def test_a_transaction_that_somebody_ended_inside_is_an_error_and_no_success(lite: storage.Storage) -> None:
    def end_it() -> None:
        with lite.writing() as connection:
            found = driver(connection)
            assert found is not None
            found.rollback()

    with pytest.raises(ConsentError, match="cannot be written"):
        end_it()
    assert read(lite) == 0  # and the next one begins anew


def test_readings_at_once_each_see_one_state(lite: storage.Storage) -> None:
    with lite.reading() as first, lite.reading() as second:
        assert first is not second
        assert GET.rows(first) == GET.rows(second) == [(0,)]
        with lite.writing() as third:
            PUT.apply(third, at=9)
            assert GET.rows(third) == [(9,)]
        assert GET.rows(first) == GET.rows(second) == [(0,)]
    assert read(lite) == 9


def test_a_closed_registry_holds_no_file_open(lite: storage.Storage) -> None:
    with lite.reading(), lite.reading():
        pass
    assert len(lite._idle) == 2
    lite.close()
    assert lite._idle == []
    with closing(sqlite3.connect(lite.where)) as db:
        db.execute("PRAGMA journal_mode=DELETE").fetchall()  # refused while anybody has it open
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


# --- rolls ------------------------------------------------------------------------------------------------------------


def test_a_roll_is_enrolled_but_for_the_erased(registry: Registry) -> None:
    known = registry.enrol(["ann", "bob"])
    registry.erase("bob")
    roll = registry.roll(["ann", "bob", "cem"])
    assert registry.enrol_roll(roll) == registry.erased(["ann", "bob", "cem"]) == {"bob"}
    names = roll.pseudonyms()
    assert names.keys() == {"ann", "cem"}
    assert names["ann"] == known["ann"]
    assert registry.enrol_roll(roll) == {"bob"}
    assert registry.roll(["ann", "bob", "cem"]).pseudonyms() == names


def test_several_processes_enrol_one_roll_alike(registry: Registry, address: Path | str) -> None:
    with closing(Registry(address, KEY)) as other:
        rolls = [asked.roll([f"p{i}" for i in range(50)]) for asked in (registry, other)]
        threads = [
            threading.Thread(target=asked.enrol_roll, args=[roll])
            for asked, roll in zip((registry, other), rolls, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert rolls[0].pseudonyms() == rolls[1].pseudonyms()
        assert len(rolls[0].pseudonyms()) == 50


@given(st.lists(st.dictionaries(st.integers(0, 5), st.binary(min_size=32, max_size=32)), min_size=1, max_size=6))
def test_a_roll_says_of_each_state_what_a_new_one_would(states: list[dict[int, bytes]]) -> None:
    """Keys come, go and change; no name outlives its key."""
    key, persons = SiteKey(b"s" * 32), [f"p{i}" for i in range(6)]
    held: dict[bytes, bytes] = {}
    roll = Roll(key, persons, lambda _: dict(held))
    for state in states:
        held = {key.locator(f"p{i}"): personal for i, personal in state.items()}
        expected = {f"p{i}": key.pseudonym(f"p{i}", state[i]) for i in sorted(state)}
        found = roll.pseudonyms()
        assert list(found.items()) == list(expected.items())
        found.clear()  # what was told is the asker's own
        assert roll.pseudonyms() == expected


def test_however_many_ask_at_once_an_erasure_afterwards_is_finished(tmp_path: Path) -> None:
    """More than any pool of connections would hold."""
    registry, many = Registry(tmp_path / "consent.db", KEY), 40
    registry.append([make("a", registry.enrol(["ann"])["ann"])])
    all_here = threading.Barrier(many)
    heads: list[int] = []

    def ask() -> None:
        with registry._storage.reading():
            all_here.wait(60)
            heads.append(registry.head())

    threads = [threading.Thread(target=ask) for _ in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heads == [1] * many
    assert registry._storage.tidy()
    registry.close()


def test_a_connection_in_use_while_the_registry_is_closed_is_closed_after_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "consent.db", KEY)
    with registry._storage.reading() as connection:
        registry.close()
    assert connection.closed
    assert not (tmp_path / "consent.db-wal").exists()
