"""The receipt that one person takes home: ISO/IEC TS 27560 as JSON-LD, and the same as a page to read.

It names her by the pseudonym that her events are filed under: with it she can later have proved to her whether a round
held her. The JSON holds no floats; its canonical form (RFC 8785: sorted keys, no spaces) without the signature's field
is what is signed.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from confide.errors import ConfigError, ConsentError
from confide.privacy.audit.page import write_page
from confide.privacy.consent.desk import ConsentDesk
from confide.privacy.consent.dpv import CONTEXT, OWN, RECEIPT_SCHEMA
from confide.privacy.consent.events import ConsentEvent, EventType, from_micros
from confide.privacy.consent.export import record_tree
from confide.privacy.consent.imports.event import PSEUDONYM
from confide.privacy.consent.imports.source import UnreadableError, parse_json
from confide.privacy.consent.state import Standing
from confide.privacy.files import write_atomically

__all__ = [
    "Receipt",
    "Verified",
    "load_public_key",
    "load_signing_key",
    "make_receipt",
    "read_receipt",
    "verify_receipt",
    "write_receipt",
]

_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}")
SIGNATURE, STANDING, SEQUENCE = f"{OWN}signature", f"{OWN}standing", f"{OWN}sequence"
EFFECT = (
    "From the moment the withdrawal is on record no gradient, metric or statistic is computed from your records; a "
    "round in progress is computed again without them. What was released before is differentially private: it cannot "
    "be taken back, and its ε bounds what it says about you."
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """One purpose: what stands now, and the decision that it stands on (None where there is none in force)."""

    purpose: str
    standing: Standing
    latest: ConsentEvent | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a receipt says. `data` is the JSON file; times are microseconds UTC."""

    subject: str
    pseudonym: str
    created: int
    controller: str
    withdraw: str
    agreements: tuple[Agreement, ...]
    history: tuple[ConsentEvent, ...]
    data: bytes
    public_key: str


def make_receipt(
    desk: ConsentDesk, subject: str, *, controller: str, contact: str, key: Ed25519PrivateKey | None = None
) -> Receipt:
    """The receipt of one person, as of now.

    Args:
        controller: Who is responsible.
        contact: Where she withdraws.
        key: Signs the JSON; None leaves it unsigned.

    Raises:
        ConsentError: The registry holds nothing about such a person, or cannot be read.
    """
    if desk.is_erased(subject):
        raise ConsentError("this person was erased: nothing on record can be found under her identifier any more",
                           where="receipt", hint="there is nothing that a receipt could say")  # fmt: skip
    history, pseudonym, now = [e for _, e in desk.history(subject)], desk.pseudonym(subject), desk.now()
    if not history or pseudonym is None:
        raise ConsentError("the registry holds nothing about such a person", where="receipt",
                           hint="check the identifier: it is the one of the site's table")  # fmt: skip
    agreements = tuple(
        Agreement(purpose, standing, _latest([e for e in history if e.purpose == purpose], now))
        for purpose, standing in desk.standings(subject, now, beneath=False).items()
    )
    name = PSEUDONYM + pseudonym.hex()
    identifier = secrets.token_hex(16)
    how = f"Tell {contact}. {EFFECT}"
    tree: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "dpv:ConsentReceipt",
        "@id": f"urn:confide:receipt:{identifier}",
        "dct:identifier": identifier,
        "dct:conformsTo": RECEIPT_SCHEMA,
        "dct:created": _iso(now),
        "dct:publisher": controller,
        SEQUENCE: desk.sequence(),
        "dpv:hasRecordOfActivity": [
            {
                **record_tree([e for e in history if e.purpose == a.purpose], name),
                "dpv:hasDataController": controller,
                "dpv:hasConsentControl": {"@type": "dpv:WithdrawConsent", "dpv:isExercisedAt": contact},
                STANDING: a.standing.status.value,
            }
            for a in agreements
        ],
    }
    public = ""
    if key is not None:
        public = key.public_key().public_bytes_raw().hex()
        value = base64.b64encode(key.sign(_canonical(tree))).decode()
        tree[SIGNATURE] = {"algorithm": "Ed25519", "publicKey": public, "value": value}
    return Receipt(
        subject=subject, pseudonym=pseudonym.hex(), created=now, controller=controller, withdraw=how,
        agreements=agreements, history=tuple(history), public_key=public,
        data=(json.dumps(tree, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode(),
    )  # fmt: skip


def write_receipt(receipt: Receipt, base: Path) -> tuple[Path, Path]:
    """`base.json` and `base.html`, readable by the owner only.

    Raises:
        OSError: They cannot be written.
    """
    json_path, page_path = base.with_name(base.name + ".json"), base.with_name(base.name + ".html")
    write_atomically(json_path, receipt.data, mode=0o600)
    context = {"r": receipt, "iso": _readable, "file": json_path.name}
    write_page(Path(__file__).with_name("receipt.html.j2"), context, page_path, mode=0o600)
    return json_path, page_path


def verify_receipt(data: bytes, public_key: bytes) -> None:
    """Is this receipt signed by this key (32 bytes)?

    Raises:
        ConsentError: It is no receipt, or the signature does not hold.
    """
    try:
        tree = parse_json(data)
        mark = tree.pop(SIGNATURE)
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            base64.b64decode(mark["value"], validate=True), _canonical(tree)
        )
    except (UnreadableError, AttributeError, KeyError, TypeError, ValueError, binascii.Error):
        raise ConsentError("is not a signed receipt", where="receipt", hint="ask the site for a new one") from None
    except InvalidSignature:
        raise ConsentError("the signature does not hold", where="receipt",
                           hint="the receipt was changed, or another key signed it") from None  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What a receipt with a sound signature says. `signed_by` is the public key (hex) that signed it: whose that is,
    the receipt cannot tell."""

    signed_by: str
    publisher: str
    created: str
    pseudonym: str
    standings: dict[str, str]


def read_receipt(data: bytes, public_key: bytes | None = None) -> Verified:
    """What a signed receipt says.

    Args:
        public_key: The key (32 bytes) that must have signed it; None: the one that it names.

    Raises:
        ConsentError: It is no receipt, or the signature does not hold.
    """
    try:
        tree = parse_json(data)
        if public_key is None:
            public_key = bytes.fromhex(tree[SIGNATURE]["publicKey"])
        verify_receipt(data, public_key)
        records = tree["dpv:hasRecordOfActivity"]
        found = Verified(
            signed_by=public_key.hex(), publisher=tree["dct:publisher"], created=tree["dct:created"],
            pseudonym=records[0]["dpv:hasDataSubject"]["@id"].removeprefix(PSEUDONYM),
            standings={record["dpv:hasPurpose"]["dct:identifier"]: record[STANDING] for record in records},
        )  # fmt: skip
        shown = (found.publisher, found.created, found.pseudonym, *found.standings, *found.standings.values())
        if tree["dct:conformsTo"] == RECEIPT_SCHEMA and all(isinstance(text, str) for text in shown):
            return found
    except (UnreadableError, AttributeError, KeyError, IndexError, TypeError, ValueError):
        pass
    raise ConsentError("is not a signed receipt", where="receipt", hint="ask the site for a new one")


def load_public_key(text: str) -> bytes:
    """An Ed25519 public key: 64 hexadecimal digits, or a PEM file that holds it or the key that belongs to it.

    Raises:
        ConfigError: It is no such key.
    """
    if _HEX_KEY.fullmatch(text):
        return bytes.fromhex(text)
    key: object = None
    try:
        data = Path(text).read_bytes()
        key = load_pem_private_key(data, None) if b"PRIVATE KEY" in data else load_pem_public_key(data)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=text,
                          hint="give 64 hexadecimal digits, or a PEM file") from None  # fmt: skip
    except (ValueError, TypeError):
        pass
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    if not isinstance(public, Ed25519PublicKey):
        raise ConfigError("is not an Ed25519 public key", where=text, hint="give 64 hexadecimal digits, or a PEM file")
    return public.public_bytes_raw()


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """An Ed25519 key: a PEM file without a passphrase, or its 32 bytes.

    Raises:
        ConfigError: It is no such key.
    """
    try:
        data = path.read_bytes()
        key = Ed25519PrivateKey.from_private_bytes(data) if len(data) == 32 else load_pem_private_key(data, None)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path), hint="name a key file") from None
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("is not an Ed25519 key", where=str(path),
                          hint="make one with: openssl genpkey -algorithm ed25519 -out receipts.pem")  # fmt: skip
    return key


def _canonical(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _latest(events: list[ConsentEvent], now: int) -> ConsentEvent | None:
    """The latest decision in force; at one instant the more protective."""
    past = [e for e in events if e.effective_at <= now and e.type not in _NO_DECISION]

    def rank(place: int) -> tuple[int, bool, bool, int]:
        e = past[place]
        return e.effective_at, e.type not in _GRANTS, e.valid_until is not None and e.valid_until <= now, place

    return past[max(range(len(past)), key=rank)] if past else None


_GRANTS = (EventType.GIVEN, EventType.RENEWED)
_NO_DECISION = (EventType.REQUESTED, EventType.RESTRICTED, EventType.UNRESTRICTED)


def _iso(micros: int) -> str:
    return from_micros(micros).isoformat(timespec="seconds")


def _readable(micros: int) -> str:
    return from_micros(micros).strftime("%Y-%m-%d %H:%M UTC")
