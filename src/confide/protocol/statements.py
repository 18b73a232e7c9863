"""What one site makes of another's signed reply that the coordinator passed on: all of it is verified here."""

from __future__ import annotations

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
    envelope = statement.envelope()
    header = verify(envelope, bytes.fromhex(member.public_key), sender=site, with_chunks=False, max_body=MAX_REPLY_BODY)
    expect(header, address, sender=site, recipient=coordinator)
    return decode(kind, header.type, envelope.body)
