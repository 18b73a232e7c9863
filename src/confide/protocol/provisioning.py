"""What travels between a coordinator and its sites before there is a run: files, carried by anybody, each signed.

request (site → coordinator): a site's public keys and declared population, signed by the key that it brings, and by the
old one where it changes keys. kit (coordinator → site): the chain of rosters, the certificate, the endpoint.
countersignature (site → coordinator): a site's word for one version. Nothing in them is secret.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confide.errors import ConfigError, SealingError
from confide.privacy.digest import framed
from confide.privacy.files import write_atomically
from confide.protocol.identity import Hex32, Identity, verify_signature
from confide.protocol.roster import FederationName, Roster, RosterMember, Signature, SignedRoster, SiteName

__all__ = [
    "Countersignature",
    "Kit",
    "Request",
    "SignedKit",
    "SignedRequest",
    "certificate_digest",
    "check_kit",
    "check_request",
    "read_document",
    "sign_kit",
    "sign_request",
    "write_document",
]

_MOST_BYTES = 64 * 2**20
_REQUEST, _KIT = b"confide/request/1", b"confide/kit/1"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(_Document):
    """`replaces`: the signing key that this site had so far, where it changes keys; empty for a new site, and for one
    that has lost its key."""

    format: Literal[1] = 1
    federation: FederationName
    member: RosterMember
    replaces: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


class SignedRequest(_Document):
    """`signature` is by the key that the request brings; `old_signature` by the one that it replaces."""

    request: Request
    signature: Signature
    old_signature: Annotated[str, Field(pattern=r"^([0-9a-f]{128})?$")] = ""


class Countersignature(_Document):
    """Signatures over one roster version, by public key: two where a site changes keys."""

    format: Literal[1] = 1
    federation: FederationName
    site: SiteName
    version: int
    roster: Hex32
    signatures: Annotated[dict[Hex32, Signature], Field(min_length=1, max_length=2)]


class Kit(_Document):
    """`chain`'s last version may be a proposal. `certificate`: of the certificate authority, PEM; empty for none."""

    format: Literal[1] = 1
    site: SiteName
    endpoint: Annotated[str, Field(max_length=300)]
    certificate: Annotated[str, Field(max_length=20_000)]
    chain: Annotated[tuple[SignedRoster, ...], Field(min_length=1, max_length=10_000)]

    @property
    def roster(self) -> Roster:
        """The newest version."""
        return self.chain[-1].roster

    @property
    def previous(self) -> Roster | None:
        """The version before it."""
        return self.chain[-2].roster if len(self.chain) > 1 else None

    @property
    def missing(self) -> dict[str, str]:
        """Keys that have not signed the newest version yet, with whose they are."""
        return self.chain[-1].missing(self.previous)


class SignedKit(_Document):
    """`signature` is the coordinator's."""

    kit: Kit
    signature: Signature


def sign_request(request: Request, identity: Identity, old: Identity | None = None) -> SignedRequest:
    """Proof that whoever asks holds the keys."""
    message = _message(_REQUEST, request)
    return SignedRequest(
        request=request, signature=identity.sign(message).hex(), old_signature=old.sign(message).hex() if old else ""
    )


def check_request(signed: SignedRequest) -> Request:
    """The request, if both keys that it names have signed it.

    Raises:
        SealingError: They have not.
    """
    request, message = signed.request, _message(_REQUEST, signed.request)
    held = verify_signature(bytes.fromhex(request.member.signing_key), bytes.fromhex(signed.signature), message)
    if request.replaces or signed.old_signature:
        old = bytes.fromhex(request.replaces), bytes.fromhex(signed.old_signature)
        held = held and verify_signature(*old, message)
    if not held:
        raise SealingError("is not signed by the keys that it names", where=f"request of {request.member.site}",
                           hint="ask the site for the file again")  # fmt: skip
    return request


def sign_kit(kit: Kit, coordinator: Identity) -> SignedKit:
    """The coordinator's word for a kit."""
    return SignedKit(kit=kit, signature=coordinator.sign(_message(_KIT, kit)).hex())


def check_kit(signed: SignedKit) -> Kit:
    """The kit, if the coordinator that its roster names has signed it, and the certificate is the roster's.

    Whether the roster is the right one is for the fingerprint and the site's memory to say.

    Raises:
        SealingError: It is not.
    """
    kit, where = signed.kit, f"kit of {signed.kit.site}"
    key = bytes.fromhex(kit.roster.coordinator_key)
    if not verify_signature(key, bytes.fromhex(signed.signature), _message(_KIT, kit)):
        raise SealingError("is not signed by the coordinator", where=where, hint="ask for the file again")
    if certificate_digest(kit.certificate) != kit.roster.authority:
        raise SealingError("holds another certificate than the roster names", where=where)
    return kit


def certificate_digest(pem: str) -> str:
    """SHA-256 of a certificate (DER), hex; zeros for none.

    Raises:
        SealingError: It is no certificate.
    """
    if not pem:
        return "0" * 64
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        raise SealingError("is no certificate in PEM", where="certificate authority") from None
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


_D = TypeVar("_D", bound=BaseModel)


def read_document(path: Path, kind: type[_D]) -> _D:
    """Parse a file that somebody handed over; its signatures are for others to check.

    Raises:
        ConfigError: It cannot be read, or is something else.
    """
    what = {SignedRequest: "a site's request", SignedKit: "a kit", Countersignature: "a countersignature"}.get(
        kind, "such a file"
    )
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError("is larger than any honest one", where=str(path))
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path), hint=f"name {what}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = f" ({place}: {first['msg'].removeprefix('Value error, ')})" if place else ""
        raise ConfigError(f"is not {what}{reason}", where=str(path), hint=f"name {what}") from None


def write_document(path: Path, document: BaseModel) -> None:
    """Write a file that may be handed over."""
    write_atomically(path, document.model_dump_json(indent=2).encode() + b"\n")


def _message(domain: bytes, document: BaseModel) -> bytes:
    return framed((domain, document.model_dump_json().encode()))
