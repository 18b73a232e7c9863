"""How a simulated site is made, or opened again, from one table: the same class that is deployed. And its officers, who
record who consents before the run and who leaves during it.

Whatever process a site lives in, this is how it gets there.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

from confide.clients.membership import Membership
from confide.clients.policy import SitePolicy
from confide.clients.site import Site
from confide.clients.store import SiteStore
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
from confide.privacy.dp import Ledger, RenyiBudget
from confide.privacy.dp.personal import PersonalLosses
from confide.privacy.sealing.vault import Vault
from confide.protocol.identity import Identity
from confide.protocol.roster import COORDINATOR
from confide.simulations.scenario import PoisonedSite
from confide.simulations.sources import Sources

__all__ = ["FEDERATION", "SiteMaker"]

FEDERATION = "simulation"


class SiteMaker:
    """Makes the sites of one run.

    Args:
        sources: What the sites are made from.
        run_folder: Where each site keeps this run's state and registry.
        ledger_folder: Where each site keeps what outlives a run: ledger and key.
        coordinator: The coordinator's public key.
        identity: A party's signing key.
        member: A site's membership, with the roster accepted.
        vault: Where a party keeps run keys; None: in memory only.
        carried: Folder of an earlier run's sites, whose registries hold as they are now; None: consent is recorded.
    """

    def __init__(
        self,
        sources: Sources,
        run_folder: Path,
        ledger_folder: Path,
        *,
        coordinator: bytes,
        identity: Callable[[str], Identity],
        member: Callable[[str], Membership],
        vault: Callable[[str], Vault | None],
        carried: Path | None,
    ) -> None:
        self._sources, self._experiment = sources, sources.experiment
        self._runs, self._ledgers, self._coordinator = run_folder, ledger_folder, coordinator
        self._identity, self._member, self._vault, self._carried = identity, member, vault, carried
        #: Of the sites that were made here: registry, and the pseudonyms of its persons.
        self.registries: dict[str, Registry] = {}
        self.pseudonyms: dict[str, dict[str, bytes]] = {}

    def make(self, name: str) -> Site:
        """Make a site, or open it again."""
        experiment, privacy = self._experiment, self._experiment.privacy
        identity, records = self._identity(name), self._sources.records[name]
        run_folder, ledger_folder = self._runs / name, self._ledgers / name
        run_folder.mkdir(parents=True, exist_ok=True)
        ledger_folder.mkdir(parents=True, exist_ok=True)
        # Splits are reproducible from the seed, but a ledger's first key stays: roles are for ever.
        key = SiteKey.load_or_create(ledger_folder / "site.key", _derive(experiment.run.seed, "site-key", name))
        budget = RenyiBudget.for_limit(privacy.site_epsilon_limit, privacy.delta)
        if self._carried is not None and not (run_folder / "consent.db").exists():
            _carry(self._carried / name / "consent.db", run_folder / "consent.db")
        registry = Registry(run_folder / "consent.db", key)
        self.registries[name] = registry
        self._record_consent(name, registry, key)
        poisoned = {p.site: p.factor for p in experiment.scenario.poisoned}
        kind = partial(PoisonedSite, factor=poisoned[name]) if name in poisoned else Site
        return kind(
            identity=identity,
            policy=self._policy(name),
            membership=self._member(name),
            records=records,
            registry=registry,
            ledger=Ledger(ledger_folder / "ledger.db", budget, privacy.unit, experiment.data.held_out),
            personal=PersonalLosses(ledger_folder / "personal.db"),
            key=key,
            store=SiteStore(run_folder / "state.db"),
            log=identity.open_log(run_folder / "federated.db", "federated", FEDERATION),
            local_log=identity.open_log(run_folder / "local.db", "local", FEDERATION),
            vault=self._vault(name),
        )

    def withdraw_until(self, name: str, round_: int, since: int = 0) -> None:
        """An open site's officers record the withdrawals of the rounds after `since`, up to this one."""
        for withdrawal in self._experiment.consent.withdrawals:
            if since < withdrawal.round <= round_:
                self._withdraw(name, withdrawal.fraction, withdrawal.round)

    def churn(self, name: str, round_: int) -> None:
        """An open site's officers record who comes and goes before a round."""
        churn = self._experiment.scenario.churn
        if churn.withdraw or churn.give:
            self._change(name, churn, round_)

    def _policy(self, name: str) -> SitePolicy:
        experiment, privacy = self._experiment, self._experiment.privacy
        return SitePolicy(
            coordinator=COORDINATOR,
            coordinator_key=self._coordinator,
            federation=FEDERATION,
            purposes=frozenset({experiment.run.purpose}),
            profiles=frozenset({"sealed", "masked", "ckks"} | ({"open"} if experiment.data.public else set())),
            data_are_public=experiment.data.public,
            unsafe_noise=experiment.data.public,
            models=frozenset({"logistic", "mlp", experiment.model.kind}),
            strategies=frozenset({*STRATEGY_OPTIONS, experiment.strategy.kind}),
            held_out=experiment.data.held_out,
            min_sites=experiment.sites.min_sites,
            min_subjects=experiment.sites.min_subjects,
            population=self._sources.population[name],
            max_sites_per_subject=privacy.max_sites_per_subject,
            epsilon_limit=privacy.site_epsilon_limit,
            delta=privacy.delta,
            release=True,
            statistics=True,
            local_steps_limit=experiment.training.local_steps,
        )

    def _record_consent(self, name: str, registry: Registry, key: SiteKey) -> None:
        experiment, records = self._experiment, self._sources.records[name]
        if self._carried is not None:
            self.pseudonyms[name] = registry.pseudonyms(records.persons)
            return
        begun = registry.head() > 0  # what was recorded then stands
        if self._sources.consent is not None:
            here = set(records.persons)
            mine = [e for e in self._sources.consent if e.subject in here]
            asked = {e.subject for e in mine}
            names = registry.enrol(asked - registry.erased(asked))  # nobody is erased before a run that begins
            self.pseudonyms[name] = names
            if not begun:
                registry.append([filed(e, names[e.subject], key) for e in mine])
            return
        fraction = experiment.consent.simulate.fraction if experiment.consent.simulate else 0.0
        seed = experiment.run.seed
        given = [p for p in records.persons if _share(seed, "consent", name, p) < fraction]
        self.pseudonyms[name] = registry.enrol(set(given) - registry.erased(given))
        if not begun:
            registry.append([self.simulated(name, p, EventType.GIVEN, 0) for p in given])

    def _withdraw(self, name: str, fraction: float, round_: int) -> None:
        registry, seed = self.registries[name], self._experiment.run.seed
        standing = registry.snapshot(self._experiment.run.purpose, now_micros()).participants
        leaving = [
            p
            for p, pseudonym in self.pseudonyms[name].items()
            if pseudonym in standing and _share(seed, f"withdraw-{round_}", name, p) < fraction
        ]
        registry.append([self.simulated(name, p, EventType.WITHDRAWN, round_) for p in leaving])

    def _change(self, name: str, churn: Churn, round_: int) -> None:
        """Some who consent withdraw, some who do not give consent, as both stand before the round."""
        registry, seed = self.registries[name], self._experiment.run.seed
        standing = registry.snapshot(self._experiment.run.purpose, now_micros()).participants
        draw = {p: _share(seed, f"churn-{round_}", name, p) for p in self._sources.records[name].persons}
        known = self.pseudonyms[name]
        consents = {p for p in draw if p in known and known[p] in standing}
        coming = [p for p in draw if p not in consents and draw[p] < churn.give]
        known |= registry.enrol(set(coming) - registry.erased(coming))
        registry.append([
            *(self.simulated(name, p, EventType.WITHDRAWN, round_) for p in consents if draw[p] < churn.withdraw),
            *(self.simulated(name, p, EventType.GIVEN, round_) for p in coming if p in known),
        ])  # fmt: skip

    def simulated(self, site: str, person: str, kind: EventType, round_: int) -> ConsentEvent:
        """What an officer records of a person: now, for the run's purpose."""
        return ConsentEvent(
            event_id=f"simulated-{kind}-{round_}-{hashlib.sha256(f'{site}/{person}'.encode()).hexdigest()[:32]}",
            pseudonym=self.pseudonyms[site][person],
            purpose=self._experiment.run.purpose,
            type=kind,
            effective_at=now_micros(),
            lawful_basis="simulated",
        )


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
