"""Consent: events, whose consent stands, the registry, imports."""

from confide.privacy.consent.events import ConsentEvent, EventType, from_micros, now_micros, to_micros
from confide.privacy.consent.imports import ImportedEvent, Rejection, parse_csv, read_csv
from confide.privacy.consent.pseudonyms import SiteKey, canonical_subject
from confide.privacy.consent.registry import Registry, Snapshot
from confide.privacy.consent.state import Standing, Status, decide

__all__ = [
    "ConsentEvent",
    "EventType",
    "ImportedEvent",
    "Registry",
    "Rejection",
    "SiteKey",
    "Snapshot",
    "Standing",
    "Status",
    "canonical_subject",
    "decide",
    "from_micros",
    "now_micros",
    "parse_csv",
    "read_csv",
    "to_micros",
]
