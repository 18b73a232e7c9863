"""Single updates that the coordinator passes on (profile `open`, for strategies that compare them): each counts only as
the very bytes that its own site signed, for this round and this cohort. So the coordinator can leave a whole round out,
but it cannot change, swap or invent an update, and all sites compute from the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from confide.errors import SealingError
from confide.protocol.envelope import Address, Header, carries, chunk_digests
from confide.protocol.manifest import Manifest
from confide.protocol.messages import SealReply, SumReference
from confide.protocol.statements import signed_reply

__all__ = ["signed_payloads"]


def signed_payloads(
    manifest: Manifest, reference: SumReference, chunks: Sequence[bytes], place: Address, coordinator: str
) -> tuple[bytes, ...]:
    """The cohort's payloads in the order of its names.

    Args:
        manifest: The run.
        reference: What the coordinator says these chunks are.
        chunks: All payloads, in the order of `reference.sealed`.
        place: Where the signed `seal` replies belong.
        coordinator: Whom they were addressed to.

    Raises:
        SealingError: One is missing, not its site's, or of another round, cohort or size.
    """
    where, parts, offset = f"round {reference.round}", dict[str, tuple[bytes, ...]](), 0
    for statement in reference.sealed:
        reply = signed_reply(manifest, statement, statement.site, place, coordinator, SealReply)
        header = Header.model_validate_json(statement.header)  # verified just now
        part = tuple(chunks[offset : offset + header.chunks])
        offset += header.chunks
        if reply.transcript != reference.transcript:
            raise SealingError(f"{statement.site} sent its update to another cohort", where=where)
        if not carries(header, chunk_digests(part)):
            raise SealingError(f"an update is not the one that {statement.site} signed", where=where)
        parts[statement.site] = part
    if sorted(parts) != list(reference.cohort) or len(reference.sealed) != len(parts) or offset != len(chunks):
        raise SealingError("these are not the updates of the cohort", where=where)
    if len({sum(map(len, part)) for part in parts.values()}) != 1:
        raise SealingError("the updates differ in size", where=where)
    return tuple(chunk for site in reference.cohort for chunk in parts[site])
