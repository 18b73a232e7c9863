"""Masks that keep a key holder from one site's update (Bonawitz et al. 2017).

*Pairwise*: sites i < j share s_ij by X25519 of their per-run ephemeral keys. For transcript X and chunk c both derive
the same uniform vector mod t; i adds it, j subtracts it, so all cancel in the sum. X is in the derivation: another
cohort, round or attempt gives other masks. Up to 65 sites every pair shares one; above that every site has 64
neighbours on a ring whose order X shuffles (a k-regular graph as in Bell et al. 2020), so work does not grow with K.

*Own*: where an attempt may be repeated, each site adds one more mask from a seed that it unlocks for one attempt only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.keystream import derive, expand, random_words, uniform_mod

__all__ = ["NEIGHBOURS", "CohortMasks", "PairKeys", "neighbours", "remove_own"]

Words = NDArray[np.uint64]
#: Neighbours of a site where the cohort is larger than that.
NEIGHBOURS = 64


def neighbours(site: str, cohort: Sequence[str], transcript: str) -> list[str]:
    """Whom a site shares masks with; symmetric, and the same from every member's view."""
    if len(cohort) <= NEIGHBOURS + 1:
        return [peer for peer in cohort if peer != site]
    # Each member's place on the ring is a pseudorandom word; a tie keeps the sorted order.
    words = random_words(expand(bytes.fromhex(transcript), b"ring"), len(cohort))
    ring = [cohort[i] for i in np.argsort(words, kind="stable")]
    here = ring.index(site)
    return [ring[(here + step) % len(ring)] for d in range(1, NEIGHBOURS // 2 + 1) for step in (d, -d)]


class PairKeys:
    """One site's shared secrets with its peers, for one run.

    Args:
        site: Its own name.
        private_key: Its ephemeral X25519 private key, raw.
        peers: Ephemeral public keys by site, raw; its own is ignored.
    """

    def __init__(self, site: str, private_key: bytes, peers: Mapping[str, bytes]) -> None:
        self._site = site
        self._private: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(private_key)
        self._peers = {peer: key for peer, key in peers.items() if peer != site}
        self._shared: dict[str, bytes] = {}

    def for_cohort(self, cohort: Sequence[str], transcript: str, own: bytes | None = None) -> CohortMasks:
        """This site's masks for a cohort.

        Args:
            cohort: Its sorted members.
            transcript: X, hex.
            own: Seed of this site's own mask, where there is one.

        Raises:
            SealingError: A member's key is unknown or unusable.
        """
        keys = []
        for peer in neighbours(self._site, cohort, transcript):
            low, high = sorted((self._site, peer))
            key = derive(self._secret(peer), bytes.fromhex(transcript), b"pair", low.encode(), high.encode())
            keys.append((key, self._site == low))
        return CohortMasks(keys if own is None else [*keys, (expand(own, b"own"), True)])

    def destroy(self) -> None:
        """Forget the secrets."""
        self._shared.clear()
        self._private = None

    def _secret(self, peer: str) -> bytes:
        if peer not in self._peers or self._private is None:
            raise SealingError("no ephemeral key of this site was agreed on", where=f"site {peer}")
        if peer not in self._shared:
            try:
                public = X25519PublicKey.from_public_bytes(self._peers[peer])
                self._shared[peer] = self._private.exchange(public)
            except ValueError:
                raise SealingError("the ephemeral key is not usable", where=f"site {peer}") from None
        return self._shared[peer]


class CohortMasks:
    """The masks of one site for one transcript: (key, is it added?) each."""

    def __init__(self, keys: list[tuple[bytes, bool]]) -> None:
        self._keys = keys

    def apply(self, values: Words, chunk: int, modulus: int) -> Words:
        """`values` plus the chunk's masks, mod t; shape unchanged."""
        t = np.uint64(modulus)
        for key, adds in self._keys:
            mask = _mask(key, chunk, len(values), modulus)
            values = (values + (mask if adds else t - mask)) % t
        return values


def remove_own(values: Words, seeds: Iterable[bytes], chunk: int, modulus: int) -> Words:
    """An opened chunk without the own masks whose seeds were unlocked."""
    t = np.uint64(modulus)
    for seed in seeds:
        values = (values + (t - _mask(expand(seed, b"own"), chunk, len(values), modulus))) % t
    return values


def _mask(key: bytes, chunk: int, count: int, modulus: int) -> Words:
    return uniform_mod(expand(key, b"mask", chunk.to_bytes(8, "big")), count, modulus)
