"""Which strategy a manifest names: a built-in one, one that an installed package offers, or `package.module:Class`; and
whether the run may have it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points

from confide.config import STRATEGY_OPTIONS, StrategyConfig
from confide.config.strategy import STRATEGY_GROUP
from confide.errors import ConfigError
from confide.protocol.manifest import Manifest
from confide.strategies.base import Strategy
from confide.strategies.fedadagrad import FedAdagrad
from confide.strategies.fedadam import FedAdam
from confide.strategies.fedavg import FedAvg
from confide.strategies.fedavgm import FedAvgM
from confide.strategies.fednova import FedNova
from confide.strategies.fedprox import FedProx
from confide.strategies.fedyogi import FedYogi
from confide.strategies.krum import Krum
from confide.strategies.median import Median
from confide.strategies.multi_krum import MultiKrum
from confide.strategies.scaffold import Scaffold
from confide.strategies.trimmed_mean import TrimmedMean

__all__ = ["BUILT_IN", "admit_strategy", "make_strategy"]

BUILT_IN: Mapping[str, type[Strategy]] = {
    "fedavg": FedAvg, "fedprox": FedProx, "fedavgm": FedAvgM, "fedadam": FedAdam, "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad, "scaffold": Scaffold, "fednova": FedNova, "median": Median,
    "trimmed_mean": TrimmedMean, "krum": Krum, "multi_krum": MultiKrum,
}  # fmt: skip


def make_strategy(config: StrategyConfig) -> Strategy:
    """The strategy that the manifest names.

    Raises:
        ConfigError: One of the user's own cannot be imported or made.
    """
    if not config.is_own:
        return BUILT_IN[config.kind](**{name: getattr(config, name) for name in STRATEGY_OPTIONS[config.kind]})
    where = f"strategy.kind = {config.kind!r}"
    found = _import(config.kind, where)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigError("is not a subclass of confide.strategies.Strategy", where=where)
    try:
        return found(**config.options)
    except Exception as error:  # whatever a user's class raises, it is a fault of the configuration
        raise ConfigError(f"raised {type(error).__name__}: {error}", where=where,
                          hint="the class is called with (**strategy.options)") from error  # fmt: skip


def admit_strategy(strategy: Strategy, manifest: Manifest) -> None:
    """Refuse a run that cannot have its strategy.

    Raises:
        ConfigError: Says why, and what to use instead.
    """
    kind, profile = manifest.strategy.kind, manifest.sealing.profile
    where = f"strategy.kind = {kind!r}"
    if strategy.single_updates and profile != "open":
        raise ConfigError(
            f"{kind} compares the sites' single updates, and under profile {profile} nobody sees one: only their sum "
            "is ever opened",
            where=where,
            hint="under sealed sums use fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, scaffold or fednova; "
            "on public data sealing.profile = 'open' shows single updates",
        )
    if (strategy.single_updates, strategy.control_variates) != (manifest.single_updates, manifest.control_variates):
        raise ConfigError("needs something else to be sent than the manifest says", where=where)
    if strategy.single_updates and strategy.control_variates:
        raise ConfigError("cannot have both single updates and control variates", where=where)
    refused = strategy.refusal(manifest)
    if refused is not None:
        raise ConfigError(refused[0], where=where, hint=refused[1])


def _import(kind: str, where: str) -> object:
    module, _, name = kind.partition(":")
    if not name:
        offered = {e.name: e.value for e in entry_points(group=STRATEGY_GROUP)}
        if kind not in offered:
            raise ConfigError("is not a strategy that is installed here", where=where,
                              hint=f"install the package whose entry points {STRATEGY_GROUP} offer it")  # fmt: skip
        module, _, name = offered[kind].partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        expected = isinstance(error, ImportError | AttributeError | ValueError)
        reason = f"{error}" if expected else f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot be imported: {reason}", where=where,
                          hint="install the package, or add its folder to PYTHONPATH") from None  # fmt: skip
