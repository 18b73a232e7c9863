"""What sealing costs a run: RAND under `open` and `sealed`, turn by turn, and the uplink of a large model."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from confide.simulations import simulate

LARGE = (
    "model.kind=mlp",
    "model.hidden=[1200, 64]",
    "run.rounds=2",
    "training.local_steps=2",
    "training.learning_rate=0.1",
)


def _seconds(*overrides: str) -> tuple[float, float, int]:
    """(seconds, bytes a parameter, rounds abandoned) of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        result = simulate(overrides=overrides, out=Path(scratch) / "out")
        return result.seconds, result.bytes_per_parameter, result.rounds_abandoned


def measure(repeats: int) -> dict[str, Any]:
    """Medians over `repeats` alternating runs."""
    times: dict[str, list[float]] = {"open": [], "sealed": []}
    for _ in range(repeats):
        for profile, seconds in times.items():
            seconds.append(_seconds(f"sealing.profile={profile}")[0])
            sys.stderr.write(f"{profile}: {seconds[-1]:.2f} s\n")
    medians = {profile: round(statistics.median(seconds), 2) for profile, seconds in times.items()}
    uplink = {bits: _seconds(*LARGE, f"sealing.bits={bits}")[1] for bits in (20, 16, 12)}
    return {
        "seconds": medians,
        "sealed_over_open": round(medians["sealed"] / medians["open"], 3),
        "repeats": repeats,
        "uplink_bytes_per_parameter": {**{f"sealed_{b}_bits": u for b, u in uplink.items()}, "float32": 4.0},
        "uplink_model_parameters": 30 * 1200 + 1200 + 1200 * 64 + 64 + 64 + 1,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().repeats)))


if __name__ == "__main__":
    main()
