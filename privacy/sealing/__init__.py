"""Sealed sums: one vector a site goes in, only the sum comes out, under one of several profiles."""

from confide.config import SealingConfig
from confide.privacy.sealing.plain import OpenProfile
from confide.privacy.sealing.profile import Accumulator, Agreement, Exposure, Payload, Profile, Segment, Session
from confide.privacy.sealing.sealed import SealedProfile

__all__ = [
    "Accumulator",
    "Agreement",
    "Exposure",
    "OpenProfile",
    "Payload",
    "Profile",
    "SealedProfile",
    "Segment",
    "Session",
    "make_profile",
]


def make_profile(config: SealingConfig, sites: int) -> Profile:
    """The profile that the manifest names, for sums over at most `sites` sites.

    Raises:
        ConfigError: The parameters are impossible.
    """
    if config.profile == "open":
        return OpenProfile()
    return SealedProfile(sites, config.bits)
