"""What lets a simulated run go on after its process was killed: one folder beside the run's own files, until it ends.

It holds the manifest, the roster, the sites' run keys (each in a vault), the coordinator's run store, and what the run
was made from. The vaults' passphrase is random and lies beside them (mode 0600), and the parties' signing keys are
derived from it: whoever can read the folder can read the keys. That is a simulation of sites in one place, not
protection of one from another; a deployed site has a passphrase of its operator's. With the end of the run the folder
goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.clients.membership import Membership
from confide.errors import ConfigError, StorageError
from confide.privacy.files import write_atomically, write_private
from confide.privacy.sealing.keystream import expand
from confide.privacy.sealing.vault import Vault
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.roster import SignedRoster
from confide.server.runs import RunStore

__all__ = ["KEPT", "Keeping", "Parties", "digest_of_files"]

#: The folder's name inside a run's.
KEPT = "resume"
_IDENTITY, _FACTS, _ROSTER = "identity", "made_from.json", "roster.json"


class Parties(Protocol):
    """A federation whose parties have made their own keys."""

    @property
    def chain(self) -> tuple[SignedRoster, ...]:
        """The roster that all of them have signed."""

    def identity(self, party: str) -> Identity:
        """A party's signing key."""

    def member(self, name: str) -> Membership:
        """What a site has accepted of the roster."""


class Keeping:
    """See the module.

    Args:
        folder: Made where it does not exist.
        attached: This process works for the one that holds the run, which has it locked.

    Raises:
        ConfigError: Another process works on the run.
    """

    def __init__(self, folder: Path, *, attached: bool = False) -> None:
        self.folder, self._lock = folder, None if attached else _locked(folder)
        #: Who has made the parties' keys and roster, where a real federation was provisioned for the run.
        self.parties: Parties | None = None
        path = folder / "passphrase"
        if not path.is_file():
            write_private(path, secrets.token_hex(32).encode())
        self.passphrase = path.read_text()

    def vault(self, party: str) -> Vault:
        """Where a party keeps its keys."""
        return Vault(self.folder / "keys" / party, self.passphrase, random=True)

    def identity(self, party: str) -> Identity:
        """A party's signing key: the same in every process of the run, and gone with its passphrase."""
        if self.parties is not None:
            return self.parties.identity(party)
        if (self.folder / "keys" / party / f"{_IDENTITY}.vault").is_file():  # of a run that an earlier version began
            data = self.vault(party).load(_IDENTITY)
            return Identity(party, Ed25519PrivateKey.from_private_bytes(data or b""))
        # Derived from the run's one secret: a file for each of thousands would be read by whoever reads the passphrase.
        seed = expand(bytes.fromhex(self.passphrase), b"simulation/identity", party.encode())
        return Identity(party, Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def manifest(self) -> Manifest | None:
        """The run, once everything that belongs to it has been made."""
        path = self.folder / "manifest.json"
        return Manifest.from_bytes(path.read_bytes()) if path.is_file() else None

    @property
    def chain(self) -> tuple[SignedRoster, ...]:
        """The roster that the parties have signed; empty before they have."""
        if self.parties is not None:
            return self.parties.chain
        path = self.folder / _ROSTER
        return (SignedRoster.model_validate_json(path.read_bytes()),) if path.is_file() else ()

    def keep_chain(self, chain: Sequence[SignedRoster]) -> None:
        """Keep a simulation's roster, of which there is one version."""
        if self.parties is None:
            write_atomically(self.folder / _ROSTER, chain[-1].model_dump_json().encode())

    def begin(self, manifest: Manifest) -> None:
        """Everything has been made: from here on the run is resumed, not begun again."""
        write_atomically(self.folder / "manifest.json", manifest.to_bytes())

    def store(self) -> RunStore:
        """The coordinator's."""
        return RunStore(f"sqlite:///{self.folder / 'runs.db'}")

    def note(self, facts: Mapping[str, str]) -> None:
        """Keep what the run was made from."""
        write_atomically(self.folder / _FACTS, json.dumps(facts).encode())

    def facts(self) -> dict[str, str] | None:
        """What the run was made from; None where that was not noted any more."""
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / _FACTS).read_text())
            return {str(k): str(v) for k, v in found.items()}
        return None

    def clear_but_facts(self) -> None:
        """Forget a run that was never wholly made, but not what it is to be made from."""
        for path in self.folder.iterdir():
            if path.name not in ("lock", "passphrase", _FACTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Let others work on the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def destroy(self) -> None:
        """The run has ended: its keys go. They are encrypted under the passphrase, and that goes first."""
        path = self.folder / "passphrase"
        if path.is_file():
            with path.open("r+b") as stream:
                stream.write(secrets.token_bytes(path.stat().st_size))
                stream.flush()
                os.fsync(stream.fileno())
        shutil.rmtree(self.folder, ignore_errors=True)


def _locked(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
    except BlockingIOError:
        os.close(lock)
        raise ConfigError("another process works on this run", where=str(folder.parent),
                          hint="wait until it ends, or end it first") from None  # fmt: skip
    return lock


def digest_of_files(paths: Iterable[Path]) -> str:
    """Names the content of these files.

    Raises:
        StorageError: One cannot be read.
    """
    hasher = hashlib.sha256()
    for path in paths:
        try:
            hasher.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise StorageError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return hasher.hexdigest()
