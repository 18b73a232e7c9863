"""Everything that a coordinator or a peer gets to see of a simulated run, in shape: what one person must not change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import Message

from confide.privacy.audit.log import LOG_SUFFIX
from confide.protocol.envelope import Header
from confide.protocol.flower import from_records
from confide.simulations.engines.grid import LocalGrid


@dataclass(frozen=True)
class Seen:
    """One message. Names of runs, digests, signatures and ciphertexts differ from run to run; their sizes must not."""

    site: str
    way: str
    flower_type: str
    step: str
    type: str
    round: int
    attempt: int
    error: int
    sizes: tuple[int, ...]
    wire: int
    #: Of a refusal: the code and all that it says.
    refusal: bytes


@dataclass
class Transcript:
    """All messages of a run, in their order; and of each log that travels, the size of every line."""

    messages: list[Seen] = field(default_factory=list)
    logs: dict[str, list[int]] = field(default_factory=dict)


def record_runs(patch: pytest.MonkeyPatch) -> list[Transcript]:
    """Have every run from here on recorded, until the patch is undone."""
    found: list[Transcript] = []

    class Recorder(LocalGrid):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # whatever the grid takes
            found.append(Transcript())
            self._mine = found[-1]

        def _deliver(self, message: Message) -> Message:
            down, up, site = self.bytes_down, self.bytes_up, self._site_of[message.metadata.dst_node_id]
            reply = super()._deliver(message)
            self._mine.messages.append(_seen(site, "to", message, self.bytes_down - down))
            self._mine.messages.append(_seen(site, "from", reply, self.bytes_up - up))
            return reply

    patch.setattr("confide.simulations.execution.LocalGrid", Recorder)
    return found


def read_logs(transcript: Transcript, out: Path) -> Transcript:
    """Add the logs that a finished run has left for travelling."""
    for path in sorted((out / "logs").glob(f"*{LOG_SUFFIX}")):
        transcript.logs[path.name] = [_size(line) for line in path.read_bytes().splitlines()]
    return transcript


def _size(line: bytes) -> int:
    """Released metrics are noised and charged for, and written with as many digits as they have."""
    salt, found, entry = line.partition(b" {")
    if b'"metrics_released"' not in line:
        return len(line)
    tree = json.loads(b"{" + entry)
    tree["values"] = ["" for _ in tree["values"]]
    return len(salt + found + json.dumps(tree).encode())


def _seen(site: str, way: str, message: Message, wire: int) -> Seen:
    kind = message.metadata.message_type
    if message.has_error():
        return Seen(site, way, kind, "", "", 0, 0, message.error.code, (), wire, b"")
    envelope = from_records(message.content)
    header = Header.model_validate_json(envelope.header)
    parts = (envelope.header, envelope.signature, envelope.body, *envelope.chunks)
    refusal = envelope.body if "refus" in header.type else b""
    sizes = tuple(map(len, parts))
    return Seen(site, way, kind, header.step, header.type, header.round, header.attempt, 0, sizes, wire, refusal)
