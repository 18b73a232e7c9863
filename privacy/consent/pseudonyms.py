"""From a person's identifier to the names used inside a site. No identifier is stored anywhere.

*locator* = HMAC(site key, identifier): stable for the site's lifetime, finds the person's key.
*pseudonym* = HMAC(site key, personal key ‖ identifier): what events are filed under; destroying the personal key
cuts it off from the person.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from confide.errors import ConsentError
from confide.privacy.consent.commitment import RoundKeys
from confide.privacy.files import write_private

__all__ = ["KEY_BYTES", "KeyBox", "SiteKey", "canonical_subject"]

KEY_BYTES = 32


def canonical_subject(value: object) -> str:
    """One spelling for an identifier that a table may hold as text, integer or whole float: `7`, `7.0` → "7"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    # A table exported with floats writes 7.0 where the consent form says 7; nothing else is made equal.
    whole, dot, zeros = text.partition(".")
    return whole if dot and whole.isdigit() and zeros and not zeros.strip("0") else text


class KeyBox(Protocol):
    """How a key lies on the disk, where it does not lie there as it is (`confide.protocol.keyfiles`)."""

    def close(self, secret: bytes) -> bytes:
        """What is written."""

    def open(self, data: bytes) -> bytes:
        """Inverse of `close`."""


@dataclass(frozen=True, slots=True, repr=False)
class SiteKey:
    """The site-lifetime secret from which names and roles are derived."""

    secret: bytes

    @classmethod
    def load_or_create(cls, path: Path, secret: bytes | None = None, box: KeyBox | None = None) -> SiteKey:
        """Read the key file, or make it (from `secret` where one is given, else from the operating system).

        Args:
            path: The file.
            secret: For a new one.
            box: Opens and closes it; None: it lies there in the clear.

        Raises:
            ConsentError: The file is not a key, or no box was given that opens it.
            ConfigError: It is encrypted, and there is no passphrase.
            SealingError: A wrong passphrase, or a changed file.
        """
        if not path.exists():
            new = secret or secrets.token_bytes(KEY_BYTES)
            write_private(path, new if box is None else box.close(new))
        data = path.read_bytes()
        if box is not None:
            data = box.open(data)
        if len(data) != KEY_BYTES:
            hint = "restore it from the site's backup; an encrypted one needs its passphrase"
            raise ConsentError("is not a site key", where=str(path), hint=hint)
        return cls(data)

    @property
    def fingerprint(self) -> str:
        """Names the key, and tells nothing of it."""
        return self._mac(b"fingerprint", b"").hex()

    def locator(self, subject: str) -> bytes:
        """32 bytes that find a person again, for the site's lifetime."""
        return self._mac(b"locator", subject.encode())

    def pseudonym(self, subject: str, personal_key: bytes) -> bytes:
        """32 bytes under which a person's events are filed."""
        return self._mac(b"pseudonym", personal_key + subject.encode())

    def role_share(self, subject: str) -> float:
        """A fixed number in [0, 1) per person, uniform without the key: decides the role, for ever."""
        return int.from_bytes(self._mac(b"role", subject.encode())[:6], "big") / 2**48

    def round_keys(self, run: str, round_: int) -> RoundKeys:
        """Keys of the commitment to a round's snapshot; other ones for every round, made again whenever asked for."""
        place = f"{run}/{round_}".encode()
        return RoundKeys(self._mac(b"snapshot-opening", place), self._mac(b"snapshot-filling", place))

    def _mac(self, label: bytes, message: bytes) -> bytes:
        return hmac.digest(self.secret, b"confide/1/" + label + b"\0" + message, hashlib.sha256)
