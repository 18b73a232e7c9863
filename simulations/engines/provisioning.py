"""A federation for one simulated run on this machine, founded as operators found one: every site makes its keys and
asks to be admitted, signs the roster that it is shown, and accepts it when all have. The functions are those behind
`confide site` and `confide federation`; what no simulation has is people who compare fingerprints.

It lies with what the run is resumed from, all keys under that folder's passphrase, and goes with it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path

from confide.clients.enrolment import REQUEST, Confirmation, make_site, site_keys
from confide.clients.membership import KEYS, MEMBERSHIP, Membership
from confide.errors import SealingError
from confide.protocol.fingerprint import fingerprint
from confide.protocol.identity import Identity
from confide.protocol.keyfiles import read_key
from confide.protocol.provisioning import Countersignature, SignedRequest, read_document, write_document
from confide.protocol.roster import COORDINATOR, SignedRoster
from confide.server.federation import AUTHORITY, SERVER_CERTIFICATE, SERVER_KEY, FederationFolder
from confide.simulations.keeping import Keeping
from confide.simulations.making import FEDERATION

__all__ = ["LOOPBACK", "ProvisionedParties", "found_parties", "provision"]

LOOPBACK = "127.0.0.1"
_FOLDER, _NODE_KEY, _KIT = "federation", "node.key", "kit.json"
#: Nobody is told this port: agents are told the one that is listened on.
_ANY_PORT = 1


class ProvisionedParties:
    """The coordinator and the sites of a federation in one folder.

    Args:
        folder: The federation's.
        passphrase: Of all keys in it.
    """

    def __init__(self, folder: Path, passphrase: str) -> None:
        self.folder, self._passphrase = folder, passphrase

    @property
    def chain(self) -> tuple[SignedRoster, ...]:
        """The roster that everybody has signed."""
        return self._federation.state.chain

    @property
    def tls(self) -> tuple[Path, Path, Path]:
        """The authority's certificate, the server's, and the server's key."""
        here = self.folder / COORDINATOR
        return here / AUTHORITY, here / SERVER_CERTIFICATE, here / SERVER_KEY

    @property
    def nodes(self) -> dict[str, str]:
        """Each site's public node key."""
        return {member.site: member.node_key for member in self.chain[-1].roster.members}

    def identity(self, party: str) -> Identity:
        """A party's signing key."""
        if party == COORDINATOR:
            return self._federation.identity(self._passphrase)
        return site_keys(self.site(party), self._passphrase).identity

    def member(self, name: str) -> Membership:
        """What a site has accepted."""
        return Membership(self.site(name) / MEMBERSHIP)

    def node_key(self, name: str) -> bytes:
        """A site's private node key."""
        return read_key(self.site(name) / KEYS / _NODE_KEY, self._passphrase)

    def site(self, name: str) -> Path:
        """A site's folder in the federation's."""
        return self.folder / "sites" / name

    @property
    def _federation(self) -> FederationFolder:
        return FederationFolder(self.folder / COORDINATOR)


def found_parties(keeping: Keeping) -> ProvisionedParties | None:
    """The federation that was provisioned for a run; None where its parties are the simulation's own."""
    folder = keeping.folder / _FOLDER
    return ProvisionedParties(folder, keeping.passphrase) if folder.is_dir() else None


def provision(keeping: Keeping, populations: Mapping[str, int]) -> ProvisionedParties:
    """Found a federation for a run.

    Args:
        keeping: What the run is resumed from.
        populations: Each site's declared population.

    Raises:
        ConfigError: A name is none, or the folder is in use.
        SealingError: The roster did not come to be complete.
    """
    parties = ProvisionedParties(keeping.folder / _FOLDER, keeping.passphrase)
    secret, now = keeping.passphrase, dt.datetime.now(dt.UTC)
    federation = FederationFolder.create(
        parties.folder / COORDINATOR, FEDERATION, f"{LOOPBACK}:{_ANY_PORT}", now, secret
    )
    for name, population in populations.items():
        make_site(parties.site(name), name, FEDERATION, population, secret)
    federation.add([read_document(parties.site(n) / REQUEST, SignedRequest) for n in populations], secret)
    for name in populations:
        signed = _confirm(parties, name, secret)
        FederationFolder(parties.folder / COORDINATOR).collect(read_document(signed, Countersignature))
    if not parties.chain:
        raise SealingError("is not signed by everybody", where=f"roster of {FEDERATION}")
    for name in populations:
        _confirm(parties, name, secret)
    return parties


def _confirm(parties: ProvisionedParties, name: str, passphrase: str) -> Path:
    """A site's operator is handed a kit, and confirms it; the signature, where one is asked for."""
    kit = parties.site(name) / _KIT
    write_document(kit, FederationFolder(parties.folder / COORDINATOR).kit(name, passphrase))
    confirmation = Confirmation(parties.site(name), kit)
    outcome = confirmation.confirm(fingerprint(confirmation.roster), passphrase)
    return outcome.file or kit
