"""When a site's reply leaves: at the deadline, not when the computation is done. On a clock of the tests' own, which
moves as training does; nothing here waits or measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from confide.clients import app, cutoff
from confide.config.site import REPLY_SECONDS
from confide.errors import BudgetError, ConsentError, SealingError
from confide.privacy.audit.log import stored_entries
from confide.privacy.audit.records import LocalReply
from tests.clients.test_consent_decides import withdraw
from tests.clients.test_withdrawals import ROUNDS, leaving, observe
from tests.clients.watching import TrainCall, Watch

TRAINING = 10.0


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(cutoff, "_clock", lambda: self.now)
        patch.setattr(cutoff, "_wait_until", self.wait_until)

    def wait_until(self, instant: float) -> None:
        assert instant >= self.now
        self.now = instant


def spans(
    folder: Path, every: float, leave: Callable[[pytest.MonkeyPatch, Watch], None], again: float = TRAINING
) -> list[float]:
    """How long each request to train was held, at `ash`; one that trains nothing is the last.

    Args:
        folder: New; the run's.
        every: The sites' `reply_seconds`.
        leave: Who leaves, and when.
        again: How long it takes to train what is trained again.
    """
    found = list[float]()
    folder.mkdir()

    def arrange(patch: pytest.MonkeyPatch, watch: Watch) -> None:
        leave(patch, watch)
        clock, on_train, on_round, real = Clock(patch), watch.on_train, watch.on_round, cutoff.released_at_deadline
        site = [""]

        def slow(seen: Watch, name: str, call: TrainCall) -> Any:
            clock.now += TRAINING if seen.attempts[seen.round, name] == 1 else again
            site[0] = name
            return on_train(seen, name, call)

        def declare(seen: Watch) -> None:
            on_round(seen)
            assert seen.world is not None
            for member in seen.world.sites.values():
                member.policy = replace(member.policy, reply_seconds=every)

        @contextmanager
        def seen_released(*arguments: Any) -> Iterator[None]:
            started = clock.now
            with real(*arguments):
                yield
            if site[0] == "ash" and clock.now > started:
                found.append(clock.now - started)
            site[0] = ""

        watch.on_train, watch.on_round = slow, declare
        patch.setattr(app, "released_at_deadline", seen_released)

    observe(folder, arrange)
    return found


def test_a_withdrawal_before_the_cut_off_does_not_move_the_reply(tmp_path: Path) -> None:
    person = min(observe_persons(tmp_path))
    gone = leaving("before the cut-off", withdraw, person)
    assert spans(tmp_path / "a", 60.0, nobody) == spans(tmp_path / "b", 60.0, gone) == [60.0] * ROUNDS
    # The control: without a deadline the recomputation is to be seen, and so that somebody has left.
    assert spans(tmp_path / "c", 0.0, nobody) == [TRAINING] * ROUNDS
    assert spans(tmp_path / "d", 0.0, leaving("before the cut-off", withdraw, person)) == [
        TRAINING, 2 * TRAINING, TRAINING,
    ]  # fmt: skip


def nobody(_patch: pytest.MonkeyPatch, _watch: Watch) -> None:
    """Nobody leaves."""


def test_what_a_site_does_by_default_hides_a_recomputation_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round takes ten times the span, and leaves in time to be computed twice, whether or not it is."""
    person = min(observe_persons(tmp_path))
    assert spans(tmp_path / "a", REPLY_SECONDS, nobody) == [2 * TRAINING] * ROUNDS
    assert (
        spans(tmp_path / "b", REPLY_SECONDS, leaving("before the cut-off", withdraw, person)) == [2 * TRAINING] * ROUNDS
    )
    # The control: without that time the next multiple of the span tells that a round was computed again.
    monkeypatch.setattr(cutoff, "_HEADROOM", 1.0)
    assert spans(tmp_path / "c", REPLY_SECONDS, nobody) == [TRAINING] * ROUNDS
    assert spans(tmp_path / "d", REPLY_SECONDS, leaving("before the cut-off", withdraw, person)) == [
        TRAINING,
        2 * TRAINING,
        TRAINING,
    ]


def test_what_is_late_leaves_at_the_next_multiple_and_the_local_log_says_so(tmp_path: Path) -> None:
    person = min(observe_persons(tmp_path))
    for folder, again, left in (("a", TRAINING + 1, 24), ("b", 25.5, 36)):
        gone = leaving("before the cut-off", withdraw, person)
        assert spans(tmp_path / folder, 6.0, gone, again) == [24.0, left, 24.0], "21 s leave with the others, 35.5 late"
        log = tmp_path / folder / "out" / "sites" / "ash" / "local.db"
        told = [e for e, _ in stored_entries(log) if isinstance(e, LocalReply)][:ROUNDS]
        assert [(e.round, e.deadline, e.left) for e in told] == [
            (1, 24_000, 24_000), (2, 24_000, 1000 * left), (3, 24_000, 24_000),
        ]  # fmt: skip
        assert [e.took for e in told if not e.again] == [10_000] * 2
        assert not [e for e, _ in stored_entries(log.with_name("federated.db")) if isinstance(e, LocalReply)]


@example(took=1.9, every=0.1, again=0.5)
@given(st.floats(0.01, 1e5), st.floats(0.1, 1e4), st.floats(0, 1))
def test_a_round_that_is_computed_again_leaves_when_it_would_have_left_otherwise(
    took: float, every: float, again: float
) -> None:
    """Whatever the span: as long as the second computation takes no longer than the whole round."""
    left = list[float]()
    for more in (0.0, again * took):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch)
            with cutoff.released_at_deadline(every):
                reply = cutoff._answering.get()
                assert reply is not None
                reply.again = more
                clock.now += took + more
            left.append(clock.now)
    spans_ = 2 * took / every
    at_an_edge = abs(spans_ - round(spans_)) < 1e-9 * max(1.0, spans_)  # there, rounding decides between two spans
    assert left[1] == pytest.approx(left[0], abs=every * 1e-3) or at_an_edge


def observe_persons(folder: Path) -> set[str]:
    (folder / "first").mkdir()
    return observe(folder / "first").watch.of("train", site="ash")


@given(st.floats(0, 1e6), st.floats(0, 1e5), st.floats(0.1, 1e4))
def test_a_reply_leaves_at_a_multiple_of_the_span_and_never_before_it_is_done(
    arrived: float, took: float, every: float
) -> None:
    leaves = cutoff.deadline_after(arrived, arrived + took, every)
    spans_ = (leaves - arrived) / every
    assert spans_ == pytest.approx(round(spans_), abs=1e-6)
    assert round(spans_) >= 1
    assert leaves >= arrived + took - 1e-6 * max(1.0, arrived + took)
    if took <= every * 0.999:
        assert leaves == arrived + every


@pytest.mark.parametrize(
    "error", [ConsentError("consent kept changing"), BudgetError("used up"), ValueError("a fault")]
)
def test_refusals_and_faults_are_held_back_too(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    clock = Clock(monkeypatch)

    def fail() -> None:
        clock.now += 7
        raise error

    with pytest.raises(type(error)), cutoff.released_at_deadline(60.0):
        fail()
    assert clock.now == 1060.0


def test_what_is_not_authentic_keeps_no_site_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(SealingError), cutoff.released_at_deadline(60.0):
        raise SealingError("not signed by the coordinator")
    assert clock.now == 1000.0
