"""Where a site keeps what its answers about persons are made from: a deployed site's folder, or a simulated run's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from confide.clients.enrolment import CONFIG
from confide.errors import ConfigError, ConsentError
from confide.privacy.consent import Registry, SiteKey
from confide.privacy.consent.storage import holds_registry, shown_address
from confide.protocol.keyfiles import site_key

__all__ = ["SiteFiles", "sites_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFiles:
    """Where a site keeps what the answer is made from. What is of single runs (`state`, `log`, `snapshots`) may be
    missing: older runs lie elsewhere."""

    site: str
    registry: Path | str
    key: Path
    ledger: Path
    personal: Path
    state: Path
    log: Path
    snapshots: Path
    passphrase: str | None = None

    @classmethod
    def of(cls, site: str, folder: Path, ledger: Path) -> SiteFiles:
        """The files of a site whose run files lie in one folder, and what outlives runs in another."""
        return cls(
            site=site, registry=folder / "consent.db", key=ledger / "site.key", ledger=ledger / "ledger.db",
            personal=ledger / "personal.db", state=folder / "state.db", log=folder / "federated.db",
            snapshots=folder / "snapshots.db",
        )  # fmt: skip

    @classmethod
    def deployed(cls, folder: Path, passphrase: str | None = None) -> SiteFiles:
        """The files of a site that its `site.toml` names; all its runs are in them.

        Args:
            folder: As `confide site init` made it.
            passphrase: Of its keys.

        Raises:
            ConfigError: There is no site in it, or its `site.toml` is not one.
        """
        from confide.clients.assembly import SiteFolder

        place = SiteFolder.read(folder)
        return cls(
            site=place.config.name, registry=place.registry, key=place.site_key, ledger=place.ledger / "ledger.db",
            personal=place.ledger / "personal.db", state=place.state, log=place.federated_log,
            snapshots=place.state.with_name("snapshots.db"), passphrase=passphrase,
        )  # fmt: skip

    def open_registry(self) -> tuple[Registry, SiteKey]:
        """The consent registry and the site key, neither of which is made.

        Raises:
            ConsentError: One of them is missing, or cannot be read.
        """
        hint = "name the site's folder and its ledger folder"
        if not self.key.is_file():
            raise ConsentError("is missing", where=str(self.key), hint=hint)
        if not holds_registry(self.registry):
            raise ConsentError("is missing", where=shown_address(self.registry), hint=hint)
        key = site_key(self.key, self.passphrase)
        return Registry(self.registry, key), key


def sites_of(folder: Path, ledger: Path | None = None, passphrase: str | None = None) -> list[SiteFiles]:
    """The sites whose files lie in a folder: the one whose `site.toml` does, or those of a simulated run.

    Args:
        folder: A deployed site's, or a run's output folder.
        ledger: Where a run's sites have their ledgers; None: `ledgers/` in the folder.
        passphrase: Of a deployed site's keys.

    Raises:
        ConfigError: It holds no site, or a ledger folder is named beside a `site.toml` that names it.
    """
    if (folder / CONFIG).is_file():
        if ledger is not None:
            raise ConfigError("is named by the site's own site.toml", where=f"--ledger {ledger}", hint="leave it out")
        return [SiteFiles.deployed(folder, passphrase)]
    found = sorted(p for p in (folder / "sites").glob("*") if (p / "consent.db").is_file())
    if not found:
        raise ConfigError("holds no site (site.toml, or sites/NAME/consent.db)", where=str(folder),
                          hint="give a site's folder, or the output folder of a run, at the site")  # fmt: skip
    return [SiteFiles.of(p.name, p, (ledger or folder / "ledgers") / p.name) for p in found]
