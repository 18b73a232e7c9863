"""Sealed sums: one vector a site goes in, only the sum comes out, under one of several profiles."""

from confide.config import SealingConfig
from confide.errors import ConfigError
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


def make_profile(config: SealingConfig, sites: int, *, gather: bool = False) -> Profile:
    """The profile that the manifest names, for sums over at most `sites` sites.

    Args:
        config: `[sealing]`.
        sites: Most sites of a cohort.
        gather: Are single updates passed on to all sites? Profile `open` only.

    Raises:
        ConfigError: The parameters are impossible; names the nearest possible.
    """
    if config.profile == "open":
        return OpenProfile(sites, gather=gather)
    if gather:
        raise ConfigError(f"profile {config.profile} opens sums, never a single update", where="sealing.profile")
    kinds: dict[str, type[SealedProfile | MaskedProfile | CkksProfile]] = {
        "sealed": SealedProfile, "masked": MaskedProfile, "ckks": CkksProfile,
    }  # fmt: skip
    return kinds[config.profile](sites, config.bits)
