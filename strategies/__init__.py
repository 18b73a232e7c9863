"""Strategies: one a module, pure functions of (model, sum, state)."""

from confide.config import StrategyConfig
from confide.strategies.base import State, StepInput, Strategy
from confide.strategies.fedavg import FedAvg

__all__ = ["FedAvg", "State", "StepInput", "Strategy", "make_strategy"]


def make_strategy(config: StrategyConfig) -> Strategy:
    """The strategy that the manifest names."""
    return FedAvg(server_learning_rate=config.server_learning_rate)
