"""Sites of a deployed federation leave for good, come back, are cut off and run out of disk: the others lose nothing,
and who comes back catches up."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from confide.errors import StorageError
from confide.privacy.audit import records as audit
from tests.cli.command import confide
from tests.integration.deployed import LOOPBACK
from tests.integration.outcomes import Outcome, check_run
from tests.integration.staged import COORDINATOR, SECTIONS, VICTIM, Staged, chaos
from tests.integration.wire import wire

AT_FAULT, UNREACHABLE = "a fault at the site", "the node cannot be reached"
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
        faults = {(e.party, e.reason) for e in federation.entries(COORDINATOR, audit.Fault, run)}
        network.heal()
        federation.until_it_asks(VICTIM)
        later.touch()
        outcome = check_run(federation, run)
        assert network.swallowed > 0, "the control: it tried"
        federation.stop_site(VICTIM)
    federation.reroute(VICTIM, before)
    federation.start_site(VICTIM)
    federation.until_it_asks(VICTIM)
    assert faults == {(VICTIM, UNREACHABLE)}
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
        made.stop_site(site)
        shutil.rmtree(aside)
        shutil.copytree(place, aside)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
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


def check_full(
    made: Staged,
    name: str,
    full: Callable[[], AbstractContextManager[None]],
    meanwhile: Callable[[], None],
    said: frozenset[str] = frozenset({AT_FAULT}),
) -> None:
    """Space runs out after the second round and is back before the fifth. Outside, nothing more is said than `said`."""
    held = made.hold("asked train 3")
    run = made.start_run(name, **LONG)
    made.until_held()
    with full():
        later = made.hold("asked train 5")
        meanwhile()
        held.touch()
        made.until_held()
        faults = {(e.party, e.reason) for e in made.entries(COORDINATOR, audit.Fault, run)}
    made.until_it_asks(VICTIM)
    later.touch()
    outcome = check_run(made, run)
    assert {party for party, _ in faults} == {VICTIM}
    assert {reason for _, reason in faults} <= said
    # One that starts again may find the space for a commitment and none for its seal: that costs everybody the round.
    assert set(outcome.lost) <= ({3, 4} if UNREACHABLE in said else set())
    assert {*outcome.missed.get(VICTIM, []), *outcome.lost} >= {3, 4}
    assert 6 not in outcome.missed.get(VICTIM, [])


@chaos
def test_a_site_that_may_not_write_takes_no_part_and_goes_on_when_it_may(
    federation: Staged, kept: list[Staged]
) -> None:
    executor = federation.pid_of(VICTIM, "site")
    check_full(federation, "limit", lambda: no_space(federation, VICTIM), lambda: None)
    assert federation.pid_of(VICTIM, "site") == executor, "it need not be started again"
    kept.append(federation)


@chaos
@pytest.mark.parametrize("dies", [False, True], ids=["", "and its executor dies meanwhile"])
def test_a_site_whose_disk_is_full_takes_no_part_and_goes_on_when_there_is_space(
    federation: Staged, kept: list[Staged], dies: bool
) -> None:
    def meanwhile() -> None:
        looked = confide(
            "site", "check", federation.sites[VICTIM], "--passphrase-file", federation.passphrase, "--json"
        )
        found = {f["check"]: (f["state"], f["code"]) for f in looked.last_line["findings"]}
        assert found["disk"] == ("fail", StorageError.exit_code)
        assert "restore" not in looked.out, "nothing is damaged"
        if dies:
            os.kill(executor, signal.SIGKILL)

    federation.stop_site(VICTIM)
    with on_a_small_disk(federation, VICTIM) as place:
        federation.start_site(VICTIM)
        federation.until_it_asks(VICTIM)
        executor = federation.pid_of(VICTIM, "site")
        said = frozenset({AT_FAULT, UNREACHABLE} if dies else {AT_FAULT})  # it may, or may not, start without space
        check_full(federation, f"full-{dies}".lower(), lambda: filled(place), meanwhile, said)
        assert Path(f"/proc/{executor}").exists() != dies
    federation.start_site(VICTIM)
    federation.until_it_asks(VICTIM)
    kept.append(federation)
