"""The registry: append-only, reproducible, whole or not at all, and refusing what it cannot read."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import ConsentError
from confide.privacy.consent import ConsentEvent, EventType, Registry, SiteKey, decide

PURPOSE = "research/test"
KEY = SiteKey(b"k" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "consent.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    found = Registry(path, KEY)
    yield found
    found.close()


def make(event_id: str, pseudonym: bytes, kind: EventType = EventType.GIVEN, effective_at: int = 10) -> ConsentEvent:
    return ConsentEvent(event_id=event_id, pseudonym=pseudonym, purpose=PURPOSE, type=kind, effective_at=effective_at)


def one_person(registry: Registry, name: str = "ann") -> bytes:
    return registry.enrol([name])[name]


def known(registry: Registry, names: list[str]) -> dict[str, bytes]:
    """Pseudonyms of those names that the registry knows."""
    return registry.pseudonyms({name: KEY.locator(name) for name in names})


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE consent_event SET type = 'given'",
        "UPDATE consent_event SET effective_at = 0 WHERE event_id = 'no'",
        "DELETE FROM consent_event",
        "DELETE FROM consent_event WHERE event_id = 'no'",
        # SQLite's REPLACE deletes the row that is in the way without asking a DELETE trigger.
        "REPLACE INTO consent_event SELECT seq, event_id, pseudonym, purpose, 'given', effective_at, valid_until, "
        "notice_digest, lawful_basis, jurisdiction, evidence_ref, max_epsilon, recorded_at FROM consent_event "
        "WHERE event_id = 'no'",
        "UPDATE OR REPLACE consent_event SET seq = 1 WHERE seq = 2",
    ],
)
def test_the_database_itself_refuses_to_change_an_event(registry: Registry, path: Path, statement: str) -> None:
    ann = one_person(registry)
    registry.append([make("yes", ann), make("no", ann, EventType.WITHDRAWN, 20)])
    with closing(sqlite3.connect(path)) as db:
        before = db.execute("SELECT * FROM consent_event ORDER BY seq").fetchall()
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)
        db.commit()
        assert db.execute("SELECT * FROM consent_event ORDER BY seq").fetchall() == before
    assert registry.snapshot(PURPOSE, 30).participants == {}


def test_without_the_triggers_the_same_statement_does_change_it(registry: Registry, path: Path) -> None:
    """The control: it is the triggers that hold, not SQLite."""
    ann = one_person(registry)
    registry.append([make("yes", ann), make("no", ann, EventType.WITHDRAWN, 20)])
    with closing(sqlite3.connect(path)) as db, db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        db.execute("DELETE FROM consent_event WHERE event_id = 'no'")
    assert set(registry.snapshot(PURPOSE, 30).participants) == {ann}


def test_the_triggers_come_back_when_the_registry_is_opened(registry: Registry, path: Path) -> None:
    registry.append([make("yes", one_person(registry))])
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TRIGGER consent_event_no_delete")
    Registry(path, KEY).close()
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute("DELETE FROM consent_event")


def test_an_event_that_is_known_already_adds_nothing(registry: Registry) -> None:
    ann = one_person(registry)
    assert registry.append([make("a", ann), make("b", ann)]) == 2
    assert registry.append([make("b", ann), make("c", ann), make("c", ann)]) == 1
    assert registry.append([make("a", ann)]) == 0
    assert registry.head() == 3


def test_events_are_kept_in_the_order_they_were_learnt(registry: Registry) -> None:
    """Equal instants and equal precedence: the one learnt later counts."""
    ann = one_person(registry)
    first = replace(make("a", ann), max_epsilon=1.0)
    registry.append([first, replace(first, event_id="b", max_epsilon=2.0)])
    assert registry.snapshot(PURPOSE, 10).participants == {ann: 2.0}
    assert registry.snapshot(PURPOSE, 10, sequence=1).participants == {ann: 1.0}


def test_nothing_of_an_import_is_kept_when_one_event_cannot_be_written(registry: Registry, path: Path) -> None:
    ann = one_person(registry)
    registry.append([make("a", ann)])
    broken = replace(make("c", ann), purpose=None)  # type: ignore[arg-type]  # what the database refuses
    with pytest.raises(ConsentError, match="nothing was added"):
        registry.append([make("b", ann, EventType.WITHDRAWN, 20), broken])
    assert registry.head() == 1
    assert set(registry.snapshot(PURPOSE, 30).participants) == {ann}


PEOPLE = tuple(bytes([i]) * 32 for i in range(3))
EVENTS = st.lists(
    st.tuples(st.sampled_from(PEOPLE), st.sampled_from(EventType), st.integers(0, 5), st.sampled_from([PURPOSE, "x"])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(EVENTS, EVENTS, st.integers(0, 6))
def test_a_snapshot_as_of_an_instant_and_a_sequence_number_never_changes(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[tuple[bytes, EventType, int, str]],
    after: list[tuple[bytes, EventType, int, str]],
    at: int,
) -> None:
    history = [
        ConsentEvent(event_id=str(i), pseudonym=p, purpose=purpose, type=kind, effective_at=when)
        for i, (p, kind, when, purpose) in enumerate([*before, *after])
    ]
    with closing(Registry(tmp_path_factory.mktemp("registry") / "consent.db", KEY)) as registry:
        registry.append(history[: len(before)])
        then = registry.snapshot(PURPOSE, at)
        registry.append(history[len(before) :])
        assert registry.snapshot(PURPOSE, at, then.sequence) == then
        mine = {p: [e for e in history if e.pseudonym == p and e.purpose == PURPOSE] for p in PEOPLE}
        assert set(registry.snapshot(PURPOSE, at).participants) == {
            p for p, events in mine.items() if decide(events, at).may_participate
        }


def test_what_another_process_recorded_counts_in_the_next_snapshot(registry: Registry, path: Path) -> None:
    """A consent officer's program writes while the site's agent is running."""
    ann = one_person(registry)
    registry.append([make("a", ann)])
    assert set(registry.snapshot(PURPOSE, 30).participants) == {ann}
    with closing(Registry(path, KEY)) as officer:
        officer.append([make("b", officer.enrol(["ann"])["ann"], EventType.WITHDRAWN, 20)])
        bob = officer.enrol(["bob"])["bob"]
        officer.append([make("c", bob)])
    assert set(registry.snapshot(PURPOSE, 30).participants) == {bob}
    assert known(registry, ["ann", "bob"]) == {"ann": ann, "bob": bob}


def test_asking_as_of_a_sequence_number_that_is_not_there_yet_hides_nothing_later(registry: Registry) -> None:
    ann = one_person(registry)
    registry.append([make("a", ann)])
    assert set(registry.snapshot(PURPOSE, 30, sequence=100).participants) == {ann}
    registry.append([make("b", ann, EventType.WITHDRAWN, 20)])
    assert registry.snapshot(PURPOSE, 30).participants == {}
    assert registry.snapshot(PURPOSE, 30, sequence=100).participants == {}


def test_snapshots_of_the_past_do_not_change_those_of_the_present(registry: Registry) -> None:
    ann = one_person(registry)
    registry.append([make("a", ann), make("b", ann, EventType.WITHDRAWN, 20)])
    for _ in range(2):
        assert registry.snapshot(PURPOSE, 30).participants == {}
        assert set(registry.snapshot(PURPOSE, 30, sequence=1).participants) == {ann}
        assert registry.snapshot(PURPOSE, 30, sequence=0).participants == {}
        assert set(registry.snapshot(PURPOSE, 15).participants) == {ann}


def test_consent_for_one_purpose_is_none_for_another(registry: Registry) -> None:
    ann = one_person(registry)
    registry.append([make("a", ann)])
    assert set(registry.snapshot(PURPOSE, 10).participants) == {ann}
    for other in ("research", PURPOSE + "/x", PURPOSE.upper(), "%"):
        assert registry.snapshot(other, 10).participants == {}


def test_an_unknown_person_has_no_pseudonym(registry: Registry) -> None:
    ann = one_person(registry)
    assert known(registry, ["ann", "bob"]) == {"ann": ann}
    assert known(registry, ["bob"]) == {}  # and asking did not enrol


def test_a_person_keeps_one_pseudonym_across_restarts_and_shares_it_with_nobody(registry: Registry, path: Path) -> None:
    names = [f"p{i}" for i in range(1200)]  # more than one query's worth
    first = registry.enrol(names)
    assert len(set(first.values())) == len(names)
    with closing(Registry(path, KEY)) as again:
        assert again.enrol(names) == first
        assert known(again, names) == first


def test_a_pseudonym_tells_nothing_without_the_key(registry: Registry, path: Path, tmp_path: Path) -> None:
    ann = one_person(registry)
    registry.append([make("a", ann)])
    with closing(sqlite3.connect(path)) as db:
        assert b"ann" not in b"".join(line.encode() for line in db.iterdump())
    with closing(Registry(tmp_path / "other.db", SiteKey(b"x" * 32))) as other:
        assert other.enrol(["ann"])["ann"] != ann
    with closing(Registry(tmp_path / "same-key.db", KEY)) as other:  # a person's own key enters too
        assert other.enrol(["ann"])["ann"] != ann


def test_a_file_that_is_no_registry_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database at all, but long enough to be read as a header" * 20)
    with pytest.raises(ConsentError, match="is not a consent registry"):
        Registry(path, KEY)


def test_a_registry_of_another_schema_version_is_refused(registry: Registry, path: Path) -> None:
    registry.close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE consent_schema SET version = 99")
    with pytest.raises(ConsentError, match="schema version 99"):
        Registry(path, KEY)


@pytest.mark.parametrize("question", ["snapshot", "append", "head", "pseudonyms", "enrol"])
def test_a_registry_damaged_while_open_answers_every_question_with_a_consent_error(
    registry: Registry, path: Path, question: str
) -> None:
    """Anything else would reach the coordinator as a fault and not as the uniform `abstains`."""
    ann = one_person(registry)
    registry.append([make("a", ann)])
    registry.close()  # the next question opens the file again
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"\xff" * path.stat().st_size)
    ask = {
        "snapshot": lambda: registry.snapshot(PURPOSE, 10),
        "append": lambda: registry.append([make("b", ann)]),
        "head": registry.head,
        "pseudonyms": lambda: known(registry, ["ann"]),
        "enrol": lambda: registry.enrol(["bob"]),
    }[question]
    with pytest.raises(ConsentError):
        ask()


def test_an_event_of_a_kind_this_version_does_not_know_is_a_consent_error(registry: Registry, path: Path) -> None:
    ann = one_person(registry)
    registry.append([make("a", ann)])
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "INSERT INTO consent_event (event_id, pseudonym, purpose, type, effective_at, notice_digest, lawful_basis,"
            " jurisdiction, evidence_ref, recorded_at) SELECT 'b', pseudonym, purpose, 'paused', 20, '', '', '', '', 20"
            " FROM consent_event"
        )
    with pytest.raises(ConsentError):
        registry.snapshot(PURPOSE, 30)
