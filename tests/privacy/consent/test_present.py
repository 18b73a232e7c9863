"""The present: what is kept for speed says what the events say, and no clock opens again what was closed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from confide.errors import ConsentError
from confide.privacy.consent import ConsentEvent, EventType, Registry, Status, adding, now_micros
from confide.privacy.consent import registry as registry_module
from tests.privacy.consent.conftest import KEY, raw
from tests.privacy.consent.reference import GRANTS, may

PURPOSE = "research/test"
HOUR = 3_600_000_000


def make(event_id: str, pseudonym: bytes, kind: EventType = EventType.GIVEN, at: int = 10, **more: Any) -> ConsentEvent:
    return ConsentEvent(
        event_id=event_id, pseudonym=pseudonym, purpose=PURPOSE, type=kind, effective_at=at, **more
    )  # fmt: skip


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the machine's clock, in microseconds from now."""
    start = now_micros()

    def set_to(offset: int) -> None:
        for module in (registry_module, adding):
            monkeypatch.setattr(module, "now_micros", lambda: start + offset)

    return set_to


# --- the clock --------------------------------------------------------------------------------------------------------


def test_an_expired_consent_stays_expired_when_the_clock_is_set_back(
    registry: Registry, address: Path | str, set_clock: Callable[[int], None]
) -> None:
    """Between the last event and the present nothing is recorded but that a snapshot was taken; and over a restart."""
    set_clock(0)
    ann = registry.enrol(["ann"])["ann"]
    registry.append([make("a", ann, valid_until=registry.now() + HOUR)])
    assert set(registry.snapshot(PURPOSE, registry.now()).participants) == {ann}  # the control
    set_clock(2 * HOUR)
    after = registry.now()
    assert registry.snapshot(PURPOSE, after).participants == {}
    set_clock(-HOUR)
    for found in (registry, Registry(address, KEY)):
        assert found.now() == after
        assert found.latest_recorded() == after
        assert found.snapshot(PURPOSE, found.now()).participants == {}
        assert found.state("ann", PURPOSE).status is Status.EXPIRED
        found.close()


def test_a_withdrawal_stays_when_the_clock_is_set_back_to_before_it(
    registry: Registry, set_clock: Callable[[int], None]
) -> None:
    set_clock(HOUR)
    ann = registry.enrol(["ann"])["ann"]
    registry.append([make("a", ann), make("b", ann, EventType.WITHDRAWN, registry.now())])
    set_clock(0)
    assert registry.snapshot(PURPOSE, registry.now()).participants == {}
    assert registry.state("ann", PURPOSE).status is Status.REFUSED
    assert registry.state("ann", PURPOSE, at=registry.now() - 2 * HOUR).may_participate  # history may be asked for


def test_an_event_is_never_recorded_as_before_what_was_recorded_or_taken(
    registry: Registry, set_clock: Callable[[int], None]
) -> None:
    ann = registry.enrol(["ann"])["ann"]
    set_clock(HOUR)
    registry.snapshot(PURPOSE, registry.now())
    latest = registry.latest_recorded()
    set_clock(0)
    registry.append([make("a", ann)])
    assert registry.latest_recorded() == latest


def test_asking_about_the_future_does_not_move_the_present(registry: Registry) -> None:
    ann = registry.enrol(["ann"])["ann"]
    registry.append([make("a", ann)])
    registry.snapshot(PURPOSE, now_micros() + 1000 * HOUR)
    assert registry.latest_recorded() <= now_micros()
    latest = registry.latest_recorded()
    registry.snapshot(PURPOSE, 20)
    registry.snapshot(PURPOSE, now_micros() + HOUR, sequence=0)
    assert registry.latest_recorded() == latest


# --- the view moves on ------------------------------------------------------------------------------------------------


PURPOSES = ("a", "a/b", "a/b/c")
DIGESTS = ("", "broad", "narrow", "other")
SAYS = {
    "broad": (frozenset({"a"}), True),
    "narrow": (frozenset({"a", "a/b"}), False),
    "other": (frozenset({"x"}), True),
}


def crowd(draw: random.Random, first: int, size: int, people: Sequence[bytes], common: str) -> list[ConsentEvent]:
    """Any events of many persons; few instants, so that ties are common; most for one purpose."""
    kinds = [EventType.GIVEN, EventType.RENEWED, EventType.GIVEN, EventType.WITHDRAWN, EventType.RESTRICTED,
             EventType.UNRESTRICTED, EventType.REQUESTED]  # fmt: skip
    events = []
    for number in range(first, first + size):
        kind = draw.choice(kinds) if draw.random() > 0.02 else EventType.ERASED
        at, grant = draw.randrange(10), kind in GRANTS
        events.append(ConsentEvent(
            event_id=str(number), pseudonym=draw.choice(people), type=kind, effective_at=at,
            purpose=common if draw.random() < 0.7 else draw.choice(PURPOSES),
            valid_until=at + draw.randint(1, 6) if grant and draw.random() < 0.4 else None,
            notice_digest=draw.choice(DIGESTS) if grant else "",
            max_epsilon=draw.choice([None, 1.0, 2.0]) if grant else None,
        ))  # fmt: skip
    return events


@pytest.mark.parametrize("common", PURPOSES)
def test_a_view_that_moves_says_what_the_reference_says_at_every_step(registry: Registry, common: str) -> None:
    """Hundreds of persons; grants expire, decisions fall due, events and notices come, questions jump back."""
    draw = random.Random(common)  # noqa: S311
    people = [bytes([i // 250, i % 250]) * 16 for i in range(400)]
    learnt: list[ConsentEvent] = []
    notices: dict[str, Any] = {}
    answers = set()
    for step in range(14):
        fresh = crowd(draw, len(learnt), 600 if step == 0 else 15, people, common)
        registry.append(fresh)
        learnt += fresh
        if step in (1, 2, 3):
            digest = DIGESTS[step]
            registry.register_notice(digest, *SAYS[digest])
            notices[digest] = SAYS[digest]
        at = step if step % 5 else draw.randrange(14)
        mine = {p: [e for e in learnt if e.pseudonym == p] for p in people}
        for purpose in PURPOSES:
            expected = {p: may(events, notices, purpose, at) for p, events in mine.items()}
            found = registry.snapshot(purpose, at).participants
            assert found == {p: limit for p, (yes, limit) in expected.items() if yes}
            answers.add(len(found))
    assert len(answers) > 20  # the control: it kept changing


def test_a_snapshot_that_was_taken_does_not_change_with_the_next(registry: Registry) -> None:
    ann = registry.enrol(["ann"])["ann"]
    registry.append([make("a", ann)])
    first = registry.snapshot(PURPOSE, 20)
    registry.append([make("b", ann, EventType.WITHDRAWN, 15)])
    assert registry.snapshot(PURPOSE, 20).participants == {}
    assert set(first.participants) == {ann}


def test_a_decision_of_the_future_counts_when_its_time_has_come_and_not_before(registry: Registry) -> None:
    names = registry.enrol(["ann", "bob", "cem"])
    ann, bob, cem = names["ann"], names["bob"], names["cem"]
    registry.append([
        make("a", ann), make("b", ann, EventType.WITHDRAWN, 50),
        make("c", bob, at=50), make("d", bob, EventType.RESTRICTED, 70),
        make("e", cem, valid_until=40), make("f", cem, EventType.RENEWED, 60),
    ])  # fmt: skip
    expected = {9: set(), 20: {ann, cem}, 39: {ann, cem}, 40: {ann}, 49: {ann}, 50: {bob}, 60: {bob, cem}, 70: {cem}}
    for times in (sorted(expected), sorted(expected, reverse=True)):
        for at in times:
            assert set(registry.snapshot(PURPOSE, at).participants) == expected[at]
            assert {n for n, p in names.items() if registry.state(n, PURPOSE, at).may_participate} == {
                n for n, p in names.items() if p in expected[at]
            }


# --- the projection ---------------------------------------------------------------------------------------------------

TAMPERING = {
    "different": "UPDATE consent_current SET denied_at = NULL WHERE denied_at IS NOT NULL",
    "missing": "DELETE FROM consent_current WHERE denied_at IS NOT NULL",
    "unfounded": "INSERT INTO consent_current (purpose, pseudonym, settled_at, granted_at, notice, restricted) "
    "SELECT purpose, locator, 10, 10, '', (1 = 0) FROM consent_subject CROSS JOIN consent_current LIMIT 1",
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_a_changed_projection_is_found_and_then_nothing_is_answered_until_it_is_rebuilt(
    registry: Registry, address: Path | str, kind: str
) -> None:
    names = registry.enrol(["ann", "bob"])
    registry.append(
        [make("a", names["ann"]), make("b", names["ann"], EventType.WITHDRAWN, 20), make("c", names["bob"])]
    )
    before = registry.snapshot(PURPOSE, 30)
    assert set(before.participants) == {names["bob"]}
    assert registry.check() == []
    with raw(address) as db:
        db.execute(TAMPERING[kind])
        db.commit()
    with closing(Registry(address, KEY)) as fresh:
        found = fresh.check()
        assert [(d.purpose, d.kind) for d in found] == [(PURPOSE, kind)]
        for asked in (fresh, registry):  # also those who had it open, and took a snapshot before
            for question in (lambda r: r.snapshot(PURPOSE, 30), lambda r: r.state("bob", PURPOSE, 30)):
                with pytest.raises(ConsentError, match="does not agree with the events"):
                    question(asked)
        assert fresh.snapshot(PURPOSE, 30, sequence=1).sequence == 1  # the events are untouched
        fresh.rebuild()
        assert fresh.check() == []
        assert fresh.snapshot(PURPOSE, 30) == before
    assert registry.snapshot(PURPOSE, 30) == before


def test_an_event_that_came_past_the_registry_counts_all_the_same(registry: Registry, address: Path | str) -> None:
    """The projection does not know it; so the events are asked."""
    ann = registry.enrol(["ann"])["ann"]
    registry.append([make("a", ann)])
    assert set(registry.snapshot(PURPOSE, 30).participants) == {ann}
    with raw(address) as db:
        db.execute(
            "INSERT INTO consent_event SELECT 2, 'b', pseudonym, purpose, 'withdrawn', 20, valid_until, notice_digest, "
            "lawful_basis, jurisdiction, evidence_ref, max_epsilon, recorded_at FROM consent_event"
        )
        db.commit()
    assert registry.snapshot(PURPOSE, 30).participants == {}
    assert not registry.state("ann", PURPOSE, 30).may_participate
    assert [d.kind for d in registry.check()] == ["different"]
    registry.rebuild()
    assert registry.snapshot(PURPOSE, 30).participants == {}
    assert registry.check() == []
