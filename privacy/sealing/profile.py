"""The interface of a profile: one vector a site goes in, the sum over a cohort comes out.

A coordinator only ever calls `add` and `sum_chunks`; a site calls `seal` and `open`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Accumulator", "Exposure", "Profile"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Exposure:
    """Who learns what, in words that stand in the summary and the report."""

    coalition: str
    learns: str


class Accumulator(ABC):
    """The coordinator's running sum for one round; its size does not grow with the number of sites."""

    @abstractmethod
    def add(self, chunks: Sequence[bytes]) -> None:
        """Add one site's complete payload.

        Raises:
            SealingError: The payload is not of this profile's form; the sum is unchanged.
        """

    @abstractmethod
    def sum_chunks(self) -> tuple[bytes, ...]:
        """The sum, as it goes out to the sites."""


class Profile(ABC):
    """How sums are protected."""

    name: str

    @abstractmethod
    def seal(self, vector: Floats) -> tuple[bytes, ...]:
        """A site's payload for its vector."""

    @abstractmethod
    def accumulator(self, size: int) -> Accumulator:
        """An empty sum of vectors with `size` coordinates."""

    @abstractmethod
    def open(self, chunks: Sequence[bytes], size: int) -> Floats:
        """The sum, at a site.

        Raises:
            SealingError: It is not a sum of this profile and size.
        """

    @abstractmethod
    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
