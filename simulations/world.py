"""A simulated federation: real sites (the same class that is deployed), made from one table.

What is simulated: where the sites run, who consents (unless a file says), and the officers who record withdrawals.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from confide.clients.data.preprocess import encoded_width
from confide.clients.membership import Membership, SiteKeys
from confide.clients.site import Site
from confide.clients.training.models import initial_model
from confide.privacy.audit.log import Log
from confide.privacy.dp import PrivacyEvent, Role
from confide.privacy.dp.metrics import SENSITIVITY
from confide.privacy.dp.statistics import RELEASES
from confide.privacy.flushing import flush_commits
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.roster import (
    COORDINATOR,
    NO_AUTHORITY,
    RosterMember,
    SignedRoster,
    first_roster,
    sign_roster,
)
from confide.protocol.rosterbook import write_rosters
from confide.protocol.standing import Standing
from confide.server.plan import make_manifest
from confide.simulations.keeping import Keeping
from confide.simulations.making import FEDERATION, SiteMaker
from confide.simulations.sites import Sites
from confide.simulations.sources import Sources

__all__ = ["COORDINATOR", "FEDERATION", "Elsewhere", "World"]

#: Sites that stay open where rounds are drawn for some of them; each holds files and a registry open.
_OPEN = 200


class Elsewhere(Protocol):
    """Processes that have the sites, for the one that simulates."""

    def look(self, name: str) -> tuple[float, NDArray[np.float32] | None]:
        """The share of the latest sum that was clipped, and the weights, at one site."""

    def held_out(self) -> Mapping[str, NDArray[np.bool_]]:
        """By site, whose metrics may be asked for."""

    def before_round(self, round_: int) -> None:
        """The officers record what the round brings."""

    def flush(self) -> None:
        """What was committed is on the disk."""


class World:
    """The sites of one simulated run, with their files. Where the schema's bounds are still to be learned, it is the
    statistics run.

    Args:
        sources: From `load_sources`.
        run_folder: Where each site keeps this run's state and registry.
        ledger_folder: Where each site keeps what outlives a run: ledger and key.
        log_folder: Where the logs that may travel lie.
        keeping: What makes it possible to go on with the run in another process; where it holds a run already, this
            is that run. None: with this process the run is over.
        carried: Folder of an earlier run's sites, whose registries hold as they are now; None: consent is recorded.
    """

    def __init__(
        self,
        sources: Sources,
        run_folder: Path,
        ledger_folder: Path,
        log_folder: Path,
        keeping: Keeping | None = None,
        carried: Path | None = None,
    ) -> None:
        self.sources = sources
        self.experiment = sources.experiment
        self._keeping, begun = keeping, keeping.manifest if keeping is not None else None
        self._identities: dict[str, Identity] = {}
        self.coordinator = self._identity(COORDINATOR)
        self._logs = log_folder
        log_folder.mkdir(parents=True, exist_ok=True)
        self._run_folder, self._round = run_folder, 0
        run_folder.mkdir(parents=True, exist_ok=True)
        self._ending = False
        #: Other processes of this simulation that have the sites.
        self.elsewhere: Elsewhere | None = None
        #: Makes the sites, and has their officers.
        self.maker = SiteMaker(
            sources, run_folder, ledger_folder, coordinator=self.coordinator.public_key, identity=self._identity,
            member=lambda name: self._members[name],
            vault=lambda name: keeping.vault(name) if keeping is not None else None, carried=carried,
        )  # fmt: skip
        #: What the ledgers of sites that were closed hold: (ε of the more exposed role, limit).
        self._spent: dict[str, tuple[float, float]] = {}
        drawn = self.experiment.sites.per_round
        most = None if drawn is None else max(_OPEN, 2 * drawn)
        self.sites = Sites(sources.records, self._open_site, self._close_site, most)
        try:
            self.roster, self._members = self._found()
            for folder in (log_folder, run_folder):  # with the live logs too, from which they can be exported again
                write_rosters(folder, self.roster)
            if drawn is None:
                for name in self.sites:
                    self.sites[name]
            self.log = self._open_log()
            self.initial, layout = initial_model(
                self.experiment.model,
                encoded_width(sources.schema),
                self.experiment.data.label.outputs,
                self.experiment.run.seed,
            )
            self.manifest: Manifest = begun or make_manifest(
                self.experiment,
                roster=self.roster[-1].roster,
                schema=sources.schema,
                initial_model=self.initial,
                layout=layout,
                statistics=bool(sources.schema.unknown_bounds),
            )
            if keeping is not None and begun is None:
                keeping.begin(self.manifest)
        except BaseException:
            self.close()
            raise

    @property
    def statistics_charges(self) -> list[PrivacyEvent]:
        """What learning bounds costs, in the run of its own that comes before the training."""
        if not self.sources.learned or not self.manifest.privacy.is_private:
            return []
        return [
            PrivacyEvent(
                role=Role.HELD_OUT, unit=self.manifest.privacy.unit, sample_rate=1.0, steps=RELEASES,
                noise_multiplier=self.manifest.metrics_noise_multiplier, max_grad_norm=SENSITIVITY,
                sites=self.manifest.privacy.composed_sites,
            )
        ]  # fmt: skip

    def check(self) -> None:
        """Ask every site, before anything starts, whether it would take part, and pay for the statistics too.

        Raises:
            ConfideError: The first site's own reason not to.
        """
        for name in self.manifest.drawn(1):  # whoever is drawn later is asked when it joins
            site = self.sites[name]
            site.check(self.manifest)
            if self.statistics_charges:
                site.ledger.check([*self.statistics_charges, *self.manifest.all_charges()])

    def before_round(self, round_: int) -> None:
        """The simulated officers record this round's withdrawals."""
        self._round = round_
        if self.elsewhere is not None:
            self.elsewhere.before_round(round_)
        for name in self.sites.open:
            self.maker.withdraw_until(name, round_, since=round_ - 1)
            self.maker.churn(name, round_)

    def export(self) -> None:
        """Write what may travel of the logs into the log folder, and each local log beside its site's files.

        Raises:
            StorageError: It cannot be written.
        """
        self.log.export(self._logs / f"{COORDINATOR}.log")
        self.export_sites()

    def export_sites(self) -> None:
        """The same for the sites that are open.

        Raises:
            StorageError: It cannot be written.
        """
        for site in self.sites.open.values():
            self._export(site)

    def spent(self) -> dict[str, tuple[float, float]]:
        """Of every site that took part: ε of its ledger's more exposed role, and the ledger's limit."""
        return self._spent | {name: _spent(site) for name, site in self.sites.open.items()}

    def note_spent(self, spent: Mapping[str, tuple[float, float]]) -> None:
        """What ledgers hold that others have closed."""
        self._spent |= spent

    def flush(self) -> None:
        """What was committed so far is on the disk.

        Raises:
            OSError: The disk does not take it.
        """
        if self.elsewhere is not None:
            self.elsewhere.flush()
        flush_commits()

    def let_go(self) -> None:
        """Others have the sites and the coordinator's log open from here on."""
        self.sites.close()
        self.log.close()

    def take_back(self) -> None:
        """Nobody else has them open any more: those that have taken part are open again, as far as they all may be."""
        self.log = self._open_log()
        self.open_again()

    def open_again(self) -> None:
        """Open the sites that have taken part, as far as they all may be open."""
        for name in self.sites:
            if (self._run_folder / name / "state.db").is_file():
                self.sites[name]

    @property
    def folder(self) -> Path:
        """Where the sites keep this run's state."""
        return self._run_folder

    def close(self) -> None:
        """Release all files; what of them is wanted elsewhere was exported before."""
        if hasattr(self, "log"):
            self.log.close()
        self.close_sites()

    def close_sites(self) -> None:
        """Release the sites' files; what of them is wanted elsewhere was exported before."""
        self._ending = True
        self.sites.close()

    def _open_log(self) -> Log:
        return self.coordinator.open_log(self._run_folder / f"{COORDINATOR}.db", "coordinator", FEDERATION)

    def _export(self, site: Site) -> None:
        site.log.export(self._logs / f"{site.name}.log")
        site.local_log.export(self._run_folder / site.name / "local.log")

    def _close_site(self, site: Site) -> None:
        if not self._ending and self.experiment.sites.per_round is not None:
            self._spent[site.name] = _spent(site)
            self._export(site)
        site.close()

    def _open_site(self, name: str) -> Site:
        """Make a site, or open it again; and what was to happen there up to this round has happened."""
        site = self.maker.make(name)
        self.maker.withdraw_until(name, self._round)
        return site

    def _found(self) -> tuple[tuple[SignedRoster, ...], dict[str, Membership]]:
        """The federation's first roster: every site signs it and, once it is complete, accepts it, as anywhere else.
        What no simulation has is people who compare fingerprints."""
        if self._keeping is not None and (chain := self._keeping.chain):
            found = {member.site: self._member(member) for member in chain[-1].roster.members}
        else:
            keys = [SiteKeys.generate(self._identity(name)) for name in self.sources.records]
            members = [k.member(self.sources.population[k.identity.name]) for k in keys]
            roster = first_roster(FEDERATION, self.coordinator.public_key.hex(), NO_AUTHORITY, members)
            signed = SignedRoster(roster=roster, signatures=sign_roster(roster, self.coordinator))
            found, signatures = {member.site: self._member(member) for member in members}, dict[str, str]()
            for own in keys:
                signatures |= found[own.identity.name].countersign([signed], own).signatures
            chain = (signed.with_signatures(signatures),)
        for site in found.values():  # a chain that holds for one is not verified again for the next
            site.accept(chain)
        if self._keeping is not None:
            self._keeping.keep_chain(chain)
        return chain, found

    def _member(self, member: RosterMember) -> Membership:
        return Membership(None, Standing(federation=FEDERATION, me=member))

    def _identity(self, party: str) -> Identity:
        """A party's signing key; the same whenever it is asked for."""
        if party not in self._identities:
            kept = self._keeping
            self._identities[party] = kept.identity(party) if kept is not None else Identity.generate(party)
        return self._identities[party]


def _spent(site: Site) -> tuple[float, float]:
    return max(site.ledger.epsilon(role) for role in Role), site.ledger.budget.epsilon_limit
