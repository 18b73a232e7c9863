"""Steps of our strategies from what sites would have trained, so that a test needs no sites."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confide.strategies import State, StepInput, Strategy, to_grid

Vector = NDArray[np.float32]
#: Of the grid that single updates lie on, in most tests.
BOUND = 8.0


def step(
    strategy: Strategy, model: Vector, trained: Sequence[Vector], weights: Sequence[float], state: State | None = None
) -> tuple[Vector, State]:
    """One step; the sum is made as the sites would make it."""
    deltas = np.array([t.astype(np.float64) - model.astype(np.float64) for t in trained])
    if state is None:
        state = strategy.initial_state(len(model))
    if strategy.single_updates:
        updates, unit = to_grid(deltas, BOUND)
        names = tuple((f"site-{i}", 1.0) for i in range(len(trained)))
        given = StepInput(model, deltas.sum(axis=0), len(trained), state, cohort=names, updates=updates, unit=unit)
    else:
        total = np.sum([w * d for w, d in zip(weights, deltas, strict=True)], axis=0)
        names = tuple((f"site-{i}", float(w)) for i, w in enumerate(weights))
        given = StepInput(model, total, float(sum(weights)), state, cohort=names)
    return strategy.step(given)


def centre(strategy: Strategy, updates: Sequence[Sequence[float]], bound: float = BOUND) -> list[float]:
    """Where a robust strategy moves a model of zeros to."""
    vectors = [np.array(u, dtype=np.float32) for u in updates]
    zeros = np.zeros(len(vectors[0]), dtype=np.float32)
    grid, unit = to_grid(np.array(vectors, dtype=np.float64), bound)
    cohort = tuple((f"site-{i}", 1.0) for i in range(len(vectors)))
    found, _ = strategy.step(StepInput(zeros, zeros.astype(float), 1.0, (), cohort=cohort, updates=grid, unit=unit))
    return [float(x) for x in found]
