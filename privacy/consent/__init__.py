"""Consent: events, whose consent stands, the registry, imports."""

from confide.privacy.consent.commitment import (
    MembershipProof,
    RoundKeys,
    SnapshotCommitment,
    member_name,
    slots_for,
    verify_membership,
)
from confide.privacy.consent.events import ConsentEvent, EventType, from_micros, now_micros, to_micros
from confide.privacy.consent.imports import ImportedEvent, Rejection, parse_csv, read_csv
from confide.privacy.consent.notices import Notice, lineage, notice_digest
from confide.privacy.consent.projection import Difference
from confide.privacy.consent.pseudonyms import SiteKey, canonical_subject
from confide.privacy.consent.registry import Registry, Snapshot
from confide.privacy.consent.state import Standing, Status, decide

__all__ = [
    "ConsentEvent",
    "Difference",
    "EventType",
    "ImportedEvent",
    "MembershipProof",
    "Notice",
    "Registry",
    "Rejection",
    "RoundKeys",
    "SiteKey",
    "Snapshot",
    "SnapshotCommitment",
    "Standing",
    "Status",
    "canonical_subject",
    "decide",
    "from_micros",
    "lineage",
    "member_name",
    "notice_digest",
    "now_micros",
    "parse_csv",
    "read_csv",
    "slots_for",
    "to_micros",
    "verify_membership",
]
