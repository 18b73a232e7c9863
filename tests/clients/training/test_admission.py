"""Models in which one person's record touches another's gradient are refused, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from confide.clients.training.admission import admit_model
from confide.errors import ConfigError

INPUTS = 4


class Centre(nn.Module):
    """Subtracts the batch's mean: BatchNorm by another name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=0, keepdim=True)


class MaximumOfBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (1 + x.abs().amax(dim=0))


class RunningSum(nn.Module):
    """The first example never notices the others, but each notices those before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(dim=0)


class AgainstTheFirst(nn.Module):
    """Shows every example but the first what the first one is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:1], x[1:] - x[:1]])


class Neighbours(nn.Module):
    """Attention over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(INPUTS, INPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.project(x) @ x.T, dim=1) @ x


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]  # torch's Module is untyped


def between(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, INPUTS), layer, nn.Linear(INPUTS, 1))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(INPUTS), nn.BatchNorm1d(INPUTS, affine=False), nn.SyncBatchNorm(4)])
def test_batch_normalisation_is_refused_by_name_with_what_to_use_instead(layer: nn.Module) -> None:
    with pytest.raises(ConfigError) as refused:
        admit_model(between(layer), INPUTS, 1)
    assert f"layer '1' ({type(layer).__name__}) mixes the examples of a batch" in str(refused.value)
    assert "use LayerNorm or GroupNorm" in str(refused.value)


def test_batch_normalisation_is_found_however_deep_and_whatever_its_mode() -> None:
    deep = nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Sequential(nn.ReLU(), between(nn.BatchNorm1d(INPUTS)))).eval()
    with pytest.raises(ConfigError, match=r"layer '1\.1\.1' \(BatchNorm1d\)"):
        admit_model(deep, INPUTS, 1)


@pytest.mark.parametrize("layer", [Centre(), MaximumOfBatch(), Neighbours(), RunningSum(), AgainstTheFirst()])
def test_a_layer_of_ones_own_that_mixes_examples_is_found_by_what_it_does(layer: nn.Module) -> None:
    with pytest.raises(ConfigError) as refused:
        admit_model(between(layer), INPUTS, 1)
    assert f"layer '1' ({type(layer).__name__}) mixes the examples of a batch" in str(refused.value)


def test_mixing_outside_any_layer_is_found_in_the_model_itself() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(INPUTS, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x - x.mean(dim=0))  # type: ignore[no-any-return]  # torch's Module is untyped

    with pytest.raises(ConfigError, match=r"mixes the examples of a batch"):
        admit_model(Whole(), INPUTS, 1)


def test_instance_normalisation_is_refused_only_where_it_remembers() -> None:
    class Instance(nn.Module):
        def __init__(self, *, remembers: bool) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm1d(1, track_running_stats=remembers)
            self.out = nn.Linear(INPUTS, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(x[:, None, :])[:, 0])  # type: ignore[no-any-return]  # as above

    with pytest.raises(ConfigError, match=r"layer 'norm' \(InstanceNorm1d\) keeps running statistics"):
        admit_model(Instance(remembers=True), INPUTS, 1)
    admit_model(Instance(remembers=False), INPUTS, 1)


def test_a_buffer_is_refused_because_training_would_change_it_unaccounted() -> None:
    with pytest.raises(ConfigError, match="keeps the buffer 'seen'"):
        admit_model(Counter(), INPUTS, 1)


def test_a_frozen_parameter_and_a_model_without_any_are_refused() -> None:
    frozen = between(nn.ReLU())
    frozen[0].bias.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"the parameter '0\.bias' is frozen"):
        admit_model(frozen, INPUTS, 1)
    with pytest.raises(ConfigError, match="no parameter to train"):
        admit_model(nn.Flatten(), INPUTS, INPUTS)


@pytest.mark.parametrize(
    ("model", "outputs", "reason"),
    [
        (nn.Linear(INPUTS, 2), 1, r"returns \[2\] an example; the label needs \[1\]"),
        (nn.Linear(INPUTS, 1), 3, r"returns \[1\] an example; the label needs \[3\]"),
        (nn.Sequential(nn.Linear(INPUTS, 1), nn.Flatten(0)), 1, r"returns \[\] an example"),
        (nn.Linear(INPUTS + 1, 1), 1, r"fails on a batch of shape \[4, 4\]"),
        (nn.Sequential(nn.Linear(INPUTS, 8), nn.Unflatten(1, (2, 4))), 1, r"returns \[2, 4\] an example"),
        (nn.Sequential(nn.Linear(INPUTS, 2), nn.Flatten(0)), 1, r"fails on a batch of shape \[4, 4\]: returned shape"),
    ],
)
def test_an_output_that_does_not_fit_the_label_is_refused_with_both_shapes(
    model: nn.Module, outputs: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        admit_model(model, INPUTS, outputs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(INPUTS), nn.GroupNorm(2, INPUTS), nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Tanh(),
        nn.Softmax(dim=1), nn.Sequential(nn.Linear(INPUTS, 30), nn.ReLU(), nn.Linear(30, INPUTS)),
    ],
)  # fmt: skip
def test_layers_that_look_at_one_example_at_a_time_are_admitted_and_left_as_they_were(layer: nn.Module) -> None:
    model = between(layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    admit_model(model, INPUTS, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert layer.training or not isinstance(layer, nn.Dropout)
