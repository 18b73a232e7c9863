"""What all cells of a sweep cost together, where they are charged to one set of ledgers.

Invariants:
1. The whole sweep is asked of every site's ledger before its first cell starts: a sweep that does not fit is refused,
   and costs nothing.
2. All cells hold the same people at the same sites. Where they did not, no ledger would know what a person has lost.
3. A resumed sweep asks only for what its cells have not charged yet; no charge is made twice for one round of a cell.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from confide.errors import BudgetError, ConfigError
from confide.privacy.digest import digest
from confide.privacy.dp import Ledger, PrivacyEvent, Role, person_epsilon
from confide.privacy.dp.events import merge_events
from confide.privacy.dp.statement import LEDGER
from confide.privacy.files import write_private
from confide.protocol.manifest import Manifest
from confide.simulations.keeping import KEPT
from confide.simulations.result import json_number
from confide.simulations.sources import Sources

__all__ = ["LedgerCost", "SweepCost", "ask", "give_keys", "keys_in", "people_digest", "still_to_charge", "total"]

_MANIFEST, _STATISTICS, _LEARNED, _KEY = "manifest.json", "statistics", "learned.json", "site.key"


@dataclass(frozen=True, slots=True)
class LedgerCost:
    """One site's ledger: RDP ε of all that it holds, and share of its budget, without the sweep and with all of it."""

    epsilon_before: float
    epsilon_after: float
    used_before: float
    used_after: float
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepCost:
    """A sweep's cells, composed.

    Attributes:
        cells: How many.
        epsilon: PRV of all cells together, at `delta`: their parameters were fixed before the first. ∞ where one of
            them protects nobody (public data).
        unit: What is protected.
        composed_sites: Over how many sites of a person it is composed.
        ledgers: By site.
        folder: Of the ledgers.
    """

    cells: int
    epsilon: float
    delta: float
    unit: str
    composed_sites: int
    ledgers: dict[str, LedgerCost]
    folder: str

    @property
    def admitted(self) -> bool:
        """Does it fit every ledger?"""
        return all(ledger.used_after <= 1.0 for ledger in self.ledgers.values())

    @property
    def worst(self) -> LedgerCost:
        """The ledger that is used most."""
        return max(self.ledgers.values(), key=lambda ledger: ledger.used_after)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tree = asdict(self) | {"epsilon": json_number(self.epsilon), "admitted": self.admitted}
        tree["ledgers"] = {s: {k: json_number(v) for k, v in ledger.items()} for s, ledger in tree["ledgers"].items()}
        return tree

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> SweepCost:
        """Inverse of `to_json`."""
        fields = {k: v for k, v in tree.items() if k != "admitted"}
        fields["ledgers"] = {s: LedgerCost(**{k: float(v) for k, v in t.items()}) for s, t in tree["ledgers"].items()}
        return cls(**fields | {"epsilon": float(tree["epsilon"])})


def total(
    cells: Sequence[Sequence[PrivacyEvent]], manifests: Sequence[Manifest], ledgers: Path, shown: Path
) -> SweepCost:
    """What these cells cost on top of what the ledgers hold.

    Args:
        cells: What each charges a site.
        manifests: Their runs.
        ledgers: Where the sites' ledgers, or copies of them, lie.
        shown: The folder that is told.

    Raises:
        ConfigError: The cells have more than one privacy unit or δ; a ledger has one.
    """
    privacy = [m.privacy for m in manifests]
    for name in ("unit", "delta", "site_epsilon_limit"):
        if len({getattr(p, name) for p in privacy}) > 1:
            raise ConfigError("differs between cells that are charged to one ledger", where=f"privacy.{name}",
                              hint="it is fixed with a ledger: give all cells the same")  # fmt: skip
    charges = merge_events(event for cell in cells for event in cell)
    whole = person_epsilon(charges, privacy[0].delta) if all(p.protects for p in privacy) else math.inf
    found = {}
    for site in sorted(m.site for m in manifests[0].members):
        with closing(Ledger.open(ledgers / site / LEDGER)) as ledger:
            found[site] = LedgerCost(
                epsilon_before=max(ledger.epsilon(r) for r in Role),
                epsilon_after=max(ledger.epsilon(r, charges) for r in Role),
                used_before=ledger.used(), used_after=ledger.used(charges), limit=ledger.budget.epsilon_limit,
            )  # fmt: skip
    return SweepCost(
        cells=len(cells), epsilon=whole, delta=privacy[0].delta, unit=privacy[0].unit, ledgers=found,
        composed_sites=max(p.composed_sites for p in privacy), folder=str(shown),
    )  # fmt: skip


def ask(charges: Mapping[str, Sequence[PrivacyEvent]], ledgers: Path, shown: Path, cells: int) -> None:
    """Would every site's ledger hold all of this?

    Args:
        charges: By site.
        ledgers: Where the sites' ledgers, or copies of them, lie.
        shown: The folder that is told.
        cells: How many will charge it.

    Raises:
        BudgetError: One would not.
    """
    for site, events in charges.items():
        with closing(Ledger.open(ledgers / site / LEDGER)) as ledger:
            try:
                ledger.check(events)
            except BudgetError as error:
                raise BudgetError(
                    f"for {cells} cells together: {error.what}" if cells > 1 else error.what,
                    where=f"ledger {shown / site / LEDGER}",
                    hint="sweep over fewer values, or lower privacy.epsilon or run.rounds: a site's budget is never "
                    "refilled",
                ) from None  # fmt: skip


def still_to_charge(charges: Sequence[PrivacyEvent], folder: Path, ledger: Ledger) -> list[PrivacyEvent]:
    """What a cell that has not finished will still charge: all but what its runs have charged so far.

    Args:
        charges: What the whole cell charges.
        folder: Of the cell; it need not be there.
        ledger: A site's.
    """
    runs = _runs(folder)
    made = {replace(e, steps=1): e.steps for e in merge_events(
        event for name, event in ledger.reservations().items() if name.partition("/")[0] in runs)}  # fmt: skip
    left = ((e, e.steps - made.get(replace(e, steps=1), 0)) for e in merge_events(charges))
    return [replace(e, steps=steps) for e, steps in left if steps > 0]


def _runs(folder: Path) -> set[str]:
    """The names that a cell's charges have: of its training, and of the run that learned bounds before it."""
    found = set()
    for part in (folder, folder / _STATISTICS):
        kept = part / KEPT / _MANIFEST
        if kept.is_file():
            found.add(Manifest.from_bytes(kept.read_bytes()).run)
    if (learned := folder / _STATISTICS / _LEARNED).is_file():
        found.add(str(json.loads(learned.read_text())["run_id"]))
    return found


def people_digest(sources: Sources) -> str:
    """Names who lies at which site."""
    parts = [
        hashlib.sha256("\0".join([site, *sorted(records.persons)]).encode()).digest()
        for site, records in sorted(sources.records.items())
    ]
    return digest("people of a sweep", *parts).hex()


def keys_in(ledgers: Path) -> dict[str, bytes]:
    """The sites' keys, by site."""
    return {path.parent.name: path.read_bytes() for path in ledgers.glob(f"*/{_KEY}")}


def give_keys(keys: Mapping[str, bytes], ledgers: Path) -> None:
    """Give every site its key before any cell runs: roles are for ever, and no two cells may race for the first."""
    for site, key in keys.items():
        path = ledgers / site / _KEY
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_private(path, key)
