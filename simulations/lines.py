"""`rounds.jsonl`: what each round of a simulated run showed, a line a round, as the run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from confide.privacy.files import write_atomically
from confide.simulations.result import Intervals, Progress, json_intervals, json_number

__all__ = ["RoundLines"]


class RoundLines:
    """The file in a run's folder; an earlier process of the run may have begun it."""

    def __init__(self, folder: Path) -> None:
        self._path, self._lines = folder / "rounds.jsonl", list[dict[str, Any]]()

    def __len__(self) -> int:
        return len(self._lines)

    def recall(self) -> Iterator[dict[str, Any]]:
        """What an earlier process wrote down, oldest first."""
        text = self._path.read_text() if self._path.is_file() else ""
        self._lines = [json.loads(line) for line in text.splitlines()]
        return iter(self._lines)

    def add(self, progress: Progress) -> None:
        """A round as it ends."""
        self._lines.append({
            "round": progress.round,
            "epsilon": json_number(progress.epsilon),
            "metrics": progress.metrics,
            "released_metrics": None,
            "released_intervals": None,
            "abandoned": progress.abandoned,
            "saturated": round(progress.saturated, 6),
        })  # fmt: skip
        self.release(progress.released_round, progress.released, progress.released_intervals)

    def release(
        self, round_: int | None, released: dict[str, float | None] | None, intervals: Intervals | None
    ) -> None:
        """Write all. Released metrics stand beside the round whose model they are about, though they arrive later."""
        if round_ is not None:
            self._lines[round_]["released_metrics"] = released
            self._lines[round_]["released_intervals"] = json_intervals(intervals)
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self._lines)
        write_atomically(self._path, text.encode())
