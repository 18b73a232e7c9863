"""Sealed sums: one vector a site goes in, only the sum comes out, under one of several profiles."""

from confide.config import SealingConfig
from confide.privacy.sealing.ckks import CkksProfile
from confide.privacy.sealing.exposure import COALITIONS, Exposure
from confide.privacy.sealing.masked import MaskedProfile
from confide.privacy.sealing.open import OpenProfile
from confide.privacy.sealing.profile import (
    Accumulator,
    Agreement,
    Opened,
    Payload,
    Profile,
    Sealing,
    Segment,
    Session,
    Size,
)
from confide.privacy.sealing.sealed import SealedProfile

__all__ = [
    "COALITIONS",
    "Accumulator",
    "Agreement",
    "CkksProfile",
    "Exposure",
    "MaskedProfile",
    "OpenProfile",
    "Opened",
    "Payload",
    "Profile",
    "SealedProfile",
    "Sealing",
    "Segment",
    "Session",
    "Size",
    "make_profile",
]


def make_profile(config: SealingConfig, sites: int) -> Profile:
    """The profile that the manifest names, for sums over at most `sites` sites.

    Raises:
        ConfigError: The parameters are impossible; names the nearest possible.
    """
    if config.profile == "open":
        return OpenProfile()
    kinds: dict[str, type[SealedProfile | MaskedProfile | CkksProfile]] = {
        "sealed": SealedProfile, "masked": MaskedProfile, "ckks": CkksProfile,
    }  # fmt: skip
    return kinds[config.profile](sites, config.bits)
