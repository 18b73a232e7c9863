"""A deployed coordinator's memory does not grow with the number of rounds."""

from __future__ import annotations

from pathlib import Path

from benchmarks.deployment_memory import measure
from tests.integration.staged import SITES, chaos, staged

ROUNDS = 200


@chaos
def test_over_two_hundred_rounds_a_coordinator_keeps_nothing_of_what_it_was_sent(tmp_path: Path) -> None:
    with staged(tmp_path, SITES[:3]) as made:
        found = measure(made, ROUNDS)
    print(found)
    assert found["rounds_abandoned"] == 0
    grown = found["coordinator_mib_last"] - found["coordinator_mib_first"]
    kept_everything = found["traffic_mib_per_round"] * ROUNDS
    assert kept_everything > 50, "the control: there is something that would show"
    assert grown < kept_everything / 10, "it grows with what it is sent"
