"""The desk: whole files or nothing, no identifier in the registry, and a withdrawal that ends everything."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from confide.errors import ConfigError, ConsentError
from confide.privacy.consent import EventType, ImportedEvent, Status, now_micros
from confide.privacy.consent.desk import ConsentDesk
from confide.privacy.consent.imports import check_file, read_checked
from tests.cli.command import Answer, confide
from tests.privacy import postgres
from tests.privacy.consent.imports.samples import FILES, MAPPING, csv_file

_numbers = itertools.count()
DAY = 86_400_000_000
NOW = 1_800_000_000_000_000


def event(
    kind: EventType, at: int, name: str = "e1", subject: str = "ann", purpose: str = "research", notice: str = ""
) -> ImportedEvent:
    return ImportedEvent(name, subject, purpose, kind, at, None, notice, "", "", "", None)


@dataclass(frozen=True)
class Place:
    """Where a desk finds its registry."""

    address: Path | str
    key: Path | None

    def desk(self) -> ConsentDesk:
        return ConsentDesk(self.address, self.key)


@pytest.fixture(params=["folder", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A new registry, in a folder and in a database."""
    found = Place(tmp_path / "site", None)
    if request.param == "postgresql":
        folder = request.getfixturevalue("postgres_folder")
        found = Place(postgres.new_database(folder, f"desk_{next(_numbers)}"), tmp_path / "site.key")
    with ConsentDesk.create(found.address, found.key):
        return found


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


def test_events_that_end_in_an_error_leave_nothing(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(csv_file())
    checked = check_file(path)
    path.write_bytes(csv_file().replace(b"refused", b"given"))
    with place.desk() as desk:
        with pytest.raises(ConsentError, match="changed"):
            desk.apply(read_checked(checked))
        assert list(desk.events()) == []


def test_an_id_known_with_another_content_leaves_nothing(place: Place) -> None:
    with place.desk() as desk:
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


def test_a_withdrawal_ends_a_consent_that_was_to_begin_later(place: Place) -> None:
    begins = NOW + 7 * DAY
    with place.desk() as desk:
        desk.apply([event(EventType.GIVEN, NOW - DAY, "a"), event(EventType.GIVEN, begins, "b")])
        only_now = event(EventType.WITHDRAWN, NOW, "w")
        desk.apply([only_now])
        assert desk.standings("ann", begins + 1)["research"].may_participate  # the control
        again = desk.withdrawals(replace(only_now, event_id="x", effective_at=NOW + 1))
        assert [e.effective_at for e in again] == [NOW + 1, begins]
        desk.apply(again)
        for at in (NOW + 1, begins - 1, begins, begins + DAY):
            assert not desk.standings("ann", at)["research"].may_participate


def test_a_number_below_the_threshold_is_not_said(place: Place) -> None:
    with place.desk() as desk:
        desk.apply([event(EventType.GIVEN, NOW, f"e{n}", f"p{n}") for n in range(20)])
        assert desk.count("research", NOW, 20).participants == 20
        assert desk.count("research", NOW, 21).participants is None
        assert desk.count("research", NOW - 1, 20).participants is None
        assert desk.count("research", NOW, 20).sequence == 20


def test_events_come_as_they_were_learnt(place: Place) -> None:
    with place.desk() as desk:
        desk.apply([event(EventType.GIVEN, now_micros(), "b"), event(EventType.REFUSED, NOW, "a", "bob")])
        events = list(desk.events())
        assert [(seq, e.event_id) for seq, e in events] == [(1, "b"), (2, "a")]
        assert [pair for pair in events if pair[1].pseudonym == desk.pseudonym("bob")] == desk.history("bob")
        assert desk.purposes() == ["research"]


def test_a_registry_in_a_database_is_made_once_and_never_by_mistake(postgres_folder: str, tmp_path: Path) -> None:
    address, key = postgres.new_database(postgres_folder, "desk_once"), tmp_path / "site.key"
    key.write_bytes(b"k" * 32)
    for attempt in (ConsentDesk, ConsentDesk.create):
        with pytest.raises(ConfigError, match="needs the site's key"):
            attempt(address)
    with pytest.raises(ConsentError, match="is missing"):
        ConsentDesk(address, key)
    with ConsentDesk.create(address, key) as desk:
        desk.apply([event(EventType.GIVEN, NOW)])
    assert key.read_bytes() == b"k" * 32
    with pytest.raises(ConsentError, match="is there already"):
        ConsentDesk.create(address, key)
    with pytest.raises(ConsentError, match="is missing"):
        ConsentDesk(address, tmp_path / "another.key")
    with ConsentDesk(address, key) as desk:
        assert desk.sequence() == 1


def test_a_password_in_an_address_is_never_told(tmp_path: Path) -> None:
    (tmp_path / "site.key").write_bytes(b"k" * 32)
    with pytest.raises(ConsentError, match=r"cannot be read|reached") as caught:
        ConsentDesk("postgresql://ann:s3cret@127.0.0.1:1/none", tmp_path / "site.key")
    assert "s3cret" not in str(caught.value)


def test_an_import_that_fails_enrols_nobody(place: Place) -> None:
    def events() -> Iterator[ImportedEvent]:
        yield event(EventType.GIVEN, NOW)
        raise ConsentError("has changed while it was read")

    with place.desk() as desk:
        with pytest.raises(ConsentError, match="changed"):
            desk.apply(events())
        assert (desk.sequence(), desk.pseudonym("ann")) == (0, None)
        desk.apply([event(EventType.GIVEN, NOW)])
        assert desk.pseudonym("ann") is not None  # the control


def test_an_import_holds_no_more_than_a_portion_at_a_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confide.privacy.consent.registry._BATCH", 500)
    monkeypatch.setattr("confide.privacy.consent.desk._PORTION", 100)
    given = taken = ahead = 0

    def events() -> Iterator[ImportedEvent]:
        nonlocal given, ahead
        for given in range(1, 3_001):
            ahead = max(ahead, given - taken)
            yield event(EventType.GIVEN, NOW, f"e{given}", f"p{given % 700}")

    def progress(count: int) -> None:
        nonlocal taken
        taken = count

    with place.desk() as desk:
        assert desk.apply(events(), progress) == 3_000
        assert desk.count("research", NOW, 5).participants == 700
        assert desk.check() == []
    assert taken == 3_000
    assert ahead <= 600


def test_an_erased_person_is_refused_everything_and_the_others_are_not(place: Place) -> None:
    both = [event(EventType.GIVEN, NOW, "a"), event(EventType.GIVEN, NOW, "b", "bob")]
    with place.desk() as desk:
        desk.apply(both)
        assert desk.erase("ann") == 2
        assert desk.is_erased("ann")
        assert not desk.is_erased("bob")
        assert (desk.history("ann"), desk.pseudonym("ann"), desk.standings("ann", desk.now())) == ([], None, {})
        before = desk.sequence()
        again = [event(EventType.GIVEN, NOW, "c"), event(EventType.GIVEN, NOW, "d", "cem")]
        with pytest.raises(ConsentError, match="was erased"):
            desk.apply(again)
        assert (desk.sequence(), desk.pseudonym("cem")) == (before, None)
        passed_over = list[int]()
        assert desk.apply(again, on_erased=passed_over.append) == 1
        assert sum(passed_over) == 1
        assert desk.standings("bob", NOW)["research"].may_participate
        assert desk.erase("ann") == 0
        with pytest.raises(ConsentError, match="nobody of this identifier"):
            desk.erase("dee")


@pytest.mark.parametrize("prefix", ["sha256:", ""])
def test_a_grant_reaches_beneath_only_with_a_notice_that_says_so(place: Place, prefix: str) -> None:
    digest = "ab" * 32
    with place.desk() as desk:
        desk.apply([
            event(EventType.GIVEN, NOW, "a", notice=prefix + digest),
            event(EventType.GIVEN, NOW, "b", "bob", "research/cardiology"),
            event(EventType.GIVEN, NOW, "c", "cem", "marketing"),
        ])  # fmt: skip
        assert set(desk.standings("ann", NOW)) == {"research"}  # the control
        notice = desk.add_notice("sha256:" + digest, ["research"], covers_beneath=True)
        assert [n.digest for n in desk.notices()] == [notice.digest] == ["sha256:" + digest]
        found = desk.standings("ann", NOW)
        assert {p: s.status for p, s in found.items()} == {
            "research": Status.GIVEN, "research/cardiology": Status.GIVEN,
        }  # fmt: skip
        assert set(desk.standings("ann", NOW, beneath=False)) == {"research"}
        assert desk.add_notice("sha256:" + digest, ["research"], covers_beneath=True) == notice
        with pytest.raises(ConsentError, match="something else"):
            desk.add_notice("sha256:" + digest, ["marketing"])
        desk.apply([event(EventType.WITHDRAWN, NOW + 1, "d")])
        found = desk.standings("ann", NOW + 1)
        assert {s.status for s in found.values()} == {Status.REFUSED}
        assert desk.purposes() == ["marketing", "research", "research/cardiology"]


def test_the_commands_work_on_either_kind_of_registry(place: Place, tmp_path: Path) -> None:
    where = ["--registry", str(place.address), *(["--key", str(place.key)] if place.key is not None else [])]
    path = tmp_path / "file.csv"
    path.write_bytes(csv_file())

    def consent(*arguments: str | Path) -> Answer:
        answer = confide("consent", *arguments, *where, "--json")
        assert answer.code == 0, answer.err
        return answer

    added = consent("import", path).last_line["added"]
    assert added == consent("import", path).last_line["known"] > 0
    consent("grant", "zoe", "--purpose", "research")
    assert consent("status", "zoe").last_line["standings"]["research"]["status"] == "given"
    consent("withdraw", "zoe", "--purpose", "research")
    assert consent("status", "zoe").last_line["standings"]["research"]["status"] == "refused"
    assert consent("snapshot", "--purpose", "research").last_line["participants"] is None
    consent("receipt", "zoe", "--out", tmp_path / "zoe")
    consent("notice", "add", path, "--purpose", "research")
    assert len(consent("notice", "list").last_line["notices"]) == 1
    consent("erase", "zoe", "--yes")
    assert consent("check", "--rebuild").last_line == {"differences": [], "rebuilt": True}
    assert consent("export", "--out", tmp_path / "out.csv").last_line["events"] == added + 4
