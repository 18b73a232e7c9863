"""Envelopes: what is signed, what is checked, under which limits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import SealingError
from confide.privacy.digest import framed
from confide.protocol.envelope import (
    MAX_BODY,
    MAX_CHUNKS,
    MAX_REPLY_BODY,
    Address,
    Envelope,
    Header,
    expect,
    seal_envelope,
    verify,
)
from confide.protocol.identity import Identity, verify_signature

ALICE, BOB = Identity.generate("alice"), Identity.generate("bob")
PLACE = Address(federation="f", roster_version=1, run="r", manifest="00" * 32, key_epoch=0, round=1, step="train")
CHECKPOINT = "3:" + "ab" * 32


def sealed(body: bytes = b"body", chunks: tuple[bytes, ...] = (b"one", b"two"), request: str = "") -> Envelope:
    """Alice to Bob."""
    return seal_envelope(
        ALICE, PLACE, recipient="bob", type_="t", body=body, checkpoint=CHECKPOINT, chunks=chunks, request=request
    )


@given(st.binary(max_size=200), st.lists(st.binary(max_size=50), max_size=4).map(tuple), st.text(max_size=20))
@settings(max_examples=50, deadline=None)
def test_what_is_signed_is_verified_and_says_where_it_belongs(
    body: bytes, chunks: tuple[bytes, ...], request_: str
) -> None:
    envelope = sealed(body, chunks, request_)
    header = verify(envelope, ALICE.public_key, sender="alice")
    expect(header, PLACE, sender="alice", recipient="bob", request=request_)
    assert header.checkpoint == CHECKPOINT
    with pytest.raises(SealingError, match="signature"):
        verify(envelope, BOB.public_key, sender="alice")


def test_every_field_of_a_header_is_known() -> None:
    """A field more or less is a change of the protocol: bump the version and this table together."""
    assert set(Header.model_fields) == {
        "federation", "roster_version", "run", "manifest", "key_epoch", "round", "step", "attempt",
        "version", "sender", "recipient", "type", "request", "body", "chunks", "chunk_root",
        "checkpoint",
    }  # fmt: skip
    assert set(Address.model_fields) == {
        "federation", "roster_version", "run", "manifest", "key_epoch", "round", "step",
        "attempt",  # the coordinator's own count of how often it asked to seal the round: it tells nothing new
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation", "g"), ("roster_version", 2), ("run", "s"), ("manifest", "11" * 32), ("key_epoch", 1),
        ("round", 2), ("step", "seal"), ("step", "unlock"), ("attempt", 1),
    ],
)  # fmt: skip
def test_a_message_from_another_place_is_refused_by_the_field_that_differs(field: str, value: object) -> None:
    header = verify(sealed(), ALICE.public_key, sender="alice")
    elsewhere = PLACE.model_copy(update={field: value})
    with pytest.raises(SealingError, match=f"another {field}"):
        expect(header, elsewhere, sender="alice", recipient="bob", request="")


@pytest.mark.parametrize(
    ("who", "match"),
    [
        ({"sender": "bob", "recipient": "bob", "request": ""}, "another sender"),
        ({"sender": "alice", "recipient": "carol", "request": ""}, "another recipient"),
        ({"sender": "alice", "recipient": "bob", "request": "00"}, "another request"),
    ],
)
def test_a_message_of_or_for_somebody_else_is_refused(who: dict[str, str], match: str) -> None:
    header = verify(sealed(), ALICE.public_key, sender="alice")
    with pytest.raises(SealingError, match=match):
        expect(header, PLACE, sender=who["sender"], recipient=who["recipient"], request=who["request"])
    expect(header, PLACE, sender="alice", recipient="bob", request=None)


def test_bulk_may_be_left_out_only_where_the_caller_says_so() -> None:
    bare = sealed().without_chunks()
    with pytest.raises(SealingError, match="chunk"):
        verify(bare, ALICE.public_key, sender="alice")
    assert verify(bare, ALICE.public_key, sender="alice", with_chunks=False).sender == "alice"
    assert bare.digest == sealed().without_chunks().digest, "Ed25519 is deterministic"


def test_every_part_has_a_limit_and_the_largest_allowed_passes() -> None:
    largest = sealed(body=bytes(MAX_BODY))
    assert verify(largest, ALICE.public_key, sender="alice").sender == "alice"
    many = sealed(chunks=(b"",) * MAX_CHUNKS)
    assert verify(many, ALICE.public_key, sender="alice").chunks == MAX_CHUNKS
    assert len(many.header) < 2048, "a header is short, whatever it carries"
    short = sealed(body=bytes(MAX_REPLY_BODY))
    assert verify(short, ALICE.public_key, sender="alice", max_body=MAX_REPLY_BODY).sender == "alice"
    with pytest.raises(SealingError, match="larger than any honest"):
        verify(sealed(body=bytes(MAX_REPLY_BODY + 1)), ALICE.public_key, sender="alice", max_body=MAX_REPLY_BODY)
    for oversized in (
        replace(sealed(), body=bytes(MAX_BODY + 1)),
        replace(sealed(), header=bytes(4097)),
        replace(sealed(), chunks=(b"",) * (MAX_CHUNKS + 1)),
    ):
        with pytest.raises(SealingError, match="larger than any honest"):
            verify(oversized, ALICE.public_key, sender="alice")


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1}, {"version": 2}, {"version": "1"}, {"body": "00"}, {"chunks": ["zz"]}, {"chunks": -1},
        {"chunks": MAX_CHUNKS + 1},
        {"chunk_root": "zz"}, {"sender": "x" * 129}, {"round": -1},
        {"round": 1.5}, {"attempt": -1}, {"attempt": 101}, {"attempt": 0.5}, {"key_epoch": -1}, {"key_epoch": 1001},
        {"key_epoch": None}, {"step": "destroy"}, {"sender": None}, {"checkpoint": "1"}, {"manifest": "AB" * 32},
    ],
)  # fmt: skip
def test_a_signed_header_of_another_form_is_refused(change: dict[str, object]) -> None:
    fields = json.loads(sealed().header) | change
    header = json.dumps(fields).encode()
    envelope = Envelope(header, ALICE.sign(framed((b"confide/envelope/1", header))), b"body", (b"one", b"two"))
    with pytest.raises(SealingError, match="cannot be read"):
        verify(envelope, ALICE.public_key, sender="alice")


def test_a_signature_over_bare_bytes_is_no_envelope() -> None:
    """Domain separation: what an identity signs for another purpose (a log's checkpoint) is no message."""
    header = sealed().header
    with pytest.raises(SealingError, match="signature"):
        verify(Envelope(header, ALICE.sign(header), b"body", (b"one", b"two")), ALICE.public_key, sender="alice")


def test_names_of_messages_do_not_collide() -> None:
    digests = {sealed(b"a").digest, sealed(b"b").digest, sealed(b"a", ()).digest, sealed(b"a", request="x").digest}
    assert len(digests) == 4


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), bytes(32)])
def test_a_key_that_is_none_verifies_nothing(key: bytes) -> None:
    assert verify_signature(ALICE.public_key, ALICE.sign(b"m"), b"m")
    assert not verify_signature(key, ALICE.sign(b"m"), b"m")


def test_an_identity_does_not_print_its_key() -> None:
    assert ALICE.key.private_bytes_raw().hex() not in repr(ALICE)
    assert "Ed25519" not in repr(ALICE)
