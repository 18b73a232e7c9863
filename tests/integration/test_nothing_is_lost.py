"""Processes of a deployed federation die, each in each phase of a round, and the run ends as if nothing had happened.

The commands are the operators' own, over TLS on the loopback interface. A coordinator that dies is started again, a
SuperNode and an executor by their agent; nobody else does anything. The coordinator's process is the SuperLink's, too
(ADR 15): for the SuperLink it is killed by the link's own threads, in the middle of a message. All runs are made in one
federation, one after the other, so that each also stands on what the ones before it left.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from confide.privacy.audit import records as audit
from tests.integration.outcomes import NOTHING, Outcome, check_run
from tests.integration.staged import COORDINATOR, ROUNDS, SECTIONS, SITES, VICTIM, Staged, chaos, staged

PHASES = ("train", "seal", "add", "open", "release")
#: When the coordinator is killed: in its own thread, and in those of its link.
AT_THE_COORDINATOR = {
    "train": "kept train 2", "seal": "asked seal 2", "add": "added 2", "open": "kept train 3",
    "release": f"kept release {ROUNDS + 2}",
}  # fmt: skip
IN_THE_LINK = {
    "train": "handed train 2", "seal": "handed seal 2", "add": "replied seal 2", "open": "handed train 3",
    "release": f"replied release {ROUNDS + 2}",
}  # fmt: skip
#: When one of a site's processes is.
AT_A_SITE = {"train": "train 2", "seal": "seal 2", "add": "add 2", "open": "open 2", "release": "release"}


# --- the matrix -------------------------------------------------------------------------------------------------------


def strike_coordinator(made: Staged, moment: str) -> str:
    """A run in which the coordinator's process dies once."""
    before, starts = made.server.pid, made.starts
    made.plan(COORDINATOR, moment)
    run = made.start_run(f"{moment.replace(' ', '-')}-{starts}", **SECTIONS)
    made.result(run)
    assert made.struck(COORDINATOR), f"nobody came by at {moment!r}"
    assert made.server.pid != before
    assert made.starts == starts + 1
    return run


def strike_site(made: Staged, role: str, moment: str, **sections: dict[str, object]) -> str:
    """A run in which one of a site's two processes dies once."""
    before = {name: [made.pid_of(name, r) for r in ("node", "site")] for name in made.names}
    made.plan(VICTIM, moment, role if role == "node" else "")
    run = made.start_run(f"{role}-{moment.replace(' ', '-')}-{made.starts}", **{**SECTIONS, **sections})
    made.result(run)
    assert made.struck(VICTIM), f"nobody came by at {moment!r}"
    after = {name: [made.pid_of(name, r) for r in ("node", "site")] for name in made.names}
    assert [name for name in made.names if after[name] != before[name]] == [VICTIM]
    node_only = [role != "node", True]  # an executor takes its SuperNode with it
    assert [a != b for a, b in zip(reversed(before[VICTIM]), reversed(after[VICTIM]), strict=True)] == node_only
    return run


def test_in_one_run_a_coordinator_a_supernode_and_an_executor_die_and_nothing_is_lost(tmp_path: Path) -> None:
    """Of the matrix below, as much as goes into one short run."""
    with staged(tmp_path, SITES[:3]) as made:
        before = {name: made.pid_of(name, "site") for name in made.names}
        made.plan(COORDINATOR, IN_THE_LINK["add"].replace("2", "1"))
        made.plan(SITES[0], "train 2", "node")
        made.plan(SITES[1], "add 2")
        run = made.start_run("short", run={"rounds": 2, "report_metrics_every": 2})
        made.result(run)
        assert [made.struck(party) for party in (COORDINATOR, *SITES[:2])] == [True] * 3
        assert [name for name in made.names if made.pid_of(name, "site") != before[name]] == [SITES[1]]
        assert check_run(made, run) == NOTHING
        assert made.verify(run), "nor does the command find anything"
        site, round_ = made.computed(run)[0]
        with (made.strikes / "wire.jsonl").open("a") as wire:
            wire.write(json.dumps({"site": site, "run": run, "computed": round_}) + "\n")
        with pytest.raises(AssertionError, match="computed twice"):  # the control
            check_run(made, run)


@chaos
@pytest.mark.parametrize("phase", PHASES)
def test_a_coordinator_killed_in_any_phase_goes_on_with_its_run(
    federation: Staged, kept: list[Staged], phase: str
) -> None:
    assert check_run(federation, strike_coordinator(federation, AT_THE_COORDINATOR[phase])) == NOTHING
    kept.append(federation)


@chaos
@pytest.mark.parametrize("phase", PHASES)
def test_a_superlink_killed_in_the_middle_of_a_message_loses_nothing(
    federation: Staged, kept: list[Staged], phase: str
) -> None:
    assert check_run(federation, strike_coordinator(federation, IN_THE_LINK[phase])) == NOTHING
    kept.append(federation)


@chaos
@pytest.mark.parametrize("phase", PHASES)
def test_a_supernode_killed_in_any_phase_loses_nothing(federation: Staged, kept: list[Staged], phase: str) -> None:
    assert check_run(federation, strike_site(federation, "node", AT_A_SITE[phase])) == NOTHING
    kept.append(federation)


#: What an executor had computed and not sealed dies with it, by design: while it trains that costs it its round, while
#: it seals it costs everybody theirs.
COSTS = {"train": Outcome([], {VICTIM: [2]}), "seal": Outcome([2], {})}


@chaos
@pytest.mark.parametrize("phase", PHASES)
def test_an_executor_killed_in_any_phase_comes_back_into_its_run(
    federation: Staged, kept: list[Staged], phase: str
) -> None:
    assert check_run(federation, strike_site(federation, "site", AT_A_SITE[phase])) == COSTS.get(phase, NOTHING)
    kept.append(federation)


@chaos
def test_where_a_run_retries_an_executor_killed_while_it_seals_costs_nobody_else_the_round(
    federation: Staged, kept: list[Staged]
) -> None:
    run = strike_site(federation, "site", AT_A_SITE["seal"], sealing={"profile": "sealed", "retry": True})
    attempts = [e.attempt for e in federation.entries(COORDINATOR, audit.Cohort, run) if e.round == 2]
    assert attempts == [0, 1], "the round was sealed once more, by those who were left"
    assert check_run(federation, run) == Outcome([], {VICTIM: [2]})
    for site in federation.names:
        unlocked = [(e.round, e.attempt) for e in federation.entries(site, audit.Unlocked, run)]
        assert len({round_ for round_, _ in unlocked}) == len(unlocked), "two attempts were unlocked"
        assert (2, 0) not in unlocked
    kept.append(federation)


# --- more than one run, more than these sites -------------------------------------------------------------------------


@chaos
def test_two_runs_that_are_asked_for_at_once_both_end_though_the_coordinator_dies(
    federation: Staged, kept: list[Staged]
) -> None:
    """Both are under way when it dies: `test_runs_at_once.py` has them begin together."""
    federation.plan(COORDINATOR, "added 2")
    runs = [federation.start_run(name, **SECTIONS) for name in ("first", "second")]
    federation.result(runs[0])
    assert federation.struck(COORDINATOR)
    assert [check_run(federation, run) for run in runs] == [NOTHING, NOTHING]
    kept.append(federation)


@chaos
def test_a_new_site_waits_for_the_next_run(federation: Staged, kept: list[Staged]) -> None:
    """It is enrolled, with all signatures, in the middle of a run, which ends as it was begun."""
    held = federation.hold("asked train 2")
    run = federation.start_run("before", **SECTIONS)
    federation.until_held()
    before = list(federation.names)
    federation.enrol("elm")
    held.touch()
    result = federation.result(run)
    assert result["sites_in_last_cohort"] == before
    federation.start_site("elm")
    federation.until_it_asks("elm")
    following = federation.start_run("after", **SECTIONS)
    assert check_run(federation, following) == NOTHING
    assert federation.result(following)["sites_in_last_cohort"] == [*before, "elm"]
    kept.append(federation)
