"""The benchmark of the consent registry measures what it says, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.consent import measure


def test_a_small_registry_gives_every_figure() -> None:
    found = measure(events=3_000, subjects=1_500, address=None)
    assert (found["events"], found["subjects"]) == (3_000, 1_500)
    assert {
        "import_events_per_second", "snapshot_seconds", "snapshot_after_1000_seconds", "commit_seconds",
        "single_check_p99_ms", "peak_mib",
    } <= set(found)  # fmt: skip
    assert all(value > 0 for value in found.values())


def test_its_output_is_one_json_object_and_too_few_events_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.consent", "--json", "--subjects", "1200", "--events"]
    done = subprocess.run([*command, "1200"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["events"] == 1200
    refused = subprocess.run([*command, "1000"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "everybody decides at least once" in refused.stderr
