"""Messages: every field that may leave a site stands in a table here, and nothing else passes."""

from __future__ import annotations

import json
import re
import typing

import pytest
from pydantic import BaseModel

from confide.errors import SealingError
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope

H = "ab" * 32
STATEMENT = m.Statement(site="ash", header="{}", signature="00" * 64, body="{}")
SUM = m.SumReference(
    round=1, cohort=("ash", "birch", "cedar"), statements=(H, H, H), transcript=H, attempt=1, chunks=2, tags=("1f",),
    unlocked=(STATEMENT, STATEMENT, STATEMENT), sealed=(STATEMENT, STATEMENT, STATEMENT),
)  # fmt: skip
#: Adding a field to a message means adding it here, and thinking about what it tells of people.
FIELDS: dict[type[m.Message], set[str]] = {
    m.JoinRequest: set(),
    m.JoinReply: {"ephemeral"},
    m.Statement: {"site", "header", "signature", "body"},
    m.SecretRequest: {"statements"},
    m.SecretReply: set(),
    m.KeysRequest: {"statements", "made", "wraps"},
    m.KeysReply: {"secret"},
    # attempt: how often the coordinator asked for this round; it depends on which sites answered, on nobody's data.
    # unlocked: signed `unlock` replies, see below; the coordinator has them, and sites check them.
    # sealed: signed `seal` replies, where single updates are passed on (profile `open` only): each covers its chunks.
    m.SumReference: {
        "round",
        "cohort",
        "statements",
        "transcript",
        "attempt",
        "chunks",
        "tags",
        "unlocked",
        "sealed",
    },
    m.Handover: {"round", "applied", "trained", "statements", "chunks"},
    m.TrainRequest: {"sums"},
    m.LateTrainRequest: {"handover", "sums"},
    m.TrainReply: {"commitment", "model", "state", "secret", "coordinator"},
    m.SealRequest: {"cohort", "statements"},
    m.SealReply: {"transcript", "tags"},
    m.UnlockRequest: {"statements"},  # signed `seal` replies without their bulk: a transcript and tags
    # seed: makes the site's own mask, a random one of this attempt only; the pairwise masks still hide its update.
    m.UnlockReply: {"transcript", "seed"},
    m.ReleaseRequest: {"sums", "statements"},
    m.ReleaseReply: {"model", "key"},
    m.EndRequest: {"status"},
    m.EndReply: set(),
    m.Refusal: {"kind", "reason"},
}
HANDOVER = m.Handover(round=3, applied=2, trained=2, statements=(STATEMENT,), chunks=1)
EXAMPLES: list[m.Message] = [
    m.JoinRequest(),
    m.JoinReply(ephemeral=H),
    STATEMENT,
    m.SecretRequest(statements=(STATEMENT,)),
    m.SecretReply(),
    m.KeysRequest(statements=(STATEMENT,), made=STATEMENT, wraps=(H,)),
    m.KeysReply(secret=H),
    SUM,
    m.TrainRequest(sums=(SUM,)),
    HANDOVER,
    m.LateTrainRequest(handover=HANDOVER, sums=(SUM,)),
    m.TrainReply(commitment=H, model=H, state=H, secret=H, coordinator=f"7:{H}"),
    m.SealRequest(cohort=("ash",), statements=(STATEMENT,)),
    m.SealReply(transcript=H, tags=("0", "ffffffffffffffff")),
    m.UnlockRequest(statements=(STATEMENT,)),
    m.UnlockReply(transcript=H, seed=H),
    m.ReleaseRequest(sums=(SUM,), statements=()),
    m.ReleaseReply(model=H, key=H),
    m.EndRequest(status="stopped"),
    m.EndReply(),
    m.Refusal(kind="abstains", reason="abstains"),
]
TYPES = [e.TYPE for e in EXAMPLES]
FROM_SITES = (
    m.JoinReply, m.SecretReply, m.KeysReply, m.TrainReply, m.SealReply, m.UnlockReply, m.ReleaseReply, m.EndReply,
    m.Refusal,
)  # fmt: skip


def test_the_table_of_fields_holds_every_message_and_every_field() -> None:
    assert {kind: set(kind.model_fields) for kind in m.Message.__subclasses__()} == FIELDS


def test_every_reply_of_a_site_is_looked_at_below() -> None:
    assert set(FROM_SITES) == {kind for kind in FIELDS if kind.TYPE.endswith(".reply")} | {m.Refusal}


def test_every_type_has_its_own_name() -> None:
    assert len(set(TYPES)) == len(TYPES) == len(FIELDS)


@pytest.mark.parametrize("kind", FROM_SITES, ids=lambda k: k.TYPE)
def test_nothing_that_a_site_says_is_a_number_or_free_text(kind: type[m.Message]) -> None:
    """Counts, losses, sizes and times are numbers. Digests, keys, tags and a refusal's words are all there is."""
    tags = typing.get_args(m.Tags)[0]
    for name, field in kind.model_fields.items():
        assert field.annotation in (str, tags), f"{kind.TYPE}.{name} is a {field.annotation}"
        patterns = [p for x in field.metadata if (p := getattr(x, "pattern", None))]
        assert patterns or name == "tags" or kind is m.Refusal, f"{kind.TYPE}.{name} is free text"
    (tag, _) = typing.get_args(tags)
    assert tag is not str, "tags have a pattern of their own"


@pytest.mark.parametrize("kind", FIELDS, ids=lambda k: k.TYPE)
def test_no_message_names_counts_or_losses(kind: type[m.Message]) -> None:
    telling = re.compile("count|loss|num|size|accura|auc|sample|subject|person|record|weight|epsilon|time|min|max")
    assert not [name for name in kind.model_fields if telling.search(name)]


@pytest.mark.parametrize("message", EXAMPLES, ids=TYPES)
def test_a_message_survives_the_wire(message: m.Message) -> None:
    kind = type(message)
    assert m.decode(kind, kind.TYPE, message.to_bytes()) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=TYPES)
def test_unknown_and_missing_fields_and_other_types_are_refused(message: m.Message) -> None:
    kind, fields = type(message), json.loads(message.to_bytes())
    with pytest.raises(SealingError, match="malformed"):
        m.decode(kind, kind.TYPE, json.dumps(fields | {"num_examples": 5}).encode())
    for name in fields:
        with pytest.raises(SealingError, match="malformed"):
            m.decode(kind, kind.TYPE, json.dumps({k: v for k, v in fields.items() if k != name}).encode())
    for other in {*TYPES, "", "x" * 1000} - {kind.TYPE}:
        with pytest.raises(SealingError, match="expected a"):
            m.decode(kind, other, message.to_bytes())


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"\xff", b"{", b"{}" * 2, b"[" * 5000])
def test_bytes_that_are_no_message_are_refused(body: bytes) -> None:
    with pytest.raises(SealingError, match="malformed"):
        m.decode(m.TrainReply, m.TrainReply.TYPE, body)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (m.JoinReply, {"ephemeral": "AB" * 32}),
        (m.JoinReply, {"ephemeral": "ab" * 31}),
        (m.JoinReply, {"ephemeral": H + "\n"}),
        (m.SealReply, {"transcript": H, "tags": ["-1"]}),
        (m.SealReply, {"transcript": H, "tags": ["0x1"]}),
        (m.SealReply, {"transcript": H, "tags": [""]}),
        (m.SealReply, {"transcript": H, "tags": ["f" * 17]}),
        (m.SealReply, {"transcript": H, "tags": [1]}),
        (m.SumReference, SUM.model_dump() | {"round": 0}),
        (m.SumReference, SUM.model_dump() | {"chunks": -1}),
        (m.SumReference, SUM.model_dump() | {"attempt": -1}),
        (m.SumReference, SUM.model_dump() | {"attempt": 101}),
        (m.SumReference, SUM.model_dump() | {"unlocked": [H]}),
        (m.SumReference, SUM.model_dump() | {"sealed": [H]}),
        (m.UnlockReply, {"transcript": H, "seed": "ab" * 31}),
        (m.UnlockReply, {"transcript": H, "seed": "AB" * 32}),
        (m.UnlockReply, {"transcript": H, "seed": ""}),
        (m.KeysRequest, {"statements": [], "made": STATEMENT.model_dump(), "wraps": ["zz"]}),
        (m.Refusal, {"kind": "abstains", "reason": "x" * 501}),
        (m.Refusal, {"kind": "x" * 33, "reason": "abstains"}),
        (m.TrainReply, {"commitment": H, "model": H, "state": H, "secret": None}),
    ],
)
def test_values_out_of_form_are_refused(kind: type[m.Message], fields: dict[str, object]) -> None:
    with pytest.raises(SealingError, match="malformed"):
        m.decode(kind, kind.TYPE, json.dumps(fields).encode())


def test_messages_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        m.JoinReply(ephemeral=H).ephemeral = "00" * 32  # type: ignore[misc]  # the point of the test


def test_a_statement_is_the_same_signed_message_again() -> None:
    envelope = Envelope(b'{"a": 1}', bytes(range(64)), b'{"b": "\xc3\xa9"}', (b"bulk",))
    again = m.Statement.of("ash", envelope).envelope()
    assert again == envelope.without_chunks()
    assert again.digest == envelope.digest


@pytest.mark.parametrize("signature", ["zz", "0", "00 0g", "é"])
def test_a_statement_whose_signature_is_not_hexadecimal_is_refused(signature: str) -> None:
    with pytest.raises(SealingError, match="malformed"):
        STATEMENT.model_copy(update={"signature": signature}).envelope()


def test_all_messages_derive_from_one_strict_base() -> None:
    for kind in FIELDS:
        assert issubclass(kind, BaseModel)
        assert kind.model_config["extra"] == "forbid"
        assert kind.model_config["frozen"] is True
