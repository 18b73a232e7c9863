"""What a log may hold: one form for every entry, and no room for a number about people in what travels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from confide.errors import AuditError
from confide.privacy.audit import records as r
from confide.privacy.audit.entries import decode, encode
from confide.privacy.consent import ConsentEvent, EventType, now_micros
from tests.privacy.audit.logbook import COORDINATOR, Run

#: `slots=True` makes every class twice, and `__subclasses__` may show both: only what the module names is a kind.
KINDS: list[type[r.Record]] = [
    kind
    for kind in map(vars(r).get, r.__all__)
    if isinstance(kind, type) and issubclass(kind, r.Record) and kind is not r.Record
]
LOCAL = {"local_snapshot", "local_refusal", "local_reply", "local_fault", "consent_read"}
#: Of an auditor who reads no record of a real person: its numbers are about persons that she has invented.
AUDITORS = {"attack_result"}
TEXT = st.text()
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(1 - 2**63, 2**63 - 1),
    list[str]: st.lists(TEXT, max_size=4),
    dict[str, str]: st.dictionaries(TEXT, TEXT, max_size=4),
}

#: Everything that a federated log can say. A new field is a decision about what leaves a site: first make sure that it
#: cannot tell anything of one person (a digest under a salt, a public parameter, or noised and charged), then add it.
FEDERATED_FIELDS = {
    "charged": {"run", "round", "charge", "event"},
    # attempt, key_epoch: how often the coordinator had to ask again; that hangs on which sites answered, not on people.
    "cohort": {"run", "round", "attempt", "key_epoch", "cohort", "statements", "checkpoints", "transcript"},
    "fault": {"run", "round", "step", "party", "reason"},
    "joined": {"run", "manifest", "roster", "coordinator"},  # roster: a digest of public keys and declared populations
    "keys_agreed": {"run", "epoch", "maker", "secret"},  # epoch: as a cohort's
    "keys_destroyed": {"run", "secret"},  # secret: the digest that stands in keys_agreed already
    "metrics_released": {"run", "round", "cohort_size", "values"},  # values: noised, charged, of a whole cohort
    "model_released": {"run", "model", "key", "sites", "checkpoints"},
    # saturated: the clipped share of a whole cohort's coordinates, which had their noise before they were clipped; it
    # is opened from the sealed sum, and every site of the run reads the same.
    "opened": {"run", "round", "transcript", "model", "saturated"},
    "refused": {"run", "round", "step", "party", "reason"},
    # reason: why a message is not authentic or not of the right form, in the words of somebody who holds no data.
    "rejected": {"run", "round", "step", "party", "reason"},
    "round_abandoned": {"run", "round", "reason"},
    "run_created": {"run", "manifest", "software"},
    "run_ended": {"run", "status"},
    "run_stopped": {"run", "reason"},
    "sealed": {"run", "round", "attempt", "cohort", "transcript", "coordinator"},
    "told_ended": {"run", "status", "coordinator"},  # what the coordinator said, and signed
    "settled": {"run", "charge", "steps"},
    "taken_over": {"run", "round", "model"},
    "snapshot_taken": {"run", "round", "commitment"},
    "unlocked": {"run", "round", "attempt", "transcript"},  # which attempt: the coordinator chose it
    "update_committed": {"run", "round", "commitment", "model", "state", "coordinator"},
}
#: Numbers of the schedule, of the roster, and of how often the coordinator asked again: known, or not about people.
PUBLIC_NUMBERS = {"round", "steps", "cohort_size", "attempt", "epoch", "key_epoch"}


@st.composite
def any_record(draw: st.DrawFn) -> r.Record:
    kind: type[r.Record] = draw(st.sampled_from(KINDS))
    return kind(**{name: draw(VALUES[hint]) for name, hint in field_types(kind).items()})


def field_types(kind: type[r.Record]) -> dict[str, Any]:
    """Name and type of what an entry of a kind holds."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def example(kind: type[r.Record]) -> r.Record:
    """One entry of a kind."""
    samples: dict[Any, Any] = {str: "text", int: 3, list[str]: ["a", "b"], dict[str, str]: {"b": "2", "a": "1"}}
    return kind(**{name: samples[hint] for name, hint in field_types(kind).items()})


# --- one form --------------------------------------------------------------------------------------------------------


@given(any_record(), st.integers(0, 2**60))
def test_every_entry_comes_back_as_it_was(record: r.Record, at: int) -> None:
    assert decode(encode(record, at)) == (record, at)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.KIND)
def test_an_entry_is_canonical_json_with_its_kind_version_and_time(kind: type[r.Record]) -> None:
    data = encode(example(kind), 5)
    tree = json.loads(data)
    assert (tree["kind"], tree["v"], tree["at"]) == (kind.KIND, 1, 5)
    assert data == json.dumps(tree, sort_keys=True, separators=(",", ":")).encode("ascii")


def test_kinds_have_different_names() -> None:
    assert len({kind.KIND for kind in KINDS}) == len(KINDS)
    assert all(kind.KIND for kind in KINDS)


def test_every_kind_of_the_module_is_tested_here() -> None:
    assert {kind.__name__ for kind in r.Record.__subclasses__()} == {kind.__name__ for kind in KINDS}


def test_canonical_json_is_that_of_rfc_8785() -> None:
    for kind in KINDS:
        data = encode(example(kind), 1_700_000_000_000_000)
        assert rfc8785.dumps(json.loads(data)) == data


Change = Callable[[dict[str, Any]], bytes]


def _dump(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


CHANGES: dict[str, Change] = {
    "spaces": lambda t: json.dumps(t, sort_keys=True).encode(),
    "a space at the end": lambda t: _dump(t) + b" ",
    "a space at the start": lambda t: b" " + _dump(t),
    "keys in another order": lambda t: json.dumps(
        dict(sorted(t.items(), reverse=True)), separators=(",", ":")
    ).encode(),
    "an unknown field": lambda t: _dump({**t, "note": "x"}),
    "no run": lambda t: _dump({k: v for k, v in t.items() if k != "run"}),
    "no time": lambda t: _dump({k: v for k, v in t.items() if k != "at"}),
    "no version": lambda t: _dump({k: v for k, v in t.items() if k != "v"}),
    "a later version": lambda t: _dump({**t, "v": 2}),
    "version as text": lambda t: _dump({**t, "v": "1"}),
    "version as a float": lambda t: _dump({**t, "v": 1.0}),
    "version as a truth": lambda t: _dump({**t, "v": True}),
    "an unknown kind": lambda t: _dump({**t, "kind": "confession"}),
    "no kind": lambda t: _dump({k: v for k, v in t.items() if k != "kind"}),
    "kind as a list": lambda t: _dump({**t, "kind": [t["kind"]]}),
    "time as a float": lambda t: _dump({**t, "at": 5.0}),
    "time as a truth": lambda t: _dump({**t, "at": True}),
    "time as text": lambda t: _dump({**t, "at": "5"}),
    "run as a number": lambda t: _dump({**t, "run": 7}),
    "run as a float": lambda t: _dump({**t, "run": 0.875}),
    "run as nothing": lambda t: _dump({**t, "run": None}),
    "run as a list": lambda t: _dump({**t, "run": ["r"]}),
    "run not a number": lambda t: _dump({**t, "run": float("nan")}),
    "run without end": lambda t: _dump({**t, "run": float("inf")}),
    "a key twice": lambda t: b'{"at":5,' + _dump(t)[1:],
    "an escape that is not needed": lambda t: _dump(t).replace(b'"run"', b'"\\u0072un"'),
    "text that is not ASCII": lambda t: json.dumps(
        {**t, "run": "é"}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode(),
    "a byte order mark": lambda t: b"\xef\xbb\xbf" + _dump(t),
    "in UTF-16": lambda t: _dump(t).decode().encode("utf-16"),
    "in a list": lambda t: b"[" + _dump(t) + b"]",
    "twice": lambda t: _dump(t) * 2,
    "half of it": lambda t: _dump(t)[: len(_dump(t)) // 2],
    "nothing": lambda t: b"",
    "null": lambda t: b"null",
    "bytes that are no text": lambda t: b"\xff\xfe\x00\x81",
    "nested without end": lambda t: b"[" * 200_000,
    "nested in a field": lambda t: _dump({**t, "run": "@"}).replace(b'"@"', b"[" * 50_000 + b"]" * 50_000),
    "a number of 5,000 digits": lambda t: _dump({**t, "at": 0}).replace(b'"at":0', b'"at":' + b"9" * 5_000),
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("kind", [r.Joined, r.Cohort, r.LocalSnapshot], ids=lambda k: k.KIND)
def test_any_other_form_is_refused(kind: type[r.Record], change: str) -> None:
    honest = encode(example(kind), 5)
    assert decode(honest) == (example(kind), 5)  # the control
    with pytest.raises(AuditError):
        decode(CHANGES[change](json.loads(honest)))


WRONG_VALUES: dict[Any, list[Any]] = {
    str: [1, 1.5, True, None, ["x"], {"x": "y"}],
    int: ["1", 0.875, 2.0, True, None, [1]],
    list[str]: ["ab", [1], [0.875], [None], [["x"]], {"a": "b"}, None, 1],
    dict[str, str]: ["ab", {"a": 1}, {"a": 0.875}, {"a": None}, [["a", "b"]], None],
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.KIND)
def test_a_field_holds_its_own_type_only(kind: type[r.Record]) -> None:
    """A float in a field would be a metric in a log; any other type, a crash of whoever reads it."""
    honest, accepted = json.loads(encode(example(kind), 5)), []
    for name, hint in field_types(kind).items():
        for wrong in WRONG_VALUES[hint]:
            try:
                decode(_dump({**honest, name: wrong}))
            except AuditError:
                continue
            accepted.append((name, wrong))
    assert accepted == []


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
).map(lambda tree: json.dumps(tree).encode()))  # fmt: skip
def test_nothing_else_is_an_entry(data: bytes) -> None:
    with pytest.raises(AuditError):
        decode(data)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_a_float_cannot_be_logged(value: float) -> None:
    with pytest.raises((TypeError, ValueError, AuditError)):
        decode(encode(r.Opened(run="r", round=value, transcript="x", model="y", saturated="0"), 5))  # type: ignore[arg-type]


# --- what travels ----------------------------------------------------------------------------------------------------


def test_what_may_travel_is_written_down_here_field_by_field() -> None:
    assert {k.KIND: {f.name for f in fields(k)} for k in KINDS if k.KIND not in LOCAL | AUDITORS} == FEDERATED_FIELDS


@pytest.mark.parametrize("kind", [k for k in KINDS if k.KIND not in LOCAL | AUDITORS], ids=lambda k: k.KIND)
def test_a_federated_entry_has_no_number_but_public_ones(kind: type[r.Record]) -> None:
    numbers = {name for name, hint in field_types(kind).items() if hint not in (str, list[str], dict[str, str])}
    assert numbers <= PUBLIC_NUMBERS


def test_a_sites_federated_log_holds_federated_kinds_only(finished: Run) -> None:
    for site in finished.sites:
        assert {e.KIND for e in finished.records(site)} <= set(FEDERATED_FIELDS)
        assert {e.KIND for e in finished.records(site, local=True)} <= LOCAL


def test_what_is_clipped_is_the_same_share_of_the_whole_cohort_in_every_log(finished: Run) -> None:
    """No site's own: each of them reads it from the opened sum."""
    told = [[(e.round, e.saturated) for e in finished.records(s) if isinstance(e, r.Opened)] for s in finished.sites]
    assert [round_ for round_, _ in told[0]] == [1, 2, 3]
    assert all(each == told[0] for each in told)
    assert all(re.fullmatch(r"[01]\.\d{6}", share) and 0 <= float(share) <= 1 for _, share in told[0])


def test_only_the_coordinator_rejects_and_only_sites_unlock(finished: Run, retried: Run) -> None:
    for run in (finished, retried):
        assert not [e for site in run.sites for e in run.records(site) if isinstance(e, r.Rejected | r.Cohort)]
        assert not [e for e in run.records(COORDINATOR) if isinstance(e, r.Unlocked | r.Opened | r.KeysDestroyed)]
        for site in run.sites:
            assert isinstance(run.records(site)[-1], r.KeysDestroyed), "the last that a site tells of a run"


def test_no_federated_log_names_a_person_or_counts_persons(finished: Run) -> None:
    table = pd.read_csv(finished.tree["data"]["file"])
    for site in finished.sites:
        text = finished.log(site).read_text()
        people = set(table.person[table.clinic == site])
        exact = [e for e in finished.records(site, local=True) if isinstance(e, r.LocalSnapshot)]
        counts = {len(people), int((table.clinic == site).sum())}
        counts |= {e.training for e in exact} | {e.held_out for e in exact} | {e.persons for e in exact}
        counts |= {e.training + e.held_out for e in exact}
        assert min(counts) > 50  # the control: larger than any round or size of a log, so none is there by chance
        assert {c for c in counts if re.search(rf"(?<![\w.]){c}(?![\w.])", text)} == set()
        # Names of people in this table start with their site's.
        assert not re.search(rf"\b{site}-\d", text)
        assert all(re.search(rf"\b{site}-\d", person) for person in people)  # the control


def test_no_federated_log_holds_a_metric_of_the_simulator(finished: Run) -> None:
    lines = [json.loads(line) for line in (finished.folder / "rounds.jsonl").read_text().splitlines()]
    exact = {repr(v)[:8] for line in lines for v in line["metrics"].values()}
    exact |= {repr(v)[:8] for line in lines for v in (line["released_metrics"] or {}).values() if v is not None}
    exact = {number for number in exact if len(number) > 5}  # a metric of 1.0 is told by nothing
    assert len(exact) > 3
    for party in (COORDINATOR, *finished.sites):
        text = finished.log(party).read_text()
        assert {number for number in exact if number in text} == set()
    # The control: the coordinator's log does hold numbers, and they are the noised sums only.
    sums = [v for e in finished.records(COORDINATOR) if isinstance(e, r.MetricsReleased) for v in e.values]
    assert sums
    assert all(v in finished.log(COORDINATOR).read_text() for v in sums)


def shape(run: Run, site: str) -> list[tuple[str, int | None, int]]:
    """Kind, round and length in bytes of every federated entry: all that a peer could measure."""
    lines = run.log(site).read_bytes().splitlines()
    return [(e.KIND, getattr(e, "round", None), len(line)) for e, line in zip(run.records(site), lines, strict=True)]


def test_one_persons_withdrawal_changes_neither_number_nor_size_of_entries(start: Callable[..., Run]) -> None:
    gone: list[str] = []

    def withdraw(world: Any, round_: int) -> None:
        if round_ == 2:
            person, pseudonym = sorted(world.maker.pseudonyms["birch"].items())[0]
            world.maker.registries["birch"].append([
                ConsentEvent(
                    event_id="leaves", pseudonym=pseudonym, purpose="research/test", type=EventType.WITHDRAWN,
                    effective_at=now_micros(), lawful_basis="simulated",
                )
            ])  # fmt: skip
            gone.append(person)

    sections = {"run": {"rounds": 3}}
    without, with_one = start(people=40, **sections), start(people=40, before_round=withdraw, **sections)
    assert len(gone) == 1
    assert _persons(with_one, "birch") == [_persons(without, "birch")[0]] + [_persons(without, "birch")[0] - 1] * 3
    for site in with_one.sites:
        assert shape(with_one, site) == shape(without, site)


def _persons(run: Run, site: str) -> list[int]:
    """The exact numbers, round by round, that stay at the site."""
    return [e.training + e.held_out for e in run.records(site, local=True) if isinstance(e, r.LocalSnapshot)]


def test_every_log_of_a_run_is_plain_ascii_without_floats(finished: Run) -> None:
    def refuse(text: str) -> float:
        raise AssertionError(f"a float in a log: {text}")

    found = 0
    for path in finished.all_logs():
        for line in Path(path).read_text("ascii").splitlines():
            found += bool(json.loads(line.split(" ", 1)[1], parse_float=refuse, parse_constant=refuse))
    assert found > 10, "there was something to look at"
