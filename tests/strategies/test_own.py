"""A strategy of one's own: by `module:Class`, or by name from an installed package; a site's policy must allow it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import confide
from confide.clients.training.code import package_digest
from confide.config import STRATEGY_OPTIONS, StrategyConfig, load_experiment
from confide.config.site import PolicyConfig
from confide.errors import ConfigError, PeerError, SealingError
from confide.privacy.audit.verify import verify
from confide.strategies import make_strategy
from tests.attacks.federation import Federation, is_refusal, refusal_of
from tests.support import experiment_tree, write_people

CODE = '''
"""Half an average; and some that nobody should run."""
from dataclasses import dataclass

import numpy as np

from confide.strategies import FedAvg, Scaffold, Strategy
from confide.strategies.base import moved


@dataclass(frozen=True)
class Half(Strategy):
    """w + share of the mean update."""

    share: float = 0.5

    def initial_state(self, size):
        return (np.zeros(size),)

    def step(self, given):
        return moved(given.model, given.average * self.share), (given.state[0] + given.average,)


@dataclass(frozen=True)
class Careful(FedAvg):
    def refusal(self, manifest):
        return ("this one wants more rounds", "set run.rounds = 99") if manifest.rounds < 99 else None


class Peeking(Half):
    single_updates = True


class Drifting(Half):
    """Not the same at every site: nobody may apply what only one has computed."""

    def step(self, given):
        weights, state = super().step(given)
        return weights + np.float32(np.random.default_rng().normal()), state


class Busy(Half):
    def steps_of(self, site, most):
        return most + 1


class Broken(Half):
    def __init__(self):
        raise RuntimeError("no")


class MyScaffold(Scaffold):
    pass


not_a_class = 3
'''
ENTRY = "[confide.strategies]\nhalf = own_strategies:Half\nfedavg = own_strategies:Half\n"
OWN = "own_strategies:Half"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that offers strategies, installed for as long as a test runs."""
    folder = tmp_path / "site-packages"
    information = folder / "own_strategies-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "own_strategies.py").write_text(CODE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: own-strategies\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("own_strategies", None)


def tree(folder: Path, kind: str, **sections: Any) -> dict[str, Any]:
    """A tiny experiment with a strategy."""
    strategy = {"kind": kind, **sections.pop("strategy", {})}
    return experiment_tree(
        str(write_people(folder)), run={"rounds": 2, "report_metrics_every": 1}, privacy={"sample_rate": 1.0},
        sealing={"profile": "sealed"}, strategy=strategy, **sections,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [OWN, "half"])
def test_a_run_with_a_strategy_of_ones_own_verifies(tmp_path: Path, kind: str) -> None:
    experiment = tree(tmp_path, kind, strategy={"options": {"share": 0.25}})
    result = confide.simulate(experiment, out=tmp_path / "out")
    assert result.rounds_abandoned == 0
    assert verify(tmp_path / "out").findings == []
    assert confide.simulations.plan(experiment).strategy == f"{kind} (share 0.25)"


def test_it_is_made_with_its_options() -> None:
    made = make_strategy(StrategyConfig(kind="half", options={"share": 0.125}))
    assert made == make_strategy(StrategyConfig(kind=OWN, options={"share": 0.125}))
    assert made != make_strategy(StrategyConfig(kind=OWN))


def test_a_built_in_name_stays_what_it_is() -> None:
    """Whoever installs a package does not change what a run's manifest says."""
    assert type(make_strategy(StrategyConfig(kind="fedavg"))).__module__ == "confide.strategies.fedavg"


def test_a_name_that_no_package_offers_is_unknown(package: Path, tmp_path: Path) -> None:
    assert load_experiment(tree(tmp_path, "half")).strategy.kind == "half"
    with pytest.raises(ConfigError, match="did you mean 'half'"):
        load_experiment(tree(tmp_path, "halff"))
    (package / "own_strategies-1.0.dist-info" / "entry_points.txt").write_text("")
    with pytest.raises(ConfigError, match=r"strategy\.kind = 'half': input should be one of"):
        load_experiment(tree(tmp_path, "half"))


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("nowhere.at_all:Thing", {}, "cannot be imported: No module named 'nowhere'"),
        ("own_strategies:Nothing", {}, "cannot be imported: module 'own_strategies' has no attribute 'Nothing'"),
        ("own_strategies:not_a_class", {}, "is not a subclass of confide.strategies.Strategy"),
        ("os:PathLike", {}, "is not a subclass of confide.strategies.Strategy"),
        (OWN, {"shares": 1}, "raised TypeError"),
        ("own_strategies:Broken", {}, "raised RuntimeError: no"),
        ("own_strategies:Careful", {}, "this one wants more rounds"),
        ("own_strategies:Peeking", {}, "compares the sites' single updates"),
    ],
)
def test_what_cannot_be_made_or_does_not_fit_is_refused_when_the_run_is_created(
    tmp_path: Path, kind: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        confide.simulations.plan(tree(tmp_path, kind, strategy={"options": options}))
    assert says in str(caught.value)
    assert kind in str(caught.value)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Sites whose policies allow this very strategy."""
    made = Federation(tmp_path / "f", people={"people": 12}, strategy={"kind": OWN},
                      sites={"min_sites": 3, "min_subjects": 1, "population": {"default": 12}},
                      privacy={"sample_rate": 1.0})  # fmt: skip
    yield made
    made.world.close()


@pytest.mark.parametrize(
    ("allowed", "joins"),
    [({"fedavg", OWN}, True), ({"fedavg"}, False), (set(), False), ({"own_strategies"}, False), ({"half"}, False)],
)
def test_a_site_runs_the_code_that_its_policy_names_and_no_other(
    federation: Federation, allowed: set[str], joins: bool
) -> None:
    sys.modules.pop("own_strategies", None)  # to see whether the site imports it
    federation.set_policy("ash", strategies=frozenset(allowed))
    answer = federation.join(("ash",))["ash"]
    assert is_refusal(answer) != joins
    assert ("own_strategies" in sys.modules) == joins, "refused code is not even imported"
    if not joins:
        refused = refusal_of(answer)
        assert refused.kind == "policy"
        assert refused.reason == f"site.toml [policy] strategies allows {sorted(allowed)}, the run asks for {OWN}"


def test_a_site_runs_the_code_that_its_operator_has_read(federation: Federation, package: Path) -> None:
    sys.modules.pop("own_strategies", None)
    federation.set_policy("ash", strategy_digests={OWN: package_digest(OWN)})
    code = package / "own_strategies.py"
    code.write_text(code.read_text() + "# one more line\n")
    assert "strategy_digests allows other code" in refusal_of(federation.join(("ash",))["ash"]).reason
    assert "own_strategies" not in sys.modules
    federation.set_policy("birch", strategy_digests={OWN: package_digest(OWN)})
    assert not is_refusal(federation.join(("birch",))["birch"]), "the control"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"strategies": ["own_strategies:Half"]}, "own_strategies:Half runs code here: give its digest"),
        ({"strategies": ["fedprocs"]}, "strategies holds 'fedprocs': a built-in name or module:Class"),
        ({"strategy_digests": {OWN: "0" * 64}}, "which strategies does not allow"),
    ],
)
def test_site_toml_names_no_code_without_its_digest(lines: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PolicyConfig(population=20, **lines)
    assert set(PolicyConfig(population=20).strategies) == set(STRATEGY_OPTIONS)
    allowed = PolicyConfig(population=20, strategies=[OWN], strategy_digests={OWN: "0" * 64})
    assert allowed.strategies == (OWN,)


def test_the_default_policy_allows_the_built_in_ones_and_nothing_else(federation: Federation) -> None:
    from confide.clients.policy import SitePolicy
    from confide.strategies import BUILT_IN

    policy = SitePolicy(coordinator="c", coordinator_key=b"", federation="f")
    assert policy.strategies == frozenset(BUILT_IN)


def test_a_strategy_that_differs_between_sites_ends_the_run_before_anything_is_applied(tmp_path: Path) -> None:
    with pytest.raises(SealingError, match="not bit-identical"):
        confide.simulate(tree(tmp_path, "own_strategies:Drifting"), out=tmp_path / "out")


def test_a_strategy_cannot_make_a_site_train_more_than_it_is_charged_for(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, PeerError, confide.errors.PolicyError), match="more local steps than are charged"):
        confide.simulate(tree(tmp_path, "own_strategies:Busy"), out=tmp_path / "out")


def test_control_variates_are_for_whoever_asks_for_them(tmp_path: Path) -> None:
    result = confide.simulate(tree(tmp_path, "own_strategies:MyScaffold"), out=tmp_path / "out")
    assert result.rounds_abandoned == 0
    assert np.isfinite(result.epsilon.max)
