"""A coordinator is killed with SIGKILL at every step of a run, and so is a whole simulation: the run finishes.

`killing.PARTS` is the table of moments; that it is complete is tested here as well, by watching runs in which nobody is
killed. Each check has a control: a coordinator that is broken on purpose and fails it. The ordinary tests kill at one
moment of each kind; `make test-chaos` (CONFIDE_CHAOS=1) at every one, and at random ones, several times a run.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from confide.privacy.dp.events import event_to_json
from confide.protocol.manifest import Manifest
from tests.clients.conftest import Stage
from tests.server.killing import AT_THE_END, IN_A_SITE, PARTS, ROUND, ROUNDS, SITES

CHAOS = bool(os.environ.get("CONFIDE_CHAOS"))
ALONE, TOGETHER = "the coordinator dies", "everything dies"
WHOLE = [list(SITES)] * (ROUNDS + 1)


@dataclass(frozen=True)
class Case:
    """What a job left."""

    folder: Path
    job: dict[str, Any]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What its processes told."""
        return json.loads((self.folder / "facts.json").read_text())

    @cached_property
    def manifest(self) -> Manifest:
        """The run."""
        return Manifest.from_bytes(self.facts["manifest"].encode())

    @cached_property
    def computed(self) -> list[tuple[str, int]]:
        """(site, round) of every update that was computed, in all processes."""
        return [(w["site"], w["computed"]) for w in self.facts["wire"] if "computed" in w]

    @property
    def said(self) -> str:
        """What its processes wrote to stderr, its end."""
        return (self.folder / "errors.txt").read_text()[-600:]


def play(stage: Stage, *jobs: dict[str, Any]) -> list[Case]:
    return [Case(folder, job) for folder, job in zip(stage.play(*jobs), jobs, strict=True)]


# --- what must hold ---------------------------------------------------------------------------------------------------


def check_finished(case: Case) -> None:
    """The run came to its end, and what it left verifies."""
    assert case.facts["ends"][-1] == 0, f"it does not go on: {case.said}"
    assert not case.facts["findings"], "; ".join(case.facts["findings"])


def check_same_requests(case: Case) -> None:
    """No site was ever asked two different things for one step; whatever it answered, it answered once."""
    asked: dict[tuple[str, str], set[str]] = {}
    answered: dict[tuple[str, str], set[str]] = {}
    for noted in case.facts["wire"]:
        if "asked" in noted:
            asked.setdefault((noted["site"], str(noted["asked"])), set()).add(noted["request"])
        if "answered" in noted and noted["type"] != "refusal":
            answered.setdefault((noted["site"], str(noted["answered"])), set()).add(noted["reply"])
    assert len(asked) > len(SITES), "the control: something was asked"
    assert [place for place, requests in asked.items() if len(requests) > 1] == [], "asked two things for one step"
    assert [place for place, replies in answered.items() if len(replies) > 1] == [], "answered twice"


def check_paid_once(case: Case) -> None:
    """Every charge is one that the run was to make, and none is there twice."""
    expected = {
        f"{case.manifest.run}/{round_}/{event.role.value}": event_to_json(event)
        for round_ in range(1, ROUNDS + 2)
        for event in case.manifest.charges(round_)
    }
    for site, charges in case.facts["charges"].items():
        assert charges.items() <= expected.items(), f"{site} was charged for something else"
        assert {c for s, r in case.computed if s == site for c in expected if f"/{r}/" in c} <= charges.keys()


def check_trained_once(case: Case) -> None:
    """No update was computed twice."""
    assert len(case.computed) == len(set(case.computed)) > 0


def check_whole(case: Case) -> None:
    """Nothing was lost: every round has its sum over everybody, and nobody has refused anything."""
    assert case.facts["cohorts"] == WHOLE
    assert case.facts["refusals"] == []


CHECKS = {
    "finished": check_finished, "asked the same": check_same_requests, "paid once": check_paid_once,
    "trained once": check_trained_once, "whole": check_whole,
}  # fmt: skip


def wrong(cases: list[Case], checks: list[str], killed: int = 1) -> dict[str, str]:
    """What does not hold, by point and check."""
    found = {}
    for case in cases:
        assert case.facts["ends"][:-1] == [signal.SIGKILL] * killed, f"{case.job}: {case.facts['ends']} {case.said}"
        for name in checks:
            try:
                CHECKS[name](case)
            except Exception as error:
                found[f"{case.job.get('point')} [{name}]"] = str(error).splitlines()[0]
                if name == "finished":
                    break
    return found


def one_of_each(part: str) -> list[str]:
    """After each kind of thing, at the second of the sites where each has it done to it."""
    names = [n for n in PARTS[part] if n.startswith("after ")]
    chosen = [n for n in names if not any(f" {s}" in n for s in ("ash", "cedar"))]
    if part == "joining":
        chosen += [n for n in names if "secret" in n and " ash" in n]
    if part == "a round that may be retried":
        chosen = [n for n in chosen if "unlock" in n]
    if part == "releasing":
        chosen = [n for n in chosen if not n.endswith(f" {ROUNDS + 1}") and f" {ROUNDS + 1} of" not in n
                  and "seal" not in n and "cohort" not in n and f"train {ROUNDS + 1}" not in n]  # fmt: skip
    return chosen


def points(part: str) -> list[str]:
    return PARTS[part] if CHAOS else one_of_each(part)


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_wherever_the_coordinator_is_killed_another_one_finishes_the_run_as_if_nothing_had_happened(
    stage: Stage, part: str
) -> None:
    """Everybody is in every round, everything is computed and paid once, and the model is that of an unbroken run."""
    common = {"scene": ALONE, "part": part, "seeded": True, "retry": "retried" in part}
    unbroken, *cases = play(stage, common, *({**common, "point": point} for point in points(part)))
    assert unbroken.facts["ends"] == [0]
    assert wrong(cases, list(CHECKS)) == {}
    assert {case.facts["model"] for case in cases} == {unbroken.facts["model"]}


EVERYWHERE = {part: [n for n in PARTS[part] if CHAOS or n in FEW] for part in PARTS if "retried" not in part} if (
    FEW := {
        "after keep join of birch", "after store keys", "after keep keys of birch", "after keep train 2 of birch",
        "after store seal 2", "after keep the sum 2", "after keep release 4 of birch", "after log model_released",
    }
) else {}  # fmt: skip


@pytest.mark.parametrize("part", EVERYWHERE)
def test_wherever_everything_is_killed_another_process_finishes_the_run_and_nobody_pays_twice(
    stage: Stage, part: str
) -> None:
    """Updates were in the memory that is gone: the round that was under way may be lost, and only that one."""
    among = [*EVERYWHERE[part], *((IN_A_SITE if CHAOS else IN_A_SITE[:5]) if part == "a round" else [])]
    among += AT_THE_END if part == "releasing" else []
    cases = play(stage, *({"scene": TOGETHER, "part": part, "point": point} for point in among))
    assert wrong(cases, [name for name in CHECKS if name != "whole"]) == {}
    for case in cases:
        lost = [number for number, cohort in enumerate(case.facts["cohorts"], start=1) if not cohort]
        assert set(lost) <= ({ROUND} if part == "a round" else {ROUNDS + 1} if part == "releasing" else set())
        assert [c for c in case.facts["cohorts"] if c] == [list(SITES)] * (ROUNDS + 1 - len(lost))


def test_with_a_seed_a_run_that_was_killed_ends_with_the_model_of_an_unbroken_one(stage: Stage) -> None:
    """A restarted site computes the very same update again, under the same charge."""
    common = {"scene": TOGETHER, "part": "a round", "seeded": True}
    among = [*PARTS["a round"], *IN_A_SITE] if CHAOS else [
        "after keep train 2 of birch", "after store seal 2", "after keep the sum 2", "ash has computed 2",
        "ash has logged its seal 2", "cedar has charged 2",
    ]  # fmt: skip
    unbroken, *cases = play(stage, common, *({**common, "point": point} for point in among))
    assert wrong(cases, ["finished", "asked the same", "paid once", "whole"]) == {}
    assert {case.facts["model"] for case in cases} == {unbroken.facts["model"]}
    assert any(len(case.computed) > len(set(case.computed)) for case in cases), "the control: something was lost"
    (other,) = play(stage, {**common, "seeded": False})
    assert other.facts["model"] != unbroken.facts["model"], "the control: draws decide"


@pytest.mark.skipif(not CHAOS, reason="CONFIDE_CHAOS=1: minutes")
@pytest.mark.parametrize("scene", [ALONE, TOGETHER])
@pytest.mark.parametrize("retry", [False, True], ids=["", "that may retry"])
def test_killed_at_random_again_and_again_a_run_still_finishes(stage: Stage, scene: str, retry: bool) -> None:
    jobs = [{"scene": scene, "part": "", "retry": retry, "chance": 0.03, "seed": seed} for seed in range(20)]
    cases = play(stage, *jobs)
    for case in cases:
        assert set(case.facts["ends"][:-1]) <= {signal.SIGKILL}
        for name in ("finished", "asked the same", "paid once", "trained once", *(["whole"] if scene == ALONE else [])):
            CHECKS[name](case)
    assert sum(len(case.facts["ends"]) > 2 for case in cases) > 5, "the control: several died more than once"


# --- the table, and the controls --------------------------------------------------------------------------------------


def unnamed(trace: list[list[str]], part: str) -> list[str]:
    """What a watched run did that the table does not say: points that it lacks or has too many of, and things that were
    made durable outside of a named step, or besides another in the same one."""
    passed = [name for what, name, *_ in trace if what == "point"]
    found = [f"unexpected {name}" for name in Counter(passed) - Counter(PARTS[part])]
    found += [f"missing {name}" for name in Counter(PARTS[part]) - Counter(passed)]
    since: list[list[str]] = []
    for what, *entry in [*trace, ["point", "the end"]]:
        if what == "durable":
            since.append(entry)
            continue
        found += [f"unnamed {file}" for file, inside in since if not inside]
        found += [f"besides another in {inside}" for _, inside in since[1:] if inside]
        since = []
    return found


@pytest.mark.parametrize("part", PARTS)
def test_the_table_of_points_is_complete(stage: Stage, part: str) -> None:
    """Nobody is killed: every point is passed, in order, and between two of them one thing at most is made durable."""
    (case,) = play(stage, {"scene": ALONE, "part": part, "retry": "retried" in part})
    trace = case.facts["trace"]
    assert unnamed(trace, part) == []
    assert [name for what, name, *_ in trace if what == "point"] == PARTS[part]
    assert {file for what, file, *_ in trace if what == "durable"} == {"runs.db", "coordinator.db"}, "it was watched"


@pytest.mark.parametrize("broken", ["writes something more", "writes twice", "logs something more"])
def test_a_new_durable_step_without_a_point_is_noticed(stage: Stage, broken: str) -> None:
    (case,) = play(stage, {"scene": ALONE, "part": "a round", "broken": broken})
    assert unnamed(case.facts["trace"], "a round") != []


BROKEN = [
    ("forgets requests", "after keep train 2 of birch", "asked the same", "two things"),
    ("sends first", "after train reaches birch train 2", "asked the same", "two things"),
    ("logs again", "after log cohort", "finished", "second cohort"),
]


@pytest.mark.parametrize(("broken", "point", "check", "why"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_coordinator_that_is_broken_on_purpose_does_not_pass(
    stage: Stage, broken: str, point: str, check: str, why: str
) -> None:
    """The control of everything above."""
    common = {"scene": ALONE, "part": "a round", "point": point, "grown": True}
    honest, case = play(stage, common, {**common, "broken": broken})
    CHECKS[check](honest)
    with pytest.raises(AssertionError, match=why):
        CHECKS[check](case)


def test_a_coordinator_that_forgets_sums_does_not_end_with_the_model_of_an_unbroken_run(stage: Stage) -> None:
    """The control of that comparison."""
    common = {"scene": ALONE, "part": "a round", "seeded": True}
    killed = {**common, "point": "after end round 2"}
    unbroken, honest, case = play(stage, common, killed, {**killed, "broken": "forgets sums"})
    assert honest.facts["model"] == unbroken.facts["model"]
    assert case.facts["model"] != unbroken.facts["model"]
