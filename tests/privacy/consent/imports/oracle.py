"""What a file says, read a second time and otherwise: leniently, with the standard library, knowing nothing of ours.

`statements` lists every single decision that a file's own text states. An import may take no grant that is not among
them, and must leave out no decision against.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

from tests.privacy.consent.imports.samples import MAPPING

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Said:
    """One decision. Times are microseconds UTC; `end` and `limit` None: none is said."""

    subject: str
    purpose: str
    grants: bool
    start: int
    end: int | None = None
    limit: float | None = None


def statements(form: str, data: bytes) -> list[Said]:
    """Every decision of the file that can be made out."""
    text = data.decode("utf-8-sig")
    if form == "csv":
        return list(_rows(csv.DictReader(io.StringIO(text, newline=""))))
    if form == "mapped":
        return list(_mapped(text))
    trees = _trees(text)
    if form == "jsonl":
        return list(_rows(trees))
    read = {"fhir": _fhir, "kantara": _kantara, "27560": _dpv}[form]
    return [said for tree in trees for said in read(tree)]


def _trees(text: str) -> list[Any]:
    """One tree, or one a line."""
    text = text.replace("https://w3id.org/dpv#", "dpv:").replace("http://purl.org/dc/terms/", "dct:")
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]


def _instant(text: Any) -> int:
    return (datetime.fromisoformat(text.strip()) - _EPOCH) // timedelta(microseconds=1)


def _rows(rows: Any) -> Iterator[Said]:
    for row in rows:
        if not row or not any(isinstance(v, str) and v for v in row.values()):
            continue
        said = {key: str(value).strip() for key, value in row.items() if value is not None}
        kind = said["type"]
        limit = said.get("max_epsilon") or ""
        yield Said(
            said["subject"], said["purpose"], kind in ("given", "renewed"), _instant(said["effective_at"]),
            _instant(said["valid_until"]) if said.get("valid_until") else None, float(limit) if limit else None,
        )  # fmt: skip


def _mapped(text: str) -> Iterator[Said]:
    zone = timedelta(hours=1)

    def local(value: str) -> int:
        return (datetime.strptime(value, "%d.%m.%Y %H:%M:%S") - datetime(1970, 1, 1) - zone) // timedelta(
            microseconds=1
        )

    for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=";"):
        found = {key: value.strip() for key, value in row.items() if value is not None}
        topic = MAPPING.values["purpose"].get(found["topic"], found["topic"])
        yield Said(found["customer"], topic, found["action"] == "opt in", local(found["time"]),
                   local(found["end"]) if found["end"] else None)  # fmt: skip


def _fhir(tree: Any) -> Iterator[Said]:
    resources = [e["resource"] for e in tree["entry"]] if tree["resourceType"] == "Bundle" else [tree]
    for r in resources:
        if r["resourceType"] != "Consent":
            continue
        rule, patient = r["provision"], r["patient"]
        person = patient["identifier"]["value"] if "identifier" in patient else patient["reference"]
        period = rule.get("period", {})
        start = max(_instant(r["dateTime"]), _instant(period["start"]) if "start" in period else -(10**18))
        narrowed = {"actor", "action", "securityLabel", "class", "code", "dataPeriod", "data", "provision"} & set(rule)
        grants = r["status"] == "active" and rule["type"] == "permit" and not narrowed
        for coding in rule["purpose"]:
            purpose = "|".join(coding[k] for k in ("system", "code") if k in coding)
            yield Said(person.removeprefix("Patient/"), purpose, grants, start,
                       _instant(period["end"]) if grants and "end" in period else None)  # fmt: skip


def _kantara(tree: Any) -> Iterator[Said]:
    for r in tree if isinstance(tree, list) else [tree]:
        for service in r["services"]:
            for p in service["purposes"]:
                ends = p["termination"].strip()
                purpose = p["purpose"] if "purpose" in p else p["purposeCategory"][0]
                yield Said(
                    r["piiPrincipalId"].strip(), purpose.strip(), p["consentType"] == "EXPLICIT",
                    int(Fraction(r["consentTimestamp"]) * 10**6), None if ends == "none" else _instant(ends),
                )  # fmt: skip


def _dpv(tree: Any) -> Iterator[Said]:
    for record in _records(tree):
        if "ConsentRecord" not in str(record.get("@type")):
            continue
        subject = _one(record["dpv:hasDataSubject"])
        subject = subject if isinstance(subject, dict) else {"@id": subject}
        person = next(_one(subject[k]) for k in ("dct:identifier", "dpv:hasIdentifier", "@id") if k in subject)
        places = [record, *_many(record.get("dpv:hasProcess"))]
        purposes = [_one(p) for place in places for p in _many(place.get("dpv:hasPurpose"))]
        for purpose in purposes:
            for status in _many(record["dpv:hasConsentStatus"]):
                status = status if isinstance(status, dict) else {"@type": status}
                kinds = str(status.get("@type", status.get("@id")))
                grants = "ConsentGiven" in kinds and not any(word in kinds for word in _AGAINST)
                at = _one(status.get("dpv:isIndicatedAtTime", record.get("dct:date")))
                duration = status.get("dpv:hasDuration")
                end = None
                if grants and duration is not None:
                    end = _instant(_one(duration.get("rdf:value") if isinstance(duration, dict) else duration))
                yield Said(person.strip(), purpose.strip(), grants, _instant(at), end)


_AGAINST = ("Refused", "Withdrawn", "Expired", "Terminated", "Revoked", "Invalidated", "Unknown", "Requested")


def _one(value: Any) -> Any:
    """What is inside a list of one, or a wrapped value."""
    if isinstance(value, list) and len(value) == 1:
        return _one(value[0])
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("@value", "@id"):
        return _one(next(iter(value.values())))
    return value


def _records(tree: Any) -> Iterator[Any]:
    for node in tree if isinstance(tree, list) else [tree]:
        inside = node.get("@graph", node.get("dpv:hasRecordOfActivity"))
        yield from [node] if inside is None else _records(inside)


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
