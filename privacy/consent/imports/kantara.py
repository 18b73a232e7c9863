"""Kantara consent receipts, version 1.1 (`KI-CR-v1.1.0`): a receipt, a list of them, or one a line.

A receipt says that consent was given, never that it was withdrawn. Each purpose of each service becomes one event:

- `consentType` must be `EXPLICIT`: an implied consent is none.
- `termination` must be an instant, an ISO 8601 duration from `consentTimestamp`, or `none`. What else a receipt says
  (a sentence, a link) is rejected, unless `[values.termination]` of a mapping says what it means.
- The purpose is `purpose`, else the only entry of `purposeCategory`; `[values.purpose]` gives it our name.

A receipt's `publicKey`, and a signature around it, prove who wrote it to whoever knows the key; this reader does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from confide.privacy.consent.imports.event import EventBuilder, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.records import DoubtError, Draft, end_of, only_keys, read_records, text_of

__all__ = ["read_kantara"]

_RECEIPT = (
    "version", "jurisdiction", "consentTimestamp", "collectionMethod", "consentReceiptID", "publicKey", "language",
    "piiPrincipalId", "piiControllers", "policyUrl", "services", "sensitive", "spiCat",
)  # fmt: skip
_PURPOSE = (
    "purpose", "purposeCategory", "consentType", "piiCategory", "primaryPurpose", "termination",
    "thirdPartyDisclosure", "thirdPartyName",
)  # fmt: skip
_LAST_SECOND = 253_402_300_799


def read_kantara(stream: BinaryIO, options: Options) -> Iterator[ImportedEvent | Rejection]:
    """Events of all receipts."""
    return read_records(stream, options, "kantara", _find, _interpret)


def _find(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, list):
        yield from ((f"/{place}", receipt) for place, receipt in enumerate(tree))
    else:
        yield "", tree


def _interpret(node: Any, builder: EventBuilder, options: Options) -> Iterator[Draft]:
    only_keys(node, _RECEIPT, "receipt")
    version = text_of(node.get("version"), "version")
    if not version.startswith("KI-CR-v1.1"):
        raise DoubtError("version", f"{version[:40]!r} is not KI-CR-v1.1.0")
    at = node.get("consentTimestamp")
    if type(at) is not int or not 0 < at <= _LAST_SECOND:
        raise DoubtError("consentTimestamp", "is not a number of seconds since 1970")
    start = at * 1_000_000
    name = text_of(node.get("consentReceiptID"), "consentReceiptID")
    common = {
        "subject": text_of(node.get("piiPrincipalId"), "piiPrincipalId"),
        "type": "given",
        "jurisdiction": text_of(node.get("jurisdiction"), "jurisdiction"),
        "evidence_ref": name,
    }
    for purpose in _purposes(node):
        only_keys(purpose, _PURPOSE, "purposes")
        if purpose.get("consentType") != "EXPLICIT":
            raise DoubtError("purposes.consentType", "is not EXPLICIT: an implied consent is none")
        ends = text_of(purpose.get("termination"), "purposes.termination")
        ends = options.values.get("termination", {}).get(ends, ends)
        yield Draft(
            fields={**common, "purpose": _purpose_name(purpose)}, record=name, effective=start,
            until=end_of(ends, start, builder, "purposes.termination"),
        )  # fmt: skip


def _purposes(node: dict[str, Any]) -> Iterator[Any]:
    services = node.get("services")
    if not isinstance(services, list) or not services:
        raise DoubtError("services", "is missing")
    for service in services:
        only_keys(service, ("service", "purposes"), "services")
        purposes = service.get("purposes")
        if not isinstance(purposes, list) or not purposes:
            raise DoubtError("services.purposes", "is missing")
        yield from purposes


def _purpose_name(purpose: dict[str, Any]) -> str:
    if "purpose" in purpose:
        return text_of(purpose["purpose"], "purposes.purpose")
    categories = purpose.get("purposeCategory")
    if not isinstance(categories, list) or len(categories) != 1:
        raise DoubtError("purposes.purpose", "is missing, and purposeCategory does not name just one")
    return text_of(categories[0], "purposes.purposeCategory")
