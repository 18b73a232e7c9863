"""Processes of a deployed federation die, each in each phase of a round, and the run ends as if nothing had happened.

The commands are the operators' own, over TLS on the loopback interface. A coordinator that dies is started again, a
SuperNode and an executor by their agent; nobody else does anything. The coordinator's process is the SuperLink's, too
(ADR 15): for the SuperLink it is killed by the link's own threads, in the middle of a message. All runs are made in one
federation, one after the other, so that each also stands on what the ones before it left.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from confide.errors import StorageError
from confide.privacy.audit import records as audit
from tests.cli.command import confide
from tests.integration.deployed import LOOPBACK
from tests.integration.staged import COORDINATOR, ROUNDS, SITES, Staged, staged
from tests.integration.wire import wire

chaos = pytest.mark.skipif(os.environ.get("CONFIDE_CHAOS") != "1", reason="make test-chaos: minutes of real processes")
VICTIM = SITES[1]
#: What a run is asked for: small, and so that a round takes its time.
SECTIONS = {"run": {"rounds": ROUNDS, "report_metrics_every": ROUNDS}, "privacy": {"epsilon": 1.0}}
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


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Staged]]:
    """The federation of this module, once there is one."""
    made: list[Staged] = []
    yield made
    for one in made:
        one.stop()


@pytest.fixture
def federation(kept: list[Staged], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Staged]:
    """A federation that listens: the one that the test before it left whole, or a new one."""
    made = kept.pop() if kept else Staged.started(tmp_path_factory.mktemp("federation"))
    yield made
    if made not in kept:
        made.stop()


# --- what must hold ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What did not happen in a run: rounds without a sum, and the rounds that a site was in no cohort of."""

    lost: list[int]
    missed: dict[str, list[int]]


def check_run(made: Staged, run: str, *, away: frozenset[str] = frozenset()) -> Outcome:
    """The run has ended with one model at all sites, nothing was trained or charged twice, and the logs verify.

    Args:
        made: The federation.
        run: Its run.
        away: Sites that have left for good.
    """
    result, here = made.result(run), [site for site in made.names if site not in away]
    assert result["status"] == "finished", result
    assert result["sites_in_last_cohort"] == here
    released = {site: [e.model for e in made.entries(site, audit.ModelReleased, run)] for site in here}
    assert released == {site: [result["model"]] for site in here}, "not the same model everywhere"
    computed = made.computed(run)
    assert len(computed) == len(set(computed)) > 0, "an update was computed twice"
    rounds = range(1, result["rounds"] + 2)
    cohorts = {e.round: e.cohort for e in made.entries(COORDINATOR, audit.Cohort, run)}
    summed = {e.round for e in made.entries(here[0], audit.Opened, run)}
    assert len(rounds) - len(summed) == result["rounds_abandoned"]
    for site in made.names:
        check_site(made, run, site, [r for r in cohorts if site in cohorts[r]])
        opened = [e.round for e in made.entries(site, audit.Opened, run)]
        assert site in away or set(opened) == summed, "a sum was not opened"
    evidence = made.evidence(run)
    assert evidence.findings == []
    assert set(evidence.sites) == set(made.names), "the control: every log was read"
    missed = {site: [r for r in rounds if r in cohorts and site not in cohorts[r]] for site in made.names}
    return Outcome([r for r in rounds if r not in summed], {site: found for site, found in missed.items() if found})


def check_site(made: Staged, run: str, site: str, sealed: list[int]) -> None:
    """Each round trained once at most and charged once; what may have left is charged whole."""
    trained = [e.round for e in made.entries(site, audit.UpdateCommitted, run)]
    assert len(trained) == len(set(trained)), "a round was trained twice"
    assert set(sealed) <= set(trained), "the control: cohorts are of those who trained"
    manifest = made.manifest(run)
    events = {r: {f"{run}/{r}/{e.role.value}": e for e in manifest.charges(r)} for r in range(1, manifest.rounds + 2)}
    reserved, standing = made.charges(site, run)
    assert reserved.items() <= {c: e for of_round in events.values() for c, e in of_round.items()}.items()
    for round_ in trained:
        assert events[round_].items() <= reserved.items(), "trained for nothing"
    logged = [e.charge for e in made.entries(site, audit.Charged, run)]
    assert sorted(logged) == sorted(reserved), "a charge was not logged once"
    for round_ in {e.round for e in made.entries(site, audit.Sealed, run)}:
        assert events[round_].items() <= standing.items(), "something was given back that may have left"


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


NOTHING = Outcome([], {})


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


# --- sites that are away ----------------------------------------------------------------------------------------------

#: Long enough to miss a part of it.
LONG = {**SECTIONS, "run": {"rounds": 5, "report_metrics_every": 5}}


@chaos
def test_a_site_that_leaves_for_good_costs_the_others_nothing_but_itself(
    federation: Staged, kept: list[Staged]
) -> None:
    held = federation.hold("asked train 3")
    run = federation.start_run("left", **LONG)
    federation.until_held()
    federation.stop_site(VICTIM)
    held.touch()
    outcome = check_run(federation, run, away=frozenset({VICTIM}))
    assert outcome == Outcome([], {VICTIM: [3, 4, 5, 6]})
    federation.start_site(VICTIM)
    federation.until_it_asks(VICTIM)
    kept.append(federation)


@chaos
def test_a_site_that_comes_back_catches_up_on_the_sums_that_it_missed(federation: Staged, kept: list[Staged]) -> None:
    held = federation.hold("asked train 3")
    run = federation.start_run("back", **LONG)
    federation.until_held()
    federation.stop_site(VICTIM)
    later = federation.hold("asked train 5")
    held.touch()
    federation.until_held()
    federation.start_site(VICTIM)
    federation.until_it_asks(VICTIM)
    later.touch()
    outcome = check_run(federation, run)
    assert outcome.lost == []
    assert set(outcome.missed[VICTIM]) >= {3, 4}, "the control: it was away"
    assert 6 not in outcome.missed[VICTIM]
    kept.append(federation)


@chaos
def test_a_network_that_is_cut_for_longer_than_a_heartbeat_costs_the_rounds_of_that_time(
    federation: Staged, kept: list[Staged]
) -> None:
    """What was connected stays dead for ever: nobody is told that it is."""
    federation.stop_site(VICTIM)
    before = federation.reroute(VICTIM, "")
    with wire(int(before.rpartition(":")[2])) as network:
        federation.reroute(VICTIM, f"{LOOPBACK}:{network.port}")
        federation.start_site(VICTIM)
        federation.until_it_asks(VICTIM)
        held = federation.hold("asked train 3")
        run = federation.start_run("cut", **LONG)
        federation.until_held()
        network.cut()
        later = federation.hold("asked train 5")
        held.touch()
        federation.until_held()
        faults = [(e.party, e.round) for e in federation.entries(COORDINATOR, audit.Fault, run)]
        network.heal()
        federation.until_it_asks(VICTIM)
        later.touch()
        outcome = check_run(federation, run)
        assert network.swallowed > 0, "the control: it tried"
        federation.stop_site(VICTIM)
    federation.reroute(VICTIM, before)
    federation.start_site(VICTIM)
    federation.until_it_asks(VICTIM)
    assert {party for party, _ in faults} == {VICTIM}
    assert outcome.lost == []
    assert set(outcome.missed[VICTIM]) >= {3, 4}
    assert 6 not in outcome.missed[VICTIM]
    kept.append(federation)


# --- a disk that is full ----------------------------------------------------------------------------------------------


@contextmanager
def no_space(made: Staged, site: str) -> Iterator[None]:
    """The executor of a site may write no file beyond its first page (EFBIG), as long as the block lasts."""
    executor = made.pid_of(site, "site")
    soft, hard = resource.prlimit(executor, resource.RLIMIT_FSIZE)
    resource.prlimit(executor, resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.prlimit(executor, resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def on_a_small_disk(made: Staged, site: str) -> Iterator[Path]:
    """A site that is stopped lies on a file system of its own, of 24 MiB, as long as the block lasts."""
    place = made.sites[site]
    aside = place.with_name(f"{site}-aside")
    place.rename(aside)
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "confide-test", str(place)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        place.rmdir()
        aside.rename(place)
        pytest.skip(f"only who may mount can fill a disk: {done.stderr.strip()}")
    try:
        shutil.copytree(aside, place, dirs_exist_ok=True)
        yield place
        shutil.rmtree(aside)
        shutil.copytree(place, aside)
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()
        aside.rename(place)


@contextmanager
def filled(place: Path) -> Iterator[None]:
    """Not a byte is left (ENOSPC), as long as the block lasts."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


def check_full(made: Staged, name: str, full: Callable[[], AbstractContextManager[None]]) -> None:
    """Space runs out after the second round and is back before the fifth."""
    ids = made.pid_of(VICTIM, "site")
    held = made.hold("asked train 3")
    run = made.start_run(name, **LONG)
    made.until_held()
    with full():
        later = made.hold("asked train 5")
        held.touch()
        made.until_held()
        faults = {e.party: e.reason for e in made.entries(COORDINATOR, audit.Fault, run)}
        looked = confide("site", "check", made.sites[VICTIM], "--passphrase-file", made.passphrase)
    later.touch()
    outcome = check_run(made, run)
    assert faults == {VICTIM: "a fault at the site"}, "nothing more is said outside"
    assert looked.code in (0, StorageError.exit_code)
    assert made.pid_of(VICTIM, "site") == ids, "it need not be started again"
    assert outcome.lost == []
    assert set(outcome.missed[VICTIM]) >= {3, 4}
    assert 6 not in outcome.missed[VICTIM]


@chaos
def test_a_site_that_may_not_write_takes_no_part_and_goes_on_when_it_may(
    federation: Staged, kept: list[Staged]
) -> None:
    check_full(federation, "limit", lambda: no_space(federation, VICTIM))
    kept.append(federation)


@chaos
def test_a_site_whose_disk_is_full_takes_no_part_and_goes_on_when_there_is_space(
    federation: Staged, kept: list[Staged]
) -> None:
    federation.stop_site(VICTIM)
    with on_a_small_disk(federation, VICTIM) as place:
        federation.start_site(VICTIM)
        federation.until_it_asks(VICTIM)
        check_full(federation, "full", lambda: filled(place))
        assert "StorageError" in (place / "agent" / "site.log").read_text(), "its operator is told"
        federation.stop_site(VICTIM)
    federation.start_site(VICTIM)
    federation.until_it_asks(VICTIM)
    kept.append(federation)


# --- more than one run, more than these sites -------------------------------------------------------------------------


@chaos
def test_two_runs_that_are_asked_for_at_once_both_end_though_the_coordinator_dies_in_each(
    federation: Staged, kept: list[Staged]
) -> None:
    """A deployed coordinator takes them one after the other (at once in one site: `tests/server/test_two_runs.py`)."""
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
