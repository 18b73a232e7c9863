"""A hierarchy of purposes: what reaches beneath, what does not, and what a notice has to say for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from confide.errors import ConsentError
from confide.privacy.consent import ConsentEvent, EventType, Notice, Registry, Standing, Status, lineage, notice_digest
from confide.privacy.consent.bulk import insert_rows
from confide.privacy.consent.state import DENIALS, decide
from confide.privacy.consent.tables import NOTICES as NOTICE_TABLE

BROAD = Notice(digest="broad", purposes=frozenset({"research"}), covers_beneath=True)
NARROW = Notice(digest="narrow", purposes=frozenset({"research"}), covers_beneath=False)
OTHER = Notice(digest="other", purposes=frozenset({"marketing"}), covers_beneath=True)
NOTICES = {n.digest: n for n in (BROAD, NARROW, OTHER)}
BENEATH = "research/cardiology"


def make(
    kind: EventType, purpose: str = "research", effective_at: int = 0, notice: str = "", limit: float | None = None
) -> ConsentEvent:
    return ConsentEvent(
        event_id="e", pseudonym=b"p" * 32, purpose=purpose, type=kind, effective_at=effective_at, notice_digest=notice,
        max_epsilon=limit,
    )  # fmt: skip


def may(*events: ConsentEvent, purpose: str = BENEATH, at: int = 9) -> bool:
    return decide(events, at, purpose, NOTICES).may_participate


GIVEN = EventType.GIVEN
BROADLY = make(GIVEN, notice="broad")
EXACTLY = make(GIVEN, BENEATH)


def test_a_lineage_goes_up_to_everything() -> None:
    assert lineage("research/cardiology/heart") == ("research/cardiology/heart", "research/cardiology", "research", "")
    assert lineage("research") == ("research", "")
    assert lineage("") == ("",)


def test_a_grant_reaches_beneath_only_with_a_registered_notice_that_says_so() -> None:
    assert may(BROADLY)
    assert may(BROADLY, purpose="research/cardiology/heart")
    for digest in ("", "narrow", "other", "never registered"):
        assert not may(make(GIVEN, notice=digest))
    assert not decide([BROADLY], 9, BENEATH, {}).may_participate


def test_a_grant_never_reaches_above_beside_or_into_a_name_that_only_starts_alike() -> None:
    assert not may(EXACTLY, purpose="research")
    assert not may(BROADLY, purpose="researches/cardiology")
    assert not may(make(GIVEN, BENEATH, notice="broad"), purpose="research/oncology")
    assert may(make(GIVEN, BENEATH, notice="broad"), purpose="research/cardiology/heart")  # research covers its purpose


def test_a_grant_whose_notice_was_written_for_something_else_is_not_consent() -> None:
    assert may(make(GIVEN, notice="narrow"), purpose="research")
    assert decide([make(GIVEN, notice="other")], 9, "research", NOTICES) == Standing(Status.NOT_COVERED)
    assert may(make(GIVEN, notice="never registered"), purpose="research")


@pytest.mark.parametrize("denial", sorted(DENIALS | {EventType.ERASED}))
def test_a_denial_takes_everything_beneath_with_it_and_nothing_above(denial: EventType) -> None:
    assert may(EXACTLY, make(GIVEN, "research/oncology"))
    assert not may(EXACTLY, make(denial, "research", 1))
    assert not may(BROADLY, make(denial, "research", 1))
    assert not may(EXACTLY, make(denial, "research", 0)), "protective on a tie"
    assert may(make(GIVEN, "research"), make(denial, BENEATH, 1), purpose="research")
    assert may(EXACTLY, make(denial, "research/oncology", 1))


def test_the_latest_of_all_decisions_that_concern_a_purpose_wins() -> None:
    denied = make(EventType.WITHDRAWN, "research", 1)
    assert may(denied, replace(EXACTLY, effective_at=2)), "given again, for this alone"
    assert not may(denied, replace(EXACTLY, effective_at=2), purpose="research/oncology")
    assert may(make(EventType.REFUSED, BENEATH, 1), replace(BROADLY, effective_at=2)), "given later, for all of it"
    assert not may(replace(BROADLY, effective_at=1), make(EventType.REFUSED, BENEATH, 2))
    assert not may(make(EventType.REFUSED, BENEATH, 2), replace(BROADLY, effective_at=1)), "a backdated grant"


def test_a_later_grant_with_a_narrower_notice_narrows_what_was_given_before() -> None:
    narrower = make(EventType.RENEWED, effective_at=1, notice="narrow")
    assert not may(BROADLY, narrower)
    assert may(BROADLY, narrower, purpose="research")
    assert may(BROADLY, narrower, EXACTLY), "what was given for this alone stays"
    assert not may(BROADLY, replace(narrower, effective_at=0)), "protective on a tie"
    assert not may(replace(narrower, effective_at=0), BROADLY)


def test_a_grant_of_something_above_that_does_not_reach_here_changes_nothing_here() -> None:
    withdrawn = make(EventType.WITHDRAWN, BENEATH, 1)
    assert not may(EXACTLY, withdrawn, make(GIVEN, effective_at=2, notice="narrow"))
    assert may(EXACTLY, make(GIVEN, effective_at=2, notice="narrow"))


def test_a_restriction_above_holds_beneath_until_it_is_lifted_where_it_was_laid() -> None:
    restricted = make(EventType.RESTRICTED, "research", 1)
    assert not may(EXACTLY, restricted)
    assert not may(EXACTLY, restricted, make(EventType.UNRESTRICTED, BENEATH, 2))
    assert may(EXACTLY, restricted, make(EventType.UNRESTRICTED, "research", 2))
    assert not may(EXACTLY, make(EventType.RESTRICTED, BENEATH, 1), make(EventType.UNRESTRICTED, "research", 2))


def test_of_two_purposes_grants_at_one_instant_the_smaller_limit_counts() -> None:
    two = [replace(BROADLY, max_epsilon=3.0), replace(EXACTLY, max_epsilon=1.0)]
    assert decide(two, 9, BENEATH, NOTICES) == Standing(Status.GIVEN, 1.0)
    assert decide(two[::-1], 9, BENEATH, NOTICES) == Standing(Status.GIVEN, 1.0)
    two[0] = replace(two[0], effective_at=1)
    assert decide(two, 9, BENEATH, NOTICES) == Standing(Status.GIVEN, 3.0)


# --- notices on record ------------------------------------------------------------------------------------------------


def test_a_notice_counts_from_when_it_was_registered_and_the_past_stays_as_it_was(registry: Registry) -> None:
    ann = registry.enrol(["ann"])["ann"]
    digest = notice_digest(b"We will use your data for research of every kind.")
    registry.append([replace(BROADLY, pseudonym=ann, notice_digest=digest)])
    assert registry.snapshot(BENEATH, 9).participants == {}
    before = registry.head()
    notice = registry.register_notice(digest, ["research"], covers_beneath=True)
    assert notice.sequence == registry.head() == before + 1
    assert set(registry.snapshot(BENEATH, 9).participants) == {ann}
    assert registry.snapshot(BENEATH, 9, before).participants == {}
    assert registry.state("ann", BENEATH, 9).may_participate
    assert not registry.state("ann", BENEATH, 9, before).may_participate
    assert registry.notices() == {digest: notice}
    assert registry.notices(before) == {}


def test_a_notice_is_registered_once_and_never_changed(registry: Registry) -> None:
    first = registry.register_notice("digest", ["b", "a"])
    assert registry.register_notice("digest", ["a", "b"]) == first
    for purposes, below in ((["a"], False), (["a", "b"], True)):
        with pytest.raises(ConsentError, match="known as written for something else"):
            registry.register_notice("digest", purposes, below)
    assert registry.notices() == {"digest": first}
    assert registry.head() == 1


@pytest.mark.parametrize(("digest", "purposes"), [("", ["a"]), ("d", []), ("d", ["a", ""])])
def test_a_notice_without_a_digest_or_a_purpose_is_refused(
    registry: Registry, digest: str, purposes: list[str]
) -> None:
    with pytest.raises(ConsentError, match="a notice has a digest"):
        registry.register_notice(digest, purposes)


def test_a_view_that_was_taken_knows_of_a_notice_that_another_process_registers(registry: Registry) -> None:
    ann = registry.enrol(["ann"])["ann"]
    registry.append([replace(BROADLY, pseudonym=ann)])
    assert registry.snapshot(BENEATH, 9).participants == {}
    registry.register_notice("broad", ["research"], True)
    assert set(registry.snapshot(BENEATH, 9).participants) == {ann}


SMALL = "ab" * 32


@pytest.mark.parametrize("named", [SMALL, SMALL.upper(), f"sha256:{SMALL}", f"sha256:{SMALL.upper()}"])
@pytest.mark.parametrize("registered", [SMALL, SMALL.upper(), f"sha256:{SMALL}"])
def test_a_digest_is_one_however_it_is_spelt(registry: Registry, registered: str, named: str) -> None:
    ann = registry.enrol(["ann"])["ann"]
    registry.append([replace(BROADLY, pseudonym=ann, notice_digest=named)])
    assert registry.snapshot(BENEATH, 9).participants == {}  # the control
    before = registry.head()
    notice = registry.register_notice(registered, ["research"], covers_beneath=True)
    assert registry.head() == before + 1, "one notice, one number"
    assert registry.notices() == {registered: notice}
    assert registry.register_notice(named, ["research"], covers_beneath=True) == notice
    with pytest.raises(ConsentError, match="known as written for something else"):
        registry.register_notice(named, ["marketing"])
    assert set(registry.snapshot(BENEATH, 9).participants) == {ann}  # by the query
    assert registry.state("ann", BENEATH, 9).may_participate  # by the rule
    assert set(registry.snapshot(BENEATH, 9, registry.head()).participants) == {ann}  # by the events
    assert registry.check() == []


def test_what_is_no_sha_256_digest_has_one_spelling(registry: Registry) -> None:
    first = registry.register_notice("form 7", ["research"])
    second = registry.register_notice("FORM 7", ["marketing"])
    assert registry.notices() == {"form 7": first, "FORM 7": second}


def test_a_registry_in_which_a_notice_was_registered_under_both_spellings_holds_it_once(registry: Registry) -> None:
    with registry._storage.writing() as connection:  # as earlier versions wrote it
        rows = [(seq, digest, '["research"]', True, 1) for seq, digest in ((1, SMALL), (2, f"sha256:{SMALL}"))]
        insert_rows(connection, NOTICE_TABLE, rows)
    assert [(n.digest, n.sequence) for n in registry.notices().values()] == [(SMALL, 1)]
    assert registry.head() == 2
