"""Worker processes: the same results in the same order, whatever dies, fails or stops listening; no key is kept."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import tests
from confide.errors import SealingError
from confide.privacy.sealing import Segment, workers
from confide.privacy.sealing.workers import PAYS_FROM, run_jobs, stop_workers
from tests.privacy.sealing import exact
from tests.privacy.sealing.cohort import Cohort
from tests.privacy.sealing.jobs import Bulky, Dies, Fails, Held, SlowElsewhere, Where

COUNT = 3 * PAYS_FROM
ROOT = Path(tests.__file__).parent.parent
HELPERS = 2


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Is there such a process, other than as a zombie that nobody has asked after yet?"""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def start() -> list[int]:
    """Start the workers and wait until each is ready; their process numbers."""
    pool = workers._pool()
    wait_for(lambda: all(worker.is_ready() for worker in pool))
    return [worker._process.pid for worker in pool]


@pytest.fixture(scope="module")
def three_cores() -> Iterator[None]:
    """Two workers beside this process, however many cores there are; they find the jobs of these tests."""
    stop_workers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(1 + HELPERS)))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield
    stop_workers()


@pytest.fixture
def pids(three_cores: None) -> list[int]:
    """Two workers that are ready; started again where a test ended one."""
    if any(worker._process.poll() is not None for worker in workers._workers):
        stop_workers()
    return start()


def places(results: list[tuple[int, object, str, int]]) -> set[int]:
    """Process numbers in results of `Where`."""
    return {pid for *_, pid in results}


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [PAYS_FROM, PAYS_FROM + 1, COUNT - 1, COUNT, COUNT + 13])
def test_results_come_in_order_and_are_those_of_one_process(pids: list[int], count: int) -> None:
    items = [f"item {i}" for i in range(count)]
    results = list(run_jobs(Where("a"), iter(items), count))
    assert [r[:3] for r in results] == [(i, items[i], "a") for i in range(count)]
    assert places(results) == {os.getpid(), *pids}, "all of them had a share"


def test_few_items_are_done_here_and_start_nothing(three_cores: None) -> None:
    stop_workers()
    assert places(list(run_jobs(Where(), range(PAYS_FROM - 1), PAYS_FROM - 1))) == {os.getpid()}
    assert workers._workers == []


def test_until_workers_are_ready_the_caller_works_alone(three_cores: None) -> None:
    stop_workers()
    first = next(run_jobs(Where(), range(COUNT), COUNT))
    assert first[-1] == os.getpid()
    assert len(workers._workers) == HELPERS
    start()
    assert places(list(run_jobs(Where(), range(COUNT), COUNT))) > {os.getpid()}


def test_workers_join_in_the_middle_once_they_are_ready(three_cores: None) -> None:
    stop_workers()
    running = run_jobs(Where(), itertools.repeat("x"), COUNT)
    assert next(running)[-1] == os.getpid()
    pids = start()
    results = list(itertools.islice(running, COUNT))
    assert places(results) == {os.getpid(), *pids}
    assert [r[0] for r in results] == list(range(1, COUNT + 1))
    running.close()


def test_items_are_read_only_as_they_are_needed(pids: list[int]) -> None:
    taken = itertools.count()
    running = run_jobs(Where(), (next(taken) for _ in range(COUNT)), COUNT)
    next(running)
    assert next(taken) <= 8 * (HELPERS + 1), "a share for each process, not the whole vector"
    running.close()


def test_one_core_needs_no_workers(three_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_workers()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert places(list(run_jobs(Where(), range(COUNT), COUNT))) == {os.getpid()}
    assert workers._workers == []


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3, 30, COUNT - 1])
def test_a_worker_that_kills_itself_in_the_middle_of_a_share_loses_nothing(pids: list[int], at: int) -> None:
    results = list(run_jobs(Dies(os.getpid(), at), range(COUNT), COUNT))
    assert results == [(i, i) for i in range(COUNT)]
    if at < COUNT - 8:
        wait_for(lambda: not all(map(is_alive, pids)), 10)  # the control: something did die
    assert [r[:2] for r in run_jobs(Where(), range(COUNT), COUNT)] == results, "and the next call is unharmed"
    stop_workers()  # the next test starts new ones


@pytest.mark.parametrize("when", [0, 10, COUNT // 2])
def test_a_worker_that_is_killed_from_outside_loses_nothing(pids: list[int], when: int) -> None:
    results = []
    for result in run_jobs(Where(), range(COUNT), COUNT):
        results.append(result)
        if len(results) == when + 1:
            os.kill(pids[0], signal.SIGKILL)
            wait_for(lambda: not is_alive(pids[0]))
    assert [r[0] for r in results] == list(range(COUNT))
    assert pids[1] in places(results[-COUNT // 4 :]), "the other one went on"
    after = list(run_jobs(Where(), range(COUNT), COUNT))
    assert places(after) == {os.getpid(), pids[1]}, "the dead one is never asked again"


@pytest.mark.parametrize("at", [0, 5, 20, COUNT - 1])
def test_a_jobs_exception_is_raised_in_the_caller_with_all_that_it_says(pids: list[int], at: int) -> None:
    results = list[int]()
    with pytest.raises(SealingError, match="was asked to fail") as caught:
        results.extend(run_jobs(Fails(at), range(COUNT), COUNT))
    assert (caught.value.where, caught.value.hint) == (f"item {at}", "as the test wants")
    assert results == list(range(len(results)))
    assert len(results) <= at
    after = list(run_jobs(Where("next"), range(COUNT), COUNT))
    assert [r[:3] for r in after] == [(i, i, "next") for i in range(COUNT)], "and the next call is unharmed"
    assert all(map(is_alive, pids))


def test_an_exception_in_a_worker_does_come_from_there(pids: list[int]) -> None:
    with pytest.raises(SealingError, match="was asked to fail"):
        list(run_jobs(Fails(0, home=os.getpid()), range(COUNT), COUNT))


def test_an_exception_of_the_items_themselves_is_raised_and_harms_no_later_call(pids: list[int]) -> None:
    def items() -> Iterator[int]:
        yield from range(40)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(run_jobs(Where(), items(), COUNT))
    assert [r[0] for r in run_jobs(Where(), range(COUNT), COUNT)] == list(range(COUNT))


@pytest.mark.parametrize("taken", [1, 7, 9, 30])
@pytest.mark.parametrize("job", [Where("abandoned"), Where("abandoned", seconds=0.01), Bulky()])
def test_an_abandoned_call_does_not_poison_the_next(pids: list[int], taken: int, job: Where | Bulky) -> None:
    running = run_jobs(job, range(COUNT), COUNT)
    for _ in range(taken):
        next(running)
    running.close()
    after = list(run_jobs(Where("next"), range(COUNT), COUNT))
    assert [r[:3] for r in after] == [(i, i, "next") for i in range(COUNT)]
    assert all(map(is_alive, pids))


def test_an_interruption_while_it_waits_for_a_worker_does_not_poison_the_next_call(pids: list[int]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            list(run_jobs(SlowElsewhere(os.getpid()), range(COUNT), COUNT))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [r[:3] for r in run_jobs(Where("x"), range(COUNT), COUNT)] == [(i, i, "x") for i in range(COUNT)]
    stop_workers()  # the next test starts new ones


def test_two_calls_at_a_time_do_not_mix_up_their_jobs(pids: list[int]) -> None:
    one, other = (run_jobs(Where(name), range(COUNT), COUNT) for name in "ab")
    results = {"a": list[tuple[int, object, str]](), "b": list[tuple[int, object, str]]()}
    for a, b in zip(one, other, strict=True):
        results["a"].append(a[:3])
        results["b"].append(b[:3])
    assert results == {name: [(i, i, name) for i in range(COUNT)] for name in "ab"}
    assert places(list(run_jobs(Where(), range(COUNT), COUNT))) == {os.getpid(), *pids}, "workers are free again"


def test_threads_may_call_at_the_same_time(pids: list[int]) -> None:
    found: dict[int, list[tuple[int, object, str]]] = {}

    def call(number: int) -> None:
        found[number] = [r[:3] for r in run_jobs(Where(str(number), 0.001), range(COUNT), COUNT)]

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {n: [(i, i, str(n)) for i in range(COUNT)] for n in range(4)}


# --- keys -------------------------------------------------------------------------------------------------------------


def marks(folder: Path, word: str) -> int:
    """How many marks were left."""
    return sum(len(path.read_text()) for path in folder.glob(f"{word}-*"))


@pytest.mark.parametrize(
    "end",
    [
        "complete",
        "abandoned",
        "abandoned with bulk on its way",
        "an exception in a worker",
        "an exception of the items",
    ],
)
def test_after_a_call_no_worker_holds_its_job_which_holds_keys(pids: list[int], end: str, tmp_path: Path) -> None:
    if end == "complete":
        assert [r[0] for r in run_jobs(Held(tmp_path), range(COUNT), COUNT)] == list(range(COUNT))
    elif end.startswith("abandoned"):
        running = run_jobs(Held(tmp_path, bulk=100_000 if "bulk" in end else 0), range(COUNT), COUNT)
        next(running)
        running.close()
    elif end == "an exception in a worker":
        with pytest.raises(ValueError, match="was asked to fail"):
            list(run_jobs(Held(tmp_path, fails=3), range(COUNT), COUNT))
    else:
        with pytest.raises(TypeError):
            list(run_jobs(Held(tmp_path), (i if i < 40 else len(i) for i in range(COUNT)), COUNT))
    assert marks(tmp_path, "came") == HELPERS, "the control: it did reach the workers, once each"
    wait_for(lambda: marks(tmp_path, "gone") == HELPERS, 5)
    assert all(map(is_alive, pids))


# --- lives ------------------------------------------------------------------------------------------------------------


def test_workers_end_when_they_are_stopped_and_start_again_when_needed(three_cores: None) -> None:
    first = start()
    assert all(map(is_alive, first))
    stop_workers()
    assert not any(map(is_alive, first))
    assert workers._workers == []
    second = start()
    assert not set(first) & set(second)
    assert places(list(run_jobs(Where(), range(COUNT), COUNT))) == {os.getpid(), *second}


SCRIPT = """
import os, sys, time
print("main begins", os.getpid(), flush=True)
os.sched_getaffinity = lambda _: {0, 1, 2}
from confide.privacy.sealing import workers
from tests.privacy.sealing.jobs import Where
pool = workers._pool()
while not all(worker.is_ready() for worker in pool):
    time.sleep(0.01)
results = list(workers.run_jobs(Where(), range(100), 100))
assert [r[0] for r in results] == list(range(100))
print(*sorted({r[-1] for r in results} - {os.getpid()}), flush=True)
"""


def run_script(script: Path, ending: str) -> tuple[int, list[str]]:
    """Run SCRIPT as a main program; its exit status and what it said."""
    script.write_text(SCRIPT + ending)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_a_main_program_without_a_guard_works_and_runs_once(tmp_path: Path) -> None:
    status, said = run_script(tmp_path / "program.py", "print('main ends')\n")
    assert status == 0
    assert len(said) == 3
    assert said[0].startswith("main begins")
    assert said[2] == "main ends"
    pids = [int(pid) for pid in said[1].split()]
    assert len(pids) == HELPERS
    wait_for(lambda: not any(map(is_alive, pids)), 10)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    status, said = run_script(tmp_path / "program.py", "os.kill(os.getpid(), 9)\n")
    assert status == -signal.SIGKILL
    pids = [int(pid) for pid in said[1].split()]
    assert len(pids) == HELPERS
    wait_for(lambda: not any(map(is_alive, pids)), 10)


def test_a_worker_inherits_nothing_but_its_own_way(pids: list[int]) -> None:
    """One that held another's end would keep it alive when the parent is gone."""
    for pid in pids:
        sockets = [p for p in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(p).startswith("socket:")]
        assert len(sockets) == 1


# --- whole vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_masked", [False, True])
def test_a_large_vector_is_sealed_to_the_same_bytes_with_and_without_workers(
    pids: list[int], self_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = Cohort.make(3, 20, profile="masked")
    size = (PAYS_FROM + 5) * exact.coordinates("masked", 3, 20)
    vector, segments = np.linspace(-1, 1, size), [Segment(size, -1.0, 1.0, rotation=(600.0, 0.0))]
    agreement = cohort.agreement(self_masked=self_masked)
    payloads = []
    for pays_from in (PAYS_FROM, 10**6):
        monkeypatch.setattr(workers, "PAYS_FROM", pays_from)
        exact.make_deterministic(cohort, 7)
        payloads.append(cohort.sessions["site-0000"].seal(vector, segments, agreement).payload())
    assert payloads[0] == payloads[1]
    assert len(payloads[0].chunks) > PAYS_FROM


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_large_sum_opens_with_workers_as_without_and_a_forged_one_is_refused(
    pids: list[int], profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = Cohort.make(2, 8, profile=profile)
    size = PAYS_FROM * exact.coordinates(profile, 2, 8) + 5
    segments = [Segment(size, 0.0, 255.0)]
    integers = np.random.default_rng(1).integers(0, 256, (2, size))
    payloads = cohort.seal({n: row.astype(float) for n, row in zip(cohort.names, integers, strict=True)}, segments)
    total = cohort.total(list(payloads.values()), size)
    assert np.array_equal(cohort.open(total, segments), integers.sum(axis=0))
    for chunk in (3, 30):  # another process's share each
        forged = list(total.chunks)
        forged[chunk], forged[chunk + 1] = forged[chunk + 1], forged[chunk]
        with pytest.raises(SealingError, match="authenticated"):
            cohort.open(type(total)(tuple(forged), total.tags), segments)
    malformed = [*total.chunks[:10], b"", *total.chunks[11:]]
    with pytest.raises(SealingError):
        cohort.open(type(total)(tuple(malformed), total.tags), segments)
    monkeypatch.setattr(workers, "PAYS_FROM", 10**6)
    assert np.array_equal(cohort.open(total, segments), integers.sum(axis=0))
