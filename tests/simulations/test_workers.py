"""A simulation's sites in several processes: the same run to the bit, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.errors import ConfigError, StorageError
from confide.privacy.audit.verify import verify
from confide.simulations import simulate
from confide.simulations.engines.crew import Crew
from confide.simulations.engines.grouping import Grouping
from confide.simulations.result import Progress
from tests.simulations.test_drawn import NAMES, tree, weights


def many(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """Rounds for nine of the sites."""
    return tree(folder, **{"run": {"rounds": 3}, **changes, "sites": {"per_round": 9}})


def everybody(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """All sites take part in every round, sealed."""
    found = many(folder, **changes)
    del found["sites"]["per_round"]
    found["sealing"] = {"profile": "sealed", "range": 0.5}
    return found


def outcome(out: Path) -> dict[str, Any]:
    """What a run's result says, but for what is another one in each run."""
    found = json.loads((out / "result.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "out", "run_id")}


SCENARIO = {
    "stragglers": 0.2, "dropouts": [{"site": NAMES[3], "round": 3}],
    "churn": {"withdraw": 0.1, "give": 0.2},
}  # fmt: skip
LEAVING = {"withdrawals": [{"round": 2, "fraction": 0.3}]}


@pytest.fixture(autouse=True)
def small_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several."""
    monkeypatch.setattr("confide.simulations.engines.grouping.TOGETHER", 3)


@pytest.mark.parametrize("make", [many, everybody], ids=["drawn", "sealed"])
def test_the_model_is_the_same_to_the_bit_whatever_the_number_of_processes(tmp_path: Path, make: Any) -> None:
    found, said = [], []
    for count in (1, 2, 3):
        out = tmp_path / f"out{count}"
        sections = {"consent": LEAVING, "scenario": SCENARIO}
        result = simulate(make(tmp_path, **sections), out=out, workers=count)
        found.append(weights(out))
        said.append(outcome(out))
        assert verify(out).findings == []
        assert {path.stem for path in (out / "logs").glob("*.log")} == {"coordinator", *result.ledger}
        assert all((out / "sites" / site / "local.log").is_file() for site in result.ledger)
    for one, other in pairwise(found):
        np.testing.assert_array_equal(one, other)
    for one, other in pairwise(said):
        assert one == other
    out = tmp_path / "other"
    simulate(make(tmp_path, privacy={"unsafe_noise_seed": 6}), out=out, workers=2)
    assert not np.array_equal(found[0], weights(out))  # control: another seed is another run


def test_a_process_that_dies_ends_the_run_which_is_resumed_with_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(many(tmp_path), out=tmp_path / "whole")
    pids = list[int]()
    began = Crew.__init__

    def noting(self: Crew, *given: Any) -> None:
        began(self, *given)
        pids.extend(process.pid or 0 for process in self._processes)

    def killing(progress: Progress) -> None:
        if progress.round == 1:
            os.kill(pids[-1], signal.SIGKILL)

    monkeypatch.setattr(Crew, "__init__", noting)
    out = tmp_path / "out"
    with pytest.raises(StorageError, match="has ended") as caught:
        simulate(many(tmp_path), out=out, workers=2, progress=killing)
    assert "resume" in caught.value.hint
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert json.loads((out / "status.json").read_text())["status"] == "failed"
    result = simulate(resume=True, out=out, workers=3)
    assert result.rounds_abandoned == 0
    assert verify(out).findings == []
    np.testing.assert_array_equal(weights(tmp_path / "whole"), weights(out))


def test_no_process_outlives_the_one_that_simulates(tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text(json.dumps(many(tmp_path, run={"rounds": 400})))
    program = (
        "import json, os, sys\nfrom confide.simulations import simulate\n"
        "from confide.simulations.engines import grouping\ngrouping.TOGETHER = 3\n"
        "import multiprocessing\n"
        "def say(_):\n"
        "    print(' '.join(str(p.pid) for p in multiprocessing.active_children()), flush=True)\n"
        f"simulate(json.load(open({str(tmp_path / 'tree.json')!r})), out={str(tmp_path / 'out')!r}, workers=2, "
        "progress=say)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in pids)


def running(pid: int) -> bool:
    """Is there such a process that has not ended?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_number_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no number of processes"):
        simulate(tree(tmp_path), out=tmp_path / "out", workers=0)
    with pytest.raises(ConfigError, match="is for --engine local"):
        simulate(tree(tmp_path), out=tmp_path / "out", workers=2, engine="deployment")
    assert not (tmp_path / "out").exists()


@given(cohort=st.integers(1, 10_000), together=st.integers(1, 60), processes=st.integers(1, 16), data=st.data())
def test_groups_follow_from_the_run_alone_and_each_has_its_process(
    cohort: int, together: int, processes: int, data: st.DataObject
) -> None:
    grouping = Grouping.of_cohort(cohort, together)
    assert 1 <= grouping.groups <= min(64, cohort)
    weights = data.draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
    dealt = grouping.dealt(weights, processes)
    assert set(dealt) == set(range(grouping.groups))
    assert set(dealt.values()) <= set(range(processes))
    heavy = [sum(w for n, w in enumerate(weights) if grouping.of(n) == g) for g in range(grouping.groups)]
    loads = [sum(heavy[g] for g, p in dealt.items() if p == process) for process in range(processes)]
    # Graham 1966: whoever is given a group has least then, and so never more than an even share beside it.
    assert max(loads) <= sum(heavy) / processes + max(heavy) + 1e-6
