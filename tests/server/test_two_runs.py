"""Two runs over the same sites at once: each ends as it would alone, and the ledgers hold both.

Each coordinator is a thread; the sites live in the test's own thread, which takes one message of the one run and one of
the other in turn.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage

from confide.errors import ConfideError
from confide.privacy.audit import records as audit
from confide.privacy.dp import Role, rdp_epsilon
from confide.protocol.flower import from_records
from confide.protocol.manifest import Manifest
from confide.server.coordinator import Coordinator, Released
from confide.server.runs import RunStore
from confide.simulations.engines.grid import LocalGrid
from confide.simulations.world import FEDERATION
from tests.attacks.federation import Federation, header_of, open_federation

SEEDED = {"epsilon": 2.0, "unsafe_noise_seed": 7, "site_epsilon_limit": 20.0}


class TurnGrid(LocalGrid):
    """Hands each message to the thread of the sites, and waits for its reply."""

    outbox: queue.Queue[Any]

    def _deliver(self, message: FlowerMessage) -> FlowerMessage:
        answer: queue.Queue[FlowerMessage] = queue.Queue()
        self.outbox.put((message, answer))
        return answer.get()


def _grid(federation: Federation) -> TurnGrid:
    grid = federation.grid()
    grid.__class__ = TurnGrid
    assert isinstance(grid, TurnGrid)
    grid.outbox = queue.Queue()
    return grid


def _coordinate(federation: Federation, manifest: Manifest, grid: LocalGrid, path: Path) -> Callable[[], Released]:
    """One coordinator's whole life: log and store are its own, and opened in its thread."""

    def run() -> Released:
        world, store = federation.world, RunStore(f"sqlite:///{path}.runs")
        log = world.coordinator.open_log(Path(f"{path}.log.db"), "coordinator", FEDERATION)
        try:
            return Coordinator(grid, world.coordinator, manifest, world.initial, log, store=store).run()
        finally:
            log.close()
            store.close()

    return run


def _together(
    grids: list[TurnGrid], lives: list[Callable[[], Released]]
) -> tuple[list[Released | ConfideError], list[str]]:
    """Everybody's result, and the runs' messages in the order in which they were answered."""
    found: dict[int, Released | ConfideError] = {}
    order: list[str] = []

    def live(number: int) -> None:
        try:
            found[number] = lives[number]()
        except ConfideError as error:
            found[number] = error
        finally:
            grids[number].outbox.put(None)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(len(lives))]
    for thread in threads:
        thread.start()
    going = list(grids)
    while going:
        for grid in list(going):
            item = grid.outbox.get(timeout=60)
            if item is None:
                going.remove(grid)
                continue
            message, answer = item
            reply = LocalGrid._deliver(grid, message)
            order.append(header_of(from_records(message.content)).run)
            answer.put(reply)
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(lives))], order


@pytest.mark.parametrize("profile", ["sealed", "masked"])
def test_two_runs_at_once_end_as_each_would_alone(tmp_path: Path, profile: str) -> None:
    """A seed decides every draw, so that a single bit of disturbance would show in the model."""
    sections: dict[str, Any] = {"privacy": SEEDED, "sealing": {"profile": profile}}
    with open_federation(tmp_path / "alone", **sections) as alone:
        expected = alone.coordinator().run().weights
    with open_federation(tmp_path / "f", **sections) as federation:
        first = federation.manifest
        second = first.model_copy(update={"run": first.run + "-2"})
        grids = [_grid(federation), _grid(federation)]
        lives = [
            _coordinate(federation, manifest, grid, tmp_path / manifest.run)
            for manifest, grid in zip((first, second), grids, strict=True)
        ]
        released, order = _together(grids, lives)
        turns = sum(a != b for a, b in pairwise(order))
        assert turns > len(order) * 0.9, "the control: they did take turns"
        for one in released:
            assert isinstance(one, Released)
            assert np.array_equal(one.weights, expected)
            assert not any(o.abandoned for o in one.outcomes)
            assert {o.cohort for o in one.outcomes} == {federation.names}
        _check_ledgers(federation, (first, second))


def _check_ledgers(federation: Federation, manifests: tuple[Manifest, ...]) -> None:
    """Both runs are paid for, each once, and nothing was refused."""
    expected = {
        f"{manifest.run}/{round_}/{event.role.value}": event
        for manifest in manifests
        for round_ in range(1, manifest.rounds + 2)
        for event in manifest.charges(round_)
    }
    for site in federation.sites.values():
        assert site.ledger.reservations() == expected
        assert site.ledger.charges() == expected, "nothing was given back"
        refused = [e for e in site.log.entries() if isinstance(e, audit.Refused)]
        assert refused == []
        once = [e for e in manifests[0].all_charges() if e.role is Role.TRAIN]
        assert site.ledger.epsilon(Role.TRAIN) > rdp_epsilon(once, manifests[0].privacy.delta), "two cost more than one"


@pytest.mark.parametrize("limit", [2.5, 20.0])
def test_of_two_runs_that_a_budget_holds_alone_and_not_together_one_is_refused_before_it_costs_anything(
    tmp_path: Path, limit: float
) -> None:
    """Were they refused by the ledger alone, both would be paid for in part, and neither would end."""
    fits = limit > 2 * 2.0
    with open_federation(tmp_path / "f", privacy={"epsilon": 2.0, "site_epsilon_limit": limit}) as federation:
        first = federation.manifest
        second = first.model_copy(update={"run": first.run + "-2"})
        grids = [_grid(federation), _grid(federation)]
        lives = [
            _coordinate(federation, manifest, grid, tmp_path / manifest.run)
            for manifest, grid in zip((first, second), grids, strict=True)
        ]
        results, _ = _together(grids, lives)
        assert isinstance(results[0], Released)
        assert not any(o.abandoned for o in results[0].outcomes)
        assert isinstance(results[1], Released) == fits, "the control: both, where the budget holds both"
        for site in federation.sites.values():
            assert site.ledger.epsilon(Role.TRAIN) <= limit
            assert any(charge.startswith(f"{second.run}/") for charge in site.ledger.reservations()) == fits
            why = [e.reason for e in site.log.entries() if isinstance(e, audit.Refused)]
            assert bool(why) != fits
            assert all("beside the runs" in reason for reason in why)
