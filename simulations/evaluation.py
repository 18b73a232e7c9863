"""Exact metrics, for public data in the simulator only: nothing here is private, nothing here exists deployed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

from confide.clients.data.records import SiteRecords
from confide.clients.training.models import load_flat
from confide.clients.training.trainer import predict
from confide.privacy.dp.metrics import Task

__all__ = ["ExactEvaluator"]

Mask = NDArray[np.bool_]


class ExactEvaluator:
    """Evaluates a model on the consenting held-out persons of all sites, record by record.

    Args:
        model: A module of the run's architecture.
        task: Kind of label.
        records: Each site's data.
    """

    def __init__(self, model: nn.Module, task: Task, records: Mapping[str, SiteRecords]) -> None:
        self._model, self._task, self._records = model.eval(), task, records

    def evaluate(self, weights: NDArray[np.float32], held_out: Mapping[str, Mask]) -> dict[str, float]:
        """binary: auc, accuracy; multiclass: accuracy; regression: mean absolute error on the scaled label, r2."""
        load_flat(self._model, weights)
        batches = [self._records[s].gather(self._records[s].units_of(mask)) for s, mask in held_out.items()]
        y = torch.cat([b.y for b in batches]).double().numpy()
        prediction = predict(self._model, torch.cat([b.x for b in batches]), self._task, torch.device("cpu"))
        if len(y) == 0:
            return {}
        if self._task == "regression":
            spread = float(np.sum((y - y.mean()) ** 2))
            r2 = 1 - float(np.sum((y - prediction) ** 2)) / spread if spread > 0 else 0.0
            return {"mean_absolute_error_scaled": float(np.abs(y - prediction).mean()), "r2": r2}
        if self._task == "multiclass":
            return {"accuracy": float((prediction.argmax(axis=1) == y).mean())}
        accuracy = float(((prediction >= 0.5) == (y > 0.5)).mean())
        return (
            {"auc": float(roc_auc_score(y, prediction)), "accuracy": accuracy}
            if 0 < y.mean() < 1
            else {"accuracy": accuracy}
        )
