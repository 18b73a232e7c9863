"""Digests of what crosses the wire: SHA-256 over length-prefixed parts, so no two lists of parts collide."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

__all__ = ["digest", "framed", "keyed_digest"]


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


def keyed_digest(key: bytes, domain: str, *parts: bytes) -> bytes:
    """32 bytes that name the parts to whoever has the key, and tell nobody else anything: a bare digest of few small
    numbers can be guessed by trying them all."""
    return hmac.digest(key, digest(domain, *parts), hashlib.sha256)
