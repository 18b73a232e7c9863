"""Envelopes in Flower's records: the small parts in a ConfigRecord, the bulk as Arrays (Flower chunks those)."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from confide.errors import SealingError
from confide.protocol.envelope import MAX_CHUNKS, Envelope

__all__ = ["from_records", "to_records"]

_STYPE = "confide.bytes/1"


def to_records(envelope: Envelope) -> RecordDict:
    """The envelope as a message's content."""
    config = ConfigRecord()
    config["header"], config["signature"], config["body"] = envelope.header, envelope.signature, envelope.body
    records = RecordDict({"envelope": config})
    if envelope.chunks:
        arrays = {
            f"{i:06d}": Array(dtype="uint8", shape=(len(c),), stype=_STYPE, data=c)
            for i, c in enumerate(envelope.chunks)
        }
        records["chunks"] = ArrayRecord(arrays)
    return records


def from_records(records: RecordDict) -> Envelope:
    """Inverse of `to_records`. Nothing is trusted yet: verify the envelope next.

    Raises:
        SealingError: The content has another shape.
    """
    try:
        config = records.config_records["envelope"]
        header, signature, body = (config[name] for name in ("header", "signature", "body"))
    except KeyError:
        raise SealingError("the content is not a confide envelope", where="message") from None
    if set(records) - {"envelope", "chunks"} or set(config) != {"header", "signature", "body"}:
        raise SealingError("the content holds records that nobody signed", where="message")
    if ("chunks" in records) != ("chunks" in records.array_records):
        raise SealingError("the chunks are not arrays", where="message")
    arrays = records.array_records.get("chunks", ArrayRecord())
    if len(arrays) > MAX_CHUNKS or list(arrays) != [f"{i:06d}" for i in range(len(arrays))]:
        raise SealingError("the chunks are not numbered from zero", where="message")
    if not (isinstance(header, bytes) and isinstance(signature, bytes) and isinstance(body, bytes)):
        raise SealingError("the envelope's parts are not bytes", where="message")
    return Envelope(header, signature, body, tuple(array.data for array in arrays.values()))
