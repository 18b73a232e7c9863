"""Jobs for worker processes: what they do tells the tests where they ran and whether they are still held."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError


@dataclass(frozen=True)
class Where:
    """Says where it ran, under which name."""

    name: str = ""
    seconds: float = 0.0

    def __call__(self, number: int, item: object) -> tuple[int, object, str, int]:
        time.sleep(self.seconds)
        return number, item, self.name, os.getpid()


@dataclass(frozen=True)
class Dies:
    """Kills any process but one, at some item."""

    home: int
    at: int

    def __call__(self, number: int, item: object) -> tuple[int, object]:
        if number >= self.at and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return number, item


@dataclass(frozen=True)
class Fails:
    """Raises at some items, in any process but one (or everywhere)."""

    at: int
    home: int = 0

    def __call__(self, number: int, item: object) -> int:
        if number == self.at and os.getpid() != self.home:
            raise SealingError("was asked to fail", where=f"item {number}", hint="as the test wants")
        return number


@dataclass(frozen=True)
class SlowElsewhere:
    """Takes its time in any process but one."""

    home: int

    def __call__(self, number: int, item: object) -> int:
        if os.getpid() != self.home:
            time.sleep(0.1)
        return number


@dataclass(frozen=True)
class Bulky:
    """Returns more than fits the way back at once."""

    def __call__(self, number: int, item: object) -> NDArray[np.uint64]:
        return np.full(100_000, number, dtype=np.uint64)


class Held:
    """Stands for a job with a key: each copy leaves a mark when it comes to a process and another when it is gone.

    Args:
        folder: Where the marks are left.
        fails: Raise at this item, in any process but the first.
        bulk: Words that come back for each item.
    """

    def __init__(self, folder: Path, fails: int = -1, bulk: int = 0) -> None:
        self.folder, self.fails, self.bulk, self.home = folder, fails, bulk, os.getpid()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._mark("came")

    def __call__(self, number: int, item: object) -> tuple[int, NDArray[np.uint64]]:
        if number == self.fails and os.getpid() != self.home:
            raise ValueError("was asked to fail")
        return number, np.zeros(self.bulk, dtype=np.uint64)

    def __del__(self) -> None:
        if os.getpid() != self.home:
            self._mark("gone")

    def _mark(self, word: str) -> None:
        with (self.folder / f"{word}-{os.getpid()}").open("a") as stream:
            stream.write(".")
