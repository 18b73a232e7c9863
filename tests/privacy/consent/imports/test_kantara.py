"""Kantara receipts: only an explicit consent with an end that can be evaluated is one."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from confide.privacy.consent import EventType
from confide.privacy.consent.imports import Options
from tests.privacy.consent.imports.reading import read, refused
from tests.privacy.consent.imports.samples import FACTS, kantara_receipt

RECEIPT = kantara_receipt(FACTS[0])
START = 1769846400_000000
DAY = 86_400_000_000


def with_purpose(**changes: Any) -> dict[str, Any]:
    tree = copy.deepcopy(RECEIPT)
    purpose = tree["services"][0]["purposes"][0]
    purpose.update(changes)
    for key in [k for k, v in purpose.items() if v is None]:
        del purpose[key]
    return tree


def test_a_receipt_is_a_grant_of_each_purpose() -> None:
    tree = copy.deepcopy(RECEIPT)
    tree["services"].append({"service": "b", "purposes": [with_purpose(purpose="care")["services"][0]["purposes"][0]]})
    events, rejections = read("kantara", tree)
    assert rejections == []
    assert [(e.type, e.subject, e.purpose, e.effective_at) for e in events] == [
        (EventType.GIVEN, "ann", "research", START), (EventType.GIVEN, "ann", "care", START)
    ]  # fmt: skip
    assert all(e.derived and e.jurisdiction == "DE" and e.evidence_ref == "r1" for e in events)


@pytest.mark.parametrize(
    ("termination", "until"),
    [("none", None), ("P1D", START + DAY), ("P2W", START + 14 * DAY), ("PT36H", START + 36 * DAY // 24),
     ("P1M", START + 28 * DAY), ("P1Y", START + 365 * DAY), ("2026-02-01T08:00:00Z", START + DAY)],
)  # fmt: skip
def test_an_end_is_an_instant_a_duration_or_none(termination: str, until: int | None) -> None:
    (event,), _ = read("kantara", with_purpose(termination=termination))
    assert event.valid_until == until  # the 31st, a month later, is February's last day


@pytest.mark.parametrize(
    "termination",
    ["Subscription end date + 1 year", "https://ash.example/policy", "", "P", "PT", "P0D", "P1", "-P1D", "P1.5Y",
     "P99999Y", "P9999Y", "2027-01-31", "2027-01-31T00:00:00", "2020-01-01T00:00:00Z", "NONE", None, 1, ["none"]],
)  # fmt: skip
def test_an_end_that_cannot_be_evaluated_is_rejected(termination: Any) -> None:
    assert refused("kantara", with_purpose(termination=termination)).field in ("purposes.termination", "valid_until")


def test_an_operator_may_say_what_a_sentence_means() -> None:
    options = Options(values={"termination": {"Subscription end date + 1 year": "P1Y"}})
    tree = with_purpose(termination="Subscription end date + 1 year")
    (event,), _ = read("kantara", tree, options)
    assert event.valid_until == START + 365 * DAY


@pytest.mark.parametrize("kind", ["IMPLIED", "IMPLICIT", "explicit", "", None, True, ["EXPLICIT"]])
def test_a_consent_that_is_not_explicit_is_none(kind: Any) -> None:
    assert refused("kantara", with_purpose(consentType=kind)).field == "purposes.consentType"


@pytest.mark.parametrize(
    ("key", "value"),
    [("version", "KI-CR-v1.0.0"), ("version", "2"), ("consentTimestamp", "1769846400"), ("consentTimestamp", 1.5),
     ("consentTimestamp", True), ("consentTimestamp", 1769846400000), ("consentTimestamp", 0), ("jurisdiction", ""),
     ("consentReceiptID", 7), ("piiPrincipalId", ""), ("piiPrincipalId", ["ann"]), ("services", []), ("services", {}),
     ("revoked", True)],
)  # fmt: skip
def test_a_field_that_is_not_as_specified_is_rejected(key: str, value: Any) -> None:
    assert refused("kantara", RECEIPT | {key: value}).field in (key, f"receipt.{key}")


def test_a_purpose_is_named_by_itself_or_by_its_only_category() -> None:
    (event,), _ = read("kantara", with_purpose(purpose=None))
    assert event.purpose == "1 - Core"
    assert refused("kantara", with_purpose(purpose=None, purposeCategory=["a", "b"])).field == "purposes.purpose"
    assert refused("kantara", with_purpose(withdrawn=True)).field == "purposes.withdrawn"
