"""Parameters of the BFV lock, chosen from the number of sites and the bits a coordinate.

- Ring degree N = 4096 with one 60-bit prime q: > 192-bit security (the 128-bit limit of log q is 109; Homomorphic
  Encryption Standard 2018, as tabulated by SEAL).
- A field has `bits` + ⌈log₂ K⌉ bits, so a sum over K sites cannot run over; several fields share a slot.
- A fresh seeded ciphertext has |noise| ≤ 21 (measured bound 21.5): decryption of a sum over K is exact while
  21.5·K < q / 2t. The plain modulus t is the largest batching prime of a whole bit length for which that holds.
- Two tags where t < 2⁴⁵: a forgery passes one tag with probability about 1/t.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import tenseal.sealapi as seal

from confide.errors import ConfigError

__all__ = ["DEGREE", "MAX_BITS", "MIN_BITS", "BfvParameters", "choose_parameters"]

DEGREE = 4096
_COEFFICIENT_BITS = 60
_NOISE_BOUND = 21.5
MIN_BITS, MAX_BITS = 8, 20
_MAX_SITES = 1000
_SMALLEST_PLAIN_BITS = 20
_LARGEST_PLAIN_BITS = 52  # what the exact inner products of the tags can hold


@dataclass(frozen=True, slots=True)
class BfvParameters:
    """One choice.

    Attributes:
        sites: Most sites a sum may have (K).
        bits: Bits a coordinate.
        field_bits: Bits a field, with head-room for K.
        fields: Fields a slot.
        plain_modulus: Prime t ≡ 1 mod 2N.
        coefficient_modulus: Prime q.
        tags: Authentication tags a sum.
    """

    sites: int
    bits: int
    field_bits: int
    fields: int
    plain_modulus: int
    coefficient_modulus: int
    tags: int

    def slots(self, size: int) -> int:
        """Slots that `size` coordinates fill, padding of the last ciphertext included."""
        return self.ciphertexts(size) * DEGREE

    def ciphertexts(self, size: int) -> int:
        """Ciphertexts that `size` coordinates need."""
        return max(1, -(-size // (self.fields * DEGREE)))

    @property
    def noise_budget(self) -> int:
        """Bits of invariant noise budget that an honest sum over K sites keeps at least."""
        return max(
            0, math.floor(math.log2(self.coefficient_modulus / (2 * self.plain_modulus * _NOISE_BOUND * self.sites)))
        )


@functools.lru_cache(maxsize=128)
def choose_parameters(sites: int, bits: int) -> BfvParameters:
    """The parameters for at most `sites` sites and `bits` bits a coordinate.

    Raises:
        ConfigError: There are none; names the nearest possible.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"sealing.bits = {bits} is outside {MIN_BITS}–{MAX_BITS}", where="sealing.bits",
                          hint=f"the nearest possible is {min(max(bits, MIN_BITS), MAX_BITS)}")  # fmt: skip
    if not 2 <= sites <= _MAX_SITES:
        raise ConfigError(f"a sealed sum is over 2 to {_MAX_SITES} sites, not {sites}", where="sites")
    modulus = seal.CoeffModulus.Create(DEGREE, [_COEFFICIENT_BITS])[0].value()
    field_bits = bits + math.ceil(math.log2(sites))
    plain_bits = min(_LARGEST_PLAIN_BITS, math.floor(math.log2(modulus / (2 * _NOISE_BOUND * sites))))
    while plain_bits >= _SMALLEST_PLAIN_BITS:
        plain = seal.PlainModulus.Batching(DEGREE, plain_bits).value()
        if _NOISE_BOUND * sites < modulus / (2 * plain):
            break
        plain_bits -= 1
    fields = (plain_bits - 1) // field_bits
    if fields < 1:
        raise ConfigError(f"{bits} bits and {sites} sites do not fit a slot", where="sealing.bits",
                          hint=f"nearest: {plain_bits - 1 - math.ceil(math.log2(sites))} bits")  # fmt: skip
    return BfvParameters(
        sites=sites, bits=bits, field_bits=field_bits, fields=fields, plain_modulus=plain, coefficient_modulus=modulus,
        tags=1 if plain >= 2**45 else 2,
    )  # fmt: skip
