"""FHIR R4 `Consent`: a resource, a `Bundle`, or one resource a line (https://hl7.org/fhir/R4/consent.html).

What is read: `status`, `scope`, `patient`, `dateTime`, `policy`/`policyRule`, and the root `provision` with `type`,
`period` and `purpose`. What narrows a provision in a way that a registry of (person, purpose) cannot hold (nested
provisions, actors, actions, data, classes, codes, labels), or is not understood at all, is rejected.

- `active` + `permit` is *given*, `active` + `deny` *refused*. `inactive` is *revoked*, `entered-in-error`
  *invalidated*, `rejected` *refused*, `proposed` and `draft` *requested*.
- A consent holds from the later of `dateTime` and `provision.period.start`, to `provision.period.end`. FHIR does not
  say when a resource became inactive: whatever its status, its event holds from the instant from which it was a
  consent, and of two decisions at one instant the more protective stands.
- The purpose is `system|code`, as in FHIR searches; `[values.purpose]` of a mapping gives it our name.
- The person is the patient's `identifier.value` where there is one, else the id behind `Patient/`.
- The event's id is derived: a resource keeps its id when its status changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from confide.privacy.consent.imports.event import EventBuilder, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.records import DoubtError, Draft, only_keys, read_records, text_of

__all__ = ["read_fhir"]

_STATUS = {
    "inactive": "revoked", "entered-in-error": "invalidated", "rejected": "refused",
    "proposed": "requested", "draft": "requested",
}  # fmt: skip
_RESOURCE = (
    "resourceType", "id", "meta", "language", "text", "contained", "extension", "identifier", "status", "scope",
    "category", "patient", "dateTime", "performer", "organization", "sourceAttachment", "sourceReference", "policy",
    "policyRule", "verification", "provision",
)  # fmt: skip
_BUNDLE = (
    "resourceType", "id", "meta", "language", "identifier", "type", "timestamp", "total", "link", "entry", "signature",
)  # fmt: skip
_ENTRY = ("id", "extension", "link", "fullUrl", "resource", "search", "request", "response")
_SCOPES = ("research", "patient-privacy")
_SCOPE_SYSTEM = "http://terminology.hl7.org/CodeSystem/consentscope"
_PEOPLE = ("Patient", "Organization", "Practitioner", "PractitionerRole", "RelatedPerson")


def read_fhir(stream: BinaryIO, options: Options) -> Iterator[ImportedEvent | Rejection]:
    """Events of all `Consent` resources."""
    return read_records(stream, options, "fhir", _find, _interpret)


def _find(tree: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        raise DoubtError("resourceType", "is missing: this is no FHIR resource")
    if tree.get("resourceType") != "Bundle":
        yield "", tree
        return
    only_keys(tree, _BUNDLE, "Bundle")
    _refuse_labels(tree.get("meta"))
    entries = tree.get("entry", [] if tree.get("total") == 0 else None)
    if not isinstance(entries, list):
        raise DoubtError("Bundle.entry", "is missing, or not a list")
    for place, entry in enumerate(entries):
        only_keys(entry, _ENTRY, f"Bundle.entry[{place}]")
        resource, request = entry.get("resource"), entry.get("request")
        if isinstance(resource, dict) and resource.get("resourceType") in _PEOPLE:
            continue  # who is meant, not what was decided
        if request is not None and (not isinstance(request, dict) or request.get("method") not in ("POST", "PUT")):
            raise DoubtError(f"Bundle.entry[{place}].request", "is neither POST nor PUT: what it leaves is not said")
        yield f"/entry/{place}/resource", resource


def _interpret(node: Any, builder: EventBuilder, options: Options) -> Iterator[Draft]:
    if not isinstance(node, dict) or node.get("resourceType") != "Consent":
        raise DoubtError("resourceType", "is not Consent")
    only_keys(node, _RESOURCE, "Consent")
    _refuse_labels(node.get("meta"))
    _check_scope(node)
    policy = _policy(node)
    provision = only_keys(node.get("provision", {}), ("id", "extension", "type", "period", "purpose"), "provision")
    kind = _kind(node, provision, policy)
    start = _instant(node.get("dateTime"), "dateTime", builder)
    until = None
    if "period" in provision:
        period = only_keys(provision["period"], ("id", "extension", "start", "end"), "provision.period")
        if "start" in period:
            start = max(start, _instant(period["start"], "provision.period.start", builder))
        if "end" in period and kind == "given":
            until = _instant(period["end"], "provision.period.end", builder)
    name = text_of(node["id"], "id") if "id" in node else ""
    for purpose in _purposes(provision):
        yield Draft(
            fields={
                "subject": _patient(node.get("patient")), "purpose": purpose, "type": kind, "lawful_basis": policy,
                "evidence_ref": f"Consent/{name}" if name else "",
            },
            record=name, effective=start, until=until,
        )  # fmt: skip


def _kind(node: dict[str, Any], provision: dict[str, Any], policy: str) -> str:
    status, action = node.get("status"), provision.get("type")
    if isinstance(status, str) and status in _STATUS:
        return _STATUS[status]
    if status != "active":
        raise DoubtError("status", f"{status!r:.40} is none of active, {', '.join(_STATUS)}")
    if action == "deny":
        if "period" in provision:
            raise DoubtError("provision.period", "of a deny cannot be evaluated: what holds after it is not said")
        return "refused"
    if action != "permit":
        raise DoubtError("provision.type", "is neither permit nor deny")
    if policy.upper().startswith("OPTOUT"):
        raise DoubtError("policyRule", "is an opt-out, which a permit contradicts")
    checks = node.get("verification", [])
    if not isinstance(checks, list) or any(not isinstance(v, dict) or v.get("verified") is not True for v in checks):
        raise DoubtError("verification", "does not say that the consent was verified")
    return "given"


def _refuse_labels(meta: Any) -> None:
    if meta is None:
        return
    if not isinstance(meta, dict):
        raise DoubtError("meta", "is not an object")
    if meta.get("security"):
        raise DoubtError("meta.security", "labels cannot be evaluated")
    tags = meta.get("tag", [])
    if not isinstance(tags, list) or any(not isinstance(t, dict) or t.get("code") == "SUBSETTED" for t in tags):
        raise DoubtError("meta.tag", "says that parts of the resource were left out")


def _check_scope(node: dict[str, Any]) -> None:
    codes = [(c.get("system"), c.get("code")) for c in _codings(node.get("scope"), "scope")]
    if not codes or any(system != _SCOPE_SYSTEM or code not in _SCOPES for system, code in codes):
        raise DoubtError("scope", f"is none of {', '.join(_SCOPES)} of {_SCOPE_SYSTEM}")
    category = node.get("category")
    if not isinstance(category, list) or not category or not all(isinstance(c, dict) for c in category):
        raise DoubtError("category", "is missing")


def _policy(node: dict[str, Any]) -> str:
    """The rule that the consent stands under: a code, or the address of a policy."""
    if "policyRule" in node:
        codes = _codings(node["policyRule"], "policyRule")
        if codes:
            return text_of(codes[0].get("code"), "policyRule.coding.code")
        return text_of(node["policyRule"].get("text"), "policyRule.text")
    policies = node.get("policy")
    if not isinstance(policies, list) or not policies or not isinstance(policies[0], dict):
        raise DoubtError("policy", "is missing, and so is policyRule: one of them must be there")
    return text_of(policies[0].get("uri", policies[0].get("authority")), "policy.uri")


def _purposes(provision: dict[str, Any]) -> list[str]:
    found = provision.get("purpose")
    if not isinstance(found, list) or not found:
        raise DoubtError("provision.purpose", "is missing: a consent to everything is a consent to nothing")
    purposes = []
    for coding in found:
        only_keys(coding, ("id", "extension", "system", "version", "code", "display", "userSelected"), "purpose")
        code = text_of(coding.get("code"), "provision.purpose.code")
        system = coding.get("system")
        purposes.append(code if system is None else f"{text_of(system, 'provision.purpose.system')}|{code}")
    return purposes


def _patient(reference: Any) -> str:
    only_keys(reference, ("id", "extension", "reference", "type", "identifier", "display"), "patient")
    if reference.get("type") not in (None, "Patient"):
        raise DoubtError("patient.type", "is not Patient")
    if "identifier" in reference:
        identifier = reference["identifier"]
        return text_of(identifier.get("value") if isinstance(identifier, dict) else None, "patient.identifier.value")
    text = text_of(reference.get("reference"), "patient.reference")
    kind, slash, name = text.partition("/")
    if kind == "Patient" and slash and name and "/" not in name:
        return name
    if text.startswith(("https://", "http://", "urn:uuid:", "urn:oid:")) and "/_history/" not in text:
        return text
    raise DoubtError("patient.reference", "is not Patient/ID, an address, or a urn:uuid")


def _codings(concept: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(concept, dict):
        raise DoubtError(what, "is missing, or no CodeableConcept")
    codings = concept.get("coding", [])
    if not isinstance(codings, list) or not all(isinstance(c, dict) for c in codings):
        raise DoubtError(what, "holds no list of codings")
    return codings


def _instant(value: Any, what: str, builder: EventBuilder) -> int:
    read = builder.instant(text_of(value, what))
    if isinstance(read, str):
        raise DoubtError(what, read)
    return read
