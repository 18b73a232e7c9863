"""The round's cut-off: the instant before a site commits to its update, at which consent is looked at once more; and
the deadline at which its reply is released, so that how long it computed is not to be seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from confide.clients.data.records import SiteRecords
from confide.clients.participants import Participants
from confide.clients.run import SiteRun
from confide.clients.store import ModelState
from confide.errors import ConsentError, SealingError

__all__ = ["compute_until_cut_off", "deadline_after", "released_at_deadline"]

_ATTEMPTS = 5


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
    for attempt in range(1, _ATTEMPTS + 1):
        used = take()
        vector = run.compute(round_, model, records.units_of(used.train), records.units_of(used.held_out))
        if used.still_covers(take()):
            return vector, used, attempt
    raise ConsentError("consent kept changing while the round was computed", where=f"site {run.site}",
                       hint="the site abstains this round")  # fmt: skip


def deadline_after(arrived: float, done: float, every: float) -> float:
    """When a reply leaves: the first multiple of `every` seconds after the request at which it is done.

    Args:
        arrived, done: Seconds of one clock.
        every: Seconds, positive: public, and longer than a round takes, its recomputations included. Where it is not,
            only the number of such spans is to be seen.
    """
    return arrived + every * max(1, math.ceil((done - arrived) / every))


@contextmanager
def released_at_deadline(every: float) -> Iterator[None]:
    """Hold back whatever comes of what is done inside, a refusal or a fault too, until its deadline.

    Args:
        every: See `deadline_after`; 0 holds back nothing.
    """
    arrived = _clock()
    try:
        yield
    except SealingError:  # not authentic: nothing was looked at, and nobody may keep a site waiting with it
        every = 0
        raise
    finally:
        if every:
            _wait_until(deadline_after(arrived, _clock(), every))


def _wait_until(instant: float) -> None:
    while (left := instant - _clock()) > 0:
        time.sleep(left)


_clock = time.monotonic
