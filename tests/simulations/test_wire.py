"""A simulation's messages in Flower's wire form: byte for byte what Flower itself makes of them."""

from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.protocol.envelope import Envelope
from confide.protocol.flower import from_records, to_records
from confide.simulations.engines.grid import LocalGrid, off_the_wire, on_the_wire


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    LocalGrid(lambda message, context: message, ["ash"])  # type: ignore[arg-type]  # nobody answers
    assert TaskIdentity.run_id == 1


def message(content: RecordDict) -> Message:
    """Somebody's."""
    found = Message(content, 100, "train.train", group_id="train")
    found.metadata.__dict__["_message_id"] = "an id"
    return found


def of_flower(content: Message) -> bytes:
    """What Flower makes of it."""
    return bytes(message_to_proto(content).SerializeToString())


def array(data: bytes, shape: tuple[int, ...] = ()) -> Array:
    """Bytes."""
    return Array(dtype="uint8", shape=shape, stype="s", data=data)


@given(st.binary(max_size=300), st.lists(st.binary(max_size=2000), max_size=6).map(tuple))
@settings(max_examples=60, deadline=None)
def test_an_envelope_has_flowers_bytes_and_comes_back(body: bytes, chunks: tuple[bytes, ...]) -> None:
    envelope = Envelope(b"header", b"signature", body, chunks)
    sent = message(to_records(envelope))
    wire = on_the_wire(sent)
    assert wire == of_flower(sent)
    assert from_records(off_the_wire(wire).content) == envelope
    assert on_the_wire(off_the_wire(wire)) == wire


CONTENTS = {
    "nothing": RecordDict(),
    "no array": RecordDict({"a": ArrayRecord()}),
    "an empty array": RecordDict({"a": ArrayRecord({"x": array(b"")})}),
    "shapes": RecordDict({"a": ArrayRecord({"x": array(b"abc", (3, 1, 0)), "y": array(b"q" * 5000, (5000,))})}),
    "an empty config": RecordDict({"c": ConfigRecord()}),
    "everything": RecordDict(
        {
            "m": MetricRecord({"loss": 0.5, "many": [1, 2]}), "a": ArrayRecord({"x": array(b"abc")}),
            "c": ConfigRecord({"b": b"bytes", "t": "text", "n": [1.5], "f": True}), "z": ArrayRecord(),
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_whatever_a_message_holds_it_has_flowers_bytes(content: str) -> None:
    sent = message(CONTENTS[content])
    assert on_the_wire(sent) == of_flower(sent)


def test_replies_and_errors_have_flowers_bytes() -> None:
    asked = message(CONTENTS["everything"])
    for reply in (
        Message(CONTENTS["shapes"], reply_to=asked), Message(Error(code=201, reason="a fault"), reply_to=asked),
    ):  # fmt: skip
        assert on_the_wire(reply) == of_flower(reply)
        assert off_the_wire(on_the_wire(reply)).has_error() == reply.has_error()
