"""Both databases: what they refuse, what several processes may do at once, and how an old schema becomes the newest."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from confide.errors import ConsentError
from confide.privacy.consent import ConsentEvent, EventType, Registry, Standing, Status, storage
from tests.privacy import postgres
from tests.privacy.consent.conftest import KEY, REFUSED, raw

PURPOSE = "research/test"
DATA = Path(__file__).with_name("data")


def make(event_id: str, pseudonym: bytes, kind: EventType = EventType.GIVEN, effective_at: int = 10) -> ConsentEvent:
    return ConsentEvent(event_id=event_id, pseudonym=pseudonym, purpose=PURPOSE, type=kind, effective_at=effective_at)


def fill(registry: Registry) -> bytes:
    """Two events, a notice, an erased person, and a snapshot taken."""
    ann = registry.enrol(["ann", "bob"])["ann"]
    registry.append([make("yes", ann), make("no", ann, EventType.WITHDRAWN, 20)])
    registry.register_notice("digest", ["research"])
    registry.erase("bob")
    registry.snapshot(PURPOSE, 100)
    return ann


def dump(address: Path | str) -> list[Any]:
    tables = ("consent_event", "consent_notice", "consent_subject", "consent_tombstone", "consent_clock")
    with raw(address) as db:
        return [sorted(map(repr, db.execute(f"SELECT * FROM {table}").fetchall())) for table in tables]  # noqa: S608


FORBIDDEN = [
    "UPDATE consent_event SET purpose = 'x'",
    "DELETE FROM consent_event",
    "UPDATE consent_notice SET covers_beneath = (1 = 1)",
    "DELETE FROM consent_notice",
    "UPDATE consent_subject SET personal_key = locator",
    "DELETE FROM consent_subject",
    "UPDATE consent_tombstone SET ground = ''",
    "DELETE FROM consent_tombstone",
    "INSERT INTO consent_subject SELECT locator, locator FROM consent_tombstone",
    "UPDATE consent_clock SET latest = latest - 1",
    "UPDATE consent_clock SET one = 2",
    "DELETE FROM consent_clock",
]
KEPT = ("event", "notice", "subject", "tombstone", "clock")


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_the_database_itself_refuses_to_change_what_is_on_record(
    registry: Registry, address: Path | str, statement: str
) -> None:
    assert refuses(registry, address, statement)


@pytest.mark.parametrize("table", KEPT)
def test_a_way_around_that_one_database_has_is_refused_too(registry: Registry, address: Path | str, table: str) -> None:
    """SQLite's REPLACE deletes the row that is in the way without asking a DELETE trigger; nor does TRUNCATE."""
    name = f"consent_{table}"
    around = f"REPLACE INTO {name} SELECT * FROM {name}" if isinstance(address, Path) else f"TRUNCATE {name} CASCADE"  # noqa: S608
    assert refuses(registry, address, around)


def refuses(registry: Registry, address: Path | str, statement: str) -> bool:
    """Is it refused with the database's own reason, and is everything as it was?"""
    fill(registry)
    before = dump(address)
    with raw(address) as db:
        with pytest.raises(REFUSED):
            db.execute(statement)
        db.rollback()
    return dump(address) == before


@pytest.mark.parametrize("statement", [*FORBIDDEN[:8], *FORBIDDEN[9:]])
def test_without_its_triggers_it_would_change_it(registry: Registry, address: Path | str, statement: str) -> None:
    """The control: the same statements do something."""
    fill(registry)
    before = dump(address)
    with raw(address) as db:
        if isinstance(address, Path):
            found = db.execute("SELECT name, '' FROM sqlite_master WHERE type = 'trigger'").fetchall()
        else:
            found = db.execute(
                "SELECT tgname, ' ON ' || tgrelid::regclass FROM pg_trigger WHERE NOT tgisinternal"
            ).fetchall()
        for name, on in found:
            db.execute(f"DROP TRIGGER {name}{on}")
        db.execute(statement)
        db.commit()
    assert dump(address) != before


def test_a_trigger_that_was_dropped_is_back_when_the_registry_is_opened(
    registry: Registry, address: Path | str
) -> None:
    fill(registry)
    with raw(address) as db:
        name = "consent_event_no_delete" if isinstance(address, Path) else "consent_event_no_change ON consent_event"
        db.execute(f"DROP TRIGGER {name}")
        db.commit()
    Registry(address, KEY).close()
    with raw(address) as db, pytest.raises(REFUSED, match="append-only"):
        db.execute("DELETE FROM consent_event")


def test_a_trigger_that_was_made_harmless_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "consent.db"
    with closing(Registry(path, KEY)) as registry:
        fill(registry)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TRIGGER consent_event_no_delete")
        db.execute("CREATE TRIGGER consent_event_no_delete BEFORE DELETE ON consent_event WHEN 0 BEGIN SELECT 1; END")
    Registry(path, KEY).close()
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute("DELETE FROM consent_event")


def test_what_one_registry_holds_another_on_the_same_address_finds(registry: Registry, address: Path | str) -> None:
    ann = fill(registry)
    with closing(Registry(address, KEY)) as again:
        assert again.pseudonyms(["ann", "bob", "cem"]) == {"ann": ann}
        assert [e.event_id for _, e in again.history("ann")] == ["yes", "no"]
        assert again.notices() == registry.notices()
        assert again.head() == registry.head()
        assert again.check() == []


# --- an import is whole or not at all ---------------------------------------------------------------------------------


def test_an_import_that_fails_late_leaves_nothing_not_even_a_person(registry: Registry, address: Path | str) -> None:
    told: list[int] = []

    def events() -> Any:
        for i in range(120_000):
            yield (
                make(f"e{i}", registry.enrol([f"p{i % 7}"])[f"p{i % 7}"]) if i % 1000 == 0 else make(f"e{i}", b"x" * 32)
            )
        raise ConsentError("line 120001 is broken")

    with pytest.raises(ConsentError, match="line 120001"):
        registry.append_all(events(), told.append)
    assert told == [50_000, 100_000]  # the control: much was written by then
    assert registry.head() == 0
    assert registry.pseudonyms([f"p{i}" for i in range(7)]) == {}
    assert registry.check() == []
    assert registry.snapshot(PURPOSE, 100).participants == {}
    assert "consent_event_person" in indexes(address)


def test_a_long_import_is_one_that_short_ones_would_have_been(new_address: Callable[[], Path | str]) -> None:
    kinds = [EventType.GIVEN, EventType.WITHDRAWN, EventType.RENEWED]
    events = [make(f"e{i}", bytes([i % 251]) * 32, kinds[i % 3], i % 1000) for i in range(60_000)]
    long_address, short_address = new_address(), new_address()
    with closing(Registry(long_address, KEY)) as long, closing(Registry(short_address, KEY)) as short:
        assert long.append_all(iter([*events, events[0], events[59_999]])) == 60_000
        for start in range(0, 60_000, 20_000):
            short.append(events[start : start + 20_000])
        assert long.head() == short.head() == 60_000
        assert long.check() == short.check() == []
        assert long.snapshot(PURPOSE, 990).participants == short.snapshot(PURPOSE, 990).participants
        assert indexes(long_address) == indexes(short_address)


@pytest.mark.parametrize("known", [range(10, 20), range(0, 100, 2), [0], [99], range(100)])
def test_events_that_are_known_are_passed_over_wherever_they_stand(registry: Registry, known: Sequence[int]) -> None:
    kinds = [EventType.GIVEN, EventType.WITHDRAWN, EventType.RENEWED]
    events = [make(f"e{i}", bytes([i % 7]) * 32, kinds[i % 3], i) for i in range(100)]
    assert registry.append([events[i] for i in known]) == len(known)
    assert registry.append(events) == 100 - len(known)
    assert registry.append(events) == 0
    found = list(registry.events())
    assert [seq for seq, _ in found] == list(range(1, 101))
    assert {e.event_id: e for _, e in found} == {e.event_id: e for e in events}
    assert registry.check() == []


def test_a_known_id_with_another_content_among_new_ones_stops_all_of_them(registry: Registry) -> None:
    events = [make(f"e{i}", b"x" * 32) for i in range(100)]
    registry.append([replace(events[50], type=EventType.WITHDRAWN)])
    with pytest.raises(ConsentError, match="'e50' is known with another content"):
        registry.append(events)
    assert registry.head() == 1
    assert registry.check() == []


def indexes(address: Path | str) -> set[str]:
    sqlite = "SELECT name FROM sqlite_master WHERE type = 'index'"
    with raw(address) as db:
        return {n for (n,) in db.execute(sqlite if isinstance(address, Path) else "SELECT indexname FROM pg_indexes")}


def test_an_id_that_comes_back_with_another_content_stops_a_long_import(registry: Registry) -> None:
    first = [make(f"e{i}", b"x" * 32) for i in range(60_000)]
    with pytest.raises(ConsentError, match="'e3' is known with another content"):
        registry.append_all([*first, replace(first[3], type=EventType.WITHDRAWN)])
    assert registry.head() == 0


@pytest.mark.parametrize(
    "broken",
    [
        {"purpose": ""},  # the purpose above all is for erasures alone
        {"pseudonym": b"short"},
        {"max_epsilon": float("nan")},  # SQLite would make no limit at all of it
        {"max_epsilon": float("inf")},
        {"max_epsilon": 0.0},
        {"effective_at": 1 << 63},
        {"valid_until": 1 << 70},
    ],
)
def test_an_event_that_cannot_stand_as_it_is_is_refused(registry: Registry, broken: dict[str, Any]) -> None:
    with pytest.raises(ConsentError, match=r"'b'(.|\n)*nothing was added"):
        registry.append([make("a", b"x" * 32), replace(make("b", b"x" * 32), **broken)])
    assert registry.head() == 0


# --- several at once --------------------------------------------------------------------------------------------------

WRITER = """
import json, sys
from pathlib import Path
from confide.privacy.consent import ConsentEvent, EventType, Registry, SiteKey
address, me, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
registry = Registry(address if "://" in address else Path(address), SiteKey(b"k" * 32))
for i in range(rounds):
    names = registry.enrol([f"p{i}", f"{me}-{i}"])
    given = {"purpose": "research/test", "type": EventType.GIVEN, "effective_at": i}
    registry.append([ConsentEvent(event_id=f"{me}-{i}-{p}", pseudonym=n, **given) for p, n in names.items()])
print(json.dumps({p: n.hex() for p, n in registry.pseudonyms([f"p{i}" for i in range(rounds)]).items()}))
registry.close()
"""


def test_concurrent_writers_lose_nothing_and_no_number_appears_behind_a_readers_back(address: Path | str) -> None:
    """Four processes make the registry, enrol the same persons and append, while a reader follows the numbers."""
    writers, rounds = 4, 20
    command = [sys.executable, "-c", WRITER, str(address)]
    running = [
        subprocess.Popen([*command, str(w), str(rounds)], stdout=subprocess.PIPE, text=True) for w in range(writers)
    ]
    seen: list[int] = []
    late: list[int] = []
    done = threading.Event()

    def follow() -> None:
        with closing(Registry(address, KEY)) as registry, raw(address) as db:
            while not done.is_set():
                head = registry.head()
                now = [seq for (seq,) in db.execute("SELECT seq FROM consent_event ORDER BY seq").fetchall()]
                db.rollback()
                late.extend(set(now[: len(seen)]) ^ set(seen))
                late.extend(range(len(now) + 1, head + 1))  # numbers the head promised and that were not there
                seen[:] = now

    reader = threading.Thread(target=follow)
    reader.start()
    answers = [process.communicate(timeout=120)[0] for process in running]
    done.set()
    reader.join()
    assert [p.returncode for p in running] == [0] * writers
    assert len({answer for answer in answers}) == 1  # everybody got the same pseudonyms
    assert len(json.loads(answers[0])) == rounds
    assert late == []
    with closing(Registry(address, KEY)) as registry, raw(address) as db:
        ids = [i for (i,) in db.execute("SELECT event_id FROM consent_event ORDER BY seq").fetchall()]
        expected = {f"{w}-{i}-{p}" for w in range(writers) for i in range(rounds) for p in (f"p{i}", f"{w}-{i}")}
        assert set(ids) == expected
        assert registry.head() == len(ids) == len(expected)
        assert registry.check() == []
        assert len(registry.snapshot(PURPOSE, 100).participants) == rounds + writers * rounds


def test_a_reader_that_holds_its_state_does_not_see_half_an_import(registry: Registry, address: Path | str) -> None:
    heads: list[int] = []

    def events() -> Any:
        with closing(Registry(address, KEY)) as other:
            for i in range(100_001):
                if i % 50_000 == 0:
                    heads.append(other.head())
                yield make(f"e{i}", bytes([i % 200]) * 32)

    registry.append_all(events())
    assert heads == [0, 0, 0]
    assert registry.head() == 100_001


# --- old schemas ------------------------------------------------------------------------------------------------------


def old(path: Path, version: int) -> None:
    """A registry as the program of that version left it."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript((DATA / f"schema-{version}.sql").read_text())


@pytest.mark.parametrize("version", [1, 2])
def test_a_registry_of_an_older_version_becomes_one_of_the_newest(tmp_path: Path, version: int) -> None:
    path = tmp_path / "consent.db"
    old(path, version)
    with closing(sqlite3.connect(path)) as db:
        before = db.execute(
            "SELECT seq, event_id, pseudonym, purpose, type, effective_at FROM consent_event"
        ).fetchall()
        keys = db.execute("SELECT * FROM consent_subject").fetchall()
    with closing(Registry(path, KEY)) as registry:
        assert registry.state("ann", PURPOSE, 15) == Standing(Status.GIVEN, 2.5)
        assert registry.state("ann", PURPOSE, 25) == Standing(Status.REFUSED)
        assert set(registry.snapshot(PURPOSE, 25).participants) == set(registry.pseudonyms(["bob"]).values())
        assert registry.check() == []
        assert registry.latest_recorded() >= (1_700_000_000_000_000 if version == 2 else 25)
        registry.append([make("new", registry.enrol(["ann"])["ann"], effective_at=30)])
        assert [seq for seq, _ in registry.history("ann")] == [1, 3, 4]
    with closing(sqlite3.connect(path)) as db:
        query = "SELECT seq, event_id, pseudonym, purpose, type, effective_at FROM consent_event WHERE seq <= 3"
        assert db.execute(query).fetchall() == before
        assert db.execute("SELECT * FROM consent_subject").fetchall() == keys
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute("DELETE FROM consent_event")


@pytest.mark.parametrize("version", [1, 2])
def test_a_migrated_registry_has_the_tables_that_a_new_one_has(tmp_path: Path, version: int) -> None:
    old(tmp_path / "old.db", version)
    Registry(tmp_path / "old.db", KEY).close()
    Registry(tmp_path / "new.db", KEY).close()

    def shape(name: str) -> dict[str, Any]:
        with closing(sqlite3.connect(tmp_path / name)) as db:
            kinds = db.execute(
                "SELECT type, name FROM sqlite_master WHERE name LIKE 'consent%' ORDER BY name"
            ).fetchall()
            tables = [n for kind, n in kinds if kind == "table"]
            # whether a default is there (of a column that an old table got later) changes nothing
            columns = {t: [c[1:4] + c[5:] for c in db.execute(f"PRAGMA table_info({t})")] for t in tables}
            return {"kinds": kinds, "columns": columns}

    assert shape("old.db") == shape("new.db")


def test_a_migration_that_was_cut_off_leaves_the_old_registry(tmp_path: Path) -> None:
    """An event of a kind that nobody knows stops it after tables were made."""
    path = tmp_path / "consent.db"
    old(path, 2)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "INSERT INTO consent_event SELECT 9, 'odd', pseudonym, purpose, 'paused', 5, NULL, '', '', '', '', NULL, 5 "
            "FROM consent_event WHERE seq = 1"
        )
    with closing(sqlite3.connect(path)) as db:
        before = list(db.iterdump())
    with pytest.raises(ConsentError):
        Registry(path, KEY)
    with closing(sqlite3.connect(path)) as db:
        assert list(db.iterdump()) == before


def test_many_processes_migrate_once(tmp_path: Path) -> None:
    path = tmp_path / "consent.db"
    old(path, 1)
    script = (
        "import sys; from pathlib import Path; from confide.privacy.consent import Registry, SiteKey; "
        "print(Registry(Path(sys.argv[1]), SiteKey(b'k' * 32)).head())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [p.communicate(timeout=60)[0].strip() for p in running] == ["3"] * 3


# --- addresses --------------------------------------------------------------------------------------------------------


def test_a_database_that_does_not_answer_is_a_consent_error_that_hides_the_password(tmp_path: Path) -> None:
    with pytest.raises(ConsentError, match="cannot be reached") as caught:
        Registry(f"postgresql://somebody:secret@/nothing?host={tmp_path}", KEY)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["mysql://a/b", "postgres ql://", "://", "sqlite://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConsentError, match="is no address of a registry"):
        Registry(address, KEY)


def test_a_newer_version_is_refused_and_left_alone(registry: Registry, address: Path | str) -> None:
    registry.close()
    with raw(address) as db:
        db.execute("UPDATE consent_schema SET version = 99")
        db.commit()
    with pytest.raises(ConsentError, match="schema version 99; this program writes 3"):
        Registry(address, KEY)


def test_a_missing_server_fails_in_ci_and_is_said_in_one_line_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "binaries", lambda: None)
    for variable, kind in (("1", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("CONFIDE_CI", variable)
        with pytest.raises(kind, match=r"^PostgreSQL is not installed: apt-get install postgresql$"), postgres.server():
            pass


def test_registries_of_one_process_share_compiled_statements_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = storage._Compiled()
    monkeypatch.setattr(storage, "_COMPILED", compiled)

    def who(name: str, persons: list[str], at: int) -> set[bytes]:
        with closing(Registry(tmp_path / name, KEY)) as registry:
            names = registry.enrol(persons)
            registry.append([make(person, names[person]) for person in persons])
            assert set(registry.snapshot(PURPOSE, at).participants) == set(names.values())
            return set(names.values())

    for name in ("a.db", "b.db"):
        Registry(tmp_path / name, KEY).close()  # what a migration says is its own
    first, statements = who("a.db", ["ann", "bob"], 100), len(compiled)
    assert statements > 3
    second = who("b.db", ["cid"], 200)
    assert len(compiled) == statements, "the second one compiled nothing"
    assert len(second) == 1
    assert not first & second
    for _ in range(storage._MOST_COMPILED + 10):
        compiled["dialect", object()] = None
    assert len(compiled) <= storage._MOST_COMPILED


def test_the_past_is_answered_while_somebody_else_writes(
    registry: Registry, address: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The present is put on record before it is told, so that one waits; the past is on record already."""
    ann = fill(registry)
    registry.snapshot(PURPOSE, registry.now())
    monkeypatch.setattr(storage, "_PATIENCE", 1.0)
    with closing(Registry(address, KEY)) as reader, registry._storage.writing():
        assert ann in reader.snapshot(PURPOSE, 15).participants
        with pytest.raises(ConsentError, match="cannot be written"):
            reader.snapshot(PURPOSE, reader.now())
