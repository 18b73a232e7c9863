"""What one site makes of another's signed reply that the coordinator passed on: all of it is verified here."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

from confide.errors import SealingError
from confide.protocol.envelope import MAX_REPLY_BODY, Address, expect, verify
from confide.protocol.manifest import Manifest
from confide.protocol.messages import Message, Statement, decode

__all__ = ["signed_reply"]

_M = TypeVar("_M", bound=Message)


def signed_reply(
    manifest: Manifest, statement: Statement, site: str, address: Address, coordinator: str, kind: type[_M]
) -> _M:
    """The reply of `site`, if it is signed by the roster's key for it, to the coordinator, and for this very place.

    Raises:
        SealingError: Anything else.
    """
    member = manifest.member(site)
    if statement.site != site or member is None:
        raise SealingError(f"the reply of {site[:64]} is somebody else's", where=f"run {manifest.run}")
    found = _verified(member.public_key, statement, address, coordinator, kind)
    return found  # type: ignore[return-value]  # of this kind


@lru_cache(maxsize=512)
def _verified(key: str, statement: Statement, address: Address, coordinator: str, kind: type[Message]) -> Message:
    """The same whenever it is asked, and it never changes: the sites of a simulation are shown one cohort's replies.
    What does not hold is not remembered."""
    envelope, site = statement.envelope(), statement.site
    header = verify(envelope, bytes.fromhex(key), sender=site, with_chunks=False, max_body=MAX_REPLY_BODY)
    expect(header, address, sender=site, recipient=coordinator)
    return decode(kind, header.type, envelope.body)
