"""What sealing costs a run: RAND under `open` and `sealed`, turn by turn, and the uplink of a large model.

With `--experiment`, what it costs a round of that experiment: the median over rounds, in seconds of the clock and of
the processor. The second hardly moves with what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
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


def _rounds(experiment: str, profile: str, rounds: int) -> list[tuple[float, float]]:
    """(clock, processor) seconds of each round of one run. The first notice comes before anything is trained."""
    marks = list[tuple[float, float]]()
    with tempfile.TemporaryDirectory() as scratch:
        simulate(
            experiment,
            overrides=[f"sealing.profile={profile}", f"run.rounds={rounds}", "sealing.rotation=false"],
            out=Path(scratch) / "out",
            progress=lambda _: marks.append((time.perf_counter(), time.process_time())),
        )
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)]


def measure_rounds(experiment: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Median seconds of a round, profile by profile, over `repeats` alternating runs of `rounds` rounds."""
    times: dict[str, list[tuple[float, float]]] = {"open": [], "sealed": []}
    for _ in range(repeats):
        for profile, seconds in times.items():
            seconds += _rounds(experiment, profile, rounds)
            sys.stderr.write(f"{profile}: {seconds[-1][0]:.2f} s, of the processor {seconds[-1][1]:.2f} s\n")
    found: dict[str, Any] = {"experiment": experiment, "rounds": rounds, "repeats": repeats}
    for place, clock in enumerate(("clock", "processor")):
        medians = {profile: statistics.median(pair[place] for pair in seconds) for profile, seconds in times.items()}
        found[f"{clock}_seconds_a_round"] = {profile: round(value, 3) for profile, value in medians.items()}
        found[f"sealed_over_open_{clock}"] = round(medians["sealed"] / medians["open"], 3)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experiment", help="measure rounds of this one instead: a file, or example:NAME")
    parser.add_argument("--rounds", type=int, default=4, help="of each run of --experiment")
    asked = parser.parse_args()
    if asked.experiment is None:
        print(json.dumps(measure(asked.repeats)))
    else:
        print(json.dumps(measure_rounds(asked.experiment, asked.rounds, asked.repeats)))


if __name__ == "__main__":
    main()
