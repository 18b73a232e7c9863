"""A site from its folder: what `site.toml` says, and what lies beside it. The factory that a site's agent is given.

Invariants:
1. Policy, schema and label are the operator's: nothing of them comes from a coordinator. The table is encoded once,
   when the site is opened; a run with another schema or label is refused before any record is looked at for it.
2. Logs, ledger and state live as long as the site: many runs stand in each.
3. Run keys touch the disk only under the operator's passphrase; without one they live in the process's memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from confide.clients.data.records import SiteRecords
from confide.clients.data.source import read_source
from confide.clients.enrolment import CONFIG, site_keys
from confide.clients.membership import MEMBERSHIP, Membership
from confide.clients.policy import SitePolicy
from confide.clients.site import Site
from confide.clients.store import SiteStore
from confide.config.site import SiteConfig, load_site
from confide.errors import ConfigError, ConsentError, PolicyError, StorageError
from confide.privacy.consent import Registry
from confide.privacy.consent.storage import holds_registry, shown_address
from confide.privacy.dp import Ledger, RenyiBudget
from confide.privacy.dp.personal import PersonalLosses
from confide.privacy.sealing.vault import Vault
from confide.protocol.keyfiles import site_key
from confide.protocol.roster import given_up_keys

__all__ = ["SiteFolder", "open_site", "read_records"]

#: Deployed sites protect persons, never single records.
_UNIT = "subject"
_ENVIRONMENT, _URL = "env:", "://"


@dataclass(frozen=True, slots=True)
class SiteFolder:
    """Where everything of a site lies."""

    folder: Path
    config: SiteConfig

    @classmethod
    def read(cls, folder: Path) -> SiteFolder:
        """A folder that `confide site init` has made.

        Raises:
            ConfigError: There is no site in it, or its `site.toml` is not one.
        """
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"holds no {CONFIG}", where=str(folder), hint="make a site with: confide site init")
        return cls(folder, load_site(folder / CONFIG))

    @property
    def state(self) -> Path:
        """The state of its runs."""
        return self.folder / self.config.folders.state / "state.db"

    @property
    def vault(self) -> Path:
        """Run keys, encrypted."""
        return self.folder / self.config.folders.state / "vault"

    @property
    def ledger(self) -> Path:
        """The privacy ledger's folder."""
        return self.folder / self.config.folders.ledger

    @property
    def federated_log(self) -> Path:
        """The log that may travel."""
        return self.folder / self.config.folders.logs / "federated.db"

    @property
    def local_log(self) -> Path:
        """The log that never leaves."""
        return self.folder / self.config.folders.logs / "local.db"

    @property
    def site_key(self) -> Path:
        """The site-lifetime key."""
        return self.folder / self.config.folders.site_key

    @property
    def agent(self) -> Path:
        """The agent's own files."""
        return self.folder / "agent"

    @property
    def registry(self) -> Path | str:
        """The consent registry: a file, or a database's URL.

        Raises:
            ConfigError: The environment does not hold it.
        """
        named = self.config.folders.consent
        if named.startswith(_ENVIRONMENT):
            variable = named.removeprefix(_ENVIRONMENT)
            named = os.environ.get(variable, "")
            if not named:
                raise ConfigError("is not in the environment", where=f"variable {variable}",
                                  hint="set it to the registry's URL; see site.toml [folders] consent")  # fmt: skip
        return named if _URL in named else self.folder / named

    def budget(self) -> RenyiBudget:
        """The budget that the ledger is fixed with."""
        return RenyiBudget.for_limit(self.config.policy.ledger_epsilon_limit, self.config.policy.delta)


def read_records(site: SiteFolder) -> SiteRecords:
    """The site's table, encoded.

    Raises:
        ConfigError: `site.toml` does not say how.
        DataError: The table cannot be read, or does not fit.
    """
    data, schema = site.config.data, site.config.schema_
    missing = "[schema]" if schema is None else "[data] label" if data.label is None else None
    if schema is None or data.label is None:
        raise ConfigError(f"names no {missing}", where=str(site.folder / CONFIG),
                          hint="write down those of the runs that this site takes part in")  # fmt: skip
    # Where bounds are still to be learned the site takes part in the run that learns them, if its policy allows it, and
    # in no other: its operator writes them down afterwards, as he does with everything that his table is encoded with.
    return SiteRecords.build(
        read_source(data, site.folder), schema=schema, label=data.label, subject=data.subject, unit=_UNIT,
        where=data.file or "site.toml [data] query",
    )  # fmt: skip


def open_site(folder: str, passphrase: str | None = None) -> Site:
    """The site of a folder.

    Args:
        folder: As `confide site init` made it, with a `site.toml` that its operator has filled in.
        passphrase: Of its keys; run keys are kept across restarts under it.

    Raises:
        ConfideError: Something of it is missing, or does not hold.
    """
    place = SiteFolder.read(Path(folder))
    config, policy = place.config, SitePolicy.of(place.config)
    membership = Membership(place.folder / MEMBERSHIP)
    me = membership.standing.me
    if (config.name, config.policy.population) != (me.site, me.population):
        raise PolicyError("name and population are not those of the roster", where=str(place.folder / CONFIG),
                          hint=f'write name = "{me.site}" and [policy] population = {me.population}')  # fmt: skip
    identity = site_keys(place.folder, passphrase).identity
    records = read_records(place)
    if not place.site_key.is_file():  # another one would give every person another role
        raise ConfigError("is not there", where=str(place.site_key), hint="restore it from the newest backup")
    if not holds_registry(place.registry):  # a mistyped address is no new and empty registry
        raise ConsentError("holds no consent registry", where=shown_address(place.registry),
                           hint="check site.toml [folders] consent; confide consent init makes one")  # fmt: skip
    _make_folders(place)
    key = site_key(place.site_key, passphrase)
    ledger = Ledger(place.ledger / "ledger.db", place.budget(), _UNIT, config.policy.held_out)
    former = given_up_keys(membership.standing.accepted, me.site)
    return Site(
        identity=identity,
        policy=policy,
        membership=membership,
        records=records,
        registry=Registry(place.registry, key),
        ledger=ledger,
        personal=PersonalLosses(place.ledger / "personal.db"),
        key=key,
        store=SiteStore(place.state),
        log=identity.open_log(place.federated_log, "federated", config.federation, former),
        local_log=identity.open_log(place.local_log, "local", config.federation, former),
        device=config.device.kind,
        vault=None if passphrase is None else Vault(place.vault, passphrase),
    )


def _make_folders(place: SiteFolder) -> None:
    for folder in (place.ledger, place.state.parent, place.federated_log.parent, place.agent):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot be made: {error.strerror}", where=str(folder)) from None
