"""Does a deployed coordinator's memory grow with the number of rounds? `python -m benchmarks.deployment_memory
[--rounds N]`.

A federation of three sites, made and run through the commands that operators use; the process of `confide server run`
is looked at twice a second, over many small rounds. `coordinator_mib_first` is the median of its resident memory in the
second twentieth of the rounds (the first one fills caches), `coordinator_mib_last` that in the last twentieth;
`traffic_mib_per_round` is what a coordinator would hold more of after each round if it kept what it is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from confide.server.runs import RunStore
from confide.server.service import run_store
from tests.integration.staged import SITES, Staged, staged

_LOOK_SECONDS = 0.5
#: Some ten thousand parameters: enough for a sum that is kept to be seen.
_MODEL = {"kind": "mlp", "hidden": [192, 192]}


def resident_mib(pid: int) -> float:
    """A process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(made: Staged, rounds: int) -> dict[str, Any]:
    """See the module."""
    begun, server = time.monotonic(), made.server.pid
    run = made.start_run(
        "memory", run={"rounds": rounds, "report_metrics_every": rounds}, model=_MODEL, training={"local_steps": 1}
    )
    path, found = made.fed / "runs" / run / "result.json", dict[int, list[float]]()
    store = RunStore(run_store(made.fed))

    def ended() -> bool:
        if made.server.poll() is None:
            found.setdefault(store.next_round(run), []).append(resident_mib(made.server.pid))
        time.sleep(_LOOK_SECONDS)
        return path.exists()

    made.until(ended, f"{rounds} rounds end", patience=20.0 * rounds)
    store.close()
    result = json.loads(path.read_text())
    if result["status"] != "finished" or made.server.pid != server:
        raise RuntimeError(f"there is nothing to measure: {result}")
    manifest, part = made.manifest(run), max(1, rounds // 20)
    traffic = result["bytes_per_parameter"] * manifest.layout.size * len(made.names) / 2**20
    first = [m for r, many in found.items() if part < r <= 2 * part for m in many]
    last = [m for r, many in found.items() if rounds - part < r <= rounds for m in many]
    return {
        "rounds": rounds, "rounds_abandoned": result["rounds_abandoned"], "parameters": manifest.layout.size,
        "coordinator_mib_first": round(statistics.median(first), 1),
        "coordinator_mib_last": round(statistics.median(last), 1),
        "traffic_mib_per_round": round(traffic, 3), "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, staged(Path(name), SITES[:3]) as made:
        print(json.dumps(measure(made, options.rounds)))


if __name__ == "__main__":
    main()
