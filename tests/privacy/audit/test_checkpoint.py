"""Signed checkpoints: one form, one key, one log; any other byte is refused."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import AuditError
from confide.privacy.audit.checkpoint import Checkpoint, parse_note, sign_note

ORIGIN, NAME = "confide/simulation/ash/federated", "ash"
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
CHECKPOINT = Checkpoint(ORIGIN, 17, hashlib.sha256(b"root").digest())
NOTE = sign_note(CHECKPOINT, NAME, PUBLIC, KEY.sign)


def signed(text: str, name: str = NAME, key: Ed25519PrivateKey = KEY) -> str:
    """Any text, signed as a note by hand (C2SP signed-note)."""
    public = key.public_key().public_bytes_raw()
    identifier = hashlib.sha256(name.encode() + b"\n\x01" + public).digest()[:4]
    return f"{text}\n— {name} {base64.b64encode(identifier + key.sign(text.encode())).decode()}\n"


@given(
    st.text(st.characters(codec="ascii", exclude_characters="\n\r"), min_size=1),
    st.integers(0, 2**60),
    st.binary(min_size=32, max_size=32),
)
def test_a_note_gives_back_what_was_signed(origin: str, size: int, root: bytes) -> None:
    checkpoint = Checkpoint(origin, size, root)
    assert parse_note(sign_note(checkpoint, NAME, PUBLIC, KEY.sign), origin, NAME, PUBLIC) == checkpoint


def test_a_note_has_the_form_of_c2sp() -> None:
    root = base64.b64encode(CHECKPOINT.root).decode()
    assert NOTE.splitlines()[:4] == [ORIGIN, "17", root, ""]
    assert signed(CHECKPOINT.text) == NOTE
    assert CHECKPOINT.short == f"17:{CHECKPOINT.root.hex()}"


def test_every_bit_of_a_note_counts() -> None:
    data = NOTE.encode()
    assert parse_note(data.decode(), ORIGIN, NAME, PUBLIC) == CHECKPOINT  # the control
    accepted = []
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            parse_note(changed.decode("utf-8"), ORIGIN, NAME, PUBLIC)
        except (AuditError, UnicodeDecodeError):
            continue
        accepted.append(bit)
    assert accepted == []


@pytest.mark.parametrize("cut", range(len(NOTE)))
def test_a_note_that_was_cut_is_refused(cut: int) -> None:
    with pytest.raises(AuditError):
        parse_note(NOTE[:cut], ORIGIN, NAME, PUBLIC)


@settings(max_examples=200)
@given(st.text(), st.integers(0, len(NOTE)))
def test_a_note_with_anything_put_in_is_refused(extra: str, at: int) -> None:
    changed = NOTE[:at] + extra + NOTE[at:]
    if changed == NOTE:
        return
    with pytest.raises(AuditError):
        parse_note(changed, ORIGIN, NAME, PUBLIC)


def test_another_key_another_name_and_another_log_are_refused() -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
    with pytest.raises(AuditError, match="signed by another key"):
        parse_note(NOTE, ORIGIN, NAME, stranger.public_key().public_bytes_raw())
    with pytest.raises(AuditError):
        parse_note(sign_note(CHECKPOINT, NAME, PUBLIC, stranger.sign), ORIGIN, NAME, PUBLIC)
    with pytest.raises(AuditError):
        parse_note(NOTE, ORIGIN, "birch", PUBLIC)
    with pytest.raises(AuditError, match="about another log"):
        parse_note(NOTE, "confide/simulation/ash/local", NAME, PUBLIC)


@pytest.mark.parametrize(
    "text",
    [
        f"{ORIGIN}\n017\n{base64.b64encode(CHECKPOINT.root).decode()}\n",
        f"{ORIGIN}\n+17\n{base64.b64encode(CHECKPOINT.root).decode()}\n",
        f"{ORIGIN}\n1_7\n{base64.b64encode(CHECKPOINT.root).decode()}\n",
        f"{ORIGIN}\n 17\n{base64.b64encode(CHECKPOINT.root).decode()}\n",
        f"{ORIGIN}\n١٧\n{base64.b64encode(CHECKPOINT.root).decode()}\n",
        f"{ORIGIN}\nseventeen\n{base64.b64encode(CHECKPOINT.root).decode()}\n",
        f"{ORIGIN}\n17\n{CHECKPOINT.root.hex()}\n",
        f"{ORIGIN}\n17\n{base64.b64encode(CHECKPOINT.root[:31]).decode()}\n",
        f"{ORIGIN}\n17\n{base64.b64encode(CHECKPOINT.root + b'!').decode()}\n",
        f"{ORIGIN}\n17\n{base64.b64encode(CHECKPOINT.root).decode()}\nextension\n",
        f"{ORIGIN}\n17\n",
        "",
    ],
    ids=["leading 0", "plus", "underscore", "space", "other digits", "words", "hex", "short", "long", "more", "less",
         "none"],
)  # fmt: skip
def test_a_signature_over_another_form_is_refused(text: str) -> None:
    assert parse_note(signed(CHECKPOINT.text), ORIGIN, NAME, PUBLIC) == CHECKPOINT  # the control
    with pytest.raises(AuditError):
        parse_note(signed(text), ORIGIN, NAME, PUBLIC)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(AuditError):
        parse_note(signed(f"{ORIGIN}\n-1\n{base64.b64encode(CHECKPOINT.root).decode()}\n"), ORIGIN, NAME, PUBLIC)
