"""`[privacy]` and `[sealing]`: what a run may cost a person, and who may see what."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from confide.config.section import Section

__all__ = ["PrivacyConfig", "SealingConfig"]


class PrivacyConfig(Section):
    """`[privacy]`: the loss (ε, δ) this run may cost a person, and the mechanism that keeps to it.

    `unsafe_noise_seed` draws the noise from a number that stands in the manifest, to look for faults on public data:
    whoever knows it takes the noise off again, so such a run protects nobody, whatever its ε.

    `max_sites_per_subject` is an assumption that everybody is told: a person's records lie at so many sites at most.
    The run's ε is that of what all of them release, composed, and each site charges its own share that many times.
    """

    unit: Literal["subject", "record"] = "subject"
    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    #: Far from where float32 ends: there clipping rounds up, and the noise would be too small.
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    placement: Literal["site"] = "site"
    site_epsilon_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    max_sites_per_subject: Annotated[int, Field(ge=1, le=16)] = 1
    unsafe_noise_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _numbers(self) -> PrivacyConfig:
        if math.isnan(self.epsilon):
            raise ValueError("epsilon is not a number")
        return self

    @property
    def is_private(self) -> bool:
        """Is noise added and charged? False for the ε = ∞ baseline on public data."""
        return math.isfinite(self.epsilon)

    @property
    def composed_sites(self) -> int:
        """At how many sites the privacy unit may lie: a record lies at one, wherever its person's others do."""
        return self.max_sites_per_subject if self.unit == "subject" else 1

    @property
    def protects(self) -> bool:
        """Does the noise protect anybody? Not where everybody knows it."""
        return self.is_private and self.unsafe_noise_seed is None


class SealingConfig(Section):
    """`[sealing]`: how sums are protected.

    `bits` a coordinate; `rotation` spreads a large update evenly, so that fewer bits are enough; `range` is the share
    of the largest possible update that the quantiser covers (what lies outside is clipped, and counted); `retry` lets
    a round go on without a site that died while sealing.
    """

    profile: Literal["sealed", "masked", "ckks", "open"] = "sealed"
    bits: Annotated[int, Field(ge=8, le=20)] = 20
    rotation: bool = False
    range: Annotated[float, Field(gt=0, le=1)] = 1.0
    retry: bool = False

    @model_validator(mode="after")
    def _together(self) -> SealingConfig:
        if self.profile == "open" and self.rotation:
            raise ValueError("rotation belongs to a profile that quantises: sealed, masked or ckks")
        if self.retry and self.profile not in ("sealed", "masked"):
            raise ValueError("retry needs masks: profile sealed or masked")
        return self
