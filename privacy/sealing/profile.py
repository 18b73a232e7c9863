"""The interface of a profile: one vector a site goes in, only the sum over a cohort comes out.

A `Profile` is public: the coordinator uses it to add payloads and needs no key for it. A `Session` is a site's side of
one run and holds whatever secrets the profile has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Accumulator", "Agreement", "Exposure", "Payload", "Profile", "Segment", "Session"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of coordinates that share a public range; values outside it are clipped."""

    size: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a sum is bound to: the sorted cohort and the transcript X that all its sites signed (hex)."""

    cohort: tuple[str, ...]
    transcript: str


@dataclass(frozen=True, slots=True)
class Payload:
    """What a site hands out, or a whole sum: bulk in chunks, and authentication tags (empty where there are none)."""

    chunks: tuple[bytes, ...]
    tags: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Exposure:
    """Who learns what, in words that stand in the summary and the report."""

    coalition: str
    learns: str


class Accumulator(ABC):
    """The coordinator's running sum for one round; its size does not grow with the number of sites."""

    @abstractmethod
    def add(self, payload: Payload) -> None:
        """Add one site's complete payload.

        Raises:
            SealingError: The payload is not of this profile's form; the sum is unchanged.
        """

    @abstractmethod
    def total(self) -> Payload:
        """The sum, as it goes out to the sites."""


class Session(ABC):
    """A site's side of one run."""

    #: Digest of the run's secret, so that sites notice that they hold different ones; 64 zeros where there is none.
    secret_digest: str

    @abstractmethod
    def seal(self, vector: Floats, segments: Sequence[Segment], agreement: Agreement) -> Payload:
        """This site's payload for its vector."""

    @abstractmethod
    def open(self, total: Payload, segments: Sequence[Segment], agreement: Agreement) -> Floats:
        """Authenticate and open a sum.

        Raises:
            SealingError: It is not the sum of exactly this cohort under this transcript. This is final.
        """

    @abstractmethod
    def destroy(self) -> None:
        """Forget every secret."""


class Profile(ABC):
    """How sums are protected; holds no secret."""

    name: str
    #: Do sites need ephemeral keys and a common secret?
    keyed: bool

    @abstractmethod
    def accumulator(self, size: int) -> Accumulator:
        """An empty sum of vectors with `size` coordinates."""

    @abstractmethod
    def make_secret(self) -> bytes:
        """A fresh run secret, made at one site; empty where the profile has none."""

    @abstractmethod
    def session(self, site: str, secret: bytes, private_key: bytes, peers: Mapping[str, bytes]) -> Session:
        """A site's side of a run.

        Args:
            site: Its own name.
            secret: The run secret, the same at all sites.
            private_key: Its ephemeral X25519 private key, raw.
            peers: Every participant's authenticated ephemeral public key, raw.

        Raises:
            SealingError: The secret is not of this profile's form.
        """

    @abstractmethod
    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
