"""Two runs at once in one deployed federation: processes over TLS, and a coordinator that dies in both."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from confide.privacy.audit.log import stored_entries
from tests.integration.outcomes import NOTHING, check_run
from tests.integration.staged import COORDINATOR, SECTIONS, SITES, VICTIM, Staged, chaos
from tests.integration.test_nothing_is_lost import AT_A_SITE, AT_THE_COORDINATOR, IN_THE_LINK, PHASES

SHORT = {"run": {"rounds": 2, "report_metrics_every": 2}, "privacy": {"epsilon": 1.0}}


def turns(made: Staged, runs: list[str]) -> int:
    """How often the coordinator's log goes from one of these runs to another."""
    order = [entry.run for entry, _ in stored_entries(made.log_of(COORDINATOR)) if entry.run in runs]
    return sum(a != b for a, b in pairwise(order))


@chaos
def test_two_runs_at_once_end_as_each_would_alone_though_the_coordinator_dies_in_the_middle_of_both(
    tmp_path: Path,
) -> None:
    made = Staged(tmp_path, SITES[:3])
    try:
        made.provision()
        runs = [made.start_run(name, **SHORT) for name in ("first", "second")]
        made.plan(COORDINATOR, "kept train 2")
        server = made.start_server()
        made.start_sites()
        made.until(lambda: made.struck(COORDINATOR), "a run comes to its second round")
        server.wait()
        before = [made.status(run) for run in runs]
        assert [found["status"] for found in before] == ["running", "running"], "the control: it died in both"
        for run in runs:
            made.result(run)
        assert made.starts == 2
        for run in runs:
            assert check_run(made, run) == NOTHING
        assert made.verify(runs[1]), "nor does the command find anything"
        assert turns(made, runs) > 2, "the control: neither waited for the other's end"
        for site in made.names:
            charged = [made.charges(site, run)[0] for run in runs]
            assert all(charged), "both are paid for"
            assert not set(charged[0]) & set(charged[1])
    finally:
        made.stop()


@chaos
@pytest.mark.parametrize("moments", [AT_THE_COORDINATOR, IN_THE_LINK])
@pytest.mark.parametrize("phase", PHASES)
def test_a_coordinator_killed_in_any_phase_of_one_of_two_runs_goes_on_with_both(
    federation: Staged, kept: list[Staged], phase: str, moments: dict[str, str]
) -> None:
    starts = federation.starts
    federation.plan(COORDINATOR, moments[phase])
    runs = [federation.start_run(f"{name}-{phase}-{starts}", **SECTIONS) for name in ("a", "b")]
    for run in runs:
        federation.result(run)
    assert federation.struck(COORDINATOR), f"nobody came by at {moments[phase]!r}"
    assert federation.starts == starts + 1
    assert [check_run(federation, run) for run in runs] == [NOTHING, NOTHING]
    assert turns(federation, runs) > 1, "the control: neither waited for the other's end"
    kept.append(federation)


@chaos
@pytest.mark.parametrize("phase", PHASES)
def test_a_supernode_killed_in_any_phase_of_one_of_two_runs_loses_nothing_of_either(
    federation: Staged, kept: list[Staged], phase: str
) -> None:
    federation.plan(VICTIM, AT_A_SITE[phase], "node")
    before = federation.pid_of(VICTIM, "node")
    runs = [federation.start_run(f"{name}-{phase}-{before}", **SECTIONS) for name in ("a", "b")]
    for run in runs:
        federation.result(run)
    assert federation.struck(VICTIM), f"nobody came by at {AT_A_SITE[phase]!r}"
    assert federation.pid_of(VICTIM, "node") != before
    assert [check_run(federation, run) for run in runs] == [NOTHING, NOTHING]
    kept.append(federation)
