"""Exports: what goes out comes in again with the same standing, and nobody is named whom the caller did not name."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from confide.errors import ConsentError
from confide.privacy.consent import EventType, ImportedEvent
from confide.privacy.consent.desk import ConsentDesk
from confide.privacy.consent.export import EXPORTS, export_events
from confide.privacy.consent.imports import PSEUDONYM, check_file, read_checked

T = 1_700_000_000_000_000
PEOPLE = ("ann", "bob", 'İpek, "x"', "7")
PURPOSES = ("research", "care/acute", "dpv:Marketing", "https://w3id.org/dpv#Marketing", "a,b; c")
GRANTS = (EventType.GIVEN, EventType.RENEWED)
words = st.sampled_from(["", "DE", "GDPR-6-1-a", "https://w3id.org/dpv#Consent", "loc:DE", '"a", b', "= 1+1"])


@st.composite
def events(draw: st.DrawFn) -> list[ImportedEvent]:
    found = []
    for n in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(EventType))
        at = T + draw(st.integers(0, 6)) * 1_000_003
        until = at + draw(st.integers(1, 5_000_000)) if kind in GRANTS and draw(st.booleans()) else None
        limit = draw(st.floats(1e-9, 1e9)) if kind in GRANTS and draw(st.booleans()) else None
        found.append(ImportedEvent(
            f"e{n}", draw(st.sampled_from(PEOPLE)), draw(st.sampled_from(PURPOSES)), kind, at, until, draw(words),
            draw(words), draw(words), draw(words), limit,
        ))  # fmt: skip
    return found


@pytest.mark.parametrize("form", sorted(EXPORTS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=events())
def test_what_goes_out_comes_in_again(form: str, held: list[ImportedEvent], tmp_path: Path) -> None:
    site, other, path = tmp_path / "a", tmp_path / "b", tmp_path / "file"
    for folder in (site, other):
        shutil.rmtree(folder, ignore_errors=True)
        ConsentDesk.create(folder).__exit__(None, None, None)
    (other / "site.key").write_bytes((site / "site.key").read_bytes())
    with ConsentDesk(site) as first, ConsentDesk(other) as second:
        first.apply(held)
        path.write_bytes(export_events(first, form, PEOPLE).data)
        checked = check_file(path)
        assert checked.rejections == ()
        assert first.apply(read_checked(checked)) == 0  # to the letter what is on record
        assert second.apply(read_checked(checked)) == len(held)
        for person in PEOPLE:
            for at in range(T, T + 12_000_000, 1_000_003):
                assert first.standings(person, at) == second.standings(person, at)


@pytest.fixture
def desk(tmp_path: Path) -> ConsentDesk:
    made = ConsentDesk.create(tmp_path / "site")
    made.apply([
        ImportedEvent("1", "ann", "research", EventType.GIVEN, T, T + 9, "sha256:ab", "", "DE", "", 2.5),
        ImportedEvent("2", "bob", "research", EventType.GIVEN, T, None, "", "", "", "", None),
        ImportedEvent("3", "ann", "research", EventType.OBJECTED, T + 5, None, "", "", "", "form 7", None),
    ])  # fmt: skip
    return made


@pytest.mark.parametrize("form", sorted(EXPORTS))
def test_nobody_is_named_but_by_the_caller(desk: ConsentDesk, form: str, tmp_path: Path) -> None:
    nameless, named = export_events(desk, form, []), export_events(desk, form, ["bob", "nobody", "bob "])
    assert (nameless.events, nameless.named, nameless.by_pseudonym, nameless.left_out) == (3, 0, 2, 0)
    assert (named.events, named.named, named.by_pseudonym, named.left_out) == (3, 1, 1, 0)
    assert (b"bob" in named.data, b"ann" in named.data, b"bob" in nameless.data) == (True, False, False)
    path = tmp_path / "file"
    path.write_bytes(named.data)
    checked = check_file(path)
    assert {r.field for r in checked.rejections} == {"subject"}
    with pytest.raises(ConsentError, match="by pseudonym"):
        next(read_checked(checked))


@pytest.mark.parametrize("form", sorted(EXPORTS))
def test_whoever_is_not_named_can_be_left_out(desk: ConsentDesk, form: str, tmp_path: Path) -> None:
    found = export_events(desk, form, ["bob"], named_only=True)
    assert (found.events, found.named, found.by_pseudonym, found.left_out) == (1, 1, 0, 1)
    (tmp_path / "file").write_bytes(found.data)
    assert check_file(tmp_path / "file").events == 1


def test_the_csv_is_the_one_that_is_imported(desk: ConsentDesk) -> None:
    rows = list(csv.DictReader(io.StringIO(export_events(desk, "csv", ["ann"]).data.decode())))
    assert rows[0]["subject"] == "ann"
    assert rows[0]["max_epsilon"] == "2.5"
    pseudonym = desk.pseudonym("bob")
    assert pseudonym is not None
    assert rows[1]["subject"] == PSEUDONYM + pseudonym.hex()


def test_the_json_ld_is_a_record_a_line_in_the_terms_of_the_vocabulary(desk: ConsentDesk) -> None:
    records = [json.loads(line) for line in export_events(desk, "27560", ["ann"]).data.splitlines()]
    assert len(records) == 2
    record = records[0]
    assert record["@type"] == "dpv:ConsentRecord"
    assert record["@context"]["dpv"] == "https://w3id.org/dpv#"
    assert record["dpv:hasPurpose"]["dct:identifier"] == "research"
    given, objected = record["dpv:hasConsentStatus"]
    assert given["@type"] == "dpv:ConsentGiven"
    assert given["dpv:hasDuration"]["@type"] == "dpv:UntilTimeDuration"
    assert given["dpv:hasNotice"]["dct:identifier"] == "sha256:ab"
    assert objected["@type"] == "urn:confide:consent:objected"
