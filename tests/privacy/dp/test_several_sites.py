"""A person at several sites: what a run costs her is composed over them, whichever role each of them gives her."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import BudgetError
from confide.privacy.dp import (
    Ledger,
    PrivacyEvent,
    RenyiBudget,
    Role,
    calibrate,
    calibrate_run,
    person_epsilon,
    run_epsilon,
)
from confide.privacy.dp.accounting import rdp, rdp_epsilon
from confide.privacy.dp.events import event_from_json, event_to_json, merge_events
from confide.privacy.dp.personal import PersonalLosses
from confide.privacy.dp.statement import read_statement

DELTA = 1e-5


def event(role: Role, sigma: float, q: float, steps: int, sites: int = 1) -> PrivacyEvent:
    return PrivacyEvent(
        role=role, unit="subject", noise_multiplier=sigma, sample_rate=q, steps=steps, max_grad_norm=1.0, sites=sites
    )


def run(sites: int = 2, train: float = 3.0, held_out: float = 4.0) -> list[PrivacyEvent]:
    return [event(Role.TRAIN, train, 0.1, 60, sites), event(Role.HELD_OUT, held_out, 1.0, 3, sites)]


def by_hand(parts: list[tuple[float, float, int]], about: float, *, pessimistic: bool) -> float:
    """ε of these releases (σ, q, how many), composed by dp-accounting: a bound of the truth from above or below."""
    total = None
    for sigma, q, count in parts:
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=about / 4000, pessimistic_estimate=pessimistic
        ).self_compose(count)
        total = one if total is None else total.compose(one)
    assert total is not None
    return float(total.get_epsilon_for_delta(DELTA))


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize(("train", "held_out"), [(3.0, 4.0), (2.0, 9.0), (6.0, 2.5)])
def test_the_worst_division_of_her_sites_among_roles_is_what_dp_accounting_composes(
    sites: int, train: float, held_out: float
) -> None:
    """At each site the training's releases, or those of the metrics: 60 at σ_T, q = 0.1, or 3 at σ_H."""
    ours = person_epsilon(run(sites, train, held_out), DELTA)
    found: dict[bool, list[float]] = {True: [], False: []}
    for training in range(sites + 1):
        parts = [(train, 0.1, 60 * training)] if training else []
        parts += [(held_out, 1.0, 3 * (sites - training))] if training < sites else []
        for pessimistic, values in found.items():
            values.append(by_hand(parts, ours, pessimistic=pessimistic))
    assert max(found[False]) <= ours <= max(found[True]) * 1.01 + 0.005


def test_two_roles_may_cost_more_than_either_twice() -> None:
    """Why no role may be looked at by itself: each is calibrated to ε = 4 at two sites, and one of each costs 4.2."""
    train, held_out = event(Role.TRAIN, 1.0, 0.005, 50, 2), event(Role.HELD_OUT, 1.0, 1.0, 1, 2)
    budget = RenyiBudget.for_limit(100.0, DELTA)
    each = [replace(e, noise_multiplier=calibrate(e, 4.0, budget)) for e in (train, held_out)]
    assert max(person_epsilon([e], DELTA) for e in each) <= 4.0
    assert person_epsilon(each, DELTA) > 4.2
    assert by_hand([(e.noise_multiplier, e.sample_rate, e.steps) for e in each], 4.0, pessimistic=False) > 4.2
    sigmas = calibrate_run(train, held_out, 4.0, budget)
    both = [replace(e, noise_multiplier=s) for e, s in zip(each, sigmas, strict=True)]
    assert 3.9 < person_epsilon(both, DELTA) <= 4.0


def test_one_site_costs_what_it_did_and_several_no_more_than_so_many_times() -> None:
    alone = run(1)
    assert person_epsilon(alone, DELTA) == max(run_epsilon(e, DELTA) for e in alone)
    assert run_epsilon(run(3)[0], DELTA) == run_epsilon(event(Role.TRAIN, 3.0, 0.1, 180), DELTA)
    assert person_epsilon(run(1), DELTA) < person_epsilon(run(2), DELTA) < person_epsilon(run(3), DELTA)
    assert person_epsilon(run(3), DELTA) < 3 * person_epsilon(run(1), DELTA)


@pytest.mark.parametrize("sites", [1, 2, 4])
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_noise_is_calibrated_to_what_all_her_sites_cost_together(sites: int, epsilon: float) -> None:
    train, held_out = run(sites)
    budget = RenyiBudget.for_limit(8.0, DELTA)
    sigmas = calibrate_run(train, held_out, epsilon, budget)
    found = [replace(e, noise_multiplier=s) for e, s in zip((train, held_out), sigmas, strict=True)]
    assert epsilon * 0.97 < person_epsilon(found, DELTA) <= epsilon
    assert all(budget.admits([e]) for e in found)
    if sites > 1:  # the control: noise for one site is not enough for several
        alone = calibrate_run(*run(1), epsilon, budget)
        assert all(a < b for a, b in zip(alone, sigmas, strict=True))
        unaware = [replace(e, noise_multiplier=s) for e, s in zip((train, held_out), alone, strict=True)]
        assert person_epsilon(unaware, DELTA) > epsilon * 1.2


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.sampled_from([1.5, 3.0, 8.0]), st.sampled_from([0.1, 1.0]), st.integers(1, 40)),
                  min_size=1, max_size=12),
    where=st.lists(st.frozensets(st.integers(0, 2), min_size=1), min_size=12, max_size=12),
    roles=st.tuples(*[st.sampled_from(list(Role))] * 3),
)  # fmt: skip
def test_ledgers_that_keep_to_their_limits_keep_her_whole_loss_to_it(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[float, float, int]], where: list[frozenset[int]],
    roles: tuple[Role, ...],
) -> None:  # fmt: skip
    """Three sites, each with a role for her and runs of its own: each charges threefold or refuses."""
    budget = RenyiBudget.for_limit(2.0, DELTA)
    folder = tmp_path_factory.mktemp("ledgers")
    ledgers = [Ledger(folder / f"{site}.db", budget) for site in range(3)]
    really = list[PrivacyEvent]()
    for number, ((sigma, q, steps), sites) in enumerate(zip(runs, where, strict=False)):
        for site in sites:
            charge = event(roles[site], sigma, q, steps, sites=3)
            try:
                ledgers[site].reserve(f"run-{number}/1/x", charge)
            except BudgetError:
                continue
            really.append(replace(charge, sites=1))
    for ledger in ledgers:
        ledger.close()
    assert budget.admits(merge_events(really))
    assert rdp_epsilon(really, DELTA) <= 2.0 + 1e-9


def test_sites_that_charge_once_may_cost_her_more_than_any_limit() -> None:
    """The control: two ledgers within their limits, and a person beyond hers."""
    budget = RenyiBudget.for_limit(2.0, DELTA)
    whole = event(Role.TRAIN, 3.0, 0.1, 1)
    most = int(1 / budget.used([whole]))
    assert budget.admits([replace(whole, steps=most)])
    assert rdp_epsilon([replace(whole, steps=2 * most)], DELTA) > 2.0


def test_a_charge_says_over_how_many_sites_and_older_ones_are_read_as_of_one() -> None:
    several = event(Role.TRAIN, 3.0, 0.1, 5, sites=2)
    assert event_from_json(event_to_json(several)) == several
    once = replace(several, sites=1)
    assert "sites" not in json.loads(event_to_json(once))  # a ledger written before has the same chain
    assert event_from_json(event_to_json(once)) == once
    for wrong in ("0", "-1", "1.5", "true", '"2"'):
        with pytest.raises(BudgetError):
            event_from_json(event_to_json(several).replace('"sites":2', f'"sites":{wrong}'))
    assert rdp([several], 3.0) == pytest.approx(2 * rdp([once], 3.0))
    assert len(merge_events([several, once])) == 2


def test_her_own_loss_and_limit_count_every_site(tmp_path: Path) -> None:
    losses = PersonalLosses(tmp_path / "personal.db")
    places = losses.enrol([b"a" * 32, b"b" * 32])
    charges = {"run/1/train": event(Role.TRAIN, 3.0, 0.1, 10, sites=2)}
    losses.hold("run/1/train", places[:1])
    same = event(Role.TRAIN, 3.0, 0.1, 20)
    assert losses.epsilons(charges, DELTA)[0] == pytest.approx(rdp_epsilon([same], DELTA))
    losses.hold("run/1/train", places)  # computed again, with another
    assert losses.epsilons(charges, DELTA)[1] == pytest.approx(rdp_epsilon([same], DELTA))
    limit = rdp_epsilon([event(Role.TRAIN, 3.0, 0.1, 30)], DELTA)
    upcoming = [event(Role.TRAIN, 3.0, 0.1, 5, sites=1)]

    def admitted(sites: int) -> bool:
        more = [replace(upcoming[0], sites=sites)]
        return bool(losses.admits(places, np.full(2, limit), Role.TRAIN, charges, more, DELTA)[0])

    assert admitted(1)
    assert not admitted(4)
    losses.close()


def test_a_sites_statement_tells_what_its_charges_assume(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db", RenyiBudget.for_limit(8.0, DELTA))
    for part in run(2, 6.0, 8.0):
        ledger.reserve(f"tiny/1/{part.role.value}", part)
    ledger.close()
    (told,) = read_statement(tmp_path).runs
    assert told.sites == 2
    assert told.epsilon == person_epsilon(run(2, 6.0, 8.0), DELTA)
