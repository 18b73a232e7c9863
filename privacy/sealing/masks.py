"""Pairwise masks that cancel in the sum (Bonawitz et al. 2017), so that no key holder learns one site's update.

Sites i < j share s_ij by X25519 of their per-run ephemeral keys. For transcript X and chunk c both derive the same
uniform vector mod t; i adds it, j subtracts it. X is in the derivation, so another cohort or round gives other masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing.keystream import derive, expand, uniform_mod

__all__ = ["PairKeys"]

Words = NDArray[np.uint64]


class PairKeys:
    """One site's shared secrets with its peers, for one run.

    Args:
        site: Its own name.
        private_key: Its ephemeral X25519 private key, raw.
        peers: Ephemeral public keys by site, raw; its own is ignored.

    Raises:
        SealingError: A peer's key is not a point that two sites can share a secret with.
    """

    def __init__(self, site: str, private_key: bytes, peers: Mapping[str, bytes]) -> None:
        self._site = site
        own = X25519PrivateKey.from_private_bytes(private_key)
        self._shared: dict[str, bytes] = {}
        for peer, public in peers.items():
            if peer == site:
                continue
            try:
                self._shared[peer] = own.exchange(X25519PublicKey.from_public_bytes(public))
            except ValueError:
                raise SealingError("the ephemeral key is not usable", where=f"site {peer}") from None

    def for_cohort(self, cohort: Iterable[str], transcript: str) -> CohortMasks:
        """The masks towards every other member of a cohort.

        Raises:
            SealingError: A member's key is unknown.
        """
        keys = []
        for peer in cohort:
            if peer == self._site:
                continue
            if peer not in self._shared:
                raise SealingError("no ephemeral key of this site was agreed on", where=f"site {peer}")
            low, high = sorted((self._site, peer))
            key = derive(self._shared[peer], bytes.fromhex(transcript), b"pair", low.encode(), high.encode())
            keys.append((key, self._site == low))
        return CohortMasks(keys)

    def destroy(self) -> None:
        """Forget the secrets."""
        self._shared.clear()


class CohortMasks:
    """The masks of one site for one transcript."""

    def __init__(self, keys: list[tuple[bytes, bool]]) -> None:
        self._keys = keys

    def apply(self, values: Words, chunk: int, modulus: int) -> Words:
        """`values` plus the chunk's masks, mod t; shape unchanged."""
        t = np.uint64(modulus)
        for key, adds in self._keys:
            mask = uniform_mod(expand(key, b"mask", chunk.to_bytes(8, "big")), len(values), modulus)
            values = (values + (mask if adds else t - mask)) % t
        return values
