"""Whose consent stands: `decide` against a second, naive model of the rules, and each rule by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.privacy.consent import ConsentEvent, EventType, Standing, Status, decide

GRANTS = {EventType.GIVEN, EventType.RENEWED}
DENIALS = {EventType.REFUSED, EventType.WITHDRAWN, EventType.REVOKED, EventType.OBJECTED, EventType.INVALIDATED}
INSTANTS = st.integers(0, 4)  # few, so that ties are common


def make(
    kind: EventType, effective_at: int = 0, valid_until: int | None = None, max_epsilon: float | None = None
) -> ConsentEvent:
    return ConsentEvent(
        event_id="e", pseudonym=b"p" * 32, purpose="research", type=kind, effective_at=effective_at,
        valid_until=valid_until, max_epsilon=max_epsilon,
    )  # fmt: skip


def reference(events: Sequence[ConsentEvent], at: int) -> Standing:
    """The rules of DESIGN's 'Consent registry', written as lists and a sort instead of a scan."""
    effective = [(seq, e) for seq, e in enumerate(events) if e.effective_at <= at]
    if any(e.type is EventType.ERASED for _, e in effective):
        return Standing(Status.REFUSED)

    def protection(e: ConsentEvent) -> int:
        """erased > invalidated > objected/withdrawn/revoked/refused > expired > given"""
        if e.type in GRANTS:
            return 1 if e.valid_until is not None and e.valid_until <= at else 0
        return 3 if e.type is EventType.INVALIDATED else 2

    decisions = sorted(
        ((e.effective_at, protection(e), seq, e) for seq, e in effective if e.type in GRANTS | DENIALS),
        key=lambda d: d[:3],
    )
    if not decisions:
        return Standing(Status.UNKNOWN)
    _, rank, _, last = decisions[-1]
    if last.type in DENIALS:
        return Standing(Status.REFUSED)
    if rank == 1:
        return Standing(Status.EXPIRED)
    flags = [(e.effective_at, e.type is EventType.RESTRICTED) for _, e in effective if "restricted" in e.type]
    return Standing(Status.RESTRICTED) if flags and max(flags)[1] else Standing(Status.GIVEN, last.max_epsilon)


@st.composite
def any_event(draw: st.DrawFn) -> ConsentEvent:
    kind = draw(st.sampled_from([*EventType, *GRANTS, *GRANTS, *GRANTS]))
    effective_at = draw(INSTANTS)
    until = draw(st.none() | st.integers(1, 2)) if kind in GRANTS else None
    limit = draw(st.sampled_from([None, 0.5, 2.0])) if kind in GRANTS else None
    return make(kind, effective_at, None if until is None else effective_at + until, limit)


HISTORY = st.lists(any_event(), max_size=7)


@settings(max_examples=1000)
@given(HISTORY, INSTANTS)
def test_decide_agrees_with_an_independent_model_of_the_rules(events: list[ConsentEvent], at: int) -> None:
    assert decide(events, at) == reference(events, at)


def test_nobody_has_consented_who_decided_nothing() -> None:
    assert decide([], 5) == Standing(Status.UNKNOWN)
    assert not decide([make(EventType.REQUESTED), make(EventType.UNRESTRICTED)], 5).may_participate
    assert decide([make(EventType.GIVEN)], 5).may_participate  # control: a grant is enough


@pytest.mark.parametrize("denial", sorted(DENIALS | {EventType.ERASED}))
def test_at_the_same_instant_the_denial_wins_in_either_order(denial: EventType) -> None:
    pair = [make(EventType.GIVEN, 3), make(denial, 3)]
    assert not decide(pair, 3).may_participate
    assert not decide(pair[::-1], 3).may_participate


def test_at_the_same_instant_an_expired_grant_beats_a_standing_one_in_either_order() -> None:
    """DESIGN: precedence (… > expired > given) breaks ties."""
    pair = [make(EventType.GIVEN, 1), make(EventType.GIVEN, 1, valid_until=3)]
    assert decide(pair, 2).may_participate  # control: nothing has expired yet
    assert not decide(pair, 4).may_participate
    assert not decide(pair[::-1], 4).may_participate


@given(HISTORY, st.sampled_from(sorted(DENIALS)), INSTANTS, st.integers(1, 5))
def test_a_grant_learnt_later_but_effective_earlier_never_overrides_a_denial(
    history: list[ConsentEvent], denial: EventType, when: int, earlier: int
) -> None:
    denied = [e for e in history if e.effective_at <= when and e.type not in GRANTS] + [make(denial, when)]
    backdated = make(EventType.GIVEN, when - earlier)
    assert not decide([*denied, backdated], when).may_participate


def test_consent_can_be_given_again_after_a_withdrawal() -> None:
    events = [make(EventType.GIVEN, 1), make(EventType.WITHDRAWN, 2), make(EventType.GIVEN, 3, max_epsilon=1.5)]
    assert not decide(events, 2).may_participate
    assert decide(events, 3) == Standing(Status.GIVEN, 1.5)


@given(HISTORY, HISTORY, INSTANTS)
def test_an_erasure_is_final_whatever_is_recorded_around_it(
    before: list[ConsentEvent], after: list[ConsentEvent], at: int
) -> None:
    assert decide([*before, make(EventType.ERASED, 0), *after], at) == Standing(Status.REFUSED)


def test_a_restriction_holds_through_a_new_grant_until_it_is_lifted() -> None:
    events = [make(EventType.GIVEN, 1), make(EventType.RESTRICTED, 2), make(EventType.RENEWED, 3)]
    assert decide(events, 1).may_participate
    assert decide(events, 3).status is Status.RESTRICTED
    assert decide([*events, make(EventType.UNRESTRICTED, 4)], 4).may_participate


def test_lifting_a_restriction_grants_nothing_by_itself() -> None:
    events = [make(EventType.WITHDRAWN, 1), make(EventType.RESTRICTED, 2), make(EventType.UNRESTRICTED, 3)]
    assert decide(events, 4).status is Status.REFUSED


def test_a_restriction_wins_over_its_lifting_at_the_same_instant() -> None:
    given_, on, off = make(EventType.GIVEN), make(EventType.RESTRICTED, 2), make(EventType.UNRESTRICTED, 2)
    assert decide([given_, on, off], 2).status is Status.RESTRICTED
    assert decide([given_, off, on], 2).status is Status.RESTRICTED


def test_a_grant_ends_exactly_at_its_valid_until() -> None:
    events = [make(EventType.GIVEN, 1, valid_until=4)]
    assert decide(events, 3).status is Status.GIVEN
    assert decide(events, 4).status is Status.EXPIRED


def test_a_renewal_takes_over_the_term_and_the_limit() -> None:
    events = [make(EventType.GIVEN, 1, valid_until=3, max_epsilon=9.0), make(EventType.RENEWED, 2, valid_until=6)]
    assert decide(events, 5) == Standing(Status.GIVEN, None)


def test_a_decision_does_not_count_before_it_takes_effect() -> None:
    events = [make(EventType.GIVEN, 1), make(EventType.WITHDRAWN, 5)]
    assert decide(events, 4).may_participate
    assert not decide(events, 5).may_participate
