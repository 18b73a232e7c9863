"""A site's folder: its keys, made here and never sent, and what it has accepted of the federation's roster.

Invariants:
1. A private key is written once, for its owner only, and never leaves the folder.
2. What a signature promises is durable before the signature exists (`Membership.countersign`).
3. What lies on the disk is believed only after its signatures have been verified again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from pydantic import ValidationError

from confide.errors import ConfigError, SealingError, StorageError
from confide.privacy.files import write_private
from confide.protocol.identity import Identity
from confide.protocol.keyfiles import read_key, write_key
from confide.protocol.provisioning import Countersignature
from confide.protocol.roster import Roster, RosterMember, SignedRoster, required_keys, sign_roster, verify_chain
from confide.protocol.standing import Standing

if TYPE_CHECKING:
    from confide.protocol.manifest import Manifest

__all__ = ["KEYS", "MEMBERSHIP", "NEXT_KEYS", "Membership", "SiteKeys"]

#: Names in a site's folder: its keys, those that it is changing to, and its memory of the roster.
KEYS, NEXT_KEYS, MEMBERSHIP = "keys", "keys.next", "membership.json"
_SIGNING, _EXCHANGE, _NODE = "signing.key", "exchange.key", "node.key"


@dataclass(frozen=True, slots=True, repr=False)
class SiteKeys:
    """A site's private keys: Ed25519 signs, X25519 is encrypted to, P-384 is its SuperNode's."""

    identity: Identity
    exchange: x25519.X25519PrivateKey
    node: ec.EllipticCurvePrivateKey

    @classmethod
    def generate(cls, identity: Identity) -> SiteKeys:
        """The other two for a signing key, from the operating system's randomness."""
        return cls(identity, x25519.X25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def load(cls, folder: Path, name: str, passphrase: str | None = None) -> SiteKeys:
        """Read them.

        Raises:
            ConfigError: One is missing, open to others, encrypted without a passphrase, or no such key.
            SealingError: A wrong passphrase.
        """
        signing = _parse(folder / _SIGNING, passphrase, load_pem_private_key)
        exchange = _parse(folder / _EXCHANGE, passphrase, load_pem_private_key)
        node = _parse(folder / _NODE, passphrase, load_ssh_private_key)
        if not isinstance(signing, ed25519.Ed25519PrivateKey):
            raise _misplaced(folder / _SIGNING)
        if not isinstance(exchange, x25519.X25519PrivateKey):
            raise _misplaced(folder / _EXCHANGE)
        if not isinstance(node, ec.EllipticCurvePrivateKey):
            raise _misplaced(folder / _NODE)
        return cls(Identity(name, signing), exchange, node)

    def save(self, folder: Path, passphrase: str | None = None) -> None:
        """Write them.

        Raises:
            StorageError: There are keys already, or the disk does not take them.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        for name, key in ((_SIGNING, self.identity.key), (_EXCHANGE, self.exchange)):
            write_key(folder / name, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), passphrase)
        node = self.node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        write_key(folder / _NODE, node, passphrase)

    def member(self, population: int) -> RosterMember:
        """The public side, as it stands in a roster."""
        return RosterMember(
            site=self.identity.name,
            signing_key=self.identity.public_key.hex(),
            exchange_key=self.exchange.public_key().public_bytes_raw().hex(),
            node_key=self.node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
            population=population,
        )


class Membership:
    """A site's durable memory of the roster. Read anew whenever it is asked: another process may have confirmed.

    Args:
        path: Its file; None for a site whose signing key is in memory only, and with it all that it could promise.
        first: What a new site starts from, where there is no file yet.
    """

    def __init__(self, path: Path | None, first: Standing | None = None) -> None:
        self._path, self._memory = path, first
        if path is not None and first is not None and not path.exists():
            self._write(first)

    @property
    def standing(self) -> Standing:
        """What is remembered.

        Raises:
            ConfigError: There is no such file, or it is not one.
            SealingError: The accepted chain does not hold: the file was edited.
        """
        if self._path is None:
            if self._memory is None:
                raise ConfigError("a site without a folder remembers no roster", where="membership")
            return self._memory
        try:
            found = Standing.model_validate_json(self._path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=str(self._path),
                              hint="name the folder that confide site init made") from None  # fmt: skip
        except ValidationError:
            raise ConfigError("is not a site's memory of a roster", where=str(self._path),
                              hint="restore it from the newest backup of this folder") from None  # fmt: skip
        if found.accepted:
            verify_chain(found.accepted)
        return found

    def admit(self, manifest: Manifest) -> str:
        """Digest of the accepted roster, if it is the run's and all of the run's members stand in it.

        Raises:
            PolicyError: It is not, or they do not.
        """
        self.standing.admit(manifest)
        return manifest.roster

    def review(self, chain: Sequence[SignedRoster]) -> Roster:
        """What would be signed; see `Standing.review`."""
        return self.standing.review(chain)

    def countersign(
        self, chain: Sequence[SignedRoster], keys: SiteKeys, new: SiteKeys | None = None
    ) -> Countersignature:
        """Sign the last version of a chain; what comes before it is accepted first.

        Args:
            chain: From the first version to the proposal.
            keys: This site's.
            new: Those that it is changing to, where the version holds them.

        Raises:
            SealingError: It may not be signed here.
        """
        with self._locked():
            standing = self.standing
            roster = standing.review(chain)
            held = standing.roster
            if held is not None and len(chain) > 1 and held.version < chain[-2].roster.version:
                standing = standing.accept(chain[:-1])
            standing = standing.promise(chain)
            signers = _signers(standing, chain, [k for k in (keys, new) if k is not None])
            self._write(standing)
        signatures: dict[str, str] = {}
        for signer in signers:
            signatures |= sign_roster(roster, signer)
        return Countersignature(
            federation=roster.federation, site=standing.me.site, version=roster.version, roster=roster.digest,
            signatures=signatures,
        )  # fmt: skip

    def accept(self, chain: Sequence[SignedRoster]) -> Roster:
        """Take a complete version for the one that holds.

        Raises:
            SealingError: It is not complete, older, or a fork.
        """
        with self._locked():
            standing = self.standing.accept(chain)
            self._write(standing)
        return chain[-1].roster

    def change_to(self, member: RosterMember) -> None:
        """Remember the keys that this site wants to change to."""
        with self._locked():
            self._write(self.standing.model_copy(update={"next_me": member}))

    def _write(self, standing: Standing) -> None:
        self._memory = standing
        if self._path is None:
            return
        try:
            write_private(self._path, standing.model_dump_json().encode())
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(self._path),
                               hint="nothing was signed") from None  # fmt: skip

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: two that read the same memory could sign two versions."""
        if self._path is None:
            yield
            return
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _signers(standing: Standing, chain: Sequence[SignedRoster], keys: Sequence[SiteKeys]) -> list[Identity]:
    """Whose signatures this site owes to a version: of its entry there and, where its keys change, of the old one."""
    roster, previous = chain[-1].roster, chain[-2].roster if len(chain) > 1 else None
    mine, population = roster.member(standing.me.site), standing.me.population
    entries = [(k, k.member(population)) for k in keys]
    if mine not in [entry for _, entry in entries]:
        raise SealingError("holds keys that this site has no private side of", where=roster.where)
    held = [k for k, entry in entries if entry in (mine, standing.me)]
    if standing.me == mine:  # whose entry stays as it is owes this one signature, however many members there are
        return [k.identity for k in held]
    required = required_keys(roster, previous)
    return [k.identity for k in held if k.identity.public_key.hex() in required]


def _parse(path: Path, passphrase: str | None, load: Callable[[bytes, None], object]) -> object:
    try:
        return load(read_key(path, passphrase), None)
    except ValueError:
        raise _misplaced(path) from None


def _misplaced(path: Path) -> ConfigError:
    return ConfigError("is not the key that belongs here", where=str(path), hint="restore it from the backup")
