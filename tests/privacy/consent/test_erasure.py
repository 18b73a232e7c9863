"""Erasure: what is gone, what stays, and that the same person does not come back by the same name."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from confide.errors import ConsentError
from confide.privacy.consent import ConsentEvent, EventType, Registry, Status, now_micros
from tests.privacy.consent.conftest import KEY, raw

PURPOSE = "research/test"


def give(registry: Registry, *people: str, purpose: str = PURPOSE) -> dict[str, bytes]:
    names = registry.enrol(people)
    more = {"purpose": purpose, "type": EventType.GIVEN, "effective_at": 10}
    registry.append([ConsentEvent(event_id=f"{purpose}/{n.hex()}", pseudonym=n, **more) for n in names.values()])
    return names


def personal_key(address: Path | str, person: str) -> bytes:
    with raw(address) as db:
        mark = "?" if isinstance(address, Path) else "%s"
        query = f"SELECT personal_key FROM consent_subject WHERE locator = {mark}"  # noqa: S608
        return bytes(db.execute(query, (KEY.locator(person),)).fetchone()[0])


def test_an_erased_person_may_not_take_part_in_anything_and_the_others_may(registry: Registry) -> None:
    names = give(registry, "ann", "bob")
    give(registry, "ann", purpose="marketing")
    before = registry.snapshot(PURPOSE, 100)
    assert registry.erase("ann") == 3  # of two purposes, and of everything
    now = now_micros()
    assert set(registry.snapshot(PURPOSE, now).participants) == {names["bob"]}
    assert registry.snapshot("marketing", now).participants == {}
    assert registry.state("ann", PURPOSE).status is Status.REFUSED
    assert registry.state("bob", PURPOSE).may_participate
    assert registry.history("ann") == []
    assert registry.pseudonyms(["ann", "bob"]) == {"bob": names["bob"]}
    assert registry.erased(["ann", "bob", "cem"]) == {"ann"}
    assert registry.snapshot(PURPOSE, 100, before.sequence) == before  # what was decided stays reproducible
    assert registry.check() == []


def test_a_grant_filed_later_under_a_remembered_pseudonym_grants_nothing(registry: Registry) -> None:
    ann = give(registry, "ann")["ann"]
    registry.erase("ann")
    later = now_micros() + 10**9
    event = ConsentEvent(event_id="x", pseudonym=ann, purpose="new", type=EventType.GIVEN, effective_at=later)
    registry.append([event])
    assert registry.snapshot("new", later + 1).participants == {}
    assert registry.snapshot("new/beneath", later + 1).participants == {}


def test_the_same_identifier_is_not_enrolled_again_and_nobody_with_it(registry: Registry) -> None:
    give(registry, "zoë-417")
    registry.erase("zoë-417")
    with pytest.raises(ConsentError, match="was erased") as caught:
        registry.enrol(["bob", "zoë-417"])
    assert "zoë-417" not in str(caught.value)
    assert registry.pseudonyms(["bob"]) == {}
    assert set(registry.enrol(["bob"])) == {"bob"}


def test_erasing_again_adds_nothing_and_erasing_a_stranger_is_an_error(registry: Registry) -> None:
    give(registry, "ann")
    registry.erase("ann")
    head = registry.head()
    assert registry.erase("ann") == 0
    with pytest.raises(ConsentError, match="nobody of this identifier"):
        registry.erase("cem")
    assert registry.head() == head
    assert registry.erased(["cem"]) == set()


def test_a_person_without_events_is_erased_too(registry: Registry) -> None:
    registry.enrol(["ann"])
    assert registry.erase("ann") == 1
    assert registry.erased(["ann"]) == {"ann"}


def test_the_tombstone_holds_no_time_and_nothing_else_names_her(registry: Registry, address: Path | str) -> None:
    give(registry, "ann")
    registry.erase("ann", ground="a court order")
    locator = KEY.locator("ann")
    with raw(address) as db:
        rows = db.execute("SELECT * FROM consent_tombstone").fetchall()
        assert [(bytes(found), ground) for found, ground in rows] == [(locator, "a court order")]
        for table in ("event", "notice", "subject", "current"):
            values = [v for row in db.execute(f"SELECT * FROM consent_{table}").fetchall() for v in row]  # noqa: S608
            assert locator not in [bytes(v) for v in values if isinstance(v, bytes)]


def test_no_byte_of_the_key_is_left_in_any_file_even_while_others_have_it_open(tmp_path: Path) -> None:
    path = tmp_path / "consent.db"
    with closing(Registry(path, KEY)) as registry, closing(Registry(path, KEY)) as other:
        give(registry, *[f"p{i}" for i in range(100)])
        key = personal_key(path, "p50")
        assert any(key in file.read_bytes() for file in tmp_path.iterdir())  # the control
        assert other.head() == 100
        registry.erase("p50")
        assert [file.name for file in tmp_path.iterdir() if key in file.read_bytes()] == []
        assert len(other.pseudonyms([f"p{i}" for i in range(100)])) == 99


def test_a_copy_of_the_key_that_a_reader_keeps_in_the_log_is_said_and_erased_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("confide.privacy.consent.erasure._PATIENCE", 0.2)
    monkeypatch.setattr("confide.privacy.consent.storage._PATIENCE", 0.2)
    path = tmp_path / "consent.db"
    with closing(Registry(path, KEY)) as registry:
        give(registry, "ann")
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM consent_event").fetchone()
            with pytest.raises(ConsentError, match="a copy of her key may still lie"):
                registry.erase("ann")
            assert registry.state("ann", PURPOSE).status is Status.REFUSED  # it stands
        assert registry.erase("ann") == 0
        assert (tmp_path / "consent.db-wal").stat().st_size == 0


def test_in_postgresql_the_row_of_the_key_is_vacuumed(postgres_folder: str) -> None:
    from tests.privacy import postgres

    address = postgres.new_database(postgres_folder, "vacuum")
    with closing(Registry(address, KEY)) as registry:
        give(registry, "ann", "bob")
        key = personal_key(address, "ann")
        with raw(address) as db:
            db.execute("CREATE EXTENSION pageinspect")
            db.commit()
            page = "SELECT get_raw_page('consent_subject', 0)"
            assert key in bytes(db.execute(page).fetchone()[0])  # the control
            db.rollback()
            registry.erase("ann")
            assert key not in bytes(db.execute(page).fetchone()[0])
