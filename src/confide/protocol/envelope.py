"""The signed envelope around every message.

Invariants:
1. A signature covers sender, recipient, federation, roster version, run, manifest, key epoch, round, step, type, the
   request answered, and the digest of every byte of content. Nothing can be moved to another place and stay valid.
2. Every chunk is covered by the signature and verified before anything parses it.
3. A header is parsed only under a size limit, and content only after the signature holds and its size is one that an
   honest message has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confide.errors import SealingError
from confide.privacy.digest import digest, framed
from confide.protocol.identity import Identity, verify_signature
from confide.protocol.manifest import Hex32

__all__ = [
    "EVERYBODY",
    "MAX_BODY",
    "MAX_CHUNKS",
    "MAX_REPLY_BODY",
    "Address",
    "Envelope",
    "Header",
    "LogState",
    "carries",
    "chunk_digests",
    "chunk_root",
    "expect",
    "seal_envelope",
    "verify",
    "verify_header",
]

_DOMAIN = b"confide/envelope/1"
_MAX_HEADER = 4096
#: A request carries signed replies of the whole cohort; a reply is short, because others must be able to carry it.
MAX_BODY = 8 * 2**20
MAX_REPLY_BODY = 4096
MAX_CHUNKS = 65_536
#: Recipient of a request that goes to every node before the coordinator knows which site lives where.
EVERYBODY = "*"


#: State of a log: how many entries it has, and the root over them, `size:root`.
LogState = Annotated[str, Field(pattern=r"^[0-9]{1,18}:[0-9a-f]{64}$")]


class Address(BaseModel):
    """Where in a run a message belongs. Both sides must agree on every field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str
    roster_version: int
    run: str
    manifest: Hex32
    #: Which run secret is in force, or is being agreed on.
    key_epoch: Annotated[int, Field(ge=0, le=1000)]
    round: Annotated[int, Field(ge=0, le=1_000_000)]
    step: Literal["join", "secret", "keys", "train", "seal", "unlock", "release", "end"]
    #: Which attempt to seal the round; 0 for every other step.
    attempt: Annotated[int, Field(ge=0, le=100)] = 0


class Header(Address):
    """What is signed."""

    version: Literal[1] = 1
    sender: Annotated[str, Field(max_length=128)]
    recipient: Annotated[str, Field(max_length=128)]
    type: Annotated[str, Field(max_length=64)]
    #: Digest of the request that this answers; empty for a request.
    request: Annotated[str, Field(max_length=64)]
    body: Hex32
    #: How many chunks there are, and the digest over their digests: a header is short, whatever it carries.
    chunks: Annotated[int, Field(ge=0, le=MAX_CHUNKS)]
    chunk_root: Hex32
    #: State of the sender's log, `size:root`: whoever keeps the envelope can prove later what the log held.
    checkpoint: LogState

    @property
    def address(self) -> Address:
        """Where in the run the message says it belongs."""
        return Address(**{name: getattr(self, name) for name in Address.model_fields})


@dataclass(frozen=True, slots=True)
class Envelope:
    """A signed header, the body it commits to, and chunks of bulk data."""

    header: bytes
    signature: bytes
    body: bytes
    chunks: tuple[bytes, ...] = ()

    @property
    def digest(self) -> str:
        """Names this very message: hex digest of header and signature."""
        return digest("envelope", self.header, self.signature).hex()

    def without_chunks(self) -> Envelope:
        """The same signed statement, without its bulk."""
        return Envelope(self.header, self.signature, self.body)


def seal_envelope(
    identity: Identity,
    address: Address,
    *,
    recipient: str,
    type_: str,
    body: bytes,
    checkpoint: str,
    chunks: tuple[bytes, ...] = (),
    request: str = "",
    digests: Sequence[str] | None = None,
) -> Envelope:
    """Sign a message; `checkpoint` is the state of the sender's log, `size:root`; `digests` are the chunks' own, where
    the sender has them already."""
    header = Header(
        **address.model_dump(),
        sender=identity.name,
        recipient=recipient,
        type=type_,
        request=request,
        body=hashlib.sha256(body).hexdigest(),
        chunks=len(chunks),
        chunk_root=chunk_root(chunk_digests(chunks) if digests is None else digests),
        checkpoint=checkpoint,
    )
    encoded = header.model_dump_json().encode()
    return Envelope(encoded, identity.sign(framed((_DOMAIN, encoded))), body, chunks)


def chunk_digests(chunks: Iterable[bytes]) -> tuple[str, ...]:
    """SHA-256 of each chunk, hex."""
    return tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks)


def chunk_root(digests: Sequence[str]) -> str:
    """The digest over chunks' digests, hex."""
    return digest("chunks", *(bytes.fromhex(d) for d in digests)).hex()


def carries(header: Header, digests: Sequence[str]) -> bool:
    """Are these the digests of the chunks that a header was signed for?"""
    return header.chunks == len(digests) and header.chunk_root == chunk_root(digests)


def verify(
    envelope: Envelope, public_key: bytes, *, sender: str, with_chunks: bool = True, max_body: int = MAX_BODY
) -> Header:
    """Check size, signature and digests; where the message belongs is for `expect` to say.

    Args:
        envelope: What arrived.
        public_key: The sender's key, from the roster or the policy (never from the message).
        sender: Whose key that is, for the error text.
        with_chunks: False where a statement travels without its bulk.
        max_body: Most bytes of body that anything honest has here.

    Raises:
        SealingError: Anything at all is not as it must be.
    """
    where = f"message from {sender}"
    if len(envelope.body) > max_body or len(envelope.chunks) > MAX_CHUNKS:
        raise SealingError("is larger than any honest message", where=where)
    header = verify_header(envelope.header, envelope.signature, public_key, sender=sender)
    if hashlib.sha256(envelope.body).hexdigest() != header.body:
        raise SealingError("the body is not the signed one", where=where)
    if with_chunks and not carries(header, chunk_digests(envelope.chunks)):
        raise SealingError("a chunk is not the signed one", where=where)
    return header


def verify_header(header: bytes, signature: bytes, public_key: bytes, *, sender: str) -> Header:
    """A header that its sender signed; what it commits to is not looked at.

    Raises:
        SealingError: It is too large, not signed by this key, or cannot be read.
    """
    return _verified(header, signature, public_key, sender)


@lru_cache(maxsize=128)
def _verified(header: bytes, signature: bytes, public_key: bytes, sender: str) -> Header:
    """The same whenever it is asked: a statement that goes to a whole cohort is verified once by all the sites of a
    simulation. What does not hold is not remembered."""
    where = f"message from {sender}"
    if len(header) > _MAX_HEADER:
        raise SealingError("is larger than any honest message", where=where)
    if not verify_signature(public_key, signature, framed((_DOMAIN, header))):
        raise SealingError("the signature is not the sender's", where=where)
    try:
        return Header.model_validate_json(header)
    except ValidationError:
        raise SealingError("the signed header cannot be read", where=where) from None


def expect(header: Header, address: Address, *, sender: str, recipient: str, request: str | None = None) -> None:
    """Check that a verified message is the one that belongs here.

    Args:
        header: A header that `verify` returned.
        address: Where in the run it must belong.
        sender: Whom it must come from.
        recipient: Whom it must be for.
        request: Digest of the request it must answer ("" for a request); None where only others know it.

    Raises:
        SealingError: It is from, for, or about something else: replayed or misdirected.
    """
    expected = address.model_dump() | {"sender": sender, "recipient": recipient}
    if request is not None:
        expected["request"] = request
    for field, value in expected.items():
        if getattr(header, field) != value:
            raise SealingError(
                f"belongs to another {field}: a replayed or misdirected message",
                where=f"message from {sender}",
            )
