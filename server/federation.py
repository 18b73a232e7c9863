"""The coordinator's folder: its key, its certificates, the chain of rosters, and the one proposal under way.

Nothing here is trusted by any site: what makes a version count are the signatures of the members.

The number of a proposal that was shown to somebody (in a kit) is never used again: a site may have signed it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confide.errors import ConfigError, PolicyError, SealingError, StorageError
from confide.privacy.files import write_atomically
from confide.protocol.identity import Identity
from confide.protocol.keyfiles import read_key, write_key
from confide.protocol.provisioning import (
    Countersignature,
    Kit,
    SignedKit,
    SignedRequest,
    certificate_digest,
    check_request,
    sign_kit,
)
from confide.protocol.roster import (
    COORDINATOR,
    Change,
    FederationName,
    Roster,
    RosterMember,
    SignedRoster,
    first_roster,
    next_roster,
    sign_roster,
    verify_chain,
)
from confide.server.certificates import host_of, make_authority, make_server_certificate

__all__ = ["AUTHORITY", "SERVER_CERTIFICATE", "SERVER_KEY", "FederationFolder", "FederationState"]

#: Names in the folder. The server's key is in the clear (mode 0600): the web server reads it by itself.
STATE, KEY, AUTHORITY_KEY = "federation.json", "coordinator.key", "ca.key"
AUTHORITY, SERVER_KEY, SERVER_CERTIFICATE = "ca.crt", "server.key", "server.crt"
#: Where a new authority and its server certificate wait until all sites have confirmed it.
_NEXT = "next"


class FederationState(BaseModel):
    """`federation.json`.

    Attributes:
        name: The federation's name.
        endpoint: `host:port` that sites connect to.
        chain: Complete versions.
        proposal: The version that collects signatures, if there is one.
        shown: Was the proposal handed to anybody?
        highest: The highest version number that was ever shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    name: FederationName
    endpoint: str
    chain: tuple[SignedRoster, ...] = ()
    proposal: SignedRoster | None = None
    shown: bool = False
    highest: Annotated[int, Field(ge=0)] = 0

    @property
    def roster(self) -> Roster | None:
        """The newest complete version."""
        return self.chain[-1].roster if self.chain else None

    @property
    def newest(self) -> tuple[SignedRoster, ...]:
        """The chain with the proposal at its end, if there is one."""
        return self.chain if self.proposal is None else (*self.chain, self.proposal)

    @property
    def missing(self) -> dict[str, str]:
        """Keys that have not signed the proposal yet, with whose they are."""
        return {} if self.proposal is None else self.proposal.missing(self.roster)


class FederationFolder:
    """See the module.

    Args:
        folder: Made by `create`.

    Raises:
        ConfigError: There is no federation in it, or its file is not one.
        SealingError: The chain in it does not hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / STATE
        try:
            self.state = FederationState.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=str(path),
                              hint="make a federation with: confide federation init") from None  # fmt: skip
        except ValidationError:
            raise ConfigError("is not a federation's state", where=str(path),
                              hint="restore it from the newest backup of this folder") from None  # fmt: skip
        if self.state.newest:
            verify_chain(self.state.newest, proposal=self.state.proposal is not None)

    @classmethod
    def create(
        cls, folder: Path, name: str, endpoint: str, now: dt.datetime, passphrase: str | None
    ) -> FederationFolder:
        """Make keys and certificates, and an empty federation.

        Raises:
            ConfigError: There is one already, or name or endpoint are not such.
            StorageError: It cannot be written.
        """
        if (folder / STATE).exists() or (folder / KEY).exists():
            raise ConfigError("holds a federation already", where=str(folder), hint="choose another folder")
        host_of(endpoint)
        try:
            state = FederationState(name=name, endpoint=endpoint)
        except ValidationError:
            raise ConfigError(f"{name[:80]!r} cannot be a federation's name", where="--name",
                              hint="use letters, digits, dots, dashes; at most 64") from None  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot be made: {error.strerror}", where=str(folder)) from None
        identity = Identity.generate(COORDINATOR)
        write_key(folder / KEY, _pem(identity.key), passphrase)
        _write_state(folder, state)
        made = cls(folder)
        made._new_authority(folder, now, passphrase)
        return made

    def identity(self, passphrase: str | None) -> Identity:
        """The coordinator's name and key.

        Raises:
            ConfigError: The key cannot be read.
        """
        key = load_pem_private_key(read_key(self.folder / KEY, passphrase), None)
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ConfigError("is not the coordinator's key", where=str(self.folder / KEY))
        return Identity(COORDINATOR, key)

    # --- proposals ----------------------------------------------------------------------------------------------

    def add(self, requests: Sequence[SignedRequest], passphrase: str | None) -> Roster:
        """Propose new members; those of a proposal to add others that is under way are taken along.

        Raises:
            SealingError: A request is not authentic, of another federation, or of a site that is a member.
            PolicyError: Another kind of change is under way.
        """
        members = [self._requested(signed) for signed in requests]
        under_way, roster = self.state.proposal, self.state.roster
        if under_way is not None and under_way.roster.change.kind not in ("found", "add"):
            raise self._busy(under_way.roster)
        before = {m.site for m in roster.members} if roster else set()
        if under_way is not None:
            members = [*(m for m in under_way.roster.members if m.site not in before), *members]
        if double := before & {m.site for m in members}:
            raise SealingError(f"{min(double)} is a member already", where=f"roster of {self.state.name}",
                               hint="a site that has new keys: confide federation rotate")  # fmt: skip
        identity = self.identity(passphrase)
        if roster is None:
            key = identity.public_key.hex()
            first = first_roster(
                self.state.name, key, certificate_digest((self.folder / AUTHORITY).read_text()), members, self._number()
            )
            return self._propose(first, identity)
        added = tuple(sorted(m.site for m in members))
        change = Change(kind="add", sites=added)
        return self._propose(next_roster(roster, change, [*roster.members, *members], self._number()), identity)

    def remove(self, site: str, passphrase: str | None) -> Roster:
        """Propose to go on without a member, who is not asked.

        Raises:
            ConfigError: It is no member, or the last one.
        """
        roster = self._settled()
        left = [m for m in roster.members if m.site != site]
        if len(left) == len(roster.members) or not left:
            raise ConfigError(f"{site[:64]!r} is no member, or the last one", where=roster.where,
                              hint=f"members: {', '.join(m.site for m in roster.members)}")  # fmt: skip
        change = Change(kind="remove", sites=(site,))
        return self._propose(next_roster(roster, change, left, self._number()), self.identity(passphrase))

    def rotate(self, signed: SignedRequest, passphrase: str | None, *, lost: bool) -> Roster:
        """Propose a member's new keys.

        Args:
            signed: Its request: signed by the old key too, but where that is lost.
            passphrase: Of the coordinator's keys.
            lost: Is the old key lost? Then everybody else vouches.

        Raises:
            SealingError: The request does not fit.
        """
        roster, member = self._settled(), self._requested(signed)
        old = roster.member(member.site)
        if old is None:
            raise SealingError(f"{member.site} is no member", where=roster.where, hint="confide federation add-site")
        if lost == bool(signed.request.replaces) or (not lost and signed.request.replaces != old.signing_key):
            raise SealingError(
                "the request is not signed by the key that the roster holds" if not lost
                else "the site still has its old key", where=f"request of {member.site}",
                hint="confide site rotate makes a request under both keys; --lost is for a site that made new ones "
                "with confide site init",
            )  # fmt: skip
        change = Change(kind="replace" if lost else "rotate", sites=(member.site,))
        others = [m for m in roster.members if m.site != member.site]
        return self._propose(next_roster(roster, change, [*others, member], self._number()), self.identity(passphrase))

    def drop(self) -> Roster:
        """Give the proposal up. Whoever has signed it keeps its promise: the next one has a higher number.

        Raises:
            ConfigError: There is none.
        """
        proposal = self.state.proposal
        if proposal is None:
            raise ConfigError("no change is under way", where=str(self.folder))
        self._save(proposal=None, shown=False)
        return proposal.roster

    def collect(self, countersignature: Countersignature) -> bool:
        """Add a site's signatures to the proposal.

        Returns:
            Is the version complete now?

        Raises:
            SealingError: They are not for it, or do not hold.
        """
        proposal, where = self.state.proposal, f"countersignature of {countersignature.site}"
        given = (countersignature.federation, countersignature.version, countersignature.roster)
        if self.state.roster is not None and given[2] == self.state.roster.digest:
            return True
        if proposal is None or given != (self.state.name, proposal.roster.version, proposal.roster.digest):
            raise SealingError(f"is for version {countersignature.version} of {countersignature.federation} as the "
                               "site was shown it, not for the version that collects signatures", where=where,
                               hint="make a new kit for the site: confide federation kit")  # fmt: skip
        signed = proposal.with_signatures(countersignature.signatures)
        verify_chain((*self.state.chain, signed), proposal=True)
        if signed.missing(self.state.roster):
            self._save(proposal=signed)
            return False
        if signed.roster.change.kind == "authority":
            for path in sorted((self.folder / _NEXT).iterdir()):
                path.replace(self.folder / path.name)
        self._save(chain=(*self.state.chain, signed), proposal=None, shown=False)
        return True

    def kit(self, site: str, passphrase: str | None) -> SignedKit:
        """What a site needs to confirm, to catch up, and to connect.

        Raises:
            ConfigError: The site is in neither version.
        """
        newest = self.state.newest
        if not newest or newest[-1].roster.member(site) is None:
            known = ", ".join(m.site for m in newest[-1].roster.members) if newest else "none yet"
            raise ConfigError(f"{site[:64]!r} is no member", where=str(self.folder), hint=f"members: {known}")
        kit = Kit(site=site, endpoint=self.state.endpoint, certificate=self._certificate(newest[-1].roster),
                  chain=newest)  # fmt: skip
        if self.state.proposal is not None:
            # Durable before anybody sees it: its number is used up.
            highest = max(self.state.highest, self.state.proposal.roster.version)
            self._save(shown=True, highest=highest)
        return sign_kit(kit, self.identity(passphrase))

    # --- certificates -------------------------------------------------------------------------------------------

    def renew(self, now: dt.datetime, passphrase: str | None) -> x509.Certificate:
        """A new server key and certificate under the authority that the sites know. No site is asked.

        Raises:
            ConfigError: The authority is at its end, or its key cannot be read.
        """
        authority = x509.load_pem_x509_certificate((self.folder / AUTHORITY).read_bytes())
        key = load_pem_private_key(read_key(self.folder / AUTHORITY_KEY, passphrase), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError("is not the authority's key", where=str(self.folder / AUTHORITY_KEY))
        return self._new_server(self.folder, key, authority, now)

    def renew_authority(self, now: dt.datetime, passphrase: str | None) -> Roster:
        """Propose a new authority; the present one is in use until everybody has confirmed."""
        roster, identity, folder = self._settled(), self.identity(passphrase), self.folder / _NEXT
        folder.mkdir(exist_ok=True)
        (folder / AUTHORITY_KEY).unlink(missing_ok=True)
        digest = self._new_authority(folder, now, passphrase)
        change = Change(kind="authority", sites=())
        return self._propose(next_roster(roster, change, roster.members, self._number(), digest), identity)

    def _new_authority(self, folder: Path, now: dt.datetime, passphrase: str | None) -> str:
        key, certificate = make_authority(self.state.name, now)
        write_key(folder / AUTHORITY_KEY, _pem(key), passphrase)
        write_atomically(folder / AUTHORITY, certificate.public_bytes(Encoding.PEM))
        self._new_server(folder, key, certificate, now)
        return certificate_digest((folder / AUTHORITY).read_text())

    def _new_server(
        self, folder: Path, authority_key: ec.EllipticCurvePrivateKey, authority: x509.Certificate, now: dt.datetime
    ) -> x509.Certificate:
        key, certificate = make_server_certificate(self.state.endpoint, authority_key, authority, now)
        write_atomically(folder / SERVER_KEY, _pem(key), mode=0o600)
        write_atomically(folder / SERVER_CERTIFICATE, certificate.public_bytes(Encoding.PEM))
        return certificate

    def _certificate(self, roster: Roster) -> str:
        for path in (self.folder / AUTHORITY, self.folder / _NEXT / AUTHORITY):
            if path.is_file() and certificate_digest(pem := path.read_text()) == roster.authority:
                return pem
        raise SealingError("is not the certificate that the roster names", where=str(self.folder / AUTHORITY))

    # --- small things -------------------------------------------------------------------------------------------

    def _requested(self, signed: SignedRequest) -> RosterMember:
        request = check_request(signed)
        if request.federation != self.state.name:
            raise SealingError(f"is for federation {request.federation}, this is {self.state.name}",
                               where=f"request of {request.member.site}")  # fmt: skip
        return request.member

    def _settled(self) -> Roster:
        """The complete roster, where nothing is under way."""
        if self.state.proposal is not None:
            raise self._busy(self.state.proposal.roster)
        if self.state.roster is None:
            raise ConfigError("has no member yet", where=f"federation {self.state.name}",
                              hint="confide federation add-site REQUEST.json")  # fmt: skip
        return self.state.roster

    def _busy(self, roster: Roster) -> PolicyError:
        sites = ", ".join(roster.change.sites)
        return PolicyError(
            f"version {roster.version} ({roster.change.kind} {sites}) still collects signatures", where=roster.where,
            hint="collect them, or give it up with: confide federation drop",
        )  # fmt: skip

    def _number(self) -> int:
        """The next version's: above every one that anybody has been shown."""
        return max(self.state.highest, self.state.roster.version if self.state.roster else 0) + 1

    def _propose(self, roster: Roster, identity: Identity) -> Roster:
        proposal = SignedRoster(roster=roster, signatures=sign_roster(roster, identity))
        verify_chain((*self.state.chain, proposal), proposal=True)
        self._save(proposal=proposal, shown=False)
        return roster

    def _save(self, **changes: object) -> None:
        state = self.state.model_copy(update=changes)
        _write_state(self.folder, state)
        self.state = state


def _write_state(folder: Path, state: FederationState) -> None:
    try:
        write_atomically(folder / STATE, state.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(folder / STATE)) from None


def _pem(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
