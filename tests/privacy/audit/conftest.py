"""Runs that the tests of this folder look at. Each is made once a worker; a test that changes files copies first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from flwr.app import Error, Message

from confide.protocol.envelope import Header
from confide.protocol.flower import from_records
from confide.simulations.engines.grid import LocalGrid
from confide.simulations.result import Progress
from tests.privacy.audit.logbook import KeyRing, Run
from tests.support import experiment_tree, write_people

#: Far more people than a log has entries or rounds: their exact numbers cannot stand anywhere by chance.
PEOPLE, POPULATION = 409, 450
ROUNDS = 2


@pytest.fixture(scope="session")
def ring() -> KeyRing:
    """One set of keys for all runs: a log of one run is signed by the right key in every other."""
    return KeyRing()


@pytest.fixture(scope="session")
def start(ring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Make a run: `start(profile="open", people=409, progress=…, before_round=…, **sections)`."""

    def make(
        profile: str = "open",
        people: int = PEOPLE,
        progress: Callable[[Progress], None] = lambda _: None,
        before_round: Callable[..., None] = lambda _w, _r: None,
        **sections: dict[str, object],
    ) -> Run:
        base = tmp_path_factory.mktemp("run")
        tree = experiment_tree(
            str(write_people(base, people=people)),
            sealing={"profile": profile},
            run={"rounds": ROUNDS, "report_metrics_every": 1},
            sites={"population": {"default": POPULATION}},
        )
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        result = None
        with contextlib.suppress(KeyboardInterrupt):
            result = ring.simulate(tree, base / "out", progress, before_round)
        return Run(base / "out", dict(ring.identities), tree, result)

    return make


@pytest.fixture(scope="session")
def finished(start: Callable[..., Run]) -> Run:
    """A sealed run of four sites that ended well. Copy it before changing anything."""
    return start("sealed")


@pytest.fixture(scope="session")
def another(start: Callable[..., Run], finished: Run) -> Run:
    """A later run of the same parties with the same keys."""
    return start("sealed")


@pytest.fixture(scope="session")
def interrupted(start: Callable[..., Run]) -> Run:
    """A run that somebody stopped with Ctrl-C after its first round."""

    def stop(progress: Progress) -> None:
        if progress.round == 1:
            raise KeyboardInterrupt

    return start("sealed", progress=stop)


class _Lossy(LocalGrid):
    """doum cannot be reached when round 2 is sealed first, and what birch answers in round 3 is lost."""

    def _deliver(self, message: Message) -> Message:
        header = Header.model_validate_json(from_records(message.content).header)
        place = (header.step, header.round, header.attempt, header.recipient)
        lost = Message(Error(code=5, reason="node unavailable"), reply_to=message)
        if place == ("seal", 2, 0, "doum"):
            return lost
        reply = super()._deliver(message)
        return lost if place == ("seal", 3, 0, "birch") else reply


@pytest.fixture(scope="session")
def retried(start: Callable[..., Run]) -> Run:
    """A run that may retry, and had to: rounds 2 and 3 were summed at the second attempt, without one site each."""
    with mock.patch("confide.simulations.execution.LocalGrid", _Lossy):
        return start("sealed", sealing={"retry": True})


@pytest.fixture
def twice(retried: Run, tmp_path: Path) -> Run:
    """A copy of the run that had to retry."""
    return retried.copy(tmp_path / "twice")


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy of the finished run, to be tampered with."""
    return finished.copy(tmp_path / "run")


@pytest.fixture
def stopped(interrupted: Run, tmp_path: Path) -> Run:
    """A copy of the interrupted run."""
    return interrupted.copy(tmp_path / "stopped")
