"""Federated averaging is the weighted mean of the sites' models, bit-identical on every processor."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from numpy._core import _multiarray_umath
from numpy.typing import NDArray

from confide.config import StrategyConfig
from confide.strategies import FedAvg, StepInput, make_strategy

Vector = NDArray[np.float32]


def average(model: Vector, trained: list[Vector], weights: list[float], learning_rate: float = 1.0) -> Vector:
    """One step, given what the sites would have trained."""
    deltas = [w * (t.astype(np.float64) - model.astype(np.float64)) for w, t in zip(weights, trained, strict=True)]
    given_ = StepInput(model, np.sum(deltas, axis=0), sum(weights), ())
    found, state = FedAvg(server_learning_rate=learning_rate).step(given_)
    assert state == ()
    return found


def test_the_step_is_the_weighted_mean_computed_by_hand() -> None:
    model = np.array([1.0, -2.0], dtype=np.float32)
    trained = [np.array([2.0, -2.0], dtype=np.float32), np.array([5.0, 2.0], dtype=np.float32)]
    # weights 1 and 3: (1·2 + 3·5) / 4 = 4.25 and (1·−2 + 3·2) / 4 = 1
    assert average(model, trained, [1.0, 3.0]).tolist() == [4.25, 1.0]
    # half the way: 1 + (4.25 − 1) / 2 and −2 + (1 + 2) / 2
    assert average(model, trained, [1.0, 3.0], learning_rate=0.5).tolist() == [2.625, -0.5]


def test_a_sum_of_nothing_leaves_the_model_as_it_is() -> None:
    model = np.array([0.1, -3e7, 1e-30], dtype=np.float32)
    found, _ = FedAvg().step(StepInput(model, np.zeros(3), 4.0, ()))
    assert found.tobytes() == model.tobytes()
    assert found.dtype == np.float32


def test_the_step_leaves_its_input_alone() -> None:
    model, total = np.ones(3, dtype=np.float32), np.ones(3)
    FedAvg().step(StepInput(model, total, 2.0, ()))
    assert (model.tolist(), total.tolist()) == ([1, 1, 1], [1, 1, 1])


def test_the_manifest_chooses_strategy_and_learning_rate() -> None:
    assert make_strategy(StrategyConfig(kind="fedavg", server_learning_rate=0.25)) == FedAvg(server_learning_rate=0.25)
    assert FedAvg().initial_state(10) == ()


@pytest.fixture
def flower_identity() -> None:
    """Flower's messages ask for a process-global identity (the in-process grid sets the same one)."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def flowers_average(trained: list[Vector], weights: list[float]) -> Vector:
    """The same mean by Flower's own strategy."""
    replies = []
    for node, (vector, weight) in enumerate(zip(trained, weights, strict=True)):
        asked = Message(RecordDict(), 10 + node, "train")
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(vector)}), "metrics": MetricRecord({"num-examples": weight})}
        )
        replies.append(Message(content, reply_to=asked))
    arrays, _ = FlowerFedAvg(weighted_by_key="num-examples").aggregate_train(1, replies)
    assert arrays is not None
    return arrays["w"].numpy()


@pytest.mark.usefixtures("flower_identity")
def test_the_step_agrees_with_flowers_own_aggregation() -> None:
    rng = np.random.default_rng(0)
    for sites in (3, 6, 20):
        model = rng.normal(size=500).astype(np.float32)
        trained = [model + rng.normal(scale=0.1, size=500).astype(np.float32) for _ in range(sites)]
        weights = [float(w) for w in rng.integers(1, 1000, size=sites)]
        ours, flowers = average(model, trained, weights), flowers_average(trained, weights)
        assert np.allclose(ours, flowers, rtol=1e-5, atol=1e-6)
        assert not np.allclose(ours, np.mean(trained, axis=0), rtol=1e-5, atol=1e-6)  # the weights do matter


@given(
    trained=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=3, max_size=6),
    weights=st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
)
def test_no_coordinate_leaves_the_range_of_what_the_sites_trained(
    trained: list[list[float]], weights: list[float]
) -> None:
    vectors = [np.array(t, dtype=np.float32) for t in trained]
    found = average(np.zeros(3, dtype=np.float32), vectors, weights[: len(vectors)])
    slack = 1e-3
    assert np.all(found >= np.min(vectors, axis=0) - slack)
    assert np.all(found <= np.max(vectors, axis=0) + slack)


# --- every processor gets the same bits ------------------------------------------------------------------------------

#: Many steps over awkward numbers; prints the switches in force and the digest of the last model.
REPLAY = """
import hashlib, sys
import numpy as np
from numpy._core import _multiarray_umath
from confide.strategies import FedAvg, StepInput
if "torch" in sys.argv:
    import torch
    torch.ones(8).exp()
    capability = torch.backends.cpu.get_cpu_capability()
else:
    capability = "-"
size = 10_007
stream = b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() for i in range(size // 4 + 1))
integers = np.frombuffer(stream[: 8 * size], dtype="<u8")
numbers = (integers % np.uint64(2**53)).astype(np.float64) / 2.0**52 - 1.0
model = (numbers * 3).astype(np.float32)
for step in range(1, 60):
    total = np.roll(numbers, step) * (7.0 / step)
    model, _ = FedAvg(server_learning_rate=0.1 * step).step(StepInput(model, total, 5.0 + step / 3, ()))
features = _multiarray_umath.__cpu_features__
print(capability, ",".join(f for f in sys.argv[1].split(",") if f and features[f]) or "-")
print(hashlib.sha256(model.astype("<f4").tobytes()).hexdigest())
"""


def test_the_replicated_step_gives_the_same_bits_whatever_the_processor_can_do() -> None:
    dispatched = [f for f in _multiarray_umath.__cpu_dispatch__ if _multiarray_umath.__cpu_features__[f]]
    environments = {
        "as it is": ({}, ""),
        "torch as it is": ({}, "torch"),
        "torch without vector instructions": ({"ATEN_CPU_CAPABILITY": "default"}, "torch"),
    }
    if dispatched:
        environments["numpy without vector instructions"] = ({"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched)}, "")
    clean = {k: v for k, v in os.environ.items() if k not in ("ATEN_CPU_CAPABILITY", "NPY_DISABLE_CPU_FEATURES")}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", REPLAY, ",".join(dispatched), extra],
            env={**clean, **switches},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (switches, extra) in environments.items()
    }
    told, digests = {}, {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        told[name], digests[name] = out.splitlines()
    assert told["torch without vector instructions"].startswith("DEFAULT ")
    if dispatched:
        assert told["as it is"] == f"- {','.join(dispatched)}"  # the control: otherwise they are in use
        assert told["numpy without vector instructions"] == "- -"
    assert len(set(digests.values())) == 1, digests
