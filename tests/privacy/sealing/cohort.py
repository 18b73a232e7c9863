"""Sealing sessions of a whole cohort, without sites: what the tests of the primitive share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from confide.config import SealingConfig
from confide.privacy.sealing import Agreement, Payload, Profile, Segment, Session, make_profile
from confide.privacy.sealing.wrapping import new_ephemeral

Floats = NDArray[np.float64]
TRANSCRIPT = "ab" * 32
#: A small vector's ranges.
SEGMENTS = (Segment(6, -0.5, 0.5), Segment(2, -3.0, 40.0))
SIZE = 8


@dataclass(frozen=True)
class Cohort:
    """Sites that share a secret and know each other's ephemeral keys."""

    profile: Profile
    secret: bytes
    sessions: dict[str, Session]
    private: dict[str, bytes]
    public: dict[str, bytes]

    @classmethod
    def make(cls, sites: int = 4, bits: int = 16, most: int | None = None, profile: str = "sealed") -> Cohort:
        """A fresh cohort; the parameters leave room for `most` sites."""
        public_side = make_profile(SealingConfig.model_validate({"profile": profile, "bits": bits}), most or sites)
        names = [f"site-{i:04d}" for i in range(sites)]
        keys = {name: new_ephemeral() for name in names}
        public = {name: pair[1] for name, pair in keys.items()}
        secret = public_side.make_secret()
        sessions = {name: public_side.session(name, secret, keys[name][0], public) for name in names}
        return cls(public_side, secret, sessions, {n: k[0] for n, k in keys.items()}, public)

    @property
    def names(self) -> tuple[str, ...]:
        """All sites, sorted."""
        return tuple(sorted(self.sessions))

    def agreement(
        self, cohort: Sequence[str] | None = None, transcript: str = TRANSCRIPT, *, self_masked: bool = False
    ) -> Agreement:
        """What a sum is bound to."""
        return Agreement(tuple(sorted(cohort or self.names)), transcript, self_masked)

    def unlocked(self, agreement: Agreement) -> Agreement:
        """The same once every site has unlocked its own mask."""
        return replace(agreement, unlocked=tuple(self.sessions[name].unlock(agreement) for name in agreement.cohort))

    def seal(
        self, vectors: dict[str, Floats], segments: Sequence[Segment], agreement: Agreement | None = None
    ) -> dict[str, Payload]:
        """Every site's payload."""
        bound = agreement or self.agreement(tuple(vectors))
        return {name: self.sessions[name].seal(vector, segments, bound).payload() for name, vector in vectors.items()}

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
        return self.sessions[site or self.names[0]].open(total, segments, agreement or self.agreement()).values


def vectors(cohort: Cohort, seed: int = 0) -> dict[str, Floats]:
    """A small vector a site, inside its ranges."""
    rng = np.random.default_rng(seed)
    low, high = np.repeat([-0.5, -3.0], [6, 2]), np.repeat([0.5, 40.0], [6, 2])
    return {name: rng.uniform(low, high) for name in cohort.names}
