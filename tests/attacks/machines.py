"""A federation whose sites' processes and disks are in the attacker's hands."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from confide.clients.site import Site
from confide.clients.store import SiteStore
from confide.privacy.consent import Registry
from confide.privacy.dp import Ledger
from confide.privacy.dp.personal import PersonalLosses
from confide.privacy.sealing import Agreement, Payload
from confide.privacy.sealing.vault import Vault
from tests.attacks.federation import Federation, Sum

PASSPHRASE = "four small honest words"
#: How the names of a site's logs begin, with what SQLite keeps beside them.
LOGS = ("federated.db", "local.db")


class Machines(Federation):
    """A federation whose sites' processes and disks are in the attacker's hands.

    Args:
        vaults: Is every site given a passphrase?
    """

    def __init__(self, folder: Path, *, vaults: bool = False, **options: Any) -> None:
        super().__init__(folder, people={"people": 12}, **options)
        self._copies = 0
        for name in self.names if vaults else ():
            self.sites[name]._vault = Vault(folder / "vaults" / name, PASSPHRASE)

    @property
    def run(self) -> str:
        """Its name."""
        return self.manifest.run

    def place(self, what: str, site: str) -> Path:
        """Where a site's `sites` (state, registry), `vaults`, `ledgers` or `logs` (its two databases) lie."""
        return self.folder / ("sites" if what == "logs" else what) / site

    def entry(self, site: str) -> Path | None:
        """A site's vault entry for the run, if there is one."""
        return next(iter(self.place("vaults", site).glob("run-*.vault")), None)

    def copy(self, *parts: str, sites: Sequence[str] | None = None) -> Callable[[], None]:
        """Copy those parts of each site as they are now; what is returned puts them back, and restarts the sites."""
        self._copies += 1
        kept, names = self.folder.with_name(f"{self.folder.name}-copy-{self._copies}"), sites or self.names
        for name in names:
            for part in parts:
                for path in self._files(part, name):
                    copied = kept / path.relative_to(self.folder)
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, copied)

        def put_back() -> None:
            for name in names:
                self.stop(name)
                for part in parts:
                    for path in self._files(part, name):
                        path.unlink()
                self._put(kept, name)
                self.start(name)

        return put_back

    def _put(self, kept: Path, site: str) -> None:
        for path in kept.glob(f"*/{site}/**/*"):
            if path.is_file():
                shutil.copy2(path, self.folder / path.relative_to(kept))

    def _files(self, part: str, site: str) -> list[Path]:
        """A site's logs lie beside its state, and are a part of their own: one may be put back without the other."""
        found = (p for p in self.place(part, site).rglob("*") if p.is_file())
        if part in ("sites", "logs"):
            found = (p for p in found if p.name.startswith(LOGS) == (part == "logs"))
        return sorted(found)

    def stop(self, site: str) -> None:
        """End a site's process; nothing of its memory is left."""
        self.sites[site].close()

    def start(self, site: str, passphrase: str = PASSPHRASE) -> Site:
        """Start another process on the files that lie there now."""
        old, folder = self.sites[site], self.place("sites", site)
        reopened: dict[str, Any] = {
            "registry": Registry(folder / "consent.db", old._key),
            "personal": PersonalLosses(self.place("ledgers", site) / "personal.db"),
            "ledger": Ledger(self.place("ledgers", site) / "ledger.db", old.ledger.budget,
                             held_out=self.manifest.held_out),
            "store": SiteStore(folder / "state.db"),
            "log": old.identity.open_log(old.log.path, "federated", self.manifest.federation),
            "local_log": old.identity.open_log(old.local_log.path, "local", self.manifest.federation),
            "vault": Vault(self.place("vaults", site), passphrase) if old._vault else None,
        }  # fmt: skip
        kept = {
            name: getattr(old, name) if hasattr(old, name) else getattr(old, f"_{name}")
            for name in inspect.signature(Site.__init__).parameters
            if name not in ("self", *reopened)
        }
        self.world.sites[site] = Site(**kept, **reopened)
        return self.world.sites[site]

    def restart(self, site: str, passphrase: str = PASSPHRASE) -> Site:
        """One after the other."""
        self.stop(site)
        return self.start(site, passphrase)

    def vector(self, site: str) -> tuple[int, np.ndarray[Any, np.dtype[np.float64]]]:
        """The update that waits in a site's memory."""
        pending = self.sites[site]._runs[self.run].pending
        assert pending is not None
        return pending[0], pending[1].copy()

    def paid(self) -> dict[str, tuple[float, dict[str, int]]]:
        """Every site's used budget, and what the first round still costs there."""
        return {s: (self.sites[s].ledger.used(), self.charges(s, 1)) for s in self.names}

    def opened(self, total: Sum, site: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """What a site that works with the attacker reads in a sum."""
        run = self.sites[site]._runs[self.run]
        payload = Payload(total.chunks, tuple(int(t, 16) for t in total.reference.tags))
        agreement = Agreement(total.reference.cohort, total.reference.transcript)
        return run.keys.session.open(payload, run.segments(total.reference.round), agreement).values
