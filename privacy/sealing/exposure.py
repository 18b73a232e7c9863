"""Who learns what: one table, shown in a run's summary, the report and the threat model.

Every cell has a test in `tests/attacks/test_exposure.py` that performs the attack: it succeeds exactly where the table
says so.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COALITIONS", "Exposure", "exposure_table"]


@dataclass(frozen=True, slots=True)
class Exposure:
    """One coalition under one profile.

    Attributes:
        coalition: Who works together.
        learns: What they learn, in words.
        update: Do they learn one other site's update?
        sum: Do they learn a round's sum before anything is released?
        forges: Can they make the other sites accept a sum of their choosing?
    """

    coalition: str
    learns: str
    update: bool
    sum: bool
    forges: bool


COALITIONS = (
    "coordinator",
    "one other site",
    "coordinator and one site",
    "all other sites of the cohort",
    "outsider with backups and recorded traffic",
)
_NOTHING_YET = "nothing until a release: sizes, timing, and the noised metrics that the run names"
_SUM = "the sum over the cohort"
_SUBTRACT = "the sum, and by subtraction the remaining site's noised update"
_FORGE = "the sum; they can forge sums, not open an update"
_DESTROYED = "nothing: every key that opens it was destroyed with the run"

_EACH = "every site's update, every round"
_EACH_FORGES_NONE = "every site's update; each is signed by its site, so they can forge none of another"

#: profile → (words, update, sum, forges) for each of COALITIONS.
_TABLE = {
    "sealed": (
        (_NOTHING_YET, False, False, False),
        (_SUM, False, True, False),
        (_FORGE, False, True, True),
        (_SUBTRACT, True, True, False),
        (_DESTROYED, False, False, False),
    ),
    "masked": (
        ("the sum over the cohort, every round", False, True, False),
        (_SUM, False, True, False),
        (_FORGE, False, True, True),
        (_SUBTRACT, True, True, False),
        ("the sums, where the transport itself was recorded in the clear", False, True, False),
    ),
    "ckks": (
        (_NOTHING_YET, False, False, False),
        (_SUM, False, True, False),
        ("every site's update: one key opens all of them, and nothing masks them", True, True, True),
        (_SUBTRACT, True, True, False),
        (_DESTROYED, False, False, False),
    ),
    "open": (
        ("every site's update, every round", True, True, True),
        (_SUM, False, True, False),
        ("every site's update", True, True, True),
        (_SUBTRACT, True, True, False),
        ("every site's update, where the transport itself was recorded in the clear", True, True, False),
    ),
    # A strategy that reads single updates: each travels to every site, in a message that its own site signed.
    "open, gathered": (
        (_EACH, True, True, False),
        (f"{_EACH}: the strategy compares them", True, True, False),
        (_EACH_FORGES_NONE, True, True, False),
        (_EACH, True, True, False),
        ("every site's update, where the transport itself was recorded in the clear", True, True, False),
    ),
}


def exposure_table(profile: str, sites: int, neighbours: int) -> tuple[Exposure, ...]:
    """The table of one profile.

    Args:
        profile: Its name.
        sites: Most sites of a cohort.
        neighbours: With how many of them a site shares masks at most.
    """
    found = []
    for coalition, (learns, update, total, forges) in zip(COALITIONS, _TABLE[profile], strict=True):
        name, words = coalition, learns
        if coalition.startswith("all other") and profile in ("sealed", "masked") and sites > neighbours + 1:
            name = f"all {neighbours} neighbours of a site, or all other sites of the cohort"
            words = "the sum, and that site's noised update: its masks are known to its neighbours"
        found.append(Exposure(name, words, update, total, forges))
    return tuple(found)
