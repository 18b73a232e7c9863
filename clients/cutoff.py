"""The round's cut-off: the instant before a site commits to its update, at which consent is looked at once more; and
the deadline at which its reply is released, so that how long it computed is not to be seen.

Invariant: when a reply leaves does not tell whether its round was computed once or twice. Its deadline is a whole
number of public spans after the request, and leaves as much time again as the round took: what is computed again,
because somebody has withdrawn meanwhile, fits in. See ADR 23.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.clients.data.records import SiteRecords
from confide.clients.participants import Participants
from confide.clients.run import SiteRun
from confide.clients.store import ModelState
from confide.errors import ConsentError, SealingError

__all__ = ["ReplyTime", "compute_until_cut_off", "deadline_after", "released_at_deadline"]

_ATTEMPTS = 5
#: A deadline is at least so many times what a round takes: once, and once more for a recomputation.
_HEADROOM = 2.0


@dataclass(slots=True)
class ReplyTime:
    """When the reply to one request left, in seconds since the request came. For the site only.

    Attributes:
        run, round: What was computed for it; empty and 0 where nothing was.
        again: How long something was computed again, because somebody's consent had changed.
        took: When it was done.
        deadline: When it would have left, had nothing been computed again.
        left: When it left. Later than its deadline: whoever waits for it sees that.
    """

    run: str = ""
    round: int = 0
    again: float = 0.0
    took: float = 0.0
    deadline: float = 0.0
    left: float = 0.0


#: The request that this thread is answering, where its reply is held back.
_answering: ContextVar[ReplyTime | None] = ContextVar("_answering", default=None)


def compute_until_cut_off(
    run: SiteRun, round_: int, model: ModelState, records: SiteRecords, take: Callable[[], Participants]
) -> tuple[NDArray[np.float64], Participants, int]:
    """Compute, then look again: what was computed with a person who has withdrawn meanwhile is thrown away.

    Nothing of an abandoned attempt leaves, so attempts share one charge.

    Args:
        run: The run at this site.
        round_: The round.
        model: The replicated model.
        records: The site's data.
        take: Takes a snapshot of who may take part.

    Returns:
        The vector, whose consent it rests on, and the number of attempts.

    Raises:
        ConsentError: Consent kept changing; the site abstains this round.
    """
    reply = _answering.get() or ReplyTime()
    reply.run, reply.round = run.manifest.run, round_
    for attempt in range(1, _ATTEMPTS + 1):
        begun, used = _clock(), take()
        vector = run.compute(round_, model, records.units_of(used.train), records.units_of(used.held_out))
        lasts = used.still_covers(take())
        reply.again += _clock() - begun if attempt > 1 else 0.0
        if lasts:
            return vector, used, attempt
    raise ConsentError("consent kept changing while the round was computed", where=f"site {run.site}",
                       hint="the site abstains this round")  # fmt: skip


def deadline_after(arrived: float, done: float, every: float) -> float:
    """When a reply leaves: the first multiple of `every` seconds after the request at which it is done.

    Args:
        arrived, done: Seconds of one clock.
        every: Seconds, positive, and public.
    """
    return arrived + every * max(1, math.ceil((done - arrived) / every))


@contextmanager
def released_at_deadline(every: float, note: Callable[[ReplyTime], None] = lambda _: None) -> Iterator[None]:
    """Hold back whatever comes of what is done inside, a refusal or a fault too, until its deadline.

    What is late all the same leaves a whole number of spans later.

    Args:
        every: The span, in seconds; 0 holds back nothing.
        note: Told, before the reply leaves, when it does; where something was computed for it.
    """
    arrived, reply = _clock(), ReplyTime()
    answering = _answering.set(reply)
    try:
        yield
    except SealingError:  # not authentic: nothing was looked at, and nobody may keep a site waiting with it
        every = 0
        raise
    finally:
        _answering.reset(answering)
        if every:
            reply.took = _clock() - arrived
            # As much time again as it took without what was computed again: so that fits in, and is not to be seen.
            reply.deadline = deadline_after(0.0, _HEADROOM * (reply.took - reply.again), every)
            reply.left = max(reply.deadline, deadline_after(0.0, reply.took, every))
            if reply.run:
                note(reply)
            _wait_until(max(arrived + reply.left, deadline_after(arrived, _clock(), every)))


def _wait_until(instant: float) -> None:
    while (left := instant - _clock()) > 0:
        time.sleep(left)


_clock = time.monotonic
