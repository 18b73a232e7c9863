"""Envelopes in Flower's records and on Flower's wire."""

from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import SealingError
from confide.protocol.envelope import Envelope
from confide.protocol.flower import from_records, to_records

PARTS: dict[str, bytes] = {"header": b"h", "signature": b"s", "body": b"b"}


def array(data: bytes) -> Array:
    """A chunk."""
    return Array(dtype="uint8", shape=(len(data),), stype="confide.bytes/1", data=data)


@given(
    st.binary(max_size=100),
    st.binary(max_size=64),
    st.binary(max_size=100),
    st.lists(st.binary(max_size=80), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_an_envelope_survives_flowers_wire(header: bytes, signature: bytes, body: bytes, chunks: list[bytes]) -> None:
    envelope = Envelope(header, signature, body, tuple(chunks))
    wire = recorddict_to_proto(to_records(envelope)).SerializeToString()
    again = type(recorddict_to_proto(RecordDict())).FromString(wire)
    assert from_records(recorddict_from_proto(again)) == envelope


def test_more_chunks_than_ten_keep_their_order() -> None:
    envelope = Envelope(b"h", b"s", b"b", tuple(str(i).encode() for i in range(2000)))
    assert from_records(to_records(envelope)) == envelope


WRONG = {
    "nothing": RecordDict(),
    "no body": RecordDict({"envelope": ConfigRecord({"header": b"h", "signature": b"s"})}),
    "text": RecordDict({"envelope": ConfigRecord({**PARTS, "header": "h"})}),
    "numbers": RecordDict({"envelope": ConfigRecord({**PARTS, "body": 7})}),
    "lists": RecordDict({"envelope": ConfigRecord({**PARTS, "body": [b"b"]})}),
    "more": RecordDict({"envelope": ConfigRecord({**PARTS, "loss": 0.5})}),
    "another record": RecordDict({"envelope": ConfigRecord(dict(PARTS)), "extra": ConfigRecord({"num_examples": 12})}),
    "metrics": RecordDict({"envelope": ConfigRecord(dict(PARTS)), "metrics": MetricRecord({"loss": 0.5})}),
    "arrays for an envelope": RecordDict({"envelope": ArrayRecord({"header": array(b"h")})}),
    "config for chunks": RecordDict({"envelope": ConfigRecord(dict(PARTS)), "chunks": ConfigRecord({"000000": b"x"})}),
    "a gap": RecordDict({"envelope": ConfigRecord(dict(PARTS)), "chunks": ArrayRecord({"000001": array(b"x")})}),
    "another order": RecordDict(
        {"envelope": ConfigRecord(dict(PARTS)), "chunks": ArrayRecord({"000001": array(b"x"), "000000": array(b"y")})}
    ),
}  # fmt: skip


def test_the_right_shape_passes() -> None:
    """The control of the table above."""
    right = RecordDict({"envelope": ConfigRecord(dict(PARTS)), "chunks": ArrayRecord({"000000": array(b"x")})})
    assert from_records(right) == Envelope(b"h", b"s", b"b", (b"x",))


@pytest.mark.parametrize("shape", WRONG)
def test_records_of_another_shape_are_refused(shape: str) -> None:
    with pytest.raises(SealingError):
        from_records(WRONG[shape])
