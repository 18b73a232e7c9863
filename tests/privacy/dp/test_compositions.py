"""A ledger's ε over histories of unlike releases, against dp-accounting's two accountants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant

from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role
from confide.privacy.dp.accounting import ORDERS, conversion, rdp
from tests.privacy.dp.test_accounting import SETTINGS

DELTA = 1e-5
Part = tuple[float, float, int]
#: Each a sequence of charges (σ, q, steps), in the order they were made.
HISTORIES: dict[str, list[Part]] = {
    "two runs": [(2.0, 0.1, 50), (4.0, 0.1, 50)],
    "two rates": [(2.0, 0.05, 40), (2.0, 0.3, 10)],
    "two rates, the other way round": [(2.0, 0.3, 10), (2.0, 0.05, 40)],
    "sampled, then everybody": [(2.0, 0.1, 30), (5.0, 1.0, 4)],
    "everybody, then sampled": [(5.0, 1.0, 4), (2.0, 0.1, 30)],
    "everybody only, less and less noise": [(20.0, 1.0, 3), (10.0, 1.0, 2), (5.0, 1.0, 1)],
    "a quiet run after a loud one": [(0.7, 0.01, 20), (30.0, 0.2, 200)],
    "one release of each kind": [(1.0, 0.01, 1), (2.0, 0.1, 1), (3.0, 0.5, 1), (4.0, 1.0, 1)],
    "rare draws with little noise": [(0.7, 0.002, 100), (0.9, 0.005, 100), (1.2, 0.01, 100)],
    "nearly everybody": [(10.0, 0.9, 10), (12.0, 0.95, 10), (15.0, 1.0, 10)],
    "a long one: 20 runs of 10 rounds": [(15.0 + run % 4, 0.1, 10) for run in range(20) for _ in range(10)],
    "a long one of unlike rounds": [(12.0 + i % 5, (0.02, 0.1, 0.4, 1.0)[i % 4], 1 + i % 3) for i in range(120)],
    "the same, the other way round": [
        (12.0 + i % 5, (0.02, 0.1, 0.4, 1.0)[i % 4], 1 + i % 3) for i in reversed(range(120))
    ],
    "five thousand steps": [(6.0, 0.01, 2500), (8.0, 0.012, 2500)],
}


def events(history: list[Part]) -> list[PrivacyEvent]:
    return [
        PrivacyEvent(role=Role.TRAIN, unit="subject", noise_multiplier=s, sample_rate=q, steps=k, max_grad_norm=1.0)
        for s, q, k in history
    ]


@contextmanager
def ledger_of(path: Path, history: list[Part]) -> Iterator[Ledger]:
    """A real ledger that was charged so, one charge after the other."""
    ledger = Ledger(path, RenyiBudget.for_limit(60.0, DELTA))
    try:
        for number, event in enumerate(events(history)):
            ledger.reserve(f"run/{number}/train", event)
        yield ledger
    finally:
        ledger.close()


def optimistic_epsilon(history: list[Part], width: float) -> float:
    """dp-accounting's lower bound of the composition's true ε."""
    kinds: dict[tuple[float, float], int] = {}
    for sigma, q, steps in history:
        kinds[sigma, q] = kinds.get((sigma, q), 0) + steps
    whole = None
    for (sigma, q), steps in kinds.items():
        part = pld.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=width, pessimistic_estimate=False
        ).self_compose(steps)
        whole = part if whole is None else whole.compose(part)
    assert whole is not None
    return float(whole.get_epsilon_for_delta(DELTA))


@pytest.mark.parametrize("name", HISTORIES)
def test_a_ledgers_epsilon_is_never_below_what_its_history_is_proved_to_cost(tmp_path: Path, name: str) -> None:
    history = HISTORIES[name]
    with ledger_of(tmp_path / "ledger.db", history) as ledger:
        ours = ledger.epsilon(Role.TRAIN)
    low = optimistic_epsilon(history, width=0.02 * ours / sum(steps for _, _, steps in history))
    assert low <= ours
    assert low > 0.3 * ours, "a lower bound that says something"


@pytest.mark.parametrize("name", HISTORIES)
def test_a_ledgers_epsilon_agrees_with_dp_accountings_rdp_accountant(tmp_path: Path, name: str) -> None:
    """Equal at whole orders; between them dp-accounting drops the series' signs and so overestimates."""
    history = HISTORIES[name]
    whole = [float(a) for a in ORDERS if float(a).is_integer()]
    accountants = {"whole": RdpAccountant(whole), "all": RdpAccountant([float(a) for a in ORDERS])}
    kinds = Counter[tuple[float, float]]()  # dp-accounting adds up; it need not work out the same release again
    for sigma, q, steps in history:
        kinds[sigma, q] += steps
    for accountant in accountants.values():
        for (sigma, q), steps in kinds.items():
            accountant.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(sigma)), steps)
    with ledger_of(tmp_path / "ledger.db", history) as ledger:
        held, ours = ledger.events(Role.TRAIN), ledger.epsilon(Role.TRAIN)
    np.testing.assert_allclose([rdp(held, a) for a in whole], accountants["whole"]._rdp, rtol=1e-6, atol=1e-12)
    at_whole_orders = min(rdp(held, a) + conversion(a, DELTA) for a in whole)
    assert at_whole_orders == pytest.approx(accountants["whole"].get_epsilon(DELTA), rel=1e-6)
    assert ours <= accountants["all"].get_epsilon(DELTA) * (1 + 1e-6)


@pytest.mark.parametrize("name", HISTORIES)
def test_the_order_of_charges_changes_nothing(tmp_path: Path, name: str) -> None:
    found = []
    for number in range(3):
        history = [HISTORIES[name][i] for i in np.random.default_rng(number).permutation(len(HISTORIES[name]))]
        with ledger_of(tmp_path / f"{number}.db", history) as ledger:
            found.append((ledger.epsilon(Role.TRAIN), ledger.used()))
    assert found[1] == pytest.approx(found[0], rel=1e-12)
    assert found[2] == pytest.approx(found[0], rel=1e-12)


def test_the_two_accountants_are_compared_over_enough_settings() -> None:
    """One kind of release in `test_accounting.py`, several here."""
    assert len(HISTORIES) >= 12
    assert all(len({(s, q) for s, q, _ in history}) >= 2 for history in HISTORIES.values())
    assert sum(any(q == 1.0 for _, q, _ in history) for history in HISTORIES.values()) >= 5
    assert max(len(history) for history in HISTORIES.values()) >= 100
    assert len(SETTINGS) + len(HISTORIES) >= 40
