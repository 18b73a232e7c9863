"""The round's cut-off: the instant before a site commits to its update, at which consent is looked at once more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from confide.clients.data.records import SiteRecords
from confide.clients.participants import Participants
from confide.clients.run import SiteRun
from confide.clients.store import ModelState
from confide.errors import ConsentError

__all__ = ["compute_until_cut_off"]

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
