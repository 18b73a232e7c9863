"""Consent records in JSON-LD: one meaning however it is written, nothing fetched, and no status guessed."""

from __future__ import annotations

import copy
import json
import socket
from typing import Any

import pytest

from confide.privacy.consent import EventType
from tests.privacy.consent.imports.reading import read, refused
from tests.privacy.consent.imports.samples import FACTS, dpv_graph, dpv_record

RECORD = dpv_record([FACTS[0], FACTS[2]])
START = 1769846400_000000


def one(**changes: Any) -> dict[str, Any]:
    """A record with a single status, changed; None removes a key."""
    tree = dpv_record([FACTS[0]])
    tree["dpv:hasConsentStatus"] = {**tree["dpv:hasConsentStatus"][0], **changes}
    tree["dpv:hasConsentStatus"] = {k: v for k, v in tree["dpv:hasConsentStatus"].items() if v is not None}
    return tree


def test_every_status_is_an_event() -> None:
    events, rejections = read("27560", RECORD)
    assert rejections == []
    assert [(e.type, e.subject, e.purpose) for e in events] == [
        (EventType.GIVEN, "ann", "research"), (EventType.WITHDRAWN, "ann", "research")
    ]  # fmt: skip
    given = events[0]
    assert (given.effective_at, given.valid_until) == (START, 1801386000_000000)
    assert (given.notice_digest, given.jurisdiction) == ("https://ash.example/notice", "loc:DE")
    assert given.lawful_basis == "dpv:ExplicitlyExpressedConsent"


@pytest.mark.parametrize(
    ("term", "kind"),
    [("ConsentGiven", "given"), ("RenewedConsentGiven", "renewed"), ("ConsentRefused", "refused"),
     ("ConsentWithdrawn", "withdrawn"), ("ConsentRevoked", "revoked"), ("ConsentTerminated", "revoked"),
     ("ConsentExpired", "revoked"), ("ConsentInvalidated", "invalidated"), ("ConsentRequested", "requested")],
)  # fmt: skip
def test_each_status_has_one_meaning(term: str, kind: str) -> None:
    (event,), _ = read("27560", one(**{"@type": f"dpv:{term}", "dpv:hasDuration": None}))
    assert event.type is EventType(kind)


def test_full_addresses_prefixes_and_vocab_say_the_same() -> None:
    expected, _ = read("27560", RECORD)
    text = json.dumps(RECORD)
    full = text.replace('"dpv:', '"https://w3id.org/dpv#').replace('"dct:', '"http://purl.org/dc/terms/')
    other = json.loads(text.replace('"dpv:', '"p:')) | {"@context": {"p": "https://w3id.org/dpv#"}}
    bare = json.loads(text.replace('"dpv:has', '"has').replace('"dpv:is', '"is'))
    bare |= {"@context": {"@vocab": "https://w3id.org/dpv#"}}
    assert read("27560", full.encode()) == (expected, [])
    assert read("27560", other) == (expected, [])
    assert read("27560", bare) == (expected, [])


def test_a_graph_a_list_a_receipt_and_lines_say_the_same() -> None:
    records = dpv_graph()["@graph"]
    expected = read("27560", dpv_graph())
    assert len(expected[0]) == len(FACTS)
    assert read("27560", records) == expected
    assert read("27560", {"@type": "dpv:ConsentReceipt", "dpv:hasRecordOfActivity": records}) == expected
    assert read("27560", "\n".join(map(json.dumps, records)).encode()) == expected


def test_a_reference_is_followed_inside_the_document() -> None:
    record = dpv_record([FACTS[0]]) | {"dpv:hasDataSubject": {"@id": "ex:s"}}
    graph = {"@graph": [record, {"@id": "ex:s", "@type": "dpv:DataSubject", "dct:identifier": "ann"}]}
    (event,), rejections = read("27560", graph)
    assert (event.subject, rejections) == ("ann", [])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"@type": "dpv:ConsentUnknown"}, "dpv:hasConsentStatus"),
        ({"@type": ["dpv:ConsentGiven", "dpv:ConsentWithdrawn"]}, "dpv:hasConsentStatus"),
        ({"@type": ["dpv:ConsentGiven", "dpv:ImpliedConsent"]}, "dpv:hasConsentStatus"),
        ({"@type": "dpv:ConsentStatus"}, "dpv:hasConsentStatus"), ({"@type": None}, "dpv:hasConsentStatus"),
        ({"dpv:isIndicatedAtTime": None}, "dpv:isIndicatedAtTime"),
        ({"dpv:isIndicatedAtTime": "2026-01-31T09:00:00"}, "dpv:isIndicatedAtTime"),
        ({"dpv:isIndicatedAtTime": "2026-01-31"}, "dpv:isIndicatedAtTime"),
        ({"dpv:hasDuration": {"@type": "dpv:UntilEventDuration", "rdf:value": "Closure"}}, "dpv:hasDuration"),
        ({"dpv:hasDuration": {"@type": "dpv:FixedOccurrencesDuration", "rdf:value": "1"}}, "dpv:hasDuration"),
        ({"dpv:hasDuration": {"@type": "dpv:UntilTimeDuration", "rdf:value": "2027-12-31"}}, "dpv:hasDuration"),
        ({"dpv:hasDuration": 63115200}, "dpv:hasDuration"), ({"dpv:hasDuration": "none"}, "dpv:hasDuration"),
        ({"dpv:hasRule": "ex:only-mondays"}, "status.dpv:hasRule"),
        ({"urn:confide:consent:maxEpsilon": "-1"}, "max_epsilon"),
    ],
)  # fmt: skip
def test_a_status_that_leaves_a_doubt_is_rejected(changes: dict[str, Any], field: str) -> None:
    assert refused("27560", one(**changes)).field == field


@pytest.mark.parametrize(
    ("duration", "until"),
    [("P1D", START + 86_400_000_000), ({"@type": "dpv:TemporalDuration", "rdf:value": "P1D"}, START + 86_400_000_000),
     ("dpv:EndlessDuration", None), ({"@type": "dpv:EndlessDuration"}, None), ({"@id": "dpv:EndlessDuration"}, None),
     ({"@value": "2026-02-01T08:00:00Z", "@type": "xsd:dateTime"}, START + 86_400_000_000)],
)  # fmt: skip
def test_a_duration_ends_where_it_says(duration: Any, until: int | None) -> None:
    (event,), rejections = read("27560", one(**{"dpv:hasDuration": duration}))
    assert (event.valid_until, rejections) == (until, [])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dpv:hasDataSubject": None}, "dpv:hasDataSubject"),
        ({"dpv:hasDataSubject": ["ann", "bob"]}, "dpv:hasDataSubject"),
        ({"dpv:hasDataSubject": "_:b0"}, "dpv:hasDataSubject"),
        ({"dpv:hasDataSubject": {"@type": "dpv:Patient"}}, "dpv:hasDataSubject"),
        ({"dpv:hasDataSubject": "urn:confide:pseudonym:ab"}, "subject"),
        ({"dpv:hasProcess": None}, "dpv:hasPurpose"), ({"dpv:hasConsentStatus": []}, "dpv:hasConsentStatus"),
        ({"@type": "dpv:Consent"}, "@type"), ({"dpv:hasProhibition": "x"}, "record.dpv:hasProhibition"),
        ({"dpv:hasProcess": {"dpv:hasPurpose": "research", "odrl:constraint": {}}}, "dpv:hasProcess.odrl:constraint"),
        ({"@context": "https://w3id.org/dpv/context.jsonld"}, "@context"),
        ({"@context": {"dpv": "https://evil.example/#"}}, "@context"),
        ({"@context": {"given": {"@id": "dpv:ConsentGiven"}}}, "@context"), ({"@context": {"x": "y"}}, "@context"),
        ({"https://w3id.org/dpv#hasConsentStatus": "dpv:ConsentGiven"}, "dpv:hasConsentStatus"),
    ],
)  # fmt: skip
def test_a_record_that_leaves_a_doubt_is_rejected(changes: dict[str, Any], field: str) -> None:
    tree = {k: v for k, v in (dpv_record([FACTS[0]]) | changes).items() if v is not None}
    assert refused("27560", tree).field == field


@pytest.mark.parametrize(
    "node",
    [{"@id": "ex:r", "@type": "pv:ConsentRecord", "dpv:hasConsentStatus": "dpv:ConsentWithdrawn"},
     {"@type": "dpv:DataController"}, {"@id": "ex:g", "@graph": []}],
)  # fmt: skip
def test_a_node_that_might_be_a_misspelt_record_is_not_passed_over(node: dict[str, Any]) -> None:
    graph = dpv_graph()
    graph["@graph"].append(node)
    _, rejections = read("27560", graph)
    assert [r.field for r in rejections] == [f"@graph[{len(graph['@graph']) - 1}]"]


def test_a_node_described_twice_is_rejected() -> None:
    graph = dpv_graph()
    graph["@graph"].append(copy.deepcopy(graph["@graph"][0]))
    assert "twice" in refused("27560", graph).reason


def test_no_address_is_ever_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    tree = dpv_record([FACTS[0]]) | {"@context": ["http://127.0.0.1:9/context"]}
    assert refused("27560", tree).field == "@context"


def test_a_record_of_many_purposes_and_statuses_is_no_bomb() -> None:
    tree = dpv_record([FACTS[0]] * 300)
    tree["dpv:hasProcess"]["dpv:hasPurpose"] = [f"p{n}" for n in range(300)]
    assert "more than 1,000 events" in refused("27560", tree).reason
