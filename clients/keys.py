"""A site's keys for one run: its ephemeral X25519 key, its peers' authenticated ones, the run secret, and the key that
its own state of the run is encrypted under.

Invariants:
1. An ephemeral key counts only inside its owner's signed `join` reply, checked against the roster.
2. The run secret counts only inside its maker's signed `secret` reply, at this site's own place in it, for one epoch.
3. They touch a disk only in a vault, if the operator gave one a passphrase; without it a site whose process ends has
   left the run. Destroyed means gone from both.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence

from confide.errors import LeftError, SealingError
from confide.privacy.atrest import new_key
from confide.privacy.digest import framed
from confide.privacy.sealing import Profile, Session
from confide.privacy.sealing.keystream import derive
from confide.privacy.sealing.vault import Vault
from confide.privacy.sealing.wrapping import new_ephemeral, unwrap, wrap
from confide.protocol.envelope import MAX_REPLY_BODY, Address, carries, expect, verify
from confide.protocol.manifest import Manifest
from confide.protocol.messages import JoinReply, SecretReply, Statement, decode
from confide.protocol.statements import signed_reply

__all__ = ["RunKeys", "vault_entry"]


class RunKeys:
    """Key agreement of one run at one site.

    Args:
        manifest: The run.
        site: This site's name.
        profile: The run's profile.
        coordinator: The coordinator's name: signed replies are addressed to it.
        vault: Where keys are kept across restarts; None: in memory only.
    """

    def __init__(
        self, manifest: Manifest, site: str, profile: Profile, coordinator: str, vault: Vault | None = None
    ) -> None:
        self._manifest, self._site, self._profile, self._coordinator = manifest, site, profile, coordinator
        self._vault, self._session, self._destroyed, self._naming = vault, None, False, b""
        #: Which run secret is in force; secrets are numbered from 0.
        self.epoch = 0
        self._entry = vault_entry(manifest)
        if not self._restore():
            self._private, self.public = new_ephemeral()
            self._storage = new_key()
        if not profile.keyed:
            self._session, self._naming = profile.session(site, b"", b"", {}), bytes(32)

    _session: Session | None

    @property
    def session(self) -> Session:
        """The sealing session.

        Raises:
            LeftError: Keys are not agreed on yet, or were destroyed; who has none when a round begins gets none.
        """
        if self._session is None or self._destroyed:
            raise LeftError("this site holds no keys for the run", where=f"site {self._site}",
                            hint="a site restarted without a vault waits for the next run")  # fmt: skip
        return self._session

    @property
    def destroyed(self) -> bool:
        """Are the keys gone for good?"""
        return self._destroyed

    @property
    def storage(self) -> bytes:
        """The key that this site's own state of the run is encrypted under.

        Raises:
            SealingError: It was destroyed.
        """
        if self._destroyed:
            raise SealingError("the run's keys were destroyed", where=f"site {self._site}")
        return self._storage

    def model_key(self, trained: int) -> bytes:
        """The key that names the model after so many rounds of training: all sites of the run have it, nobody else."""
        return derive(self._naming, b"model", str(trained).encode())

    def save(self) -> None:
        """Put what is held into the vault, where there is one."""
        self._save(b"", {})

    def make_secret(self, address: Address, statements: Sequence[Statement]) -> tuple[bytes, ...]:
        """A fresh run secret, wrapped for every participant, in the order of their names."""
        peers = self._peers(address, statements)
        secret = self._profile.make_secret()
        return tuple(
            wrap(secret, peers[site], self._info(address.key_epoch, self._site, site)) for site in sorted(peers)
        )

    def accept(
        self, address: Address, statements: Sequence[Statement], made: Statement, wraps: Sequence[str], wrapped: bytes
    ) -> str:
        """Take the run secret that a site made and wrapped for this one; `address.key_epoch` numbers it.

        Args:
            address: Where the request belongs.
            statements: Every participant's signed `join` reply.
            made: The maker's signed `secret` reply.
            wraps: Digests of the chunks of that reply.
            wrapped: The chunk for this site.

        Returns:
            The secret's digest.

        Raises:
            SealingError: A signature, the position, the epoch or the wrap is not right, or another secret was taken.
        """
        peers, epoch, maker = self._peers(address, statements), address.key_epoch, made.site
        member = self._manifest.member(maker)
        if member is None or maker not in peers or self._site not in peers:
            raise SealingError("a run secret from outside the participants", where=f"site {maker}")
        envelope = made.envelope()
        key = bytes.fromhex(member.public_key)
        header = verify(envelope, key, sender=maker, with_chunks=False, max_body=MAX_REPLY_BODY)
        place = address.model_copy(update={"step": "secret", "round": 0})
        expect(header, place, sender=maker, recipient=self._coordinator)
        decode(SecretReply, header.type, envelope.body)
        position = sorted(peers).index(self._site)
        signed = carries(header, wraps) and len(wraps) == len(peers)
        if not signed or hashlib.sha256(wrapped).hexdigest() != wraps[position]:
            raise SealingError("is not what its maker signed for this site", where="run secret")
        secret = unwrap(wrapped, self._private, self._info(epoch, maker, self._site))
        session = self._profile.session(self._site, secret, self._private, peers)
        older = self._session is not None and epoch < self.epoch
        if older or (self._session and epoch == self.epoch and self._session.secret_digest != session.secret_digest):
            raise SealingError("another run secret was accepted before", where=f"site {self._site}")
        self._session, self.epoch, self._naming = session, epoch, secret
        self._save(secret, peers)
        return session.secret_digest

    def destroy(self) -> None:
        """Forget everything; final."""
        if self._session is not None:
            self._session.destroy()
        if self._vault is not None:
            self._vault.destroy(self._entry)
        self._private = self._storage = self._naming = b""
        self._destroyed = True

    def _peers(self, address: Address, statements: Sequence[Statement]) -> dict[str, bytes]:
        """Ephemeral public keys from signed `join` replies.

        Raises:
            SealingError: One is not authentic, or appears twice.
        """
        place = address.model_copy(update={"step": "join", "round": 0, "key_epoch": 0})
        found: dict[str, bytes] = {}
        for statement in statements:
            if statement.site in found:
                raise SealingError("appears twice", where=f"site {statement.site}")
            reply = signed_reply(self._manifest, statement, statement.site, place, self._coordinator, JoinReply)
            found[statement.site] = bytes.fromhex(reply.ephemeral)
        if found.get(self._site) != self.public or len(found) < self._manifest.min_sites:
            raise SealingError(
                "this site's own key is not among at least min_sites participants", where="key agreement"
            )
        return found

    def _info(self, epoch: int, maker: str, recipient: str) -> bytes:
        manifest = self._manifest
        place = (manifest.digest, str(manifest.roster_version), str(epoch), maker, recipient)
        return b"confide/1/run-secret" + framed(part.encode() for part in place)

    def _save(self, secret: bytes, peers: dict[str, bytes]) -> None:
        if self._vault is None:
            return
        held = {"private": self._private, "public": self.public, "storage": self._storage, "secret": secret, **{
            f"peer {site}": key for site, key in peers.items()
        }}  # fmt: skip
        tree = {"epoch": self.epoch, "keys": {name: base64.b64encode(key).decode() for name, key in held.items()}}
        self._vault.save(self._entry, json.dumps(tree).encode())

    def _restore(self) -> bool:
        """Take over what an earlier process of this site left in the vault."""
        data = self._vault.load(self._entry) if self._vault is not None else None
        if data is None:
            return False
        tree = json.loads(data)
        keys = {name: base64.b64decode(key) for name, key in tree["keys"].items()}
        self._private, self.public, self._storage = keys["private"], keys["public"], keys["storage"]
        self.epoch = int(tree["epoch"])
        if keys["secret"]:
            peers = {name.removeprefix("peer "): key for name, key in keys.items() if name.startswith("peer ")}
            self._session = self._profile.session(self._site, keys["secret"], self._private, peers)
            self._naming = keys["secret"]
        return True


def vault_entry(manifest: Manifest) -> str:
    """What a run's keys are called in a vault."""
    return f"run-{hashlib.sha256(manifest.digest.encode()).hexdigest()[:32]}"
