"""Runs that end without a release: logged, told to whoever joined, and told later to whoever was not there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from confide.errors import ConfigError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.audit.report import write_report
from confide.privacy.audit.verify import verify
from confide.protocol import messages as m
from confide.protocol.flower import from_records, to_records
from confide.server.ending import Endings, log_end, tell_end
from confide.server.runs import RunStore
from confide.simulations.engines.grid import LocalGrid
from confide.simulations.world import World
from tests.attacks.federation import Federation, open_federation
from tests.server.nodes import NodeClient, listening, new_key


class _Stopped(Exception):
    pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    made = RunStore(f"sqlite:///{tmp_path / 'runs.db'}")
    yield made
    made.close()


@pytest.fixture
def stopped(tmp_path: Path, store: RunStore) -> Iterator[Federation]:
    """A run that somebody stopped before its second round."""

    def stop(round_: int) -> None:
        if round_ == 2:
            raise _Stopped

    with open_federation(tmp_path / "f") as federation:
        with pytest.raises(_Stopped):
            federation.coordinator(store=store, before_round=stop).run()
        store.mark(federation.manifest.run, "stopped", only=("running",))
        yield federation


def tell(federation: Federation, store: RunStore, *down: str) -> frozenset[str]:
    """Tell everybody but those who are down; who does not know yet."""
    grid, world = federation.grid(lambda _m, site: site in down), federation.world
    nodes = {s: n for s, n in where(grid).items() if s not in down}
    return tell_end(grid, world.coordinator, federation.manifest.run, "stopped", world.log, store, nodes)


def where(grid: LocalGrid) -> dict[str, int]:
    """Each site's node."""
    return {site: node for node, site in grid._site_of.items()}


def entries(federation: Federation, kind: type[audit.Record], site: str | None = None) -> list[Any]:
    log = federation.world.log if site is None else federation.sites[site].log
    return [e for e in log.entries() if isinstance(e, kind)]


def test_every_site_is_told_and_both_sides_have_it_in_their_logs(stopped: Federation, store: RunStore) -> None:
    assert store.untold() == [stopped.manifest.run]
    assert tell(stopped, store) == frozenset()
    assert store.untold() == []
    assert [e.status for e in entries(stopped, audit.RunEnded)] == ["stopped"]
    for site in stopped.names:
        assert [e.status for e in entries(stopped, audit.ToldEnded, site)] == ["stopped"]
        assert stopped.sites[site]._runs[stopped.manifest.run].keys.destroyed
    stopped.world.export()
    assert verify(stopped.folder).findings == []
    page = stopped.folder / "report.html"
    assert write_report(stopped.folder, page)["interrupted"]
    assert "This run was stopped." in page.read_text()


def test_one_that_is_not_there_is_told_later_by_another_process_and_nobody_twice(
    stopped: Federation, store: RunStore, tmp_path: Path
) -> None:
    assert tell(stopped, store, "birch", "doum") == {"birch", "doum"}
    again = RunStore(f"sqlite:///{tmp_path / 'runs.db'}")
    assert again.untold() == [stopped.manifest.run]
    asked = dict.fromkeys(stopped.names, 0)
    for name, site in stopped.sites.items():
        real = site.handle

        def counted(step: str, request: Any, name: str = name, real: Any = real) -> Any:
            asked[name] += 1
            return real(step, request)

        site.handle = counted  # type: ignore[method-assign]
    assert tell(stopped, again) == frozenset()
    assert asked == {"ash": 0, "birch": 1, "cedar": 0, "doum": 1}
    assert len(entries(stopped, audit.RunEnded)) == 1
    assert again.untold() == []
    again.close()


def test_a_site_that_says_no_has_answered(stopped: Federation, store: RunStore) -> None:
    stopped.sites["birch"]._store.halt("its state was put back")
    assert tell(stopped, store) == frozenset()
    assert [(e.party, e.step) for e in entries(stopped, audit.Refused)] == [("birch", "end")]


def test_a_run_that_nobody_was_invited_to_has_no_end_in_the_log(store: RunStore, tmp_path: Path) -> None:
    with open_federation(tmp_path / "f") as federation:
        run = federation.manifest.run
        store.submit(run, federation.manifest.to_bytes(), federation.weights)
        store.mark(run, "stopped", only=("waiting",))
        log_end(run, "stopped", federation.world.log, store)
        assert list(federation.world.log.entries()) == []
        assert store.untold() == []
        with pytest.raises(ConfigError, match="no such run"):
            tell_end(federation.grid(), federation.world.coordinator, "x", "failed", federation.world.log, store, {})


def test_a_coordinator_that_ends_a_run_at_one_site_and_goes_on_with_others_is_found(
    tmp_path: Path, store: RunStore
) -> None:
    """It tells one site that the run has failed, and the others nothing; its log holds no end, or one too early."""
    with open_federation(tmp_path / "f") as federation:
        federation.agree()
        federation.round(1)
        federation.ask("ash", "end", 0, m.EndRequest(status="failed"))
        world = federation.world
        world.log.append(audit.RunCreated(run=federation.manifest.run, manifest=federation.manifest.to_bytes().decode(),
                                          software={}))  # fmt: skip
        world.export()
        assert any("ash" in str(f) and "told that the run has failed" in str(f)
                   for f in verify(federation.folder).findings)  # fmt: skip
        world.log.append(audit.RunEnded(run=federation.manifest.run, status="failed"))
        world.export()
        assert not any("told that" in str(f) for f in verify(federation.folder).findings), "the control"
        world.log.append(audit.RoundAbandoned(run=federation.manifest.run, round=2, reason="too few sites trained"))
        world.export()
        assert any("goes on with a run that it has ended" in str(f) for f in verify(federation.folder).findings)


def test_a_service_tells_who_is_online_and_the_others_when_they_come(
    stopped: Federation, store: RunStore, tmp_path: Path
) -> None:
    """Over a real link; each site's node is played by a client of the fleet interface."""
    keys = {site: new_key() for site in stopped.names}
    world, run = stopped.world, stopped.manifest.run
    world.log.close()
    with listening(tmp_path / "link", **keys) as link, ThreadPoolExecutor(1) as service:
        ends, log = service.submit(_endings, world, f"sqlite:///{tmp_path / 'runs.db'}").result()
        service.submit(log_end, run, "stopped", log, ends._store).result()
        service.submit(ends.note, run).result()
        service.submit(ends.tell, link, log).result()
        assert ends._untold[run].sites is None, "nobody is there, so nobody was asked"
        for names in (("ash", "cedar"), ("birch", "doum")):
            nodes = {s: NodeClient(link.port, tmp_path / "link" / "ca.pem", keys[s]).activate() for s in names}
            telling = service.submit(ends.tell, link, log)
            for site, node in nodes.items():
                message = node.pull()
                answer = stopped.sites[site].handle("end", from_records(message.content))
                node.push(Message(to_records(answer), reply_to=message))
            telling.result()
            assert {s for s in stopped.names if entries(stopped, audit.ToldEnded, s)} >= set(names)
        assert ends._untold == {}, "and then nobody is asked any more"
        assert store.untold() == []
        service.submit(log.close).result()
        service.submit(ends._store.close).result()
    world.log = world.coordinator.open_log(stopped.folder / "sites" / "coordinator.db", "coordinator", "simulation")
    world.export()
    assert verify(stopped.folder).findings == []


def _endings(world: World, url: str) -> tuple[Endings, Log]:
    """In the service's own thread: connections stay where they were made."""
    place = world._run_folder / "coordinator.db"

    def open_log() -> Log:
        return world.coordinator.open_log(place, "coordinator", "simulation")

    return Endings(world.coordinator, RunStore(url), open_log), open_log()
