"""Exact metrics, for public data in the simulator only: nothing here is private, nothing here exists deployed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

from confide.clients.data.records import SiteRecords
from confide.clients.training.models import load_flat
from confide.clients.training.trainer import predict
from confide.privacy.dp.metrics import BINS, PROBABILITY_LIMITS, Task

__all__ = ["ExactEvaluator"]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class ExactEvaluator:
    """Evaluates a model on the consenting held-out persons of all sites, record by record. Who lies at several sites
    counts where each of them holds her out: the others' models have seen her.

    Args:
        model: A module of the run's architecture.
        task: Kind of label.
        records: Data of each site that counts.
        false: What a poisoned site calls a record of these labels; None: no site is poisoned.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        records: Mapping[str, SiteRecords],
        false: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._model, self._task, self._records, self._false = model.eval(), task, records, false
        homes: dict[str, list[tuple[str, int]]] = {}
        for site, found in records.items():
            for place, person in enumerate(found.persons):
                homes.setdefault(person, []).append((site, place))
        self._several = [places for places in homes.values() if len(places) > 1]

    def evaluate(self, weights: NDArray[np.float32], held_out: Mapping[str, Mask]) -> dict[str, float]:
        """What `metrics.read` gives from sums, from records: with the probabilities themselves and not their bins'
        midpoints, and errors of regression not clipped but in the clipped loss. Regression: also r2.

        With a poisoned site also `attack_success`: the share of records that get the label it teaches for them.
        """
        load_flat(self._model, weights)
        held_out = self._everywhere(held_out)
        batches = [
            self._records[s].gather(self._records[s].units_of(mask))
            for s, mask in held_out.items()
            if s in self._records
        ]
        y = torch.cat([b.y for b in batches]).double().numpy()
        prediction = predict(self._model, torch.cat([b.x for b in batches]), self._task, torch.device("cpu"))
        if len(y) == 0:
            return {}
        if self._task == "regression":
            return _regression(prediction, y)
        if self._task == "multiclass":
            right, of_truth = prediction.argmax(axis=1) == y, prediction[np.arange(len(y)), y.astype(np.int64)]
            found = {"accuracy": float(right.mean()), **_calibration(prediction.max(axis=1), right, of_truth)}
            return found | self._success(prediction.argmax(axis=1), y)
        positive = y > 0.5
        found = {"auc": float(roc_auc_score(y, prediction))} if 0 < y.mean() < 1 else {}
        found["accuracy"] = float(((prediction >= 0.5) == positive).mean())
        found |= _calibration(prediction, positive, np.where(positive, prediction, 1 - prediction))
        return found | self._success(prediction >= 0.5, y)

    def _everywhere(self, held_out: Mapping[str, Mask]) -> dict[str, Mask]:
        found = {site: mask.copy() for site, mask in held_out.items()} if self._several else dict(held_out)
        for places in self._several:
            if not all(site in held_out and held_out[site][place] for site, place in places):
                for site, place in places:
                    if site in found:
                        found[site][place] = False
        return found

    def _success(self, called: NDArray[Any], y: Floats) -> dict[str, float]:
        if self._false is None:
            return {}
        return {"attack_success": float((called == self._false(torch.from_numpy(y)).numpy()).mean())}


def _calibration(confidence: Floats, came_true: Mask, of_truth: Floats) -> dict[str, float]:
    """ECE over `BINS` equal bins (Guo et al. 2017) and clipped log loss; each array has shape [records]."""
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=came_true - confidence, minlength=BINS)
    return {
        "ece": float(np.abs(gaps).sum()) / len(bins),
        "clipped_loss": float(-np.log(np.clip(of_truth, *PROBABILITY_LIMITS)).mean()),
    }


def _regression(prediction: Floats, y: Floats) -> dict[str, float]:
    error, spread = np.abs(y - prediction), float(np.sum((y - y.mean()) ** 2))
    return {
        "mean_absolute_error_scaled": float(error.mean()),
        "r2": 1 - float(np.sum(error**2)) / spread if spread > 0 else 0.0,
        "clipped_loss": float((np.minimum(error, 1) ** 2).mean()),
    }
