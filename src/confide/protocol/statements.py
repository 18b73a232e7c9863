"""What one site makes of other sites' signed replies that the coordinator passed on: all of it is verified here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from confide.errors import SealingError
from confide.protocol.envelope import MAX_REPLY_BODY, Address, expect, verify
from confide.protocol.manifest import Manifest
from confide.protocol.messages import Message, Statement, decode

__all__ = ["Replies", "signed_replies", "signed_reply"]

_M = TypeVar("_M", bound=Message)
_MOST_KEPT = 8


@dataclass(frozen=True, slots=True)
class Replies(Generic[_M]):
    """Signed replies that hold, in the order in which they were shown: whose, what, and the digest that names each."""

    sites: tuple[str, ...]
    messages: tuple[_M, ...]
    names: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, _M, str]]:
        return zip(self.sites, self.messages, self.names, strict=True)


#: What was found of lists of statements, with all that it was found from.
_Found = tuple[tuple[Statement, ...], str, Address, str, type[Message], Replies[Message]]
_found: deque[_Found] = deque(maxlen=_MOST_KEPT)


def signed_replies(
    manifest: Manifest, statements: tuple[Statement, ...], address: Address, coordinator: str, kind: type[_M]
) -> Replies[_M]:
    """Each site's reply, as `signed_reply` finds it.

    The sites of a simulation are shown one list, the same object. What was found of it holds for whoever asks with this
    very object, which never changes and is kept, so that no other one can take its place; about the same run, place,
    coordinator and kind. An equal list of another message is looked at again. What does not hold is not remembered.

    Raises:
        SealingError: One of them does not hold.
    """
    for known, run, place, whom, type_, replies in tuple(_found):
        if known is statements and (run, place, whom) == (manifest.digest, address, coordinator) and type_ is kind:
            return replies  # type: ignore[return-value]  # of this kind
    found = Replies(
        tuple(statement.site for statement in statements),
        tuple(signed_reply(manifest, s, s.site, address, coordinator, kind) for s in statements),
        tuple(statement.envelope().digest for statement in statements),
    )
    if type(statements) is tuple:  # a list could change afterwards
        _found.append((statements, manifest.digest, address, coordinator, kind, found))  # type: ignore[arg-type]
    return found


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
