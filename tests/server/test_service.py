"""Several runs at once in one service: how many, whom a failure, a stop or an absent site holds up, and what a full
disk or a new certificate does to them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import closing
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from benchmarks.deployment_demo import WORDS
from confide.cli.server import run as serve
from confide.cli.server import write_model
from confide.errors import ConfigError, StorageError
from confide.privacy.audit import records as audit
from confide.protocol.manifest import Manifest
from confide.server.coordinator import Released
from confide.server.federation import FederationFolder
from confide.server.runs import RunStore
from confide.server.service import AT_ONCE, MOST_AT_ONCE, Service, ServiceConfig, run_store
from tests.integration.staged import COORDINATOR, SITES, Staged
from tests.server.served import Served, copied, served

ASH, BIRCH, CEDAR, DOGWOOD = SITES
#: Three of the four.
FEWER = {"sites": {"names": [ASH, BIRCH, CEDAR]}}
#: Long enough that another one ends before it.
LONG = {"run": {"rounds": 5, "report_metrics_every": 5}}


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Staged:
    made = Staged(tmp_path_factory.mktemp("federation") / "f")
    made.provision()
    return made


@pytest.fixture
def federation(provisioned: Staged, tmp_path: Path) -> Iterator[Served]:
    with served(copied(provisioned, tmp_path / "f")) as one:
        yield one


def turns(one: Served) -> int:
    """How often the coordinator's log goes from one run to another."""
    return sum(a != b for a, b in pairwise(one.order()))


def verified(one: Served, *runs: str) -> None:
    """The logs of all who were there hold together for each of them."""
    one.made.names = tuple(name for name in one.made.names if one.made.log_of(name).exists())
    for run in runs:
        assert one.made.evidence(run).findings == []


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.long), 2])
def test_as_many_runs_are_under_way_as_the_operator_allows(federation: Served, at_once: int) -> None:
    runs = [federation.submit(name) for name in ("one", "two")]
    federation.start(at_once=at_once)
    federation.come(*SITES)
    models = [federation.result(run)["model"] for run in runs]
    assert len(set(models)) == 2
    federation.stop()
    assert (turns(federation) == 1) == (at_once == 1)
    verified(federation, *runs)


def test_the_command_says_what_the_service_does() -> None:
    assert signature(serve).parameters["at_once"].default == AT_ONCE
    (option,) = get_type_hints(serve, include_extras=True)["at_once"].__metadata__
    assert (option.min, option.max) == (1, MOST_AT_ONCE)


@pytest.mark.parametrize("at_once", [0, MOST_AT_ONCE + 1])
def test_another_number_of_runs_is_no_service(federation: Served, at_once: int) -> None:
    config = ServiceConfig(folder=federation.fed, store=run_store(federation.fed), finish=write_model, at_once=at_once)
    with pytest.raises(ConfigError, match="at once"):
        Service(config, WORDS)


@pytest.mark.long
def test_a_run_whose_sites_are_away_and_one_that_nobody_wants_hold_up_no_other(federation: Served) -> None:
    waits = federation.submit("waits", sites={"min_sites": 4})
    nobody = federation.submit("nobody", run={"rounds": 2, "purpose": "marketing"}, **FEWER)
    runs = [federation.submit(name, **FEWER) for name in ("one", "two")]
    federation.start(at_once=1, wait_for_all=0.0)
    federation.come(ASH, BIRCH, CEDAR)
    assert [federation.result(run)["status"] for run in (nobody, *runs)] == ["failed", "finished", "finished"]
    assert not federation.ended(waits)
    assert federation.status(waits) == "waiting", "it has taken nobody's place"
    federation.come(DOGWOOD)
    assert federation.result(waits)["status"] == "finished", "the control: that was what it waited for"
    federation.stop()
    verified(federation, nobody, *runs, waits)


def test_a_stop_takes_effect_while_replies_are_waited_for_and_ends_that_run_alone(federation: Served) -> None:
    """One site works on both, and answers neither. The other of the two goes on."""
    stopped, other = (federation.submit(name, **FEWER) for name in ("stopped", "other"))
    federation.start()
    federation.come(ASH, BIRCH, CEDAR)
    federation.until_asked(BIRCH, stopped, "train")
    federation.until_asked(BIRCH, other, "train")
    held = [federation.hold(ASH, run, "train") for run in (stopped, other)]
    federation.ask_to_stop(stopped)
    assert federation.result(stopped)["status"] == "stopped"
    assert not federation.ended(other)
    federation.until(lambda: bool(federation.entries(BIRCH, audit.ToldEnded, stopped)), "a site is told of the end")
    assert not federation.ended(other), "while the other is under way"
    for one in held:
        one.set()
    assert federation.result(other)["status"] == "finished"
    federation.until(lambda: bool(federation.entries(ASH, audit.ToldEnded, stopped)), "the busy site is told")
    federation.stop()
    assert [e.status for e in federation.entries(COORDINATOR, audit.RunEnded, stopped)] == ["stopped"]
    verified(federation, stopped, other)


@pytest.mark.long
def test_a_site_that_was_away_is_told_of_an_end_when_it_comes_though_another_run_is_under_way(
    federation: Served,
) -> None:
    stopped, other = federation.submit("stopped", **LONG), federation.submit("other", **LONG, **FEWER)
    gone = federation.hold(DOGWOOD, stopped, "train")
    federation.start()
    federation.come(*SITES)
    federation.until_asked(DOGWOOD, stopped, "train")
    federation.until_asked(ASH, other, "train")
    held = federation.hold(ASH, other, "train")
    federation.sites[DOGWOOD].end()
    gone.set()
    federation.sites.pop(DOGWOOD).join()
    federation.ask_to_stop(stopped)
    assert federation.result(stopped)["status"] == "stopped"
    federation.come(DOGWOOD)
    federation.until(lambda: bool(federation.entries(DOGWOOD, audit.ToldEnded, stopped)), "it is told")
    assert not federation.ended(other), "while the other is under way"
    held.set()
    assert federation.result(other)["status"] == "finished"
    federation.stop()
    verified(federation, stopped, other)


def test_a_run_that_waits_for_its_sites_is_stopped_at_once_also_where_there_is_no_room(federation: Served) -> None:
    waits, other = federation.submit("waits", sites={"min_sites": 4}), federation.submit("other", **FEWER)
    held = federation.hold(ASH, other, "train")
    federation.start(at_once=1)
    federation.come(ASH, BIRCH, CEDAR)
    federation.until_asked(ASH, other, "train")
    federation.ask_to_stop(waits)
    assert federation.status(waits) == "stopped"
    held.set()
    assert federation.result(other)["status"] == "finished"
    federation.stop()
    assert federation.entries(COORDINATOR, audit.RunEnded, waits) == [], "nobody was ever asked"


@pytest.mark.long
def test_a_stop_that_comes_while_sites_release_the_model_comes_too_late(federation: Served) -> None:
    """They have logged that they handed it over: the run ends as their logs say."""
    run = federation.submit("late", **FEWER)
    held = federation.hold(ASH, run, "release")
    federation.start()
    federation.come(ASH, BIRCH, CEDAR)
    federation.until_asked(ASH, run, "release")
    federation.ask_to_stop(run)
    federation.stop()
    assert federation.status(run) == "stopping"
    federation.start()
    held.set()
    assert federation.result(run)["status"] == "finished"
    federation.stop()
    assert [e.status for e in federation.entries(COORDINATOR, audit.RunEnded, run)] == ["finished"]
    verified(federation, run)


def test_a_disk_that_takes_nothing_ends_the_service_and_no_run(federation: Served) -> None:
    """It is one run that meets it; the other is in the middle. Another service goes on with both."""

    def full(place: Path, manifest: Manifest, released: Released) -> None:
        raise StorageError("is full", where=str(place))

    first = federation.submit("first", **FEWER)
    second = federation.submit("second", **LONG, **FEWER)
    federation.start(finish=full)
    federation.come(ASH, BIRCH, CEDAR)
    error = federation.join()
    assert isinstance(error, StorageError)
    assert StorageError.exit_code == 10
    assert (federation.status(first), federation.status(second)) == ("finished", "running")
    assert not any(federation.ended(run) for run in (first, second))
    federation.start()
    assert [federation.result(run)["status"] for run in (first, second)] == ["finished"] * 2
    federation.stop()
    for site in (ASH, BIRCH, CEDAR):
        trained = [e.round for e in federation.entries(site, audit.UpdateCommitted, second)]
        assert len(trained) == len(set(trained)), "a round was trained twice"
    verified(federation, first, second)


@pytest.mark.long
def test_a_new_certificate_waits_for_the_runs_under_way_and_new_runs_for_it(federation: Served) -> None:
    run = federation.submit("first", **FEWER)
    held = federation.hold(ASH, run, "train")
    federation.start()
    federation.come(ASH, BIRCH, CEDAR)
    federation.until_asked(ASH, run, "train")
    FederationFolder(federation.fed).renew(dt.datetime.now(dt.UTC), WORDS)
    federation.until(lambda: any("has changed" in event for event in federation.told), "it is noticed")
    following = federation.submit("second", **FEWER)
    assert federation.status(following) == "waiting"
    assert sum(event.startswith("listening") for event in federation.told) == 1
    held.set()
    assert [federation.result(r)["status"] for r in (run, following)] == ["finished"] * 2
    assert sum(event.startswith("listening") for event in federation.told) == 2
    federation.stop()
    verified(federation, run, following)


def test_what_is_no_error_of_ours_is_said_and_ends_the_service(federation: Served) -> None:
    def broken(place: Path, manifest: Manifest, released: Released) -> Any:
        raise ZeroDivisionError

    run = federation.submit("first", **FEWER)
    federation.start(finish=broken)
    federation.come(ASH, BIRCH, CEDAR)
    assert isinstance(federation.join(), ZeroDivisionError)
    assert federation.status(run) == "finished"
    federation.start()
    assert federation.result(run)["status"] == "finished", "the control: what was durable was kept"


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_a_run_whose_end_an_earlier_process_did_not_write_down_has_a_result(federation: Served, status: str) -> None:
    run = federation.submit("ended")
    with closing(RunStore(run_store(federation.fed))) as store:
        assert store.mark(run, status, only=("waiting",))
    federation.start()
    found = federation.result(run)
    assert (found["status"], "killed" in found["reason"]) == (status, status == "failed")
    federation.stop()
    assert federation.status(run) == status
    assert federation.entries(COORDINATOR, audit.RunEnded, run) == [], "nobody was ever asked"
