"""A site's keys for one run: its ephemeral X25519 key, its peers' authenticated ones, and the run secret.

Invariants:
1. An ephemeral key counts only inside its owner's signed `join` reply, checked against the roster.
2. The run secret counts only inside its maker's signed `secret` reply, and only at this site's own position in it.
3. Nothing of this is ever written to a disk; a site whose process ends has left the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from confide.errors import SealingError
from confide.privacy.digest import framed
from confide.privacy.sealing import Profile, Session
from confide.privacy.sealing.wrapping import new_ephemeral, unwrap, wrap
from confide.protocol.envelope import Address, expect, verify
from confide.protocol.manifest import Manifest
from confide.protocol.messages import JoinReply, SecretReply, Statement, decode

__all__ = ["RunKeys"]


class RunKeys:
    """Key agreement of one run at one site.

    Args:
        manifest: The run.
        site: This site's name.
        profile: The run's profile.
        coordinator: The coordinator's name: signed replies are addressed to it.
    """

    def __init__(self, manifest: Manifest, site: str, profile: Profile, coordinator: str) -> None:
        self._manifest, self._site, self._profile, self._coordinator = manifest, site, profile, coordinator
        self._private, self.public = new_ephemeral()
        self._session: Session | None = None if profile.keyed else profile.session(site, b"", b"", {})
        self._destroyed = False

    @property
    def session(self) -> Session:
        """The sealing session.

        Raises:
            SealingError: Keys are not agreed on yet, or were destroyed.
        """
        if self._session is None or self._destroyed:
            raise SealingError("this site holds no keys for the run", where=f"site {self._site}",
                               hint="they live in memory only: a restarted site waits for the next run")  # fmt: skip
        return self._session

    def make_secret(self, address: Address, statements: Sequence[Statement]) -> tuple[bytes, ...]:
        """A fresh run secret, wrapped for every participant, in the order of their names."""
        peers = self._peers(address, statements)
        secret = self._profile.make_secret()
        return tuple(wrap(secret, peers[site], self._info(self._site, site)) for site in sorted(peers))

    def accept(
        self, address: Address, statements: Sequence[Statement], made: Statement, maker: str, wrapped: bytes
    ) -> str:
        """Take the run secret that `maker` wrapped for this site.

        Returns:
            The secret's digest.

        Raises:
            SealingError: A signature, the position, or the wrap is not right, or another secret was taken before.
        """
        peers = self._peers(address, statements)
        member = self._manifest.member(maker)
        if member is None or maker not in peers or self._site not in peers:
            raise SealingError("a run secret from outside the participants", where=f"site {maker}")
        envelope = made.envelope()
        header = verify(envelope, bytes.fromhex(member.public_key), sender=maker, with_chunks=False)
        place = address.model_copy(update={"step": "secret", "round": 0})
        expect(header, place, sender=maker, recipient=self._coordinator)
        decode(SecretReply, header.type, envelope.body)
        position = sorted(peers).index(self._site)
        if len(header.chunks) != len(peers) or hashlib.sha256(wrapped).hexdigest() != header.chunks[position]:
            raise SealingError("is not what its maker signed for this site", where="run secret")
        secret = unwrap(wrapped, self._private, self._info(maker, self._site))
        session = self._profile.session(self._site, secret, self._private, peers)
        if self._session is not None and self._session.secret_digest != session.secret_digest:
            raise SealingError("another run secret was accepted before", where=f"site {self._site}")
        self._session = session
        return session.secret_digest

    def destroy(self) -> None:
        """Forget everything; final."""
        if self._session is not None:
            self._session.destroy()
        self._private, self._destroyed = b"", True

    def _peers(self, address: Address, statements: Sequence[Statement]) -> dict[str, bytes]:
        """Ephemeral public keys from signed `join` replies.

        Raises:
            SealingError: One is not authentic, or appears twice.
        """
        place = address.model_copy(update={"step": "join", "round": 0})
        found: dict[str, bytes] = {}
        for statement in statements:
            envelope = statement.envelope()
            member = self._manifest.member(statement.site)
            if member is None or statement.site in found:
                raise SealingError("is not in the roster, or appears twice", where=f"site {statement.site}")
            header = verify(envelope, bytes.fromhex(member.public_key), sender=statement.site, with_chunks=False)
            expect(header, place, sender=statement.site, recipient=self._coordinator)
            found[statement.site] = bytes.fromhex(decode(JoinReply, header.type, envelope.body).ephemeral)
        if found.get(self._site) != self.public or len(found) < self._manifest.min_sites:
            raise SealingError(
                "this site's own key is not among at least min_sites participants", where="key agreement"
            )
        return found

    def _info(self, maker: str, recipient: str) -> bytes:
        manifest = self._manifest
        return b"confide/1/run-secret" + framed(
            (manifest.digest.encode(), str(manifest.roster_version).encode(), b"0", maker.encode(), recipient.encode())
        )
