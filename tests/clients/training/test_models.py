"""A model is the built-in one or the user's own, and travels as one flat vector."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from confide.clients.training.models import build_model, flatten, initial_model, layout_of, load_flat
from confide.config import ModelConfig
from confide.errors import ConfigError

OWN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, inputs, outputs, width=3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, outputs))

    def forward(self, x):
        return self.scale * self.body(x)


def net(inputs, outputs, width=3):
    return Net(inputs, outputs, width)


def broken(inputs, outputs):
    raise RuntimeError("no such luck")


def text(inputs, outputs):
    return "a model"


NUMBER = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own on sys.path."""
    name = "own_models_of_test_models"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


MODELS = st.one_of(
    st.just(ModelConfig(kind="logistic")),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda h: ModelConfig(kind="mlp", hidden=tuple(h))),
)
SIZE = st.integers(1, 6)


@given(config=MODELS, inputs=SIZE, outputs=SIZE)
def test_a_built_in_model_maps_its_inputs_to_its_outputs(config: ModelConfig, inputs: int, outputs: int) -> None:
    model = build_model(config, inputs, outputs)
    assert model(torch.zeros(2, inputs)).shape == (2, outputs)
    widths = [inputs, *config.hidden, outputs]
    assert layout_of(model).size == sum((a + 1) * b for a, b in pairwise(widths))


@given(config=MODELS, inputs=SIZE, outputs=SIZE, data=st.data())
def test_any_vector_comes_back_bit_for_bit(config: ModelConfig, inputs: int, outputs: int, data: st.DataObject) -> None:
    model = build_model(config, inputs, outputs)
    size = layout_of(model).size
    number = st.floats(width=32, allow_nan=False)
    vector = np.array(data.draw(st.lists(number, min_size=size, max_size=size)), dtype=np.float32)
    load_flat(model, vector)
    assert flatten(model).tobytes() == vector.tobytes()


def test_the_vector_is_the_parameters_in_the_layouts_order() -> None:
    model = build_model(ModelConfig(kind="mlp", hidden=(2,)), 3, 1)
    layout = layout_of(model)
    assert layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert layout.shapes == ((2, 3), (2,), (1, 2), (1,))
    load_flat(model, np.arange(layout.size, dtype=np.float32))
    named = dict(model.named_parameters())
    assert named["0.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert named["0.bias"].tolist() == [6, 7]
    assert named["2.weight"].tolist() == [[8, 9]]
    assert named["2.bias"].tolist() == [10]


def test_loading_copies_so_that_later_training_does_not_change_the_vector() -> None:
    model, vector = build_model(ModelConfig(), 2, 1), np.ones(3, dtype=np.float32)
    load_flat(model, vector)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert vector.tolist() == [1, 1, 1]
    assert flatten(model).tolist() == [2, 2, 2]


@pytest.mark.parametrize("size", [2, 4])
def test_a_vector_of_another_size_is_refused(size: int) -> None:
    model = build_model(ModelConfig(), 2, 1)
    with pytest.raises((ValueError, RuntimeError)):
        load_flat(model, np.ones(size, dtype=np.float32))


def test_the_first_weights_follow_the_seed_and_leave_torchs_own_generator_alone() -> None:
    config = ModelConfig(kind="mlp", hidden=(4,))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, layout = initial_model(config, 3, 1, seed=5)
    assert torch.equal(torch.rand(1), expected)
    same, _ = initial_model(config, 3, 1, seed=5)
    other, _ = initial_model(config, 3, 1, seed=6)
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert layout == layout_of(build_model(config, 3, 1))
    assert one.dtype == np.float32


# --- the user's own ------------------------------------------------------------------------------------------------


def test_a_users_own_model_is_called_with_sizes_and_options(own_module: str) -> None:
    model = build_model(ModelConfig(kind=f"{own_module}:net", options={"width": 7}), 4, 2)
    assert isinstance(model, nn.Module)
    assert model(torch.zeros(5, 4)).shape == (5, 2)
    assert layout_of(model).names[:2] == ("scale", "body.0.weight")
    assert layout_of(model).shapes[:2] == ((), (7, 4))


def test_a_users_own_model_with_a_scalar_parameter_comes_back_bit_for_bit(own_module: str) -> None:
    model = build_model(ModelConfig(kind=f"{own_module}:net"), 4, 1)
    vector = np.linspace(-1, 1, layout_of(model).size, dtype=np.float32)
    load_flat(model, vector)
    assert flatten(model).tobytes() == vector.tobytes()


@pytest.mark.parametrize(
    ("function", "options", "text"),
    [
        ("none", {}, "cannot be imported: module '{module}' has no attribute 'none'"),
        ("NUMBER", {}, "is not a function"),
        ("broken", {}, "raised RuntimeError: no such luck"),
        ("text", {}, "returned a str, not an nn.Module"),
        ("net", {"depth": 3}, "raised TypeError: net() got an unexpected keyword argument 'depth'"),
    ],
)
def test_a_users_own_model_that_cannot_be_made_is_refused(
    own_module: str, function: str, options: dict[str, int], text: str
) -> None:
    kind = f"{own_module}:{function}"
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig.model_validate({"kind": kind, "options": options}), 4, 1)
    assert (caught.value.what, caught.value.where) == (text.format(module=own_module), f"model.kind = {kind!r}")


@pytest.mark.parametrize("kind", ["no_such_module_at_all:net", ":net", "torch:"])
def test_a_module_that_does_not_exist_is_refused_with_what_to_do(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(kind=kind), 4, 1)
    assert caught.value.what.startswith("cannot be imported: ")
    assert caught.value.hint == "install the package, or add its folder to PYTHONPATH"


@pytest.mark.parametrize("source", ["def net(:\n", "raise RuntimeError('at import')\n"], ids=["syntax", "import"])
def test_a_module_that_fails_while_it_is_imported_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"bad_module_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="cannot be imported: "):
        build_model(ModelConfig(kind=f"{name}:net"), 4, 1)
