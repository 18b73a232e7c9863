"""Thousands of broken files of every format: never a traceback, never half an import, never more granted than said.

What a file says is read a second time by `oracle`. 2,000 files a run; `make test-imports` tries 10,000.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from confide.errors import ConsentError
from confide.privacy.consent import EventType
from confide.privacy.consent.desk import ConsentDesk
from confide.privacy.consent.imports import Checked, ImportedEvent, Options, check_file, read_checked
from tests.privacy.consent.imports.oracle import Said, statements
from tests.privacy.consent.imports.samples import FILES, MAPPING, TREES

COUNT = 10_000 if os.environ.get("CONFIDE_IMPORTS") == "1" else 2_000
GRANTS = (EventType.GIVEN, EventType.RENEWED)

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 10**30, 1e308, float("nan"), float("inf"), "", " ", "\0", "\ud800", "ann", "research",
    "care", "given", "ConsentGiven", "dpv:ConsentGiven", "dpv:ConsentWithdrawn", "permit", "deny", "active", "inactive",
    "EXPLICIT", "IMPLIED", "P1Y", "PT99999S", "P9999Y", "none", "2026-01-31", "2026-01-31T09:00:00",
    "2031-01-31T09:00:00Z", "9999-12-31T23:59:59-14:00", "_:b0", "urn:confide:pseudonym:00", [], {}, [[]],
    {"@id": "x"}, {"@value": "dpv:ConsentGiven"}, ["dpv:ConsentGiven", "dpv:ConsentWithdrawn"], "x" * 300, "a\nb",
]  # fmt: skip
KEYS = ["provision", "actor", "data", "@context", "@type", "@id", "@graph", "dct:date", "dpv:hasPurpose", "dpv:hasRule",
        "dpv:hasDuration", "modifierExtension", "extension", "period", "type", "purpose", "status", "services",
        "event_id", "valid_until", "max_epsilon", "consentType", "security"]  # fmt: skip
#: By format: (a key that marks an object, a key to set there, to what). Files that stay well-formed and mean less.
LESS: dict[str, list[tuple[str, str, Any]]] = {
    "fhir": [
        *(("purpose", key, [{"role": {"text": "nurse"}}])
          for key in ("actor", "data", "provision", "code", "class", "action", "securityLabel")),
        *(("scope", "status", status) for status in ("inactive", "rejected", "entered-in-error", "draft")),
        ("purpose", "type", "deny"), ("purpose", "period", {"start": "2030-01-01T00:00:00Z"}),
        ("purpose", "period", {"end": "2026-12-01T00:00:00Z"}), ("scope", "dateTime", "2030-01-01T00:00:00Z"),
    ],
    "27560": [
        *(("dpv:isIndicatedAtTime", "@type", f"dpv:{term}")
          for term in ("ConsentRefused", "ConsentExpired", "ConsentUnknown", "ConsentTerminated")),
        ("dpv:isIndicatedAtTime", "@type", ["dpv:ConsentGiven", "dpv:ConsentRefused"]),
        ("dpv:isIndicatedAtTime", "dpv:hasDuration", "2026-12-01T00:00:00Z"),
        ("dpv:hasPurpose", "odrl:constraint", {}), ("dct:identifier", "@type", "pv:ConsentRecord"),
    ],
    "kantara": [
        ("consentType", "consentType", "IMPLIED"), ("consentType", "termination", "2026-12-01T00:00:00Z"),
        ("consentType", "termination", "when you leave"), ("version", "revoked", True),
    ],
    "jsonl": [
        *(("type", "type", kind) for kind in ("refused", "objected", "restricted")),
        ("type", "valid_until", "2026-12-01T00:00:00Z"), ("type", "max_epsilon", 0.1),
    ],
}  # fmt: skip
BITS = [b",", b";", b'"', b"\n", b"\r", b"\0", b"\xff", b"\xc3", b"{", b"}", b"[", b"]", b"[" * 200, b":", b"\\ud800",
        b"NaN", b"Infinity", b"1e999", b"9" * 60, b"\xef\xbb\xbf", b"given", b"opt in", b"Z", b"+01:00",
        b"null"]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node."""
    found = [path]
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += places(value, (*path, key))
    return found


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutated_tree(draw: st.DrawFn, form: str) -> bytes:
    """A sound document with nodes dropped, doubled, replaced, moved, wrapped."""
    tree = copy.deepcopy(TREES[form])
    for _ in range(draw(st.integers(0, 3))):
        known = places(tree)
        if draw(st.booleans()):
            mark, name, value = draw(st.sampled_from(LESS[form]))
            marked = [node for path in known if isinstance(node := at(tree, path), dict) and mark in node]
            if marked:
                marked[draw(st.integers(0, len(marked) - 1))][name] = copy.deepcopy(value)
            continue
        path = known[draw(st.integers(0, len(known) - 1))]
        if not path:
            continue
        parent, key = at(tree, path[:-1]), path[-1]
        match draw(st.sampled_from(["drop", "replace", "wrap", "deep", "take", "add", "double", "reorder"])):
            case "drop":
                del parent[key]
            case "replace":
                parent[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
            case "wrap":
                parent[key] = draw(st.sampled_from([[parent[key]], {"@value": parent[key]}, {"@id": parent[key]}]))
            case "deep":
                for _ in range(draw(st.sampled_from([3, 70, 1500]))):
                    parent[key] = [parent[key]]
                break  # such a tree cannot be walked again
            case "take":
                parent[key] = copy.deepcopy(at(tree, known[draw(st.integers(0, len(known) - 1))]))
            case "add" if isinstance(at(tree, path), dict):
                at(tree, path)[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
            case "double" if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            case "reorder" if isinstance(parent, list):
                parent.reverse()
    try:
        if form == "jsonl":
            return "".join(json.dumps(line) + "\n" for line in tree).encode()
        text = json.dumps(tree, indent=draw(st.sampled_from([None, 1])), ensure_ascii=draw(st.booleans()))
        return text.encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 5_000


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """(format, a file that was sound)."""
    form = draw(st.sampled_from(sorted(FILES)))
    data = draw(mutated_tree(form)) if form in TREES and draw(st.booleans()) else FILES[form]
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 6) | st.integers(0, 200))
        other = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["drop", "double", "flip", "put", "swap", "cell", "line"])):
            case "drop":
                data = data[:start] + data[start + length :]
            case "double":
                data = data[: start + length] + data[start:]
            case "flip" if data:
                start = min(start, len(data) - 1)
                data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
            case "put":
                data = data[:start] + draw(st.sampled_from(BITS)) + data[start:]
            case "swap":
                data = data[:start] + data[other : other + length] + data[start + length :]
            case "cell":  # what stands between two separators becomes what stands elsewhere between two
                cells = data.split(b",")
                first, second = start % len(cells), other % len(cells)
                cells[first], cells[second] = cells[second], cells[first]
                data = b",".join(cells)
            case "line":
                lines = data.split(b"\n")
                lines.insert(start % len(lines), lines[other % len(lines)])
                data = b"\n".join(lines)
    return form, data


def within(event: ImportedEvent, said: Said) -> bool:
    """Does the source say at least what the event grants?"""
    return (
        said.grants
        and (event.subject, event.purpose) == (said.subject, said.purpose)
        and event.effective_at >= said.start
        and (said.end is None or (event.valid_until is not None and event.valid_until <= said.end))
        and (said.limit is None or (event.max_epsilon is not None and event.max_epsilon <= said.limit))
    )


def check(path: Path, form: str | None) -> Checked | None:
    try:
        return check_file(path, Options(), mapping=MAPPING if form in (None, "mapped") else None, name=form)
    except ConsentError:
        return None


@settings(max_examples=COUNT, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_no_broken_file_is_half_taken_or_grants_more_than_it_says(found: tuple[str, bytes]) -> None:
    form, data = found
    path = SCRATCH / "file"
    path.write_bytes(data)
    told = check(path, None)
    if told is not None and told.format.name == form:
        assert (told.events, told.rejected) == ((c := check(path, form)) and c.events, c and c.rejected)
    checked = check(path, form)
    assert checked is not None, "a format that is named is read, and its faults are rejections"
    TALLY["files"] += 1
    if checked.rejected:
        assert all(r.reason and r.field and r.line >= 1 and str(r) for r in checked.rejections)
        with pytest.raises(ConsentError):
            next(read_checked(checked))
        return
    events = list(read_checked(checked))
    assert len(events) == checked.events
    said = statements(form, data) if events else []
    TALLY["taken"] += bool(events)
    for event in events:
        if event.type in GRANTS:
            assert any(within(event, s) for s in said), (event, said)
    heard = {(s.subject, s.purpose, s.start, s.grants) for s in said}
    taken = {(e.subject, e.purpose, e.effective_at, e.type in GRANTS) for e in events}
    assert heard == taken, "a decision is never lost, least of all one against"
    if TALLY["files"] % 100 == 0:
        again_adds_nothing(checked, events)


def again_adds_nothing(checked: Checked, events: list[ImportedEvent]) -> None:
    folder = SCRATCH / f"site-{TALLY['files']}"
    with ConsentDesk.create(folder) as desk:
        try:
            added = desk.apply(read_checked(checked))
        except ConsentError:
            assert list(desk.events()) == []
            return
        assert added == len({e.event_id for e in events})
        assert desk.apply(read_checked(checked)) == 0


TALLY = {"files": 0, "taken": 0}
SCRATCH = Path()


@pytest.fixture(autouse=True, scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    global SCRATCH
    SCRATCH = tmp_path_factory.mktemp("mutations")


def test_enough_of_the_files_were_taken_for_the_oracle_to_mean_something() -> None:
    assert TALLY["files"] >= COUNT
    assert TALLY["taken"] >= TALLY["files"] // 20, TALLY


@pytest.mark.parametrize("form", sorted(FILES))
def test_the_oracle_and_the_import_agree_on_sound_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES[form])
    checked = check(path, form)
    assert checked is not None
    assert checked.rejections == ()
    said = statements(form, FILES[form])
    events = list(read_checked(checked))
    assert len(events) == len(said) >= 3
    assert {(e.subject, e.purpose, e.effective_at, e.valid_until, e.type in GRANTS) for e in events} == {
        (s.subject, s.purpose, s.start, s.end, s.grants) for s in said
    }


def test_the_oracle_would_notice_a_grant_too_many() -> None:
    said = statements("csv", FILES["csv"])
    event = ImportedEvent("x", "cem", "research", EventType.GIVEN, said[3].start, None, "", "", "", "", None)
    assert not any(within(event, s) for s in said)
    longer = ImportedEvent("x", "ann", "research", EventType.GIVEN, said[0].start, None, "", "", "", "", 2.5)
    assert not any(within(longer, s) for s in said)
