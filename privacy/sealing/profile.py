"""The interface of a profile: one vector a site goes in, only the sum over a cohort comes out.

Three parties, three objects. A `Profile` is public: its `parameters`, and what it exposes (`describe_exposure`). An
`Accumulator` is the coordinator's and holds no key (`add`). A `Session` is a site's side of one run and holds whatever
secrets the profile has (`seal`, `open`). A payload is bulk in chunks, made and read chunk by chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.randomness import SecureRandom
from confide.privacy.sealing.exposure import Exposure

__all__ = ["Accumulator", "Agreement", "Opened", "Payload", "Profile", "Sealing", "Segment", "Session"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of coordinates that share a public range; values outside it are clipped.

    Attributes:
        size: How many.
        low: Lower end.
        high: Upper end.
        rotation: For ranges symmetric about 0: (L2 bound of the whole segment, standard deviation of the noise in each
            coordinate), from which the narrower range of rotated coordinates follows; None: not rotated.
    """

    size: int
    low: float
    high: float
    rotation: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a sum is bound to.

    Attributes:
        cohort: Names of the sites summed, sorted.
        transcript: The transcript X that all of them signed (hex).
        self_masked: Does each site add a mask of its own, to be unlocked later?
        unlocked: For opening: the seeds of those masks that the sites unlocked, one for each of the cohort.
    """

    cohort: tuple[str, ...]
    transcript: str
    self_masked: bool = False
    unlocked: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Payload:
    """What a site hands out, or a whole sum: bulk in chunks, and authentication tags (empty where there are none)."""

    chunks: tuple[bytes, ...]
    tags: tuple[int, ...] = ()


class Sealing:
    """A payload in the making: iterate over its chunks, then ask for the tags.

    Args:
        chunks: Makes the chunks, one at a time.
        tags: The tags, once all chunks are made.
    """

    def __init__(self, chunks: Iterable[bytes], tags: Callable[[], tuple[int, ...]] = tuple) -> None:
        self._chunks, self._tags, self._done = iter(chunks), tags, False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        self._done = True

    @property
    def tags(self) -> tuple[int, ...]:
        """Authentication tags over everything that was iterated over."""
        if not self._done:
            raise ValueError("the chunks come first")
        return self._tags()

    def payload(self) -> Payload:
        """Everything at once."""
        return Payload(tuple(self), self.tags)


@dataclass(frozen=True, slots=True)
class Opened:
    """An authenticated sum; `saturated` is the share of all sites' coordinates that were clipped to the range.

    `each` holds the cohort's single vectors, [sites, coordinates], where the profile gathers instead of adding.
    """

    values: Floats
    saturated: float
    each: Floats | None = None


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
    def seal(
        self, vector: Floats, segments: Sequence[Segment], agreement: Agreement, rounding: SecureRandom | None = None
    ) -> Sealing:
        """This site's payload for its vector, chunk by chunk; `rounding` draws how it is rounded (None: the operating
        system's stream)."""

    @abstractmethod
    def open(self, total: Payload, segments: Sequence[Segment], agreement: Agreement) -> Opened:
        """Authenticate and open a sum.

        Raises:
            SealingError: It is not the sum of exactly this cohort under this transcript. This is final.
        """

    def unlock(self, agreement: Agreement) -> bytes:
        """The seed of this site's own mask under an agreement: hand it out for one attempt a round, ever.

        Raises:
            SealingError: This profile has no mask of a site's own, so no attempt can be repeated.
        """
        raise SealingError("has no mask of a site's own to unlock", where="profile",
                           hint="a run with retries uses `sealed` or `masked`")  # fmt: skip

    @abstractmethod
    def destroy(self) -> None:
        """Forget every secret."""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes a site sends and receives for one sum."""

    uplink: int
    downlink: int
    #: Share of the coordinates' places that hold padding.
    padding: float = 0.0


class Profile(ABC):
    """How sums are protected; holds no secret."""

    name: str
    #: Do sites need ephemeral keys and a common secret?
    keyed: bool

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, int | float]:
        """The public parameters, by their usual names, for reports."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """How a sum is protected, in one line."""

    @abstractmethod
    def size(self, coordinates: int) -> Size:
        """What a sum of so many coordinates costs."""

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
