"""A roster version as sixty digits that two people can compare over the phone.

Why 199 bits, and slowly. The coordinator writes the versions that it shows. It may try many of them for two that look
alike, one for each half of the members, with keys of its own in the place of the other half. That is a collision, not
a second preimage: with n bits it takes about 2^(n/2) tries. So 128 bits would be 2^64 tries: too few. Sixty digits
are 199 bits: 2^99 tries, each of 2^19 compressions of SHA-256 (PBKDF2), is about 2^118; to meet *one* honest version
takes 2^199. The version before is in the digest, so one comparison covers the whole past.
"""

from __future__ import annotations

import hashlib
import re

from confide.protocol.roster import Roster

__all__ = ["fingerprint", "same_fingerprint"]

_DIGITS, _GROUP = 60, 5
_SALT = b"confide/roster/fingerprint/1"
_ITERATIONS = 2**18


def fingerprint(roster: Roster) -> str:
    """Twelve groups of five digits. Takes about a twentieth of a second, on purpose."""
    stretched = hashlib.pbkdf2_hmac("sha256", bytes.fromhex(roster.digest), _SALT, _ITERATIONS)
    digits = f"{int.from_bytes(stretched) % 10**_DIGITS:0{_DIGITS}d}"
    return " ".join(digits[i : i + _GROUP] for i in range(0, _DIGITS, _GROUP))


def same_fingerprint(typed: str, roster: Roster) -> bool:
    """Is that what somebody typed? Spaces, dashes and line breaks do not count; every digit does."""
    digits = re.sub(r"[\s.,-]+", "", typed)
    return digits.isascii() and digits == fingerprint(roster).replace(" ", "")
