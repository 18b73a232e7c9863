"""Purposes in a hierarchy, and the notices that say what a grant covers.

A purpose is a path: `research/cardiology` lies beneath `research`. A *notice* is the text a person was shown, known by
its digest; what it was written for, and whether that includes what lies beneath, is registered once and never changed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["EVERYTHING", "Notice", "lineage", "notice_digest"]

#: The purpose above all purposes. Only an erasure is ever filed under it.
EVERYTHING = ""


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


def notice_digest(text: bytes) -> str:
    """The name of a notice: SHA-256 of its text, as hexadecimal."""
    return hashlib.sha256(text).hexdigest()
