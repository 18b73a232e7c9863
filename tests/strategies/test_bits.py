"""Every strategy's step gives every processor the same bits: weights and state, over many steps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from numpy._core import _multiarray_umath

from confide.strategies import BUILT_IN

#: Steps of every strategy over awkward numbers; prints the switches in force, then a digest for each strategy.
REPLAY = """
import hashlib, sys
import numpy as np
from numpy._core import _multiarray_umath
from confide.config import STRATEGY_OPTIONS, StrategyConfig
from confide.strategies import StepInput, make_strategy, to_grid
from confide.strategies.scaffold import control_change, correction
if "torch" in sys.argv:
    import torch
    torch.ones(8).exp()
    capability = torch.backends.cpu.get_cpu_capability()
else:
    capability = "-"
size, sites = 10_007, 7
stream = b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() for i in range(size // 4 + 1))
integers = np.frombuffer(stream[: 8 * size], dtype="<u8")
numbers = (integers % np.uint64(2**53)).astype(np.float64) / 2.0**52 - 1.0
features = _multiarray_umath.__cpu_features__
print(capability, ",".join(f for f in sys.argv[1].split(",") if f and features[f]) or "-")
extra = {"fednova": {"steps": {"site-1": 3}}}
for kind in STRATEGY_OPTIONS:
    strategy = make_strategy(StrategyConfig(kind=kind, **extra.get(kind, {})))
    model, state = (numbers * 3).astype(np.float32), strategy.initial_state(size)
    for step in range(1, 13):
        updates = np.array([np.roll(numbers, step * i) * (7.0 / step) for i in range(sites)])
        updates[step % sites] *= 5
        cohort = tuple((f"site-{i}", 0.3 + i / 3) for i in range(sites))
        total, common = np.zeros(size), state[0] if strategy.control_variates else np.zeros(size)
        for row, (site, weight) in zip(updates, cohort):
            total += row * (weight * strategy.factor(site, 10))
        control = control_change(total, correction(common, numbers), 10, 0.1 * step)
        grid, unit = to_grid(updates, 9.0 / step) if strategy.single_updates else (None, 1.0)
        model, state = strategy.step(StepInput(
            model, total, 5.0 + step / 3, state, control=control, roster_weight=9.1, cohort=cohort, local_steps=10,
            updates=grid, unit=unit))
    assert np.isfinite(model).all() and np.abs(model - numbers * 3).max() > 1e-3
    whole = hashlib.sha256(model.astype("<f4").tobytes())
    for part in state:
        whole.update(part.astype("<f8").tobytes())
    print(kind, whole.hexdigest())
"""


@pytest.fixture(scope="module")
def told() -> dict[str, list[str]]:
    """What the same program prints in each environment."""
    dispatched = [f for f in _multiarray_umath.__cpu_dispatch__ if _multiarray_umath.__cpu_features__[f]]
    environments = {
        "as it is": ({}, ""),
        "torch without vector instructions": ({"ATEN_CPU_CAPABILITY": "default"}, "torch"),
        "numpy without vector instructions": ({"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched)}, ""),
    }
    clean = {k: v for k, v in os.environ.items() if k not in ("ATEN_CPU_CAPABILITY", "NPY_DISABLE_CPU_FEATURES")}
    found = {}
    for name, (switches, extra) in environments.items():
        if not dispatched and name.startswith("numpy"):
            continue
        done = subprocess.run(
            [sys.executable, "-c", REPLAY, ",".join(dispatched), extra],
            env={**clean, **switches}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout.splitlines()
    assert found["torch without vector instructions"][0].startswith("DEFAULT ")
    if dispatched:
        assert found["as it is"][0] == f"- {','.join(dispatched)}", "the control: otherwise they are in use"
        assert found["numpy without vector instructions"][0] == "- -"
    return found


@pytest.mark.parametrize("kind", BUILT_IN)
def test_weights_and_state_are_the_same_whatever_the_processor_can_do(kind: str, told: dict[str, list[str]]) -> None:
    digests = {name: [line for line in lines if line.startswith(f"{kind} ")] for name, lines in told.items()}
    assert len(next(iter(digests.values()))) == 1
    assert len(set(map(tuple, digests.values()))) == 1, digests


def test_different_strategies_have_different_digests(told: dict[str, list[str]]) -> None:
    """The control: the digests do hold what the step computed. A proximal term is the sites' doing."""
    digests = dict(line.split() for line in told["as it is"][1:])
    assert set(digests) == set(BUILT_IN)
    assert digests.pop("fedprox") == digests["fedavg"]
    assert len(set(digests.values())) == len(digests)
