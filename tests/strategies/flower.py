"""Flower's own strategies, asked for one aggregation without a server, a grid or nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedAvgM
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

Vector = NDArray[np.float32]


def aggregate(
    strategy: FedAvg, model: Vector, trained: Sequence[Vector], weights: Sequence[float], round_: int = 1
) -> Vector:
    """The next model, by Flower, of what the sites have trained from `model`."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # process-global; messages ask for it
    replies = []
    for node, (vector, weight) in enumerate(zip(trained, weights, strict=True)):
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(vector)}), "metrics": MetricRecord({"num-examples": float(weight)})}
        )
        replies.append(Message(content, reply_to=Message(RecordDict(), 10 + node, "train")))
    remember(strategy, model)
    arrays, _ = strategy.aggregate_train(round_, replies)
    assert arrays is not None
    return np.asarray(arrays["w"].numpy())


def remember(strategy: Any, model: Vector) -> None:
    """What `configure_train` notes of the model that it sends out."""
    if isinstance(strategy, FedAvgM):
        strategy.current_arrays = ArrayRecord({"w": Array(model)})
    elif hasattr(strategy, "current_arrays"):
        strategy.current_arrays = {"w": model}
