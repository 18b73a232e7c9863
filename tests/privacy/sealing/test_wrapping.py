"""Wrapped secrets: only the recipient opens them, only in their place, and unusable keys are noticed."""

from __future__ import annotations

import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import SealingError
from confide.privacy.sealing.wrapping import new_ephemeral, unwrap, usable, wrap

PRIVATE, PUBLIC = new_ephemeral()
INFO = b"manifest, roster, epoch 0, site-a, site-b"
SECRET = b"BFV key and MAC key"
WRAPPED = wrap(SECRET, PUBLIC, INFO)
#: Points of small order: whoever sends one knows the "shared" secret.
UNUSABLE = [
    bytes(32),
    (1).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 20).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    b"",
    b"short",
    bytes(31),
    bytes(33),
]


@given(secret=st.binary(max_size=3000), info=st.binary(max_size=200))
@settings(max_examples=40, deadline=None)
def test_the_recipient_gets_back_what_was_wrapped(secret: bytes, info: bytes) -> None:
    private, public = new_ephemeral()
    wrapped = wrap(secret, public, info)
    assert unwrap(wrapped, private, info) == secret
    assert len(wrapped) == len(secret) + 32 + 16
    assert len(secret) < 8 or secret not in wrapped


def test_a_whole_run_secret_fits() -> None:
    secret = secrets.token_bytes(30_752)
    assert unwrap(wrap(secret, PUBLIC, INFO), PRIVATE, INFO) == secret


def test_two_wraps_of_one_secret_have_nothing_in_common() -> None:
    other = wrap(SECRET, PUBLIC, INFO)
    assert other[:32] != WRAPPED[:32]
    assert other[32:] != WRAPPED[32:]


@pytest.mark.parametrize("info", [b"", INFO + b"\0", INFO[:-1], INFO.replace(b"epoch 0", b"epoch 1")])
def test_a_wrap_that_was_moved_to_another_place_is_refused(info: bytes) -> None:
    assert unwrap(WRAPPED, PRIVATE, INFO) == SECRET
    with pytest.raises(SealingError, match="was not wrapped for this site and run"):
        unwrap(WRAPPED, PRIVATE, info)


def test_another_recipient_is_refused() -> None:
    with pytest.raises(SealingError, match="was not wrapped for this site and run"):
        unwrap(WRAPPED, new_ephemeral()[0], INFO)


@pytest.mark.parametrize("private", [b"", bytes(31), bytes(33)])
def test_a_destroyed_private_key_opens_nothing(private: bytes) -> None:
    with pytest.raises(SealingError, match="was not wrapped"):
        unwrap(WRAPPED, private, INFO)


def test_every_single_changed_bit_is_refused_also_the_one_that_x25519_ignores() -> None:
    for bit in range(8 * len(WRAPPED)):
        changed = bytearray(WRAPPED)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealingError):
            unwrap(bytes(changed), PRIVATE, INFO)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 47, 48, len(WRAPPED) - 1])
def test_a_truncated_wrap_is_refused(length: int) -> None:
    with pytest.raises(SealingError):
        unwrap(WRAPPED[:length], PRIVATE, INFO)
    with pytest.raises(SealingError):
        unwrap(WRAPPED + b"\0", PRIVATE, INFO)


def test_what_is_larger_than_any_honest_secret_is_refused_before_it_is_decrypted() -> None:
    honest = wrap(bytes(256 * 1024 - 48), PUBLIC, INFO)
    assert len(honest) == 256 * 1024
    assert len(unwrap(honest, PRIVATE, INFO)) == 256 * 1024 - 48
    with pytest.raises(SealingError, match="larger than any honest"):
        unwrap(wrap(bytes(256 * 1024 - 47), PUBLIC, INFO), PRIVATE, INFO)


@pytest.mark.parametrize("public", UNUSABLE)
def test_a_key_that_gives_no_secret_is_not_usable_and_nothing_is_wrapped_for_it(public: bytes) -> None:
    assert not usable(public)
    with pytest.raises(SealingError, match="not usable"):
        wrap(SECRET, public, INFO)


def test_an_honest_key_is_usable_and_a_pair_belongs_together() -> None:
    assert usable(PUBLIC)
    assert X25519PrivateKey.from_private_bytes(PRIVATE).public_key().public_bytes_raw() == PUBLIC
    assert new_ephemeral() != new_ephemeral()
