"""What sites keep of each other's logs, so that a site whose whole state was put back to an earlier day is told.

Every signed message shows the state of its sender's log. Each site keeps the latest of these of its neighbours in the
roster (a *sighting*: a signed header, which nobody can forge) and hands them over when it joins a run. They go to the
site they are about, which looks whether its log still holds what it once signed.

Invariants:
1. A sighting is the sender's own signature: no peer can accuse a site of what it never showed.
2. They are covered by the signature of the `join` reply that brings them: a coordinator cannot leave some out, only the
   whole peer, which then takes no part in the run.
3. A site has at most `WATCHERS` watchers, so what travels does not grow with the roster.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from confide.errors import SealingError
from confide.protocol.envelope import Envelope, Header, verify_header
from confide.protocol.manifest import Manifest

__all__ = ["MAX_SIGHTINGS", "WATCHERS", "Sighting", "pack_sightings", "unpack_sightings", "watched_by", "watchers_of"]

WATCHERS = 16
#: Bytes of a site's sightings: a header in JSON (at most 4 KiB, escaped) and a signature each.
MAX_SIGHTINGS = WATCHERS * 10_000


class Sighting(BaseModel):
    """The signed header of a site's message, of which only the state of its log matters."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    header: Annotated[str, Field(max_length=4096)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def of(cls, envelope: Envelope) -> Sighting:
        """From a message whose signature was verified."""
        return cls(header=envelope.header.decode(), signature=envelope.signature.hex())

    def checked(self, public_key: bytes, sender: str) -> Header:
        """The header, if `sender` signed it.

        Raises:
            SealingError: It is somebody else's, or nothing that was ever signed.
        """
        header = verify_header(self.header.encode(), bytes.fromhex(self.signature), public_key, sender=sender)
        if header.sender != sender:
            raise SealingError("a sighting of somebody else", where=f"site {sender}")
        return header


_Sightings = TypeAdapter(Annotated[tuple[Sighting, ...], Field(max_length=WATCHERS)])


def pack_sightings(sightings: Sequence[Sighting]) -> bytes:
    """As they travel: a chunk of a `join` reply."""
    return _Sightings.dump_json(tuple(sightings))


def unpack_sightings(chunk: bytes) -> tuple[Sighting, ...]:
    """Inverse of `pack_sightings`, for a chunk whose digest was verified.

    Raises:
        SealingError: It is too large or malformed.
    """
    try:
        if len(chunk) > MAX_SIGHTINGS:
            raise ValueError
        return _Sightings.validate_json(chunk)
    except (ValidationError, ValueError):
        raise SealingError("sightings that no site can use", where="join reply") from None


def watchers_of(manifest: Manifest, site: str) -> tuple[str, ...]:
    """The sites that keep what `site` shows: the next ones in the roster's order, sorted by name."""
    return _ring(manifest, site, 1)


def watched_by(manifest: Manifest, site: str) -> tuple[str, ...]:
    """The sites whose logs `site` keeps in sight: inverse of `watchers_of`."""
    return _ring(manifest, site, -1)


def _ring(manifest: Manifest, site: str, direction: int) -> tuple[str, ...]:
    names = manifest.names
    here, count = bisect_left(names, site), min(WATCHERS, len(names) - 1)
    if here == len(names) or names[here] != site:
        raise ValueError(f"{site} takes no part in the run")
    return tuple(sorted(names[(here + direction * step) % len(names)] for step in range(1, count + 1)))
