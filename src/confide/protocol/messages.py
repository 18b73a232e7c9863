"""Every message there is, with every field it may hold. What is not listed here cannot leave a site.

Bulk (model bytes, payloads, sums) travels as chunks of the envelope, in the order each class names.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from confide.errors import SealingError
from confide.protocol.envelope import Envelope, LogState
from confide.protocol.manifest import Hex32

__all__ = [
    "HANDING_OVER",
    "NO_UPDATE",
    "EndReply",
    "EndRequest",
    "Handover",
    "JoinReply",
    "JoinRequest",
    "KeysReply",
    "KeysRequest",
    "LateTrainRequest",
    "Message",
    "Refusal",
    "ReleaseReply",
    "ReleaseRequest",
    "SealReply",
    "SealRequest",
    "SecretReply",
    "SecretRequest",
    "Statement",
    "SumReference",
    "TrainReply",
    "TrainRequest",
    "UnlockReply",
    "UnlockRequest",
    "decode",
]

#: A commitment to nothing.
NO_UPDATE = "0" * 64
#: How many sites of a drawn round add their model to the reply: should one fail, there is another.
HANDING_OVER = 2
_T = TypeVar("_T")
#: The first wrong member ends the reading: a list of a million wrong ones must not cost a million errors.
Many = Annotated[tuple[_T, ...], FailFast()]
Sites = Many[str]
Tags = Many[Annotated[str, Field(pattern=r"^[0-9a-f]{1,16}$")]]


class Message(BaseModel):
    """A message's body."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    TYPE: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _no_more_keys_than_fields(cls, data: Any) -> Any:
        """Each unknown key would cost an error of its own."""
        if isinstance(data, dict) and len(data) > len(cls.model_fields):
            raise ValueError("more keys than fields")
        return data

    def to_bytes(self) -> bytes:
        """The body's bytes."""
        return self.model_dump_json().encode()


class JoinRequest(Message):
    """Coordinator → site: take part in this run? Chunks: manifest, initial model (float32, little endian)."""

    TYPE: ClassVar[str] = "join.request"


class JoinReply(Message):
    """Site → coordinator: it takes part, with this ephemeral X25519 key for the run. Chunk: the latest states of its
    neighbours' logs that it has seen signed (`confide.protocol.sightings`)."""

    TYPE: ClassVar[str] = "join.reply"
    ephemeral: Hex32


class Statement(Message):
    """A site's signed reply as it arrived, without its bulk, passed on to other sites."""

    TYPE: ClassVar[str] = "statement"
    site: str
    header: str
    signature: str
    body: str

    @classmethod
    def of(cls, site: str, envelope: Envelope) -> Statement:
        """From what arrived."""
        return cls(
            site=site,
            header=envelope.header.decode(),
            signature=envelope.signature.hex(),
            body=envelope.body.decode(),
        )

    def envelope(self) -> Envelope:
        """Back to an envelope; still to be verified.

        Raises:
            SealingError: The signature is not hexadecimal.
        """
        try:
            return Envelope(self.header.encode(), bytes.fromhex(self.signature), self.body.encode())
        except ValueError:
            raise SealingError("a statement is malformed", where=f"statement of {self.site}") from None


class SecretRequest(Message):
    """Coordinator → one site: make the run secret for these participants."""

    TYPE: ClassVar[str] = "secret.request"
    statements: Many[Statement]


class SecretReply(Message):
    """Site → coordinator. Chunks: the secret, HPKE-wrapped for each participant in the order of names."""

    TYPE: ClassVar[str] = "secret.reply"


class KeysRequest(Message):
    """Coordinator → site: the participants' keys, the maker's signed reply with the digests of its chunks. Chunks: the
    wrap for this site, then the sightings of those participants that watch it, in the order of names."""

    TYPE: ClassVar[str] = "keys.request"
    statements: Many[Statement]
    made: Statement
    wraps: Many[Hex32]


class KeysReply(Message):
    """Site → coordinator: the digest of the secret that it holds now."""

    TYPE: ClassVar[str] = "keys.reply"
    secret: Hex32


class SumReference(Message):
    """An earlier round's sum, in `chunks` chunks of the request that carries it."""

    TYPE: ClassVar[str] = "sum"
    round: Annotated[int, Field(ge=1)]
    cohort: Sites
    #: Digests of the cohort's signed `train` replies: with them a site recomputes the transcript for this very round.
    statements: Many[Hex32]
    transcript: Hex32
    attempt: Annotated[int, Field(ge=0, le=100)]
    chunks: Annotated[int, Field(ge=0)]
    #: Summed authentication tags, hexadecimal: they exceed what JSON numbers hold everywhere.
    tags: Tags
    #: Where sites add masks of their own: the cohort's signed `unlock` replies, in the order of names.
    unlocked: Many[Statement]
    #: Where single updates are passed on: the cohort's signed `seal` replies, in the order of their chunks.
    sealed: Many[Statement]


class Handover(Message):
    """The model that a round began with, for a site that has missed the rounds before; only where rounds are drawn for
    some of the sites. It counts if all of that round's cohort, whose signed `train` replies are here, had this one.

    Chunks: the weights (float32, little endian), then the strategy's state (float64 each).
    """

    TYPE: ClassVar[str] = "handover"
    round: Annotated[int, Field(ge=1)]
    #: The latest sum in it, and the latest training round in it.
    applied: Annotated[int, Field(ge=0)]
    trained: Annotated[int, Field(ge=0)]
    statements: Many[Statement]
    chunks: Annotated[int, Field(ge=1, le=16)]


class TrainRequest(Message):
    """Coordinator → site: apply these sums, then train. Chunks: those of the sums, in order."""

    TYPE: ClassVar[str] = "train.request"
    sums: Many[SumReference]


class LateTrainRequest(Message):
    """Coordinator → site: take this model over, apply these sums, then train. Chunks: those of the handover, then those
    of the sums, in order."""

    TYPE: ClassVar[str] = "train.late_request"
    handover: Handover
    sums: Many[SumReference]


class TrainReply(Message):
    """Site → coordinator: commitments only. Chunk: where metrics are due, the opened, noised coordinates. Where rounds
    are drawn, the first ones of the draw add the model that they trained from, for a `Handover`."""

    TYPE: ClassVar[str] = "train.reply"
    #: Digest of (nonce, update): commits to the update without telling anything of it. `NO_UPDATE`: the site died in
    #: this round, which only evaluates, and computes nothing for it a second time. It is in no cohort then, but shows
    #: which model it ended with, so that the run can be released.
    commitment: Hex32
    #: The replicated model that the site trained from, and the strategy's state, named under a key of the sites.
    model: Hex32
    state: Hex32
    #: Digest of the run secret that the site holds.
    secret: Hex32
    #: The state of the coordinator's log that came with the request: the site cosigns it, as it signs this reply.
    coordinator: LogState


class SealRequest(Message):
    """Coordinator → site: seal your update for exactly this cohort, whose signed replies are here."""

    TYPE: ClassVar[str] = "seal.request"
    cohort: Sites
    statements: Many[Statement]


class SealReply(Message):
    """Site → coordinator. Chunks: the profile's payload."""

    TYPE: ClassVar[str] = "seal.reply"
    transcript: Hex32
    tags: Tags


class UnlockRequest(Message):
    """Coordinator → site: all of the cohort sealed this attempt, see their signed `seal` replies; unlock it."""

    TYPE: ClassVar[str] = "unlock.request"
    statements: Many[Statement]


class UnlockReply(Message):
    """Site → coordinator: the seed of its own mask in this attempt. A site unlocks one attempt a round, ever."""

    TYPE: ClassVar[str] = "unlock.reply"
    transcript: Hex32
    seed: Hex32


class ReleaseRequest(Message):
    """Coordinator → site: apply the last sums and hand out the model. Chunks: those of the sums.

    `statements` are signed `train` replies of the evaluation round: they show that at least `min_sites` sites have
    reached the end with this very model, and so that this is no model on the way.
    """

    TYPE: ClassVar[str] = "release.request"
    sums: Many[SumReference]
    statements: Many[Statement]


class ReleaseReply(Message):
    """Site → coordinator. Chunks: the model (float32, little endian), and the last noised metrics where due."""

    TYPE: ClassVar[str] = "release.reply"
    #: Digest of the model, and the key under which the sites have named it so far.
    model: Hex32
    key: Hex32


class EndRequest(Message):
    """Coordinator → site: the run is over, and nothing of it is released; no request of it follows."""

    TYPE: ClassVar[str] = "end.request"
    status: Literal["stopped", "failed"]


class EndReply(Message):
    """Site → coordinator: its keys of the run are gone."""

    TYPE: ClassVar[str] = "end.reply"


class Refusal(Message):
    """Site → coordinator: no. The reason is made of public parameters; anything else is the uniform `abstains`. The
    kind `left` says that the site's keys of the run are gone: nobody need keep for it what it has missed."""

    TYPE: ClassVar[str] = "refusal"
    kind: Annotated[str, Field(max_length=32)]
    reason: Annotated[str, Field(max_length=500)]


_M = TypeVar("_M", bound=Message)


def decode(kind: type[_M], type_: str, body: bytes) -> _M:
    """Parse a body whose envelope has been verified.

    Raises:
        SealingError: It is another type, or not a well-formed one.
    """
    if type_ != kind.TYPE:
        raise SealingError(f"expected a {kind.TYPE}, got a {type_[:40]!r}", where="message")
    try:
        found: _M = _parsed(kind, body)  # type: ignore[assignment]  # of this kind
    except ValidationError:
        raise SealingError(f"a {kind.TYPE} is malformed", where="message") from None
    return found


@lru_cache(maxsize=4)
def _parsed(kind: type[Message], body: bytes) -> Message:
    """One step's request has the same body for a whole cohort, whose sites in a simulation share what never changes."""
    return kind.model_validate_json(body)
