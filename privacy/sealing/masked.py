"""Profile `masked`: the masks and tags of `sealed` mod 2⁶¹ − 1, and no encryption: the coordinator reads every sum.

Cheaper than `sealed` and with the same protection of one site's update, for runs whose sums are no secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.accumulate import WordAccumulator, words_from
from confide.privacy.sealing.encoding import SATURATION
from confide.privacy.sealing.exposure import Exposure, exposure_table
from confide.privacy.sealing.masks import NEIGHBOURS, PairKeys
from confide.privacy.sealing.packing import Packing, fields_below
from confide.privacy.sealing.parameters import check_request
from confide.privacy.sealing.profile import Accumulator, Profile, Session, Size
from confide.privacy.sealing.slots import MAC_KEY_BYTES, Lock, SlotSession, chunk_words

__all__ = ["MODULUS", "MaskedProfile"]

Words = NDArray[np.uint64]
MODULUS = 2**61 - 1
_WORDS = 4096


class MaskedProfile(Profile):
    """The public side.

    Args:
        sites: Most sites a sum may have.
        bits: Bits a coordinate.

    Raises:
        ConfigError: The combination is impossible; names the nearest possible.
    """

    name = "masked"
    keyed = True

    def __init__(self, sites: int, bits: int) -> None:
        check_request(sites, bits)
        self.packing = Packing(
            sites=sites, bits=bits, fields=fields_below(MODULUS, sites, bits), modulus=MODULUS, words=_WORDS
        )

    @property
    def parameters(self) -> Mapping[str, int | float]:
        """Modulus, bits, fields a word, tags."""
        return {"modulus": MODULUS, "bits": self.packing.bits, "fields": self.packing.fields, "tags": 1}

    @property
    def summary(self) -> str:
        """See the base class."""
        return (
            f"{self.packing.bits} bits a coordinate, {self.packing.fields} to a word; pairwise masks (X25519, AES-256) "
            "and linear authentication tags mod 2⁶¹ − 1; no encryption of the sum"
        )

    def size(self, coordinates: int) -> Size:
        """See the base class."""
        total = 8 * sum(self._lengths(coordinates))
        return Size(total, total, 1 - 8 * (coordinates + SATURATION) / (total * self.packing.fields))

    def accumulator(self, size: int) -> Accumulator:
        """An empty sum."""
        return WordAccumulator(self._lengths(size), 1, MODULUS)

    def make_secret(self) -> bytes:
        """The MAC key."""
        return secrets.token_bytes(MAC_KEY_BYTES)

    def session(self, site: str, secret: bytes, private_key: bytes, peers: Mapping[str, bytes]) -> Session:
        """See the base class."""
        if len(secret) != MAC_KEY_BYTES:
            raise SealingError("is not a secret of this run", where="run secret")
        return SlotSession(site, self.packing, 1, secret, _NoLock(), PairKeys(site, private_key, peers), whole=False)

    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
        return exposure_table(self.name, self.packing.sites, NEIGHBOURS)

    def _lengths(self, size: int) -> list[int]:
        return chunk_words(self.packing, size + SATURATION, whole=False)


class _NoLock(Lock):
    """Masked words travel as they are."""

    def close(self, words: Words) -> bytes:
        return words.astype("<u8").tobytes()

    def summed_bytes(self, words: int) -> int:
        return 8 * words

    def open(self, data: bytes) -> Words:
        return words_from(data, MODULUS)
