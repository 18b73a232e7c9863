"""FHIR R4 Consent: what each status amounts to, and everything that narrows a provision is rejected."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from confide.privacy.consent import EventType, decide
from confide.privacy.consent.events import ConsentEvent
from confide.privacy.consent.imports import ImportedEvent, Options
from tests.privacy.consent.imports.reading import read, refused
from tests.privacy.consent.imports.samples import FACTS, fhir_bundle, fhir_consent

GIVEN = fhir_consent(FACTS[0])
START = 1769846400_000000


def changed(path: str, value: Any) -> dict[str, Any]:
    """The consent with one node replaced; None removes it."""
    tree = copy.deepcopy(GIVEN)
    *way, last = path.split("/")
    node = tree
    for key in way:
        node = node[int(key)] if isinstance(node, list) else node[key]  # type: ignore[assignment]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


def only(tree: Any, **kwargs: Any) -> ImportedEvent:
    (event,), rejections = read("fhir", tree, **kwargs)
    assert rejections == []
    return event


def test_an_active_permit_is_a_grant_for_its_period_and_purpose() -> None:
    event = only(GIVEN)
    assert (event.type, event.subject, event.purpose) == (EventType.GIVEN, "ann", "urn:purposes|research")
    assert (event.effective_at, event.valid_until) == (START, 1801386000_000000)
    assert (event.lawful_basis, event.evidence_ref, event.derived) == ("OPTIN", "Consent/c1", True)


@pytest.mark.parametrize(
    ("status", "kind"),
    [("inactive", "revoked"), ("entered-in-error", "invalidated"), ("rejected", "refused"), ("proposed", "requested"),
     ("draft", "requested")],
)  # fmt: skip
def test_every_status_but_active_is_no_grant(status: str, kind: str) -> None:
    event = only(changed("status", status))
    assert (event.type, event.valid_until) == (EventType(kind), None)


def test_an_active_deny_is_a_refusal() -> None:
    tree = changed("provision", {"type": "deny", "purpose": [{"code": "research"}]})
    assert only(tree).type is EventType.REFUSED


@pytest.mark.parametrize("status", ["inactive", "entered-in-error", "rejected"])
@pytest.mark.parametrize("start", ["2026-01-01T00:00:00Z", "2026-05-01T00:00:00Z"])
def test_a_resource_that_is_no_longer_active_takes_back_the_grant_it_was(status: str, start: str) -> None:
    before = changed("provision/period", {"start": start})
    after = copy.deepcopy(before) | {"status": status}
    events = [_stored(only(before)), _stored(only(after))]
    late = START + 10**15
    assert decide(events[:1], late).may_participate
    assert not decide(events, late).may_participate
    assert not decide(events[::-1], late).may_participate


def _stored(e: ImportedEvent) -> ConsentEvent:
    return ConsentEvent(event_id=e.event_id, pseudonym=b"p", purpose=e.purpose, type=e.type,
                        effective_at=e.effective_at, valid_until=e.valid_until)  # fmt: skip


def test_a_grant_begins_at_the_later_of_consent_and_period() -> None:
    assert only(changed("provision/period", {"start": "2026-05-01T00:00:00Z"})).effective_at == 1777593600_000000
    assert only(changed("provision/period", {"start": "2020-05-01T00:00:00Z"})).effective_at == START


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("status", "maybe", "status"), ("status", None, "status"), ("status", ["active"], "status"),
        ("scope", None, "scope"), ("scope/coding/0/code", "treatment", "scope"),
        ("scope/coding/0/system", "urn:x", "scope"), ("scope", {"text": "research"}, "scope"),
        ("category", [], "category"), ("patient", None, "patient"), ("patient/reference", "Group/1", "patient"),
        ("patient/reference", "#p", "patient"), ("patient/reference", "Patient/1/_history/2", "patient"),
        ("patient/type", "Group", "patient.type"), ("patient/identifier", {"system": "x"}, "patient.identifier"),
        ("dateTime", None, "dateTime"), ("dateTime", "2026-01-31", "dateTime"), ("dateTime", "2026", "dateTime"),
        ("dateTime", "2026-01-31T09:00:00", "dateTime"), ("policyRule", None, "policy"),
        ("policyRule/coding/0/code", "OPTOUT", "policyRule"), ("provision", None, "provision"),
        ("provision/type", None, "provision.type"), ("provision/type", "allow", "provision.type"),
        ("provision/purpose", None, "provision.purpose"), ("provision/purpose", [], "provision.purpose"),
        ("provision/purpose", [{"display": "all"}], "provision.purpose"),
        ("provision/period/end", "2027-01-31", "provision.period.end"),
        ("provision/period/end", "2025-01-31T00:00:00Z", "valid_until"),
        ("provision/period/_end", {"extension": []}, "provision.period._end"),
        ("provision/type", "deny", "provision.period"),
        ("provision/actor", [{"role": {}}], "provision.actor"), ("provision/action", [{}], "provision.action"),
        ("provision/data", [{"meaning": "instance"}], "provision.data"), ("provision/code", [{}], "provision.code"),
        ("provision/securityLabel", [{"code": "R"}], "provision.securityLabel"),
        ("provision/class", [{"code": "x"}], "provision.class"),
        ("provision/dataPeriod", {"start": "2020"}, "provision.dataPeriod"),
        ("provision/provision", [{"type": "deny"}], "provision.provision"),
        ("provision/modifierExtension", [{"url": "x"}], "provision.modifierExtension"),
        ("modifierExtension", [{"url": "x"}], "Consent.modifierExtension"),
        ("implicitRules", "urn:rules", "Consent.implicitRules"), ("_status", {"extension": []}, "Consent._status"),
        ("meta", {"security": [{"code": "HTEST"}]}, "meta.security"),
        ("meta", {"tag": [{"code": "SUBSETTED"}]}, "meta.tag"),
        ("verification", [{"verified": False}], "verification"), ("resourceType", "Contract", "resourceType"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_rejected_by_name(path: str, value: Any, field: str) -> None:
    found = refused("fhir", changed(path, value))
    assert found.field.startswith(field)
    assert found.reason


def test_the_person_is_the_business_identifier_where_there_is_one() -> None:
    assert only(changed("patient/identifier", {"system": "urn:mrn", "value": "4711"})).subject == "4711"
    assert only(changed("patient/reference", "https://a.example/Patient/1")).subject == "https://a.example/Patient/1"


def test_a_mapping_gives_purposes_our_names() -> None:
    options = Options(purposes=frozenset({"research/x"}), values={"purpose": {"urn:purposes|research": "research/x"}})
    assert only(GIVEN, options=options).purpose == "research/x"
    assert "not a known purpose" in refused("fhir", fhir_consent(FACTS[1]), options=options).reason


def test_several_purposes_are_several_events() -> None:
    events, _ = read("fhir", changed("provision/purpose", [{"code": "a"}, {"code": "b"}]))
    assert [e.purpose for e in events] == ["a", "b"]
    assert len({e.event_id for e in events}) == 2


def test_a_bundle_and_one_resource_a_line_say_the_same() -> None:
    bundle, _ = read("fhir", fhir_bundle())
    lines = "\n".join(json.dumps(e["resource"]) for e in fhir_bundle()["entry"][1:])
    assert read("fhir", lines.encode()) == (bundle, [])
    assert len(bundle) == len(FACTS)


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda bundle: bundle.pop(name)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_without("entry"), "Bundle.entry"),
        (lambda b: b.update(ntry=[]), "Bundle.ntry"),
        (lambda b: b.update(implicitRules="x"), "Bundle.implicitRules"),
        (lambda b: b["entry"][1].update(request={"method": "DELETE"}), "Bundle.entry[1].request"),
        (lambda b: b["entry"].append({"resource": {"resourceType": "Contract"}}), "resourceType"),
        (lambda b: b["entry"].append({"fullUrl": "x"}), "resourceType"),
    ],
)
def test_a_bundle_that_might_leave_something_out_is_rejected(
    change: Callable[[dict[str, Any]], None], field: str
) -> None:
    bundle = fhir_bundle()
    change(bundle)
    _, rejections = read("fhir", bundle)
    assert [r.field for r in rejections] == [field]


def test_a_rejected_resource_is_named_by_number_and_pointer() -> None:
    bundle = fhir_bundle()
    bundle["entry"][3]["resource"]["status"] = "?"
    _, (found,) = read("fhir", bundle)
    assert (found.line, found.pointer) == (3, "/entry/3/resource")
    assert str(found).startswith("record 3 at /entry/3/resource, status: ")


def test_an_empty_search_is_no_fault() -> None:
    assert read("fhir", {"resourceType": "Bundle", "type": "searchset", "total": 0}) == ([], [])
