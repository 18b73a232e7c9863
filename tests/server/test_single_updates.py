"""A run whose strategy needs single updates, passed on as they were signed, goes on from its store like any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from confide.server.coordinator import Released
from confide.server.journal import Journal
from confide.server.runs import RunStore
from tests.attacks.federation import Federation, open_federation


class _Died(BaseException):
    pass


def seeded(rounds: int) -> dict[str, Any]:
    """Updates are the same in every run, so models can be compared."""
    return {
        "people": {"people": 12}, "sites": {"min_subjects": 1, "population": {"default": 12}},
        "run": {"rounds": rounds, "report_metrics_every": 1}, "sealing": {"profile": "open"},
        "strategy": {"kind": "median"}, "privacy": {"unsafe_noise_seed": 3, "sample_rate": 0.5},
    }  # fmt: skip


@contextmanager
def dying(after: int) -> Iterator[None]:
    """A process that ends before its next write, having made so many."""
    real, made = Journal._write, [0]

    @contextmanager
    def write(journal: Journal, **changes: Any) -> Iterator[Connection]:
        if made[0] == after:
            raise _Died
        made[0] += 1
        with real(journal, **changes) as db:
            yield db

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "_write", write)
        yield


def to_the_end(federation: Federation, url: str) -> tuple[Released, int]:
    """One process after the other, each of which makes one write; what is released, and how many died."""
    for died in range(200):
        store = RunStore(url)
        try:
            with dying(1):
                return federation.coordinator(store=store).run(), died
        except _Died:
            continue
        finally:
            store.close()
    pytest.fail("the run does not come to its end")


def test_killed_before_every_write_it_ends_with_the_model_of_an_unbroken_run(tmp_path: Path) -> None:
    with open_federation(tmp_path / "whole", **seeded(1)) as federation:
        assert federation.manifest.single_updates
        expected = federation.coordinator().run()
    with open_federation(tmp_path / "broken", **seeded(1)) as federation:
        url = f"sqlite:///{tmp_path / 'runs.db'}"
        found, died = to_the_end(federation, url)
        assert died > 15, "the control: it was killed"
        assert found.weights.tobytes() == expected.weights.tobytes() != federation.weights
        assert [o.cohort for o in found.outcomes] == [federation.names] * 2
        assert {federation.model(s).weights.tobytes() for s in federation.names} == {found.weights.tobytes()}


def test_a_site_that_missed_a_round_replays_it_from_the_payloads_in_the_store(tmp_path: Path) -> None:
    """The others' signed payloads lie in the store; whose they are is checked again by the one that was away."""

    def away(message: Any, site: str) -> bool:
        return site == "doum" and message.metadata.message_type.startswith("train") and rounds[-1] == 1

    rounds = list[int]()
    with open_federation(tmp_path / "f", **seeded(2)) as federation:
        url = f"sqlite:///{tmp_path / 'runs.db'}"

        def stop(round_: int) -> None:
            rounds.append(round_)
            if round_ == 2:
                raise _Died

        with pytest.raises(_Died):
            federation.coordinator(federation.grid(away), store=RunStore(url), before_round=stop).run()
        found = federation.coordinator(store=RunStore(url)).run()
        assert [len(o.cohort) for o in found.outcomes] == [3, 4, 4]
        assert {federation.model(s).weights.tobytes() for s in federation.names} == {found.weights.tobytes()}
