"""Sealing sessions of a whole cohort, without sites: what the tests of the primitive share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.privacy.sealing import Agreement, Payload, SealedProfile, Segment, Session
from confide.privacy.sealing.wrapping import new_ephemeral

Floats = NDArray[np.float64]
TRANSCRIPT = "ab" * 32


@dataclass(frozen=True)
class Cohort:
    """Sites that share a secret and know each other's ephemeral keys."""

    profile: SealedProfile
    secret: bytes
    sessions: dict[str, Session]
    private: dict[str, bytes]
    public: dict[str, bytes]

    @classmethod
    def make(cls, sites: int = 4, bits: int = 16, most: int | None = None) -> Cohort:
        """A fresh cohort; the parameters leave room for `most` sites."""
        profile = SealedProfile(most or sites, bits)
        names = [f"site-{i:02d}" for i in range(sites)]
        keys = {name: new_ephemeral() for name in names}
        public = {name: pair[1] for name, pair in keys.items()}
        secret = profile.make_secret()
        sessions = {name: profile.session(name, secret, keys[name][0], public) for name in names}
        return cls(profile, secret, sessions, {n: k[0] for n, k in keys.items()}, public)

    @property
    def names(self) -> tuple[str, ...]:
        """All sites, sorted."""
        return tuple(sorted(self.sessions))

    def agreement(self, cohort: Sequence[str] | None = None, transcript: str = TRANSCRIPT) -> Agreement:
        """What a sum is bound to."""
        return Agreement(tuple(sorted(cohort or self.names)), transcript)

    def seal(
        self, vectors: dict[str, Floats], segments: Sequence[Segment], agreement: Agreement | None = None
    ) -> dict[str, Payload]:
        """Every site's payload."""
        bound = agreement or self.agreement(tuple(vectors))
        return {name: self.sessions[name].seal(vector, segments, bound) for name, vector in vectors.items()}

    def total(self, payloads: Sequence[Payload], size: int) -> Payload:
        """What the coordinator makes of payloads."""
        accumulator = self.profile.accumulator(size)
        for payload in payloads:
            accumulator.add(payload)
        return accumulator.total()

    def open(
        self, total: Payload, segments: Sequence[Segment], agreement: Agreement | None = None, site: str | None = None
    ) -> Floats:
        """What one site opens."""
        return self.sessions[site or self.names[0]].open(total, segments, agreement or self.agreement())
