"""Sealed sums: one vector a site goes in, only the sum comes out, under one of several profiles."""

from confide.config import SealingConfig
from confide.privacy.sealing.open import OpenProfile
from confide.privacy.sealing.profile import Accumulator, Exposure, Profile

__all__ = ["Accumulator", "Exposure", "OpenProfile", "Profile", "make_profile"]


def make_profile(config: SealingConfig) -> Profile:
    """The profile that the manifest names."""
    return {"open": OpenProfile}[config.profile]()
