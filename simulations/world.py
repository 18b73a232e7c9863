"""A simulated federation: real sites (the same class that is deployed), made from one table.

What is simulated: where the sites run, who consents (unless a file says), and the officers who record withdrawals.
"""

from __future__ import annotations

import hashlib
import sqlite3
from functools import partial
from pathlib import Path

from confide.clients.data.preprocess import encoded_width
from confide.clients.data.records import SiteRecords
from confide.clients.membership import Membership, SiteKeys
from confide.clients.policy import SitePolicy
from confide.clients.site import Site
from confide.clients.store import SiteStore
from confide.clients.training.models import initial_model
from confide.config import STRATEGY_OPTIONS, Churn
from confide.errors import ConsentError
from confide.privacy.consent import (
    ConsentEvent,
    EventType,
    Registry,
    SiteKey,
    now_micros,
)
from confide.privacy.consent.desk import filed
from confide.privacy.database import copy_database
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role
from confide.privacy.dp.metrics import SENSITIVITY
from confide.privacy.dp.personal import PersonalLosses
from confide.privacy.dp.statistics import RELEASES
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.roster import NO_AUTHORITY, RosterMember, SignedRoster, first_roster, sign_roster
from confide.protocol.rosterbook import write_rosters
from confide.protocol.standing import Standing
from confide.server.plan import make_manifest
from confide.simulations.keeping import Keeping
from confide.simulations.scenario import PoisonedSite
from confide.simulations.sites import Sites
from confide.simulations.sources import Sources

__all__ = ["COORDINATOR", "FEDERATION", "World"]

FEDERATION = "simulation"
COORDINATOR = "coordinator"
#: Sites that stay open where rounds are drawn for some of them; each holds files and a registry open.
_OPEN = 200


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
        self._resumed, self._carried = begun is not None, carried
        self._identities: dict[str, Identity] = {}
        self.coordinator = self._identity(COORDINATOR)
        self._logs = log_folder
        log_folder.mkdir(parents=True, exist_ok=True)
        self._registries: dict[str, Registry] = {}
        self._pseudonyms: dict[str, dict[str, bytes]] = {}
        self._run_folder, self._ledger_folder = run_folder, ledger_folder
        run_folder.mkdir(parents=True, exist_ok=True)
        self._begun, self._round = set[str](), 0
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
            self.log = self.coordinator.open_log(run_folder / f"{COORDINATOR}.db", "coordinator", FEDERATION)
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
        for withdrawal in self.experiment.consent.withdrawals:
            if withdrawal.round == round_:
                for name in self.sites.open:
                    self._withdraw(name, withdrawal.fraction, round_)
        churn = self.experiment.scenario.churn
        for name in self.sites.open if churn.withdraw or churn.give else ():
            self._change(name, churn, round_)

    def export(self) -> None:
        """Write what may travel of the logs into the log folder, and each local log beside its site's files.

        Raises:
            StorageError: It cannot be written.
        """
        self.log.export(self._logs / f"{COORDINATOR}.log")
        for site in self.sites.open.values():
            self._export(site)

    def spent(self) -> dict[str, tuple[float, float]]:
        """Of every site that took part: ε of its ledger's more exposed role, and the ledger's limit."""
        return self._spent | {name: _spent(site) for name, site in self.sites.open.items()}

    def close(self) -> None:
        """Release all files."""
        if hasattr(self, "log"):
            self.log.close()
        self.sites.close()

    def _export(self, site: Site) -> None:
        site.log.export(self._logs / f"{site.name}.log")
        site.local_log.export(self._run_folder / site.name / "local.log")

    def _close_site(self, site: Site) -> None:
        if self.experiment.sites.per_round is not None:
            self._spent[site.name] = _spent(site)
            self._export(site)
        site.close()

    def _open_site(self, name: str) -> Site:
        """Make a site, or open it again; and what was to happen there up to this round has happened."""
        site = self._make_site(
            name, self.sources.records[name], self._members[name], self._run_folder / name, self._ledger_folder / name
        )
        self._begun.add(name)
        for withdrawal in self.experiment.consent.withdrawals:
            if withdrawal.round <= self._round:
                self._withdraw(name, withdrawal.fraction, withdrawal.round)
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

    def _make_site(
        self, name: str, records: SiteRecords, membership: Membership, run_folder: Path, ledger_folder: Path
    ) -> Site:
        experiment, privacy = self.experiment, self.experiment.privacy
        identity = self._identity(name)
        run_folder.mkdir(parents=True, exist_ok=True)
        ledger_folder.mkdir(parents=True, exist_ok=True)
        # Splits are reproducible from the seed, but a ledger's first key stays: roles are for ever.
        key = SiteKey.load_or_create(ledger_folder / "site.key", _derive(experiment.run.seed, "site-key", name))
        budget = RenyiBudget.for_limit(privacy.site_epsilon_limit, privacy.delta)
        if self._carried is not None and not self._resumed and name not in self._begun:
            _carry(self._carried / name / "consent.db", run_folder / "consent.db")
        registry = Registry(run_folder / "consent.db", key)
        self._registries[name] = registry
        self._record_consent(name, records, registry, key)
        policy = SitePolicy(
            coordinator=COORDINATOR,
            coordinator_key=self.coordinator.public_key,
            federation=FEDERATION,
            purposes=frozenset({experiment.run.purpose}),
            profiles=frozenset({"sealed", "masked", "ckks"} | ({"open"} if experiment.data.public else set())),
            data_are_public=experiment.data.public,
            models=frozenset({"logistic", "mlp", experiment.model.kind}),
            strategies=frozenset({*STRATEGY_OPTIONS, experiment.strategy.kind}),
            held_out=experiment.data.held_out,
            min_sites=experiment.sites.min_sites,
            min_subjects=experiment.sites.min_subjects,
            population=self.sources.population[name],
            max_sites_per_subject=privacy.max_sites_per_subject,
            epsilon_limit=privacy.site_epsilon_limit,
            delta=privacy.delta,
            release=True,
            statistics=True,
            local_steps_limit=experiment.training.local_steps,
        )
        poisoned = {p.site: p.factor for p in experiment.scenario.poisoned}
        kind = partial(PoisonedSite, factor=poisoned[name]) if name in poisoned else Site
        return kind(
            identity=identity,
            policy=policy,
            membership=membership,
            records=records,
            registry=registry,
            ledger=Ledger(ledger_folder / "ledger.db", budget, privacy.unit, experiment.data.held_out),
            personal=PersonalLosses(ledger_folder / "personal.db"),
            key=key,
            store=SiteStore(run_folder / "state.db"),
            log=identity.open_log(run_folder / "federated.db", "federated", FEDERATION),
            local_log=identity.open_log(run_folder / "local.db", "local", FEDERATION),
            vault=self._keeping.vault(name) if self._keeping is not None else None,
        )

    def _identity(self, party: str) -> Identity:
        """A party's signing key; the same whenever it is asked for."""
        if party not in self._identities:
            kept = self._keeping
            self._identities[party] = kept.identity(party) if kept is not None else Identity.generate(party)
        return self._identities[party]

    def _record_consent(self, name: str, records: SiteRecords, registry: Registry, key: SiteKey) -> None:
        experiment = self.experiment
        if self._carried is not None:
            self._pseudonyms[name] = registry.pseudonyms(records.persons)
            return
        if self.sources.consent is not None:
            here = set(records.persons)
            mine = [e for e in self.sources.consent if e.subject in here]
            asked = {e.subject for e in mine}
            names = registry.enrol(asked - registry.erased(asked))  # nobody is erased before a run that begins
            self._pseudonyms[name] = names
            if self._resumed or name in self._begun:  # what was recorded then stands
                return
            registry.append([filed(e, names[e.subject], key) for e in mine])
            return
        fraction = experiment.consent.simulate.fraction if experiment.consent.simulate else 0.0
        seed = experiment.run.seed
        given = [p for p in records.persons if _share(seed, "consent", name, p) < fraction]
        self._pseudonyms[name] = registry.enrol(set(given) - registry.erased(given))
        if self._resumed or name in self._begun:
            return
        registry.append([self._simulated(name, p, EventType.GIVEN, 0) for p in given])

    def _withdraw(self, name: str, fraction: float, round_: int) -> None:
        registry, seed = self._registries[name], self.experiment.run.seed
        standing = registry.snapshot(self.experiment.run.purpose, now_micros()).participants
        leaving = [
            p
            for p, pseudonym in self._pseudonyms[name].items()
            if pseudonym in standing and _share(seed, f"withdraw-{round_}", name, p) < fraction
        ]
        registry.append([self._simulated(name, p, EventType.WITHDRAWN, round_) for p in leaving])

    def _change(self, name: str, churn: Churn, round_: int) -> None:
        """Some who consent withdraw, some who do not give consent, as both stand before the round."""
        registry, seed = self._registries[name], self.experiment.run.seed
        standing = registry.snapshot(self.experiment.run.purpose, now_micros()).participants
        draw = {p: _share(seed, f"churn-{round_}", name, p) for p in self.sources.records[name].persons}
        known = self._pseudonyms[name]
        consents = {p for p in draw if p in known and known[p] in standing}
        coming = [p for p in draw if p not in consents and draw[p] < churn.give]
        known |= registry.enrol(set(coming) - registry.erased(coming))
        registry.append([
            *(self._simulated(name, p, EventType.WITHDRAWN, round_) for p in consents if draw[p] < churn.withdraw),
            *(self._simulated(name, p, EventType.GIVEN, round_) for p in coming if p in known),
        ])  # fmt: skip

    def _simulated(self, site: str, person: str, kind: EventType, round_: int) -> ConsentEvent:
        return ConsentEvent(
            event_id=f"simulated-{kind}-{round_}-{hashlib.sha256(f'{site}/{person}'.encode()).hexdigest()[:32]}",
            pseudonym=self._pseudonyms[site][person],
            purpose=self.experiment.run.purpose,
            type=kind,
            effective_at=now_micros(),
            lawful_basis="simulated",
        )


def _spent(site: Site) -> tuple[float, float]:
    return max(site.ledger.epsilon(role) for role in Role), site.ledger.budget.epsilon_limit


def _carry(source: Path, target: Path) -> None:
    """An earlier run's registry, as it is now."""
    try:
        copy_database(source, target)
    except (OSError, sqlite3.Error) as error:
        raise ConsentError(f"cannot be taken over ({type(error).__name__})", where=str(source),
                           hint="without the earlier run's registry nobody knows who has left") from None  # fmt: skip


def _derive(seed: int, label: str, name: str) -> bytes:
    return hashlib.sha256(f"confide/simulation/{label}/{seed}/{name}".encode()).digest()


def _share(seed: int, label: str, site: str, person: str) -> float:
    """A uniform per person: who consents does not depend on who else is in the table."""
    return int.from_bytes(_derive(seed, label, f"{site}/{person}")[:6], "big") / 2**48
