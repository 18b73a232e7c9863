"""What the ledger costs a round: admission with a long history, the filter over persons, one calibration."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from confide.errors import BudgetError
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role, calibrate
from confide.privacy.dp.personal import PersonalLosses

DELTA = 1e-5
LIMITS = (0.5, 1.0, 2.0, 4.0, np.inf)


def _event(number: int) -> PrivacyEvent:
    """A history of many runs: eight kinds of release."""
    return PrivacyEvent(
        role=Role.TRAIN, unit="subject", noise_multiplier=20.0 + number % 8, sample_rate=0.05, steps=10,
        max_grad_norm=1.0,
    )  # fmt: skip


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(persons: int, charges: int, repeats: int) -> dict[str, Any]:
    """Medians."""
    rng = np.random.default_rng(0)
    budget = RenyiBudget.for_limit(8.0, DELTA)
    with tempfile.TemporaryDirectory() as scratch:
        ledger = Ledger(Path(scratch) / "ledger.db", budget)
        losses = PersonalLosses(Path(scratch) / "personal.db")
        places = losses.enrol([i.to_bytes(32, "big") for i in range(persons)])
        for number in range(charges):
            ledger.reserve(f"charge-{number}", _event(number))
            losses.hold(f"charge-{number}", places[rng.random(persons) < 0.9])
            sys.stderr.write(f"charge {number + 1} of {charges}\n") if number % 200 == 199 else None
        limits = rng.choice(np.array(LIMITS), persons)

        def check() -> None:
            try:
                ledger.check([_event(0)])
            except BudgetError:
                raise SystemExit("the benchmark's history exhausts the budget") from None

        checks = [_seconds(check) for _ in range(repeats)]
        first = _seconds(lambda: losses.admits(places, limits, Role.TRAIN, ledger.charges(), [_event(0)], DELTA))
        reopened = PersonalLosses(Path(scratch) / "personal.db")
        cold = _seconds(lambda: reopened.admits(places, limits, Role.TRAIN, ledger.charges(), [_event(0)], DELTA))
        warm = []
        for number in range(repeats):
            name = f"round-{number}"
            ledger.reserve(name, _event(number))
            losses.hold(name, places)
            warm.append(
                _seconds(lambda: losses.admits(places, limits, Role.TRAIN, ledger.charges(), [_event(0)], DELTA))
            )
        reopened.close()
        losses.close()
        ledger.close()
    run = PrivacyEvent(
        role=Role.TRAIN, unit="subject", noise_multiplier=1.0, sample_rate=0.1, steps=200, max_grad_norm=1.0
    )
    calibrations = [_seconds(lambda e=epsilon: calibrate(run, e, budget)) for epsilon in (0.5, 1.0, 2.0, 4.0, 8.0)]
    return {
        "round_check_ms": round(1000 * statistics.median(checks), 2),
        "persons": persons,
        "charges": charges,
        "person_filter_seconds": round(statistics.median(warm), 4),
        "person_filter_first_seconds": round(max(first, cold), 4),
        "calibration_seconds": round(statistics.median(calibrations), 3),
        "calibration_worst_seconds": round(max(calibrations), 3),
        "repeats": repeats,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--persons", type=int, default=100_000)
    parser.add_argument("--charges", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(measure(options.persons, options.charges, options.repeats)))


if __name__ == "__main__":
    main()
