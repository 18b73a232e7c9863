"""Every message there is, with every field it may hold. What is not listed here cannot leave a site.

Bulk (model bytes, payloads, sums) travels as chunks of the envelope, in the order each class names.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confide.errors import SealingError
from confide.protocol.manifest import Hex32

__all__ = [
    "JoinReply",
    "JoinRequest",
    "Message",
    "Refusal",
    "ReleaseReply",
    "ReleaseRequest",
    "SealReply",
    "SealRequest",
    "Statement",
    "SumReference",
    "TrainReply",
    "TrainRequest",
    "decode",
]

Sites = tuple[str, ...]


class Message(BaseModel):
    """A message's body."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    TYPE: ClassVar[str]

    def to_bytes(self) -> bytes:
        """The body's bytes."""
        return self.model_dump_json().encode()


class JoinRequest(Message):
    """Coordinator → site: take part in this run? Chunks: manifest, initial model (float32, little endian)."""

    TYPE: ClassVar[str] = "join.request"


class JoinReply(Message):
    """Site → coordinator: it takes part."""

    TYPE: ClassVar[str] = "join.reply"


class SumReference(Message):
    """An earlier round's sum, in `chunks` chunks of the request that carries it."""

    TYPE: ClassVar[str] = "sum"
    round: Annotated[int, Field(ge=1)]
    cohort: Sites
    transcript: Hex32
    chunks: Annotated[int, Field(ge=0)]


class TrainRequest(Message):
    """Coordinator → site: apply these sums, then train. Chunks: those of the sums, in order."""

    TYPE: ClassVar[str] = "train.request"
    sums: tuple[SumReference, ...]


class TrainReply(Message):
    """Site → coordinator: commitments only. Chunk: where metrics are due, the opened, noised coordinates."""

    TYPE: ClassVar[str] = "train.reply"
    #: Digest of (nonce, update): commits to the update without telling anything of it.
    commitment: Hex32
    #: Digest of the replicated model that the site trained from, and of the strategy's state.
    model: Hex32
    state: Hex32


class Statement(Message):
    """Another site's signed `train` reply, as it arrived."""

    TYPE: ClassVar[str] = "statement"
    header: str
    signature: str
    body: str


class SealRequest(Message):
    """Coordinator → site: seal your update for exactly this cohort, whose signed replies are here."""

    TYPE: ClassVar[str] = "seal.request"
    cohort: Sites
    statements: tuple[Statement, ...]


class SealReply(Message):
    """Site → coordinator. Chunks: the profile's payload."""

    TYPE: ClassVar[str] = "seal.reply"
    transcript: Hex32


class ReleaseRequest(Message):
    """Coordinator → site: apply the last sums and hand out the model. Chunks: those of the sums."""

    TYPE: ClassVar[str] = "release.request"
    sums: tuple[SumReference, ...]


class ReleaseReply(Message):
    """Site → coordinator. Chunks: the model (float32, little endian), and the last noised metrics where due."""

    TYPE: ClassVar[str] = "release.reply"
    model: Hex32


class Refusal(Message):
    """Site → coordinator: no. The reason is made of public parameters; anything else is the uniform `abstains`."""

    TYPE: ClassVar[str] = "refusal"
    kind: str
    reason: str


_M = TypeVar("_M", bound=Message)


def decode(kind: type[_M], type_: str, body: bytes) -> _M:
    """Parse a body whose envelope has been verified.

    Raises:
        SealingError: It is another type, or not a well-formed one.
    """
    if type_ != kind.TYPE:
        raise SealingError(f"expected a {kind.TYPE}, got a {type_[:40]!r}", where="message")
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        raise SealingError(f"a {kind.TYPE} is malformed", where="message") from None
