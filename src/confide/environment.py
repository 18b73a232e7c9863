"""Switches of third-party programs that must be set before they are imported: nothing phones home from a site."""

from __future__ import annotations

import os

__all__ = ["silence_third_parties", "switches"]

_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def silence_third_parties() -> None:
    """Set the switches, whatever the shell says."""
    os.environ.update(_SWITCHES)


def switches() -> dict[str, str]:
    """The switches, for processes that do not inherit this one's environment."""
    return dict(_SWITCHES)
