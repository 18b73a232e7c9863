"""A site's statement of account: what its ledger and its record of personal losses say, as facts. Stays at the site.

Two ε appear and are never mixed:
- *RDP filter*, of a whole ledger: sound although later runs are chosen after seeing earlier ones.
- *PRV*, of one run alone: holds because its parameters were fixed beforehand.

Invariant: nothing here names or numbers a person; what is said of persons is a distribution over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confide.privacy.dp.accounting import person_epsilon
from confide.privacy.dp.events import PrivacyEvent, Role, merge_events
from confide.privacy.dp.ledger import Ledger
from confide.privacy.dp.personal import PersonalLosses

__all__ = ["Persons", "RoleInRun", "RoleStatement", "RunStatement", "Statement", "is_ledger_folder", "read_statement"]

LEDGER, PERSONAL = "ledger.db", "personal.db"
QUANTILES = (0, 25, 50, 75, 90, 100)
BINS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleStatement:
    """All that a role's people were exposed to, as one filter sees it.

    Attributes:
        epsilon: RDP-filter ε of the whole ledger.
        used: Share of the budget used; 1.0 is all of it.
        charges: Number of charges.
        open_charges: Those not settled; they count whole.
    """

    role: Role
    epsilon: float
    used: float
    charges: int
    open_charges: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleInRun:
    """What one run charged to one role; σ and q are None where its charges differ in them."""

    role: Role
    steps: int
    noise_multiplier: float | None
    sample_rate: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatement:
    """One run.

    Attributes:
        rounds: Rounds charged, ascending. Empty for a charge that no round's name is known of.
        roles: What each role was charged, settled charges at what is left of them.
        epsilon: PRV ε of this run alone, for the more exposed role: its parameters were fixed beforehand, and a person
            holds one role. None where a role's charges differ in σ or q.
        sites: At how many sites a person may lie, as the run assumed: ε is as if all of them had charged the same.
    """

    run: str
    rounds: list[int]
    roles: list[RoleInRun]
    epsilon: float | None
    sites: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Persons:
    """The distribution of persons' own ε (RDP filter, over the charges that held each).

    Attributes:
        recorded: Is there a record of who was held? Without one nobody is enrolled, and `at_most` says all.
        enrolled: Persons known.
        never_exposed: Persons whom nothing was charged for.
        quantiles: Percent → ε, each rounded up to a person's own; empty where nobody is enrolled.
        histogram: (from, to, persons) over the exposed with a finite ε, equal widths; the upper end is included.
        infinite: Persons whose ε is infinite.
        unnoted_charges: Charges that nobody was noted for; everybody of their role counts as held by them.
        uncharged_notes: Charges noted for persons that are not in the ledger: an older copy of it was restored.
        at_most: No person's ε is above this: RDP-filter ε of the more exposed role, or the largest of a person's.
    """

    recorded: bool
    enrolled: int
    never_exposed: int
    quantiles: dict[str, float]
    histogram: list[tuple[float, float, int]]
    infinite: int
    unnoted_charges: int
    uncharged_notes: int
    at_most: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A site's ledger: what is fixed with it, what was charged, and what that means for persons."""

    site: str
    unit: str
    delta: float
    epsilon_limit: float
    held_out: float
    roles: list[RoleStatement]
    runs: list[RunStatement]
    persons: Persons


def is_ledger_folder(folder: Path) -> bool:
    """Does this folder hold a site's ledger?"""
    return (folder / LEDGER).is_file()


def read_statement(folder: Path) -> Statement:
    """Read one site's ledger folder; nothing in it is made or changed.

    Raises:
        BudgetError: There is no ledger, or the ledger or the record of personal losses is damaged.
    """
    ledger = Ledger.open(folder / LEDGER)
    try:
        charges, budget = ledger.charges(), ledger.budget
        open_charges = set(ledger.open_charges(""))
        roles = [
            RoleStatement(
                role=role,
                epsilon=ledger.epsilon(role),
                used=budget.used(ledger.events(role)),
                charges=sum(e.role is role for e in charges.values()),
                open_charges=sum(charges[c].role is role for c in open_charges),
            )
            for role in Role
        ]
        unit, held_out = ledger.unit, ledger.held_out
    finally:
        ledger.close()
    return Statement(
        site=folder.resolve().name, unit=unit, delta=budget.delta, epsilon_limit=budget.epsilon_limit,
        held_out=held_out, roles=roles, runs=_runs(charges, budget.delta),
        persons=_persons(folder / PERSONAL, charges, budget.delta, max(r.epsilon for r in roles)),
    )  # fmt: skip


def _runs(charges: Mapping[str, PrivacyEvent], delta: float) -> list[RunStatement]:
    """Runs in the order of their first charge; a charge's name is run/round/role."""
    rounds: dict[str, set[int]] = {}
    held: dict[str, list[PrivacyEvent]] = {}
    for charge, event in charges.items():
        run, _, rest = charge.rpartition("/")[0].rpartition("/")
        known = run != "" and rest.isdecimal()
        name = run if known else charge
        rounds.setdefault(name, set()).update([int(rest)] if known else [])
        held.setdefault(name, []).append(event)
    return [_run(name, sorted(rounds[name]), events, delta) for name, events in held.items()]


def _run(name: str, rounds: list[int], events: list[PrivacyEvent], delta: float) -> RunStatement:
    roles, unlike = list[RoleInRun](), False
    for role in Role:
        mine = [e for e in events if e.role is role]
        if not mine:
            continue
        kinds, steps = {(e.noise_multiplier, e.sample_rate) for e in mine}, sum(e.steps for e in mine)
        sigma, rate = kinds.pop() if len(kinds) == 1 else (None, None)
        roles.append(RoleInRun(role=role, steps=steps, noise_multiplier=sigma, sample_rate=rate))
        unlike = unlike or sigma is None
    return RunStatement(
        run=name, rounds=rounds, roles=roles, epsilon=None if unlike else person_epsilon(merge_events(events), delta),
        sites=max(e.sites for e in events),
    )  # fmt: skip


def _persons(path: Path, charges: Mapping[str, PrivacyEvent], delta: float, at_most: float) -> Persons:
    if not path.exists():
        return Persons(
            recorded=False, enrolled=0, never_exposed=0, quantiles={}, histogram=[], infinite=0,
            unnoted_charges=len(charges), uncharged_notes=0, at_most=at_most,
        )  # fmt: skip
    losses = PersonalLosses.open(path)
    try:
        found = losses.epsilons(charges, delta)[: losses.persons]
        unnoted, uncharged = len(losses.unnoted(charges)), losses.uncharged(charges)
    finally:
        losses.close()
    finite = found[np.isfinite(found) & (found > 0)]
    quantiles = np.percentile(found, QUANTILES, method="higher") if len(found) else ()
    return Persons(
        recorded=True,
        enrolled=len(found),
        never_exposed=int(np.count_nonzero(found == 0)),
        quantiles={str(p): float(v) for p, v in zip(QUANTILES, quantiles, strict=False)},
        histogram=_histogram(finite),
        infinite=int(np.count_nonzero(np.isinf(found))),
        unnoted_charges=unnoted,
        uncharged_notes=uncharged,
        at_most=max(at_most, float(found.max(initial=0.0))),
    )


def _histogram(found: NDArray[np.float64]) -> list[tuple[float, float, int]]:
    if len(found) == 0:
        return []
    counts, edges = np.histogram(found, bins=BINS, range=(0.0, float(found.max())))
    return [(float(a), float(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
