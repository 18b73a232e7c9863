"""Digests of what crosses the wire: SHA-256 over length-prefixed parts, so no two lists of parts collide."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["digest", "framed"]


def framed(parts: Iterable[bytes]) -> bytes:
    """The parts, each behind its length (8 bytes, big endian)."""
    return b"".join(len(p).to_bytes(8, "big") + p for p in parts)


def digest(domain: str, *parts: bytes) -> bytes:
    """32 bytes that commit to a domain and a list of parts."""
    hasher = hashlib.sha256(b"confide/1\0")
    for part in (domain.encode(), *parts):
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part)
    return hasher.digest()
