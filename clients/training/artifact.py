"""The trained model as a file: safetensors (never pickle), with the schema that its inputs need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from confide.clients.data.preprocess import encoded_width, features
from confide.clients.training.models import build_model, layout_of, load_flat
from confide.clients.training.trainer import predict
from confide.config import LabelConfig, ModelConfig, SchemaConfig, StrategyConfig
from confide.errors import ConfigError
from confide.privacy.digest import digest
from confide.privacy.files import write_atomically
from confide.protocol.manifest import Layout, Manifest

__all__ = ["ModelCard", "TrainedModel", "load_model", "save_model"]


class ModelCard(BaseModel):
    """What stands in the file beside the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    run: str
    purpose: str
    digest: str
    label: LabelConfig
    schema_: SchemaConfig
    model: ModelConfig
    layout: Layout
    #: How the sites' updates became the model; None in a file of a version that had one strategy only.
    strategy: StrategyConfig | None = None
    #: One sentence on what the model costs a person.
    privacy: str


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model ready to predict."""

    card: ModelCard
    module: nn.Module

    def predict(self, table: pd.DataFrame, where: str) -> pd.DataFrame:
        """One row a record, with the table's index.

        Columns: binary `probability`; multiclass `predicted` and a probability a class; regression `predicted`.
        """
        x = torch.from_numpy(features(table, self.card.schema_, where))
        output = predict(self.module, x, self.card.label.task, torch.device("cpu"))
        label = self.card.label
        if label.task == "binary":
            return pd.DataFrame({"probability": output}, index=table.index)
        if label.task == "regression":
            low, high = label.bounds or (0.0, 1.0)
            return pd.DataFrame({"predicted": low + output * (high - low)}, index=table.index)
        names = [str(c) for c in label.classes or ()]
        frame = pd.DataFrame(output, columns=[f"probability_{n}" for n in names], index=table.index)
        frame.insert(0, "predicted", [names[i] for i in output.argmax(axis=1)])
        return frame


def save_model(path: Path, weights: NDArray[np.float32], manifest: Manifest, model: str, privacy: str) -> None:
    """Write the file atomically."""
    tensors, offset = {}, 0
    for name, shape in zip(manifest.layout.names, manifest.layout.shapes, strict=True):
        size = int(np.prod(shape))
        tensors[name] = np.ascontiguousarray(weights[offset : offset + size].reshape(shape))
        offset += size
    card = ModelCard(
        run=manifest.run, purpose=manifest.purpose, digest=model, label=manifest.label, schema_=manifest.schema_,
        model=manifest.model, layout=manifest.layout, strategy=manifest.strategy,
        privacy=privacy,
    )  # fmt: skip
    write_atomically(path, save(tensors, metadata={"confide": card.model_dump_json()}))


def load_model(path: Path) -> TrainedModel:
    """Read a model file.

    Raises:
        ConfigError: It is missing, damaged, or not ours.
    """
    if not path.is_file():
        raise ConfigError("there is no such file", where=str(path), hint="give the model.safetensors of a finished run")
    try:
        with safe_open(path, framework="numpy") as stream:
            card = ModelCard.model_validate_json((stream.metadata() or {})["confide"])
            parts = [stream.get_tensor(n).reshape(-1) for n in card.layout.names]
        module = build_model(card.model, encoded_width(card.schema_), card.label.outputs)
        vector = np.concatenate(parts).astype(np.float32)
        if layout_of(module) != card.layout or len(vector) != card.layout.size:
            raise ValueError("layout")
        if digest("model", vector.astype("<f4").tobytes()).hex() != card.digest:
            raise ValueError("digest")
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise ConfigError(f"is not a confide model ({type(error).__name__})", where=str(path),
                          hint="give the model.safetensors of a finished run") from None  # fmt: skip
    load_flat(module, vector)
    module.eval()
    return TrainedModel(card, module)
