"""Authentication of a sum: a linear one-time MAC over the masked slots (Carter–Wegman; after Catalano, Fiore 2013).

For transcript X: r ∈ Z_tᵐ and pads β_i come from a PRF of (MAC key, X, …). Site i sends τ_i = β_i + ⟨r, z_i⟩ mod t over
its masked slots z_i, padding included. Masks cancel, so an honest sum satisfies Σ τ_i = Σ β_i + ⟨r, Σ z_i⟩. Without the
key, a changed, dropped, doubled or scaled contribution passes with probability about 1/t per tag. t must be prime:
modulo 2^k a change of 2^(k−1) would pass half the time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confide.privacy.sealing.keystream import derive, expand, uniform_mod

__all__ = ["SumMac", "inner_product"]

Words = NDArray[np.uint64]
_BLOCK = 4096  # 4096 products of 26-bit limbs stay below 2⁶⁴, so the sums below are exact


def inner_product(left: Words, right: Words, modulus: int) -> int:
    """⟨left, right⟩ mod `modulus`, exactly; elements below `modulus` ≤ 2⁶³."""
    limb, count = (26, 2) if modulus <= 2**52 else (21, 3)
    mask, total = np.uint64(2**limb - 1), 0
    for start in range(0, len(left), _BLOCK):
        a = [(left[start : start + _BLOCK] >> np.uint64(limb * i)) & mask for i in range(count)]
        b = [(right[start : start + _BLOCK] >> np.uint64(limb * i)) & mask for i in range(count)]
        for i in range(count):
            for j in range(count):
                total += int(np.dot(a[i], b[j])) << (limb * (i + j))
    return total % modulus


class SumMac:
    """The MAC of one run under one transcript.

    Args:
        key: The run's MAC key, 32 bytes, known to sites only.
        transcript: X, hex.
        modulus: Prime t.
        tags: How many independent tags.
    """

    def __init__(self, key: bytes, transcript: str, modulus: int, tags: int) -> None:
        self._key, self._modulus, self._tags = derive(key, bytes.fromhex(transcript), b"sum-mac"), modulus, tags

    def products(self, chunk: int, values: Words) -> tuple[int, ...]:
        """A chunk's part of ⟨r, z⟩ for each tag; parts add up mod t."""
        number = chunk.to_bytes(8, "big")
        return tuple(
            inner_product(
                uniform_mod(expand(self._key, b"r", bytes([i]), number), len(values), self._modulus),
                values,
                self._modulus,
            )
            for i in range(self._tags)
        )

    def tags(self, site: str, products: Sequence[int]) -> tuple[int, ...]:
        """τ_i of a site whose chunks' products sum to `products`."""
        return tuple((pad + p) % self._modulus for pad, p in zip(self._pads(site), products, strict=True))

    def accepts(self, cohort: Sequence[str], tags: Sequence[int], products: Sequence[int]) -> bool:
        """Do the summed tags authenticate the opened slots whose products are `products`?"""
        if len(tags) != self._tags or len(products) != self._tags:
            return False
        pads = [self._pads(site) for site in cohort]
        return all(
            (tag - sum(p[i] for p in pads) - product) % self._modulus == 0
            for i, (tag, product) in enumerate(zip(tags, products, strict=True))
        )

    def _pads(self, site: str) -> list[int]:
        return [int(w) for w in uniform_mod(expand(self._key, b"pad", site.encode()), self._tags, self._modulus)]
