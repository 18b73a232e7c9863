"""Simulated federations: in-process grid, experiment runner, figures. The sites and coordinator are the real ones."""

from confide.simulations.result import Plan, Progress, Result
from confide.simulations.runner import plan, simulate

__all__ = ["Plan", "Progress", "Result", "plan", "simulate"]
