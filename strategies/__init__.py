"""Strategies: one a module, pure functions of (model, sum, state)."""

from confide.strategies.base import State, StepInput, Strategy
from confide.strategies.fedadagrad import FedAdagrad
from confide.strategies.fedadam import FedAdam
from confide.strategies.fedavg import FedAvg
from confide.strategies.fedavgm import FedAvgM
from confide.strategies.fednova import FedNova
from confide.strategies.fedprox import FedProx
from confide.strategies.fedyogi import FedYogi
from confide.strategies.grid import to_grid
from confide.strategies.krum import Krum
from confide.strategies.load import BUILT_IN, admit_strategy, make_strategy
from confide.strategies.median import Median
from confide.strategies.multi_krum import MultiKrum
from confide.strategies.scaffold import Scaffold
from confide.strategies.trimmed_mean import TrimmedMean

__all__ = [
    "BUILT_IN",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedProx",
    "FedYogi",
    "Krum",
    "Median",
    "MultiKrum",
    "Scaffold",
    "State",
    "StepInput",
    "Strategy",
    "TrimmedMean",
    "admit_strategy",
    "make_strategy",
    "to_grid",
]
