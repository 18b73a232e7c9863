"""Profile `sealed`: two locks and a seal. Masks hide a site from key holders, BFV hides the sum from the coordinator,
tags let only the agreed sum open.

Invariant: the coordinator's side (`SealedProfile`, its accumulator) holds no key.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from confide.errors import SealingError
from confide.privacy.sealing.accumulate import LatticeAccumulator
from confide.privacy.sealing.bfv import BfvLock, lattice_for
from confide.privacy.sealing.encoding import SATURATION
from confide.privacy.sealing.exposure import Exposure, exposure_table
from confide.privacy.sealing.lattice import FRESH_BYTES, KEY_BYTES, SUMMED_BYTES
from confide.privacy.sealing.masks import NEIGHBOURS, PairKeys
from confide.privacy.sealing.parameters import COEFFICIENT_BITS, DEGREE, choose_parameters
from confide.privacy.sealing.profile import Accumulator, Profile, Session, Size
from confide.privacy.sealing.slots import MAC_KEY_BYTES, SlotSession

__all__ = ["SealedProfile"]


class SealedProfile(Profile):
    """The public side.

    Args:
        sites: Most sites a sum may have.
        bits: Bits a coordinate.

    Raises:
        ConfigError: The combination is impossible; names the nearest possible.
    """

    name = "sealed"
    keyed = True

    def __init__(self, sites: int, bits: int) -> None:
        self.choice = choose_parameters(sites, bits)

    @property
    def parameters(self) -> Mapping[str, int | float]:
        """N, log₂ q, t, fields a slot, bits, tags, and the noise budget predicted for the largest cohort."""
        choice = self.choice
        return {
            "N": DEGREE, "log2_q": COEFFICIENT_BITS, "t": choice.plain_modulus, "bits": choice.packing.bits,
            "fields": choice.packing.fields, "tags": choice.tags, "noise_budget_bits": choice.noise_budget,
        }  # fmt: skip

    @property
    def summary(self) -> str:
        """See the base class."""
        packing = self.choice.packing
        return (
            f"{packing.bits} bits a coordinate, {packing.fields} to a slot; pairwise masks (X25519, AES-256), BFV "
            f"(N = {DEGREE}, one {COEFFICIENT_BITS}-bit prime: above 128-bit security), linear authentication tags"
        )

    def size(self, coordinates: int) -> Size:
        """See the base class."""
        chunks, held = self._chunks(coordinates), coordinates + SATURATION
        return Size(chunks * FRESH_BYTES, chunks * SUMMED_BYTES, 1 - held / (chunks * self.choice.packing.coordinates))

    def accumulator(self, size: int) -> Accumulator:
        """An empty sum."""
        choice = self.choice
        return LatticeAccumulator(lattice_for(choice), self._chunks(size), choice.tags, choice.plain_modulus)

    def make_secret(self) -> bytes:
        """BFV key ‖ MAC key."""
        return lattice_for(self.choice).generate_key() + secrets.token_bytes(MAC_KEY_BYTES)

    def session(self, site: str, secret: bytes, private_key: bytes, peers: Mapping[str, bytes]) -> Session:
        """See the base class."""
        if len(secret) != KEY_BYTES + MAC_KEY_BYTES:
            raise SealingError("is not a secret of this run", where="run secret")
        lock, choice = BfvLock(self.choice, secret[:-MAC_KEY_BYTES]), self.choice
        return SlotSession(
            site, choice.packing, choice.tags, secret, lock, PairKeys(site, private_key, peers), whole=True
        )

    def describe_exposure(self) -> tuple[Exposure, ...]:
        """What each coalition learns."""
        return exposure_table(self.name, self.choice.packing.sites, NEIGHBOURS)

    def _chunks(self, size: int) -> int:
        return self.choice.packing.chunks(size + SATURATION)
