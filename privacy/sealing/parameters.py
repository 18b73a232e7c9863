"""Parameters of the BFV lock, chosen from the number of sites K and the bits b a coordinate.

- Ring degree N = 4096 with one 60-bit prime q: > 192-bit security (the 128-bit limit of log q is 109; Homomorphic
  Encryption Standard 2018, as tabulated by SEAL). N = 2048 would sit on the edge of the table and saves 6 %: not used.
- A fresh ciphertext's noise is a sum of bits: at most 21, with standard deviation σ = 3.25 (SEAL's centred binomial),
  and 1/2 for rounding. A sum over K stays below 21.5·K always, and below 12·σ·√K but with probability < 2⁻⁹⁰; the
  smaller of the two is predicted. Decryption is exact while noise < q / 2t; one bit of that is kept as margin.
- Among the plain moduli that leave this margin, first the most fields a slot, then a whole bit length (masks are drawn
  by rejection: a prime just above a power of two would double their cost), then the largest.
- Two tags where t < 2⁴⁵: a forgery passes one tag with probability about 1/t.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import tenseal.sealapi as seal

from confide.errors import ConfigError
from confide.privacy.sealing.packing import Packing, fields_below

__all__ = [
    "COEFFICIENT_BITS",
    "DEGREE",
    "MAX_BITS",
    "MAX_SITES",
    "MIN_BITS",
    "BfvParameters",
    "check_request",
    "choose_parameters",
    "fresh_noise",
]

DEGREE = 4096
COEFFICIENT_BITS = 60
MIN_BITS, MAX_BITS = 8, 20
MIN_SITES, MAX_SITES = 2, 1000
_WORST_FRESH_NOISE = 21.5
_FRESH_NOISE_VARIANCE = 42 / 4 + 1 / 12  # 42 fair bits, and rounding
_DEVIATIONS = 12
_LARGEST_PLAIN_BITS = 52  # what the quick inner products of the tags can hold
_ONE_TAG_FROM = 2**45


@dataclass(frozen=True, slots=True)
class BfvParameters:
    """One choice.

    Attributes:
        packing: How coordinates lie in slots mod t.
        coefficient_modulus: Prime q.
        tags: Authentication tags a sum.
    """

    packing: Packing
    coefficient_modulus: int
    tags: int

    @property
    def plain_modulus(self) -> int:
        """Prime t ≡ 1 mod 2N."""
        return self.packing.modulus

    @property
    def noise_budget(self) -> int:
        """Bits of invariant noise budget that an honest sum over K sites keeps at least (predicted)."""
        return budget_left(self.coefficient_modulus, self.plain_modulus, self.packing.sites)


def check_request(sites: int, bits: int) -> None:
    """Refuse what no profile can do.

    Raises:
        ConfigError: Names the nearest possible.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"sealing.bits = {bits} is outside {MIN_BITS}–{MAX_BITS}", where="sealing.bits",
                          hint=f"the nearest possible is {min(max(bits, MIN_BITS), MAX_BITS)}")  # fmt: skip
    if not MIN_SITES <= sites <= MAX_SITES:
        raise ConfigError(f"a sum over {sites} sites cannot be sealed", where="sites",
                          hint=f"the nearest possible is {min(max(sites, MIN_SITES), MAX_SITES)} sites")  # fmt: skip


def fresh_noise(sites: int) -> float:
    """Bound on the noise of a sum over `sites` fresh ciphertexts, in units of q's lowest bit."""
    return min(_WORST_FRESH_NOISE * sites, _DEVIATIONS * math.sqrt(_FRESH_NOISE_VARIANCE * sites))


def budget_left(coefficient_modulus: int, plain_modulus: int, sites: int) -> int:
    """⌊log₂(q / 2t·noise)⌋: bits that a sum over `sites` sites keeps."""
    return math.floor(math.log2(coefficient_modulus / (2 * plain_modulus * fresh_noise(sites))))


@functools.lru_cache(maxsize=256)
def choose_parameters(sites: int, bits: int) -> BfvParameters:
    """The parameters for at most `sites` sites and `bits` bits a coordinate.

    Raises:
        ConfigError: There are none; names the nearest possible.
    """
    check_request(sites, bits)
    modulus = seal.CoeffModulus.Create(DEGREE, [COEFFICIENT_BITS])[0].value()
    largest = min(2**_LARGEST_PLAIN_BITS, math.floor(modulus / (4 * fresh_noise(sites))))  # 4: one bit of margin
    fields = fields_below(largest, sites, bits)
    plain = _plain_modulus(largest, (sites * (2**bits - 1) + 1) ** fields) if fields else None
    if plain is None:
        fitting = [b for b in range(MIN_BITS, bits) if fields_below(largest, sites, b)]
        raise ConfigError(f"{bits} bits and {sites} sites do not fit a slot", where="sealing.bits",
                          hint=f"the nearest is {fitting[-1]} bits" if fitting else "use fewer sites")  # fmt: skip
    return BfvParameters(
        packing=Packing(sites=sites, bits=bits, fields=fields, modulus=plain, words=DEGREE),
        coefficient_modulus=modulus,
        tags=1 if plain >= _ONE_TAG_FROM else 2,
    )


def _plain_modulus(largest: int, smallest: int) -> int | None:
    """A prime ≡ 1 mod 2N in [smallest, largest]: of a whole bit length if there is one, else the largest."""
    whole = seal.PlainModulus.Batching(DEGREE, largest.bit_length() - 1).value()
    if smallest <= whole <= largest:
        return int(whole)
    for candidate in range(largest - (largest - 1) % (2 * DEGREE), smallest - 1, -2 * DEGREE):
        if seal.Modulus(candidate).is_prime():
            return candidate
    return None
