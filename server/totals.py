"""What a journal keeps of a round: how it ended, and its sum, for sites that still have to apply it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confide.privacy.sealing import Payload
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope

__all__ = ["RoundOutcome", "Total", "total_of"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What the coordinator knows after a round; `metrics` are those opened from an earlier round's sum."""

    round: int
    cohort: tuple[str, ...]
    abandoned: bool
    uplink_bytes: int
    metrics_round: int | None = None
    metrics: Floats | None = None
    #: Bytes a parameter that each site sent; None where nothing was trained.
    update_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Total:
    """A round's sum, kept for sites that still have to apply it."""

    round: int
    cohort: tuple[str, ...]
    statements: tuple[str, ...]
    transcript: str
    attempt: int
    payload: Payload
    unlocked: tuple[m.Statement, ...] = ()
    uplink: int = 0
    #: Each member's signed `seal` reply, without its bulk.
    sealed: Mapping[str, Envelope] = field(default_factory=dict)
    #: Where single updates are passed on: who signed which chunks, in their order.
    signed: tuple[m.Statement, ...] = ()

    @property
    def chunks(self) -> tuple[bytes, ...]:
        """Its bulk."""
        return self.payload.chunks

    @property
    def reference(self) -> m.SumReference:
        """What a request says of it."""
        return m.SumReference(
            round=self.round, cohort=self.cohort, statements=self.statements, transcript=self.transcript,
            attempt=self.attempt, chunks=len(self.chunks), tags=tuple(f"{tag:016x}" for tag in self.payload.tags),
            unlocked=self.unlocked, sealed=self.signed,
        )  # fmt: skip


def total_of(row: Any, chunks: tuple[bytes, ...]) -> Total:
    """A sum from its row in the store, and its bulk."""
    of = m.SumReference.model_validate_json(row.reference)
    sealed = (m.Statement.model_validate(tree) for tree in json.loads(row.sealed))
    return Total(
        of.round, of.cohort, of.statements, of.transcript, of.attempt,
        Payload(chunks, tuple(int(tag, 16) for tag in of.tags)), of.unlocked, row.uplink,
        {statement.site: statement.envelope() for statement in sealed}, of.sealed,
    )  # fmt: skip
