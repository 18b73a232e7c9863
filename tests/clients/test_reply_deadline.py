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
from hypothesis import given
from hypothesis import strategies as st

from confide.clients import app, cutoff
from confide.errors import BudgetError, ConsentError, SealingError
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


def spans(folder: Path, every: float, leave: Callable[[pytest.MonkeyPatch, Watch], None]) -> list[float]:
    """How long each request to train was held, at `ash`; one that trains nothing is the last."""
    found = list[float]()
    folder.mkdir()

    def arrange(patch: pytest.MonkeyPatch, watch: Watch) -> None:
        leave(patch, watch)
        clock, on_train, on_round, real = Clock(patch), watch.on_train, watch.on_round, cutoff.released_at_deadline
        site = [""]

        def slow(seen: Watch, name: str, call: TrainCall) -> Any:
            clock.now += TRAINING
            site[0] = name
            return on_train(seen, name, call)

        def declare(seen: Watch) -> None:
            on_round(seen)
            assert seen.world is not None
            for member in seen.world.sites.values():
                member.policy = replace(member.policy, reply_seconds=every)

        @contextmanager
        def seen_released(seconds: float) -> Iterator[None]:
            started = clock.now
            with real(seconds):
                yield
            if site[0] == "ash" and clock.now > started:
                found.append(clock.now - started)
            site[0] = ""

        watch.on_train, watch.on_round = slow, declare
        patch.setattr(app, "released_at_deadline", seen_released)

    observe(folder, arrange)
    return found


def test_a_withdrawal_before_the_cut_off_does_not_move_the_reply(tmp_path: Path) -> None:
    def nobody(_patch: pytest.MonkeyPatch, _watch: Watch) -> None:
        pass

    person = min(observe_persons(tmp_path))
    gone = leaving("before the cut-off", withdraw, person)
    assert spans(tmp_path / "a", 60.0, nobody) == spans(tmp_path / "b", 60.0, gone) == [60.0] * ROUNDS
    # The control: without a deadline the recomputation is to be seen, and so that somebody has left.
    assert spans(tmp_path / "c", 0.0, nobody) == [TRAINING] * ROUNDS
    assert spans(tmp_path / "d", 0.0, leaving("before the cut-off", withdraw, person)) == [
        TRAINING, 2 * TRAINING, TRAINING,
    ]  # fmt: skip


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
