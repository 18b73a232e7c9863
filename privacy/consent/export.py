"""Events back into files: CSV, and ISO/IEC TS 27560 consent records as JSON-LD, one record a line.

The registry holds pseudonyms. A person is named by identifier only where the caller supplies the identifier, and else
by pseudonym; such a person's events cannot be imported again, because only this registry knows the pseudonym.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from confide.privacy.consent.desk import ConsentDesk
from confide.privacy.consent.dpv import CONTEXT, MAX_EPSILON, RECORD_SCHEMA, STATUS_OF
from confide.privacy.consent.events import ConsentEvent, from_micros
from confide.privacy.consent.imports.event import COLUMNS, PSEUDONYM

__all__ = ["EXPORTS", "Exported", "export_events", "record_tree"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written: bytes, events, persons by identifier, persons by pseudonym, persons left out."""

    data: bytes
    events: int
    named: int
    by_pseudonym: int
    left_out: int


def export_events(desk: ConsentDesk, form: str, subjects: Iterable[str], *, named_only: bool = False) -> Exported:
    """All events of the registry as a file.

    Args:
        form: A key of `EXPORTS`.
        subjects: Identifiers that persons may be named by; those that the registry does not know are passed over.
        named_only: Leave out everybody whose identifier is not among `subjects`.

    Raises:
        ConsentError: The registry cannot be read.
    """
    names, everybody = desk.names(subjects), set[bytes]()
    events = list[ConsentEvent]()
    for _, event in desk.events():
        everybody.add(event.pseudonym)
        if not named_only or event.pseudonym in names:
            events.append(event)
    named = len(everybody & names.keys())
    others = len(everybody) - named
    return Exported(
        data="".join(EXPORTS[form](events, names)).encode(), events=len(events), named=named,
        by_pseudonym=0 if named_only else others, left_out=others if named_only else 0,
    )  # fmt: skip


def record_tree(events: list[ConsentEvent], subject: str) -> dict[str, Any]:
    """The consent record of one person and one purpose; holds no floats.

    Args:
        events: Oldest first; not empty.
        subject: How the person is named.
    """
    first = events[0]
    pseudonymous = subject.startswith(PSEUDONYM)
    return {
        "@type": "dpv:ConsentRecord",
        # Pseudonyms cannot be guessed, so neither can this; it names the record in every export.
        "dct:identifier": hashlib.sha256(first.pseudonym + first.purpose.encode()).hexdigest()[:32],
        "dct:conformsTo": RECORD_SCHEMA,
        "dpv:hasDataSubject": {"@type": "dpv:DataSubject", ("@id" if pseudonymous else "dct:identifier"): subject},
        "dpv:hasPurpose": {"@type": "dpv:Purpose", "dct:identifier": first.purpose},
        "dpv:hasConsentStatus": [_status(event) for event in events],
    }


def _status(event: ConsentEvent) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "@type": STATUS_OF[event.type],
        "dct:identifier": event.event_id,
        "dpv:isIndicatedAtTime": _iso(event.effective_at),
    }
    if event.valid_until is not None:
        tree["dpv:hasDuration"] = {"@type": "dpv:UntilTimeDuration", "rdf:value": _iso(event.valid_until)}
    if event.notice_digest:
        tree["dpv:hasNotice"] = {"@type": "dpv:ConsentNotice", "dct:identifier": event.notice_digest}
    for key, text in (
        ("dpv:hasLegalBasis", event.lawful_basis),
        ("dpv:hasJurisdiction", event.jurisdiction),
        ("dct:source", event.evidence_ref),
        (MAX_EPSILON, "" if event.max_epsilon is None else repr(event.max_epsilon)),
    ):
        if text:
            tree[key] = {"@value": text}
    return tree


def _csv(events: list[ConsentEvent], names: Mapping[bytes, str]) -> Iterator[str]:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for e in events:
        writer.writerow((
            e.event_id, _named(e, names), e.purpose, e.type.value, _iso(e.effective_at),
            "" if e.valid_until is None else _iso(e.valid_until), e.notice_digest, e.lawful_basis, e.jurisdiction,
            e.evidence_ref, "" if e.max_epsilon is None else repr(e.max_epsilon),
        ))  # fmt: skip
    yield text.getvalue()


def _json_ld(events: list[ConsentEvent], names: Mapping[bytes, str]) -> Iterator[str]:
    records: dict[tuple[bytes, str], list[ConsentEvent]] = {}
    for event in events:
        records.setdefault((event.pseudonym, event.purpose), []).append(event)
    for held in records.values():
        tree = {"@context": CONTEXT, **record_tree(held, _named(held[0], names))}
        yield json.dumps(tree, ensure_ascii=False, allow_nan=False) + "\n"


EXPORTS: dict[str, Callable[[list[ConsentEvent], Mapping[bytes, str]], Iterator[str]]] = {
    "csv": _csv,
    "27560": _json_ld,
}


def _named(event: ConsentEvent, names: Mapping[bytes, str]) -> str:
    return names.get(event.pseudonym) or PSEUDONYM + event.pseudonym.hex()


def _iso(micros: int) -> str:
    return from_micros(micros).isoformat()
