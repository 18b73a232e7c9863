"""What the runs that a site has joined may still charge: where several are under way, their charges must fit together.

The ledger refuses what its budget does not hold whenever it is charged, so no budget is ever overspent. But of two runs
that fit alone and not together both would then come to a halt in the middle, paid for and without a model. So the one
that is joined second is refused before it costs anything. Everything here is public: manifests, and rounds gone by.
"""

from __future__ import annotations

from confide.clients.store import SiteStore
from confide.errors import BudgetError
from confide.privacy.dp import Ledger
from confide.privacy.dp.events import PrivacyEvent
from confide.protocol.manifest import Manifest

__all__ = ["check_beside_others"]


def check_beside_others(manifest: Manifest, ledger: Ledger, store: SiteStore) -> None:
    """May a run be joined beside those that have not ended?

    Raises:
        BudgetError: The budget suffices for it, or for them.
    """
    promised = _promised(manifest.run, ledger, store)
    if not promised:
        return
    try:
        ledger.check([*manifest.all_charges(), *promised])
    except BudgetError:
        raise BudgetError(
            "the privacy budget does not suffice beside the runs that this site has joined and that are under way",
            where=f"ledger {ledger.path}", hint="start it again when they have ended",
        ) from None  # fmt: skip


def _promised(but: str, ledger: Ledger, store: SiteStore) -> list[PrivacyEvent]:
    """Charges that are not reserved yet of rounds that are still to come, of all joined runs but one."""
    ended = {Manifest.from_bytes(data).run for data in store.ended_runs()}
    reserved, found = ledger.reservations(), list[PrivacyEvent]()
    for run in store.runs():
        data = store.manifest(run)
        if run == but or run in ended or data is None:
            continue
        of = Manifest.from_bytes(data)
        for round_ in range(max(1, store.latest_round(run)), of.rounds + 2):
            found += [e for e in of.charges(round_) if f"{run}/{round_}/{e.role.value}" not in reserved]
    return found
