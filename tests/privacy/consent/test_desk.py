"""The desk: whole files or nothing, no identifier in the registry, and a withdrawal that ends everything."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from confide.errors import ConsentError
from confide.privacy.consent import EventType, ImportedEvent, now_micros
from confide.privacy.consent.desk import ConsentDesk
from confide.privacy.consent.imports import check_file, read_checked
from tests.privacy.consent.imports.samples import FILES, MAPPING, csv_file

DAY = 86_400_000_000
NOW = 1_800_000_000_000_000


def event(kind: EventType, at: int, name: str = "e1", subject: str = "ann") -> ImportedEvent:
    return ImportedEvent(name, subject, "research", kind, at, None, "", "", "", "", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ConsentDesk.create(tmp_path / "site").__exit__(None, None, None)
    return tmp_path / "site"


def test_a_new_registry_is_the_owners_and_is_not_made_twice(folder: Path) -> None:
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == {"consent.db": 0o600, "site.key": 0o600}
    key = (folder / "site.key").read_bytes()
    with pytest.raises(ConsentError, match="is there already"):
        ConsentDesk.create(folder)
    assert (folder / "site.key").read_bytes() == key


@pytest.mark.parametrize("name", ["consent.db", "site.key"])
def test_what_is_missing_is_never_made(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConsentError, match="is missing"):
        ConsentDesk(folder)
    assert not (folder / name).exists()


@pytest.mark.parametrize("form", sorted(FILES))
def test_a_file_imported_twice_adds_nothing_the_second_time(folder: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES[form])
    checked = check_file(path, mapping=MAPPING if form == "mapped" else None, name=form)
    with ConsentDesk(folder) as desk:
        assert desk.apply(read_checked(checked)) == checked.events
        assert desk.apply(read_checked(checked)) == 0
        assert desk.sequence() == checked.events


def test_events_that_end_in_an_error_leave_nothing(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(csv_file())
    checked = check_file(path)
    path.write_bytes(csv_file().replace(b"refused", b"given"))
    with ConsentDesk(folder) as desk:
        with pytest.raises(ConsentError, match="changed"):
            desk.apply(read_checked(checked))
        assert list(desk.events()) == []


def test_an_id_known_with_another_content_leaves_nothing(folder: Path) -> None:
    with ConsentDesk(folder) as desk:
        desk.apply([event(EventType.GIVEN, NOW)])
        with pytest.raises(ConsentError, match="another content"):
            desk.apply([event(EventType.GIVEN, NOW, "e2"), event(EventType.WITHDRAWN, NOW + 1, "e1")])
        assert [e.event_id for _, e in desk.events()] == ["e1"]


def test_no_identifier_can_be_tried_out_on_a_stolen_registry(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES["fhir"])
    checked = check_file(path)
    derived = [e.event_id for e in read_checked(checked)]
    assert all(e.startswith("sha256:") for e in derived)  # what whoever knows the person can compute
    with ConsentDesk(folder) as desk:
        desk.apply(read_checked(checked))
        stored = [e.event_id for _, e in desk.events()]
    assert len(set(stored)) == len(stored) == len(derived)
    assert all(e.startswith("keyed:") for e in stored)
    data = b"".join(p.read_bytes() for p in folder.iterdir())
    for name in ("ann", "bob"):
        assert hashlib.sha256(name.encode()).digest() not in data
    assert not [e for e in derived if e.removeprefix("sha256:").encode() in data]
    assert stored[0].encode() in data  # the control: what is stored can be found this way


def test_a_withdrawal_ends_a_consent_that_was_to_begin_later(folder: Path) -> None:
    begins = NOW + 7 * DAY
    with ConsentDesk(folder) as desk:
        desk.apply([event(EventType.GIVEN, NOW - DAY, "a"), event(EventType.GIVEN, begins, "b")])
        only_now = event(EventType.WITHDRAWN, NOW, "w")
        desk.apply([only_now])
        assert desk.standings("ann", begins + 1)["research"].may_participate  # the control
        again = desk.withdrawals(replace(only_now, event_id="x", effective_at=NOW + 1))
        assert [e.effective_at for e in again] == [NOW + 1, begins]
        desk.apply(again)
        for at in (NOW + 1, begins - 1, begins, begins + DAY):
            assert not desk.standings("ann", at)["research"].may_participate


def test_a_number_below_the_threshold_is_not_said(folder: Path) -> None:
    with ConsentDesk(folder) as desk:
        desk.apply([event(EventType.GIVEN, NOW, f"e{n}", f"p{n}") for n in range(20)])
        assert desk.count("research", NOW, 20).participants == 20
        assert desk.count("research", NOW, 21).participants is None
        assert desk.count("research", NOW - 1, 20).participants is None
        assert desk.count("research", NOW, 20).sequence == 20


def test_events_come_as_they_were_learnt(folder: Path) -> None:
    with ConsentDesk(folder) as desk:
        desk.apply([event(EventType.GIVEN, now_micros(), "b"), event(EventType.REFUSED, NOW, "a", "bob")])
        events = list(desk.events())
        assert [(seq, e.event_id) for seq, e in events] == [(1, "b"), (2, "a")]
        assert [pair for pair in events if pair[1].pseudonym == desk.pseudonym("bob")] == desk.history("bob")
        assert desk.purposes() == ["research"]
