"""Two runs at once in one deployed federation: processes over TLS, and a coordinator that dies in both."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from confide.privacy.audit.log import stored_entries
from tests.integration.outcomes import NOTHING, check_run
from tests.integration.staged import COORDINATOR, SITES, Staged

SHORT = {"run": {"rounds": 2, "report_metrics_every": 2}, "privacy": {"epsilon": 1.0}}


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
            assert made.verify(run), "nor does the command find anything"
        turns = [entry.run for entry, _ in stored_entries(made.log_of(COORDINATOR))]
        assert sum(a != b for a, b in pairwise(turns)) > 2, "the control: neither waited for the other's end"
        for site in made.names:
            charged = [made.charges(site, run)[0] for run in runs]
            assert all(charged), "both are paid for"
            assert not set(charged[0]) & set(charged[1])
    finally:
        made.stop()
