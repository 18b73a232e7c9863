"""The terms of the W3C Data Privacy Vocabulary that consent records and receipts are written in (ISO/IEC TS 27560).

Source: https://w3id.org/dpv/guides/consent-27560. What DPV has no term for (restrictions, objections, erasure, a
person's own limit of ε) stands under `urn:confide:consent:`.
"""

from __future__ import annotations

from confide.privacy.consent.events import EventType

__all__ = [
    "CONTEXT", "EXPRESSED", "MAX_EPSILON", "NAMESPACES", "OWN", "RECEIPT_SCHEMA", "RECORD_SCHEMA", "STATUS_OF",
    "STATUS_TERMS",
]  # fmt: skip

#: The prefixes that are understood, and what each must stand for.
NAMESPACES = {
    "dpv": "https://w3id.org/dpv#",
    "dct": "http://purl.org/dc/terms/",
    "dcterms": "http://purl.org/dc/terms/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "skos": "http://www.w3.org/2004/02/skos/core#",
    "schema": "https://schema.org/",
    "xsd": "http://www.w3.org/2001/XMLSchema#",
}
CONTEXT = {name: NAMESPACES[name] for name in ("dpv", "dct", "rdf")}
RECORD_SCHEMA = "https://w3id.org/dpv/schema/dpv-27560#record"
RECEIPT_SCHEMA = "https://w3id.org/dpv/schema/dpv-27560#receipt"
OWN = "urn:confide:consent:"
MAX_EPSILON = f"{OWN}maxEpsilon"

#: Status → event. An expired consent is over, whoever says so; one that is unknown says nothing and is not listed.
STATUS_TERMS = {
    "dpv:ConsentRequested": EventType.REQUESTED,
    "dpv:ConsentRequestDeferred": EventType.REQUESTED,
    "dpv:ConsentGiven": EventType.GIVEN,
    "dpv:RenewedConsentGiven": EventType.RENEWED,
    "dpv:ConsentRefused": EventType.REFUSED,
    "dpv:ConsentWithdrawn": EventType.WITHDRAWN,
    "dpv:ConsentRevoked": EventType.REVOKED,
    "dpv:ConsentTerminated": EventType.REVOKED,
    "dpv:ConsentExpired": EventType.REVOKED,
    "dpv:ConsentInvalidated": EventType.INVALIDATED,
    **{
        f"{OWN}{kind}": kind
        for kind in (EventType.RESTRICTED, EventType.UNRESTRICTED, EventType.OBJECTED, EventType.ERASED)
    },
}
#: Event → the status that it is written as: the first that reads back as it.
STATUS_OF = {kind: next(term for term, read in STATUS_TERMS.items() if read is kind) for kind in EventType}
#: How a consent may have been expressed. Implied and uninformed consent is none.
EXPRESSED = ("dpv:ConsentStatus", "dpv:ExpressedConsent", "dpv:ExplicitlyExpressedConsent", "dpv:InformedConsent")
