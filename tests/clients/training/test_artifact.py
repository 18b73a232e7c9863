"""A model file holds all that predicting needs, is refused when damaged, and never runs code."""

from __future__ import annotations

import json
import os
import pickle
import types
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save as save_tensors

from confide.clients.data.preprocess import encoded_width, features
from confide.clients.training.artifact import load_model, save_model
from confide.clients.training.models import flatten, initial_model
from confide.config import LabelConfig, ModelConfig, SchemaConfig, StrategyConfig
from confide.errors import ConfigError, DataError
from confide.privacy.digest import digest
from confide.protocol.manifest import Manifest

SCHEMA = SchemaConfig.model_validate(
    {
        "missing": "midpoint",
        "features": {
            "age": {"kind": "number", "bounds": [0, 100]},
            "ward": {"kind": "category", "values": ["north", "south"]},
        },
    }
)
TABLE = pd.DataFrame({"age": [10.0, 95.0, np.nan], "ward": ["north", "east", None]}, index=[2, 3, 4])
BINARY = LabelConfig(column="sick", classes=(0, 1))
MANY = LabelConfig(column="ward", classes=("low", "mid", "high"))
AMOUNT = LabelConfig(column="cost", bounds=(50, 150))


def save(path: Path, label: LabelConfig = BINARY, model: ModelConfig | None = None) -> np.ndarray[Any, Any]:
    """A model file as a run writes it; returns its weights."""
    model = model or ModelConfig()
    weights, layout = initial_model(model, encoded_width(SCHEMA), label.outputs, seed=1)
    manifest = types.SimpleNamespace(
        run="tiny-1", purpose="research/test", label=label, schema_=SCHEMA, model=model, layout=layout,
        strategy=StrategyConfig(),
    )  # fmt: skip
    name = digest("model", weights.astype("<f4").tobytes()).hex()
    save_model(path, weights, cast(Manifest, manifest), name, "(2, 1e-05)-differentially private")
    return weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the model goes."""
    return tmp_path / "model.safetensors"


def encoded() -> np.ndarray[Any, Any]:
    """The table as a model sees it."""
    return features(TABLE, SCHEMA, "t.csv").astype(np.float64)


def test_a_logistic_models_predictions_are_those_computed_by_hand(file: Path) -> None:
    weights = save(file).astype(np.float64)
    found = load_model(file).predict(TABLE, "t.csv")
    expected = 1 / (1 + np.exp(-(encoded() @ weights[:3] + weights[3])))
    assert list(found.columns) == ["probability"]
    assert list(found.index) == [2, 3, 4]
    assert np.allclose(found["probability"], expected, atol=1e-6)


def test_a_multiclass_models_predictions_are_those_computed_by_hand(file: Path) -> None:
    weights = save(file, MANY).astype(np.float64)
    logits = encoded() @ weights[:9].reshape(3, 3).T + weights[9:]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = load_model(file).predict(TABLE, "t.csv")
    assert list(found.columns) == ["predicted", "probability_low", "probability_mid", "probability_high"]
    assert np.allclose(found.iloc[:, 1:], expected, atol=1e-6)
    assert list(found["predicted"]) == [["low", "mid", "high"][i] for i in expected.argmax(axis=1)]


def test_a_regression_models_predictions_are_in_the_labels_own_unit(file: Path) -> None:
    weights = save(file, AMOUNT).astype(np.float64)
    found = load_model(file).predict(TABLE, "t.csv")
    assert np.allclose(found["predicted"], 50 + 100 * (encoded() @ weights[:3] + weights[3]), atol=1e-4)


def test_a_deep_models_predictions_are_those_computed_by_hand(file: Path) -> None:
    weights = save(file, model=ModelConfig(kind="mlp", hidden=(4,))).astype(np.float64)
    hidden = np.maximum(encoded() @ weights[:12].reshape(4, 3).T + weights[12:16], 0)
    expected = 1 / (1 + np.exp(-(hidden @ weights[16:20] + weights[20])))
    assert np.allclose(load_model(file).predict(TABLE, "t.csv")["probability"], expected, atol=1e-6)


def test_the_card_comes_back_as_it_was_written(file: Path) -> None:
    weights = save(file, MANY)
    card = load_model(file).card
    assert (card.run, card.purpose) == ("tiny-1", "research/test")
    assert card.digest == digest("model", weights.tobytes()).hex()
    assert (card.label, card.schema_, card.model) == (MANY, SCHEMA, ModelConfig())
    assert card.privacy == "(2, 1e-05)-differentially private"


def test_the_file_is_plain_safetensors_that_other_tools_read(file: Path) -> None:
    weights = save(file)
    with safe_open(file, framework="numpy") as stream:
        assert sorted(stream.keys()) == ["bias", "weight"]
        assert np.array_equal(stream.get_tensor("weight").reshape(-1), weights[:3])
        assert json.loads(stream.metadata()["confide"])["run"] == "tiny-1"


def test_a_prediction_refuses_a_table_without_the_models_columns(file: Path) -> None:
    save(file)
    with pytest.raises(DataError) as caught:
        load_model(file).predict(TABLE.rename(columns={"age": "years"}), "t.csv")
    assert caught.value.what == "there is no column 'age'"


# --- files that are not ours ---------------------------------------------------------------------------------------


def refusal(path: Path) -> ConfigError:
    """The error with which a file is refused."""
    with pytest.raises(ConfigError) as caught:
        load_model(path)
    assert (caught.value.exit_code, caught.value.where) == (2, str(path))
    assert caught.value.hint == "give the model.safetensors of a finished run"
    return caught.value


@pytest.mark.parametrize("name", ["none.safetensors", "."])
def test_a_file_that_does_not_exist_is_named(name: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / name).what == "there is no such file"


def test_a_safetensors_file_of_somebody_else_is_refused(file: Path) -> None:
    file.write_bytes(save_tensors({"weight": np.ones((1, 3), np.float32)}))
    assert refusal(file).what == "is not a confide model (KeyError)"


def edited(file: Path, **changes: Any) -> None:
    """Write the file again with a changed card."""
    with safe_open(file, framework="numpy") as stream:
        card, tensors = json.loads(stream.metadata()["confide"]), {k: stream.get_tensor(k) for k in stream.keys()}  # noqa: SIM118 - not a mapping
    file.write_bytes(save_tensors(tensors, metadata={"confide": json.dumps({**card, **changes})}))


def test_an_unchanged_card_is_accepted_so_that_the_next_tests_mean_something(file: Path) -> None:
    save(file)
    edited(file)
    assert load_model(file).card.run == "tiny-1"


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": {"names": ["weight"], "shapes": [[1, 3]]}},
        {"layout": {"names": ["weight", "bias"], "shapes": [[3, 1], [1]]}},
        {"layout": {"names": ["weight", "none"], "shapes": [[1, 3], [1]]}},
        {"layout": {"names": [], "shapes": []}},
        {"model": {"kind": "mlp", "hidden": [4], "options": {}}},
        {"unknown": 1},
        {"label": {"column": "x"}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_card_that_does_not_fit_its_weights_is_refused(changes: dict[str, Any], file: Path) -> None:
    save(file)
    edited(file, **changes)
    assert refusal(file).what.startswith(("is not a confide model", "the weights do not fit"))


def test_a_card_of_a_later_format_is_refused(file: Path) -> None:
    save(file)
    edited(file, format=2)
    assert refusal(file).exit_code == 2


def test_weights_that_are_not_those_of_the_cards_digest_are_refused(file: Path) -> None:
    save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refusal(file).exit_code == 2


@given(data=st.data())
def test_a_damaged_file_is_a_configuration_error_or_the_same_model(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    weights = save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans(), label="cut"):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1), label="length")]
    else:
        at = data.draw(st.integers(0, header - 1), label="position")
        broken = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255), label="bits")]) + whole[at + 1 :]
    path.write_bytes(broken)
    try:
        found = flatten(load_model(path).module)
    except ConfigError:
        found = weights
    assert found.tobytes() == weights.tobytes()


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_in_disguise_is_refused_and_not_run(file: Path, tmp_path: Path) -> None:
    file.write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    refusal(file)
    assert not (tmp_path / "exploded").exists()
    torch.save({"x": _Bomb(tmp_path / "exploded")}, file)
    refusal(file)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(_Bomb(tmp_path / "exploded")))  # noqa: S301 - the control: it does explode when unpickled
    assert (tmp_path / "exploded").is_dir()


def test_a_written_model_holds_no_pickle(file: Path) -> None:
    save(file)
    content = file.read_bytes()
    assert content[8:9] == b"{"  # safetensors: the header's length, then JSON
    assert not content.startswith((b"\x80", b"PK"))


def test_a_model_that_cannot_be_written_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
