"""Simulated federations: in-process grid, experiment runner, sweeps, figures. Sites and coordinator are real."""

from confide.simulations.place import finished_result
from confide.simulations.planning import plan
from confide.simulations.result import HONEST, Plan, Progress, Result
from confide.simulations.runner import simulate
from confide.simulations.sweeps.check import Quote
from confide.simulations.sweeps.cost import SweepCost
from confide.simulations.sweeps.place import finished_sweep
from confide.simulations.sweeps.result import Sweep
from confide.simulations.sweeps.sweep import SweepProgress, plan_sweep, sweep
from confide.simulations.tracking import Tracker, open_tracker

__all__ = [
    "HONEST",
    "Plan",
    "Progress",
    "Quote",
    "Result",
    "Sweep",
    "SweepCost",
    "SweepProgress",
    "Tracker",
    "finished_result",
    "finished_sweep",
    "open_tracker",
    "plan",
    "plan_sweep",
    "simulate",
    "sweep",
]
