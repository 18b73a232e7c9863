"""Sites of one process that train at once.

Each site answers its request by itself, in a greenlet of its own: the same code as anywhere. Where it comes to its
local steps it waits, until all others have come there or are done; then all who wait are trained in one stack, and go
on. What a site gets is what it would have computed alone, from its own stream of random numbers.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from numpy.typing import NDArray

from confide.clients.training.stacked import Chain, Work, train_stacked
from confide.clients.training.trainer import TRAIN

__all__ = ["answer_together"]

_T = TypeVar("_T")
Floats = NDArray[np.float64]
_Asked = tuple[Chain, Work, torch.device]


def answer_together(tasks: Sequence[Callable[[], _T]]) -> list[_T]:
    """Run tasks that may train, and give back what each of them returns.

    Raises:
        Exception: The first that a task raises; the others then end where they wait.
    """
    hub = getcurrent()

    def train(chain: Chain, work: Work, device: torch.device) -> Floats:
        moved: Floats = hub.switch((chain, work, device))
        return moved

    def begin(task: Callable[[], _T]) -> _T:
        TRAIN.set(train)  # in this greenlet's own context
        return task()

    results, waiting = dict[int, _T](), dict[int, _Asked]()
    runners = [greenlet(begin) for _ in tasks]

    def note(number: int, came: object) -> None:
        if runners[number].dead:
            results[number] = came  # type: ignore[assignment]  # what the task returned
        else:
            waiting[number] = came  # type: ignore[assignment]  # what `train` handed over

    for number, task in enumerate(tasks):
        runners[number].gr_context = contextvars.copy_context()
        note(number, runners[number].switch(task))
    while waiting:
        asked = dict(waiting)
        waiting.clear()
        for number, moved in _train(asked).items():
            runner = runners[number]
            note(number, runner.throw(moved) if isinstance(moved, Exception) else runner.switch(moved))
    return [results[number] for number in range(len(tasks))]


def _train(asked: dict[int, _Asked]) -> dict[int, Floats | Exception]:
    """Everybody's local steps, or why there are none."""
    groups: dict[tuple[Chain, torch.device], list[int]] = {}
    for number, (chain, _, device) in asked.items():
        groups.setdefault((chain, device), []).append(number)
    found: dict[int, Floats | Exception] = {}
    for (chain, device), numbers in groups.items():
        try:
            moved: list[Floats | Exception] = [*train_stacked(chain, [asked[n][1] for n in numbers], device)]
        except Exception:  # whoever it is that cannot train must not keep the others from it
            moved = [_alone(*asked[n]) for n in numbers]
        found |= zip(numbers, moved, strict=True)
    return found


def _alone(chain: Chain, work: Work, device: torch.device) -> Floats | Exception:
    try:
        return train_stacked(chain, [work], device)[0]
    except Exception as error:
        return error
