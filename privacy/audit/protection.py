"""The report's section on sealing: how sums were protected, who could learn what, and what became of the keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from confide.config import SealingConfig
from confide.errors import ConfideError
from confide.privacy.audit import records as r
from confide.privacy.audit.evidence import Evidence
from confide.privacy.sealing import Exposure, Profile, make_profile

__all__ = ["Protection", "describe_protection"]


@dataclass(frozen=True, slots=True)
class Protection:
    """What the page shows.

    Attributes:
        summary: How a sum is protected, in one line.
        exposure: Who could learn what.
        clipped: What is known of coordinates outside the public range.
        keys: Where run keys were destroyed; each with the entry that says so.
    """

    summary: str
    exposure: tuple[Exposure, ...]
    clipped: str
    keys: list[str]


def describe_protection(evidence: Evidence) -> Protection:
    """From the manifest and the sites' logs."""
    profile = _profile(evidence.manifest)
    if profile is None:
        unknown = Exposure("everybody", "unknown: this version knows no such profile", True, True, True)
        return Protection("unknown", (unknown,), "", [])
    shares = [_share(e.saturated) for log in evidence.sites.values() for _, e in log.of(r.Opened)]
    clipped = "No coordinate of a sum was clipped to the public range." if shares else ""
    if max(shares, default=0.0) > 0:
        clipped = f"At most {max(shares):.2%} of a sum’s coordinates were clipped to the public range."
    keys = [f"{site} (entry {n})" for site, log in evidence.sites.items() for n, e in log.of_run()
            if isinstance(e, r.KeysDestroyed | r.ToldEnded)]  # fmt: skip
    return Protection(profile.summary, profile.describe_exposure(), clipped, keys)


def _profile(manifest: Mapping[str, Any]) -> Profile | None:
    try:
        gather = bool(manifest.get("single_updates", False))  # logs of earlier versions do not know of it
        return make_profile(SealingConfig(**manifest["sealing"]), len(manifest["members"]), gather=gather)
    except (ConfideError, ValueError, TypeError):
        return None


def _share(text: str) -> float:
    """A log is whatever its site signed: what is no share counts as all."""
    try:
        value = float(text)
    except ValueError:
        return 1.0
    return value if 0.0 <= value <= 1.0 else 1.0
