"""Sound files of every format, from the same few facts, and the mapping of the mapped one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta, timezone
from typing import Any

from confide.privacy.consent.imports import COLUMNS, ColumnMapping


@dataclass(frozen=True)
class Fact:
    """What a person said: times in ISO 8601 with an offset, empty is none."""

    subject: str
    purpose: str
    type: str
    at: str
    until: str = ""
    limit: str = ""


FACTS = (
    Fact("ann", "research", "given", "2026-01-31T09:00:00+01:00", "2027-01-31T09:00:00Z", "2.5"),
    Fact("bob", "care", "given", "2026-02-01T10:30:00Z"),
    Fact("ann", "research", "withdrawn", "2026-03-01T00:00:00Z"),
    Fact("cem", "research", "refused", "2026-03-02T00:00:00Z"),
    Fact("dee", "care", "given", "2026-03-03T12:00:00.5Z", "2026-12-31T23:59:59Z"),
    Fact("eve", "research", "requested", "2026-03-04T12:00:00Z"),
)

#: A platform's words for ours, in its export.
MAPPING = ColumnMapping(
    delimiter=";",
    time_zone=timezone(timedelta(hours=1)),
    time_format="%d.%m.%Y %H:%M:%S",
    ignore=("ip",),
    columns={"subject": "customer", "purpose": "topic", "type": "action", "effective_at": "time", "valid_until": "end"},
    constants={"lawful_basis": "GDPR-6-1-a"},
    values={
        "type": {"opt in": "given", "opt out": "withdrawn", "no": "refused", "asked": "requested"},
        "purpose": {"R": "research", "C": "care"},
    },
)
_WORDS = {"given": "opt in", "withdrawn": "opt out", "refused": "no", "requested": "asked"}


def csv_file(facts: Sequence[Fact] = FACTS) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for n, f in enumerate(facts):
        writer.writerow((f"e{n}", f.subject, f.purpose, f.type, f.at, f.until, "sha256:n", "GDPR", "DE", "", f.limit))
    return text.getvalue().encode()


def jsonl_file(facts: Sequence[Fact] = FACTS) -> bytes:
    lines = [
        {"event_id": f"e{n}", "subject": f.subject, "purpose": f.purpose, "type": f.type, "effective_at": f.at,
         "valid_until": f.until or None, "max_epsilon": float(f.limit) if f.limit else None}
        for n, f in enumerate(facts)
    ]  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def mapped_file(facts: Sequence[Fact] = FACTS) -> bytes:
    from datetime import datetime

    def local(text: str) -> str:
        return datetime.fromisoformat(text).astimezone(MAPPING.time_zone).strftime("%d.%m.%Y %H:%M:%S") if text else ""

    rows = [
        ";".join((f.subject, f.purpose[0].upper(), _WORDS[f.type], local(f.at), local(f.until), "10.0.0.1"))
        for f in facts
    ]
    return "\n".join(["customer;topic;action;time;end;ip", *rows, ""]).encode()


def fhir_consent(f: Fact, name: str = "c1") -> dict[str, Any]:
    status = {"given": "active", "refused": "active", "withdrawn": "inactive", "requested": "proposed"}[f.type]
    provision: dict[str, Any] = {
        "type": "deny" if f.type == "refused" else "permit",
        "purpose": [{"system": "urn:purposes", "code": f.purpose}],
    }
    if f.until:
        provision["period"] = {"start": f.at, "end": f.until}
    return {
        "resourceType": "Consent", "id": name, "status": status,
        "scope": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/consentscope", "code": "research"}]},
        "category": [{"coding": [{"system": "http://loinc.org", "code": "59284-0"}]}],
        "patient": {"reference": f"Patient/{f.subject}"}, "dateTime": f.at,
        "policyRule": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "OPTIN"}]},
        "provision": provision,
    }  # fmt: skip


def fhir_bundle(facts: Sequence[Fact] = FACTS) -> dict[str, Any]:
    entries = [{"resource": fhir_consent(f, f"c{n}")} for n, f in enumerate(facts)]
    return {"resourceType": "Bundle", "type": "collection",
            "entry": [{"resource": {"resourceType": "Patient", "id": "ann"}}, *entries]}  # fmt: skip


def kantara_receipt(f: Fact, name: str = "r1") -> dict[str, Any]:
    from datetime import datetime

    return {
        "version": "KI-CR-v1.1.0", "jurisdiction": "DE",
        "consentTimestamp": int(datetime.fromisoformat(f.at).timestamp()), "collectionMethod": "form",
        "consentReceiptID": name, "language": "en", "piiPrincipalId": f.subject,
        "piiControllers": [{"piiController": "Ash", "contact": "x"}], "policyUrl": "https://ash.example/policy",
        "services": [{"service": "study", "purposes": [
            {"purpose": f.purpose, "purposeCategory": ["1 - Core"], "consentType": "EXPLICIT",
             "piiCategory": ["1"], "primaryPurpose": True, "termination": f.until or "none",
             "thirdPartyDisclosure": False},
        ]}],
        "sensitive": False, "spiCat": [],
    }  # fmt: skip


def kantara_list(facts: Sequence[Fact] = FACTS) -> list[Any]:
    return [kantara_receipt(f, f"r{n}") for n, f in enumerate(facts) if f.type == "given"]


_TERMS = {"given": "ConsentGiven", "withdrawn": "ConsentWithdrawn", "refused": "ConsentRefused",
          "requested": "ConsentRequested"}  # fmt: skip


def dpv_record(facts: Sequence[Fact], name: str = "rec1") -> dict[str, Any]:
    """One record: the facts are of one person and purpose."""
    statuses = []
    for f in facts:
        status: dict[str, Any] = {
            "@type": [f"dpv:{_TERMS[f.type]}", "dpv:ExplicitlyExpressedConsent"],
            "dpv:isIndicatedBy": "dpv:DataSubject", "dpv:isIndicatedAtTime": f.at,
        }  # fmt: skip
        if f.until:
            status["dpv:hasDuration"] = {"@type": "dpv:UntilTimeDuration", "rdf:value": f.until}
        statuses.append(status)
    return {
        "@type": "dpv:ConsentRecord", "@id": f"https://ash.example/{name}", "dct:identifier": name,
        "dct:conformsTo": "https://w3id.org/dpv/schema/dpv-27560#record",
        "dpv:hasDataSubject": {"@type": "dpv:DataSubject", "dct:identifier": facts[0].subject},
        "dpv:hasDataController": "ex:Ash", "dpv:hasJurisdiction": "loc:DE",
        "dpv:hasProcess": {"@type": "dpv:Process", "dpv:hasPurpose": facts[0].purpose,
                           "dpv:hasLegalBasis": "dpv:ExplicitlyExpressedConsent", "dpv:hasPersonalData": "pd:Health"},
        "dpv:hasNotice": {"@id": "https://ash.example/notice", "@type": "dpv:ConsentNotice", "dct:language": "en"},
        "dpv:hasConsentStatus": statuses,
    }  # fmt: skip


def dpv_graph(facts: Sequence[Fact] = FACTS) -> dict[str, Any]:
    groups: dict[tuple[str, str], list[Fact]] = {}
    for f in facts:
        groups.setdefault((f.subject, f.purpose), []).append(f)
    return {
        "@context": {"dpv": "https://w3id.org/dpv#", "dct": "http://purl.org/dc/terms/"},
        "@graph": [dpv_record(held, f"rec{n}") for n, held in enumerate(groups.values())],
    }


def dumped(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode()


#: A sound file of each format.
FILES = {
    "csv": csv_file(), "jsonl": jsonl_file(), "mapped": mapped_file(), "fhir": dumped(fhir_bundle()),
    "kantara": dumped(kantara_list()), "27560": dumped(dpv_graph()),
}  # fmt: skip
TREES = {"fhir": fhir_bundle(), "kantara": kantara_list(), "27560": dpv_graph(),
         "jsonl": [json.loads(line) for line in jsonl_file().splitlines()]}  # fmt: skip
