"""Purposes in a hierarchy, and the notices that say what a grant covers.

A purpose is a path: `research/cardiology` lies beneath `research`. A *notice* is the text a person was shown, known by
its digest; what it was written for, and whether that includes what lies beneath, is registered once and never changed.

A SHA-256 digest is one digest however it is spelt: 64 hexadecimal digits in small or capital letters, with or without
`sha256:` before them. Events keep the spelling that they came with, as nothing on record is changed; a notice is on
record once, under the spelling that it was registered with, and is found under all of them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

__all__ = ["EVERYTHING", "Notice", "lineage", "notice_digest", "spellings"]

#: The purpose above all purposes. Only an erasure is ever filed under it.
EVERYTHING = ""
_PREFIX = "sha256:"
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64}|[0-9A-F]{64})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """One version of a notice.

    Attributes:
        digest: Digest of its text, as grants name it.
        purposes: What it was written for.
        covers_beneath: It says that consent includes every purpose beneath these.
        sequence: The registry's sequence number at which it was learnt.
        registered_at: Microseconds UTC.
    """

    digest: str
    purposes: frozenset[str]
    covers_beneath: bool
    sequence: int = 0
    registered_at: int = 0

    def covers(self, purpose: str) -> bool:
        """Was it written for this purpose?"""
        return purpose in self.purposes or (
            self.covers_beneath and any(above in self.purposes for above in lineage(purpose))
        )


def lineage(purpose: str) -> tuple[str, ...]:
    """A purpose and all that lie above it, nearest first, `EVERYTHING` last."""
    found = [purpose]
    while "/" in purpose:
        purpose = purpose.rpartition("/")[0]
        found.append(purpose)
    return (*found, EVERYTHING) if purpose != EVERYTHING else tuple(found)


def spellings(digest: str) -> tuple[str, ...]:
    """All ways to spell a digest; one that is no SHA-256 digest has but its own."""
    found = _SHA256.fullmatch(digest)
    if found is None:
        return (digest,)
    small, capital = found[1].lower(), found[1].upper()
    return tuple(dict.fromkeys((_PREFIX + small, small, _PREFIX + capital, capital)))


def notice_digest(text: bytes) -> str:
    """The name of a notice: SHA-256 of its text, as hexadecimal."""
    return hashlib.sha256(text).hexdigest()
