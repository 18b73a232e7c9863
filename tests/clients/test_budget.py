"""Promise 2 through the whole path: charged on the disk before a record is read, composed over runs, then refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

import confide
from confide.errors import BudgetError
from confide.privacy.dp import Ledger, RenyiBudget, Role
from confide.simulations import execution
from confide.simulations.engines.grid import LocalGrid
from tests.clients.watching import Watch, ledger_rows, watch_runs
from tests.support import SITES

LIMIT, DELTA = 8.0, 1e-5
WHOLE = {"sample_rate": 1.0}  # whose noise is quickly found


def used(ledgers: Path, site: str) -> tuple[float, float]:
    """A site's used share and ε for its trainees."""
    ledger = Ledger(ledgers / site / "ledger.db", RenyiBudget.for_limit(LIMIT, DELTA), held_out=0.25)
    found = ledger.used(), ledger.epsilon(Role.TRAIN)
    ledger.close()
    return found


def test_runs_on_one_ledger_compose_until_the_next_is_refused_before_anything_is_read(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers, experiment = tmp_path / "ledgers", make_experiment(privacy={**WHOLE, "epsilon": 4.0}, run={"rounds": 2})
    watch, shares = watch_runs(monkeypatch, Watch()), [0.0]

    def run(number: int) -> BudgetError | None:
        try:
            confide.simulate(experiment, out=tmp_path / f"run-{number}", ledger=ledgers)
        except BudgetError as error:
            return error
        return None

    while (refused := run(len(shares))) is None:
        assert watch.readings  # control: an admitted run does read
        watch.readings.clear()
        share, epsilon = used(ledgers, "ash")
        assert share > shares[-1]
        assert epsilon <= LIMIT
        shares.append(share)
        before = {site: ledger_rows(ledgers, site) for site in SITES}
    assert "the privacy budget does not suffice" in str(refused)
    assert watch.readings == []
    assert not (tmp_path / f"run-{len(shares)}").exists()
    assert {site: ledger_rows(ledgers, site) for site in SITES} == before
    assert len(shares) >= 3  # at least two runs were admitted
    assert shares[-1] <= 1.0 < shares[-1] + shares[1]  # and the refused one would not have fitted


def test_the_same_run_with_a_ledger_of_its_own_is_admitted_again_and_again(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The control: what refuses is the ledger, not the run."""
    experiment = make_experiment(privacy={**WHOLE, "epsilon": LIMIT}, run={"rounds": 1})
    for number in range(2):
        confide.simulate(experiment, out=tmp_path / f"run-{number}")
    with pytest.raises(BudgetError):
        confide.simulate(experiment, out=tmp_path / "third", ledger=tmp_path / "run-0" / "ledgers")
    assert not (tmp_path / "third").exists()


def test_a_ledger_of_another_limit_is_refused_and_nothing_is_written(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    ledgers = tmp_path / "ledgers"
    confide.simulate(make_experiment(run={"rounds": 1}, privacy=WHOLE), out=tmp_path / "first", ledger=ledgers)
    with pytest.raises(BudgetError, match="fixed for the ledger's lifetime"):
        confide.simulate(
            make_experiment(run={"rounds": 1}, privacy={**WHOLE, "site_epsilon_limit": 80.0}), out=tmp_path / "second",
            ledger=ledgers,
        )  # fmt: skip
    assert not (tmp_path / "second").exists()


def test_a_round_is_on_the_disk_before_a_record_is_read_for_it(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers, looks, absent = tmp_path / "ledgers", list[tuple[str, int, str]](), list[int]()

    def charged(site: str) -> set[str]:
        return {charge for charge, _, _ in ledger_rows(ledgers, site)}

    def look(watch: Watch, site: str) -> None:
        role = {"train": "train", "metric": "held_out"}.get(watch.purpose)
        if role is not None:
            assert f"{watch.round}/{role}" in charged(site)
            looks.append((site, watch.round, role))

    def before(watch: Watch) -> None:
        assert all(f"{watch.round}/train" not in charged(site) for site in SITES)
        absent.append(watch.round)

    watch_runs(monkeypatch, Watch(on_read=look, on_round=before))
    confide.simulate(make_experiment(privacy=WHOLE), out=tmp_path / "out", ledger=ledgers)
    trained, measured = (
        {(s, r) for s, r, role in looks if role == "train"},
        {r for _, r, role in looks if role != "train"},
    )
    assert trained == {(site, round_) for site in SITES for round_ in (1, 2, 3)}
    assert measured == {3, 4}
    assert absent == [1, 2, 3, 4]  # control: before its round, no charge was there to be seen


def test_what_was_charged_is_the_schedule_and_nothing_that_depends_on_people(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for name, fraction in (("many", 0.95), ("few", 0.5)):
        confide.simulate(
            make_experiment(privacy=WHOLE, consent={"simulate": {"fraction": fraction}}), out=tmp_path / name
        )
    expected = [
        ("1/train", "reserve", 4), ("2/train", "reserve", 4), ("3/train", "reserve", 4), ("3/held_out", "reserve", 1),
        ("4/held_out", "reserve", 1),
    ]  # fmt: skip
    expected += [(charge, "expire", steps) for charge, _, steps in expected]  # at the end of the run: they stand whole
    for site in SITES:
        assert ledger_rows(tmp_path / "many" / "ledgers", site) == expected
        assert ledger_rows(tmp_path / "few" / "ledgers", site) == expected


def test_an_update_that_was_never_sealed_settles_its_charge_to_nothing(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ash` cannot be reached while round 2 is sealed: the others' updates left their sites, its own did not."""
    seals = list[str]()

    def drop(message: Message, site: str) -> bool:
        if message.metadata.message_type != "train.seal" or site != "ash":
            return False
        seals.append(site)
        return len(seals) == 2

    monkeypatch.setattr(execution, "LocalGrid", lambda app, sites, **_: LocalGrid(app, sites, drop=drop))
    result = confide.simulate(make_experiment(privacy=WHOLE), out=tmp_path / "out")
    assert result.rounds_abandoned == 1
    settled = {s: [r for r in ledger_rows(tmp_path / "out" / "ledgers", s) if r[1] == "settle"] for s in SITES}
    assert settled.pop("ash") == [("2/train", "settle", 0)]
    assert not any(settled.values())  # control: what was sealed stays charged
    assert used(tmp_path / "out" / "ledgers", "ash") < used(tmp_path / "out" / "ledgers", "birch")
