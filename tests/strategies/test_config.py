"""`[strategy]`: an option belongs to the kinds that use it, and a run that cannot have its strategy is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import confide
from confide.config import STRATEGY_OPTIONS, StrategyConfig, load_experiment
from confide.errors import ConfigError
from confide.simulations import plan
from confide.strategies import BUILT_IN, make_strategy
from tests.support import experiment_tree

Make = Callable[..., dict[str, Any]]


def read(**strategy: Any) -> StrategyConfig:
    """As an experiment file would say it."""
    return load_experiment(experiment_tree("people.csv", strategy=strategy)).strategy


def refusal(**strategy: Any) -> ConfigError:
    """Why it is refused."""
    with pytest.raises(ConfigError) as caught:
        read(**strategy)
    return caught.value


def test_every_kind_has_a_class_whose_fields_are_its_options_with_the_same_defaults() -> None:
    assert set(BUILT_IN) == set(STRATEGY_OPTIONS)
    for kind, options in STRATEGY_OPTIONS.items():
        fields = {f.name: f.default for f in dataclasses.fields(BUILT_IN[kind])}  # type: ignore[arg-type]
        assert fields == options, kind
        assert make_strategy(StrategyConfig(kind=kind)) == BUILT_IN[kind]()


def test_what_is_not_given_has_its_kinds_default() -> None:
    config = read(kind="fedadam", beta1=0.5)
    assert (config.server_learning_rate, config.beta1, config.beta2, config.tau) == (0.1, 0.5, 0.99, 1e-3)
    assert (config.mu, config.momentum, config.trim, config.byzantine) == (None,) * 4
    assert read().describe() == "fedavg (server learning rate 1)"
    assert config.describe() == "fedadam (server learning rate 0.1, beta1 0.5, beta2 0.99, tau 0.001)"


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ({"kind": "fedavg", "mu": 0.1}, "mu belongs to fedprox, not to fedavg; fedavg has server_learning_rate"),
        ({"kind": "fedadam", "beta": 0.1}, "did you mean strategy.beta"),
        ({"kind": "fedadam", "momentum": 0.1}, "momentum belongs to fedavgm, not to fedadam; fedadam has beta1, "),
        ({"kind": "fedyogi", "beta_2": 0.1}, "did you mean strategy.beta2?"),
        ({"kind": "krum", "keep": 2}, "keep belongs to multi_krum, not to krum; krum has byzantine, server_"),
        ({"kind": "median", "options": {"a": 1}}, "options belongs to a strategy of your own, not to median"),
        ({"kind": "fedprocs"}, "or 'package.module:Class': did you mean 'fedprox'?"),
        ({"kind": "krum", "byzantine": -1}, "strategy.byzantine = -1: input should be greater than or equal to 0"),
        ({"kind": "trimmed_mean", "trim": 0.5}, "strategy.trim = 0.5: input should be less than 0.5"),
        ({"kind": "fedavgm", "momentum": 1.0}, "strategy.momentum = 1.0: input should be less than 1"),
        ({"kind": "fednova", "steps": {"ash": 0}}, "strategy.steps.ash = 0: input should be greater than"),
        ({"kind": "my.module:Mine", "mu": 0.1}, "mu belongs to a built-in kind; a strategy of your own takes options"),
        ({"kind": "a b"}, "strategy.kind = 'a b': string should match pattern"),
        ({"kind": 3}, "strategy.kind = 3: input should be a valid string"),
    ],
)  # fmt: skip
def test_a_wrong_kind_or_option_is_answered_with_the_right_one(strategy: dict[str, Any], says: str) -> None:
    assert says in str(refusal(**strategy))


@pytest.mark.parametrize("turned", [False, True])
def test_another_kind_on_the_command_line_leaves_the_files_options_behind(turned: bool) -> None:
    tree = experiment_tree("people.csv", strategy={"kind": "fedavgm", "server_learning_rate": 0.5, "momentum": 0.3})
    assignments = ["strategy.kind=fedadam", "strategy.beta1=0.5"]
    found = load_experiment(tree, assignments[::-1] if turned else assignments).strategy
    assert found.describe() == "fedadam (server learning rate 0.1, beta1 0.5, beta2 0.99, tau 0.001)"
    assert load_experiment(tree, ["strategy.momentum=0.7"]).strategy.server_learning_rate == 0.5
    same = load_experiment(tree, ["strategy.kind=fedavgm", "strategy.momentum=0.7"]).strategy
    assert (same.server_learning_rate, same.momentum) == (0.5, 0.7), "the control: the same kind keeps them"


def test_a_loaded_experiment_can_be_given_another_kind(make_experiment: Make) -> None:
    loaded = load_experiment(make_experiment(strategy={"kind": "fedavgm"}))
    assert plan(loaded, overrides=["strategy.kind=median"]).strategy == "median (server learning rate 1)"
    assert plan(loaded).strategy == "fedavgm (server learning rate 1, momentum 0.9)"


@given(st.sampled_from(sorted(STRATEGY_OPTIONS)))
def test_a_config_survives_its_journey_through_a_manifest(kind: str) -> None:
    config = StrategyConfig(kind=kind)
    assert StrategyConfig.model_validate_json(config.model_dump_json()) == config
    assert StrategyConfig(**config.model_dump(exclude_none=True)) == config


# --- when the run is created ------------------------------------------------------------------------------------------

SINGLE = ("median", "trimmed_mean", "krum", "multi_krum")


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
@pytest.mark.parametrize("kind", SINGLE)
def test_single_updates_are_not_to_be_had_under_encryption(make_experiment: Make, kind: str, profile: str) -> None:
    tree = make_experiment(strategy={"kind": kind}, sealing={"profile": profile})
    with pytest.raises(ConfigError) as caught:
        plan(tree)
    assert f"{kind} compares the sites' single updates, and under profile {profile} nobody sees one" in str(
        caught.value
    )
    assert "fedadam" in caught.value.hint
    assert "'open'" in caught.value.hint


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"strategy": {"kind": "scaffold", "steps": {"ash": 5}}}, "more than training.local_steps = 4"),
        ({"strategy": {"kind": "krum"}}, "krum with byzantine = 1 needs 5 updates, and a sum may hold 3"),
        ({"strategy": {"kind": "krum", "byzantine": 2}}, "krum with byzantine = 2 needs 7 updates"),
        ({"strategy": {"kind": "multi_krum", "byzantine": 0, "keep": 4}}, "keep = 4 leaves out fewer than byzantine"),
        ({"strategy": {"kind": "trimmed_mean"}}, "trimmed_mean with trim = 0.2 cuts nothing off 3 updates"),
        ({"strategy": {"kind": "scaffold"}, "training": {"optimizer": "adam"}}, "defined for plain SGD"),
        ({"strategy": {"kind": "scaffold"}, "training": {"momentum": 0.5}}, "defined for plain SGD"),
        ({"strategy": {"kind": "fednova"}, "training": {"momentum": 0.5}}, "fednova is defined for plain SGD"),
        ({"strategy": {"kind": "fednova", "steps": {"oak": 2}}}, "names 'oak', which is no site of the run"),
        ({"strategy": {"kind": "fednova", "steps": {"ash": 5}}}, "more than training.local_steps = 4"),
        ({"strategy": {"kind": "fedprox", "mu": 3}}, "steps past the round's model"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_have_its_strategy_is_refused_before_anything_starts(
    make_experiment: Make, sections: dict[str, Any], says: str, tmp_path: Any
) -> None:
    for call in (lambda t: plan(t), lambda t: confide.simulate(t, out=tmp_path / "out")):
        with pytest.raises(ConfigError) as caught:
            call(make_experiment(**sections))
        assert says in caught.value.what
        assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "strategy",
    [{"kind": "krum", "byzantine": 0}, {"kind": "trimmed_mean", "trim": 0.34}, {"kind": "median"},
     {"kind": "fednova", "steps": {"ash": 2}}, {"kind": "multi_krum", "byzantine": 0, "keep": 3}],
    ids=lambda s: s["kind"],
)  # fmt: skip
def test_the_hints_work(make_experiment: Make, strategy: dict[str, Any]) -> None:
    """The control: what the refusals tell to do is accepted."""
    assert plan(make_experiment(strategy=strategy)).admitted


def test_the_plan_names_the_strategy_with_its_options_and_what_it_costs_on_the_wire(make_experiment: Make) -> None:
    averaged = plan(make_experiment())
    assert averaged.strategy == averaged.to_json()["strategy"] == "fedavg (server learning rate 1)"
    scaffold = plan(make_experiment(strategy={"kind": "scaffold"}))
    assert scaffold.uplink_bytes - averaged.uplink_bytes == 4 * averaged.parameters, "as many coordinates again"
    median = plan(make_experiment(strategy={"kind": "median"}))
    assert median.uplink_bytes == averaged.uplink_bytes
    assert median.downlink_bytes == 4 * median.uplink_bytes, "every site gets the payloads of all four"
