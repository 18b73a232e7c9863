"""The transcript X of a sealed sum: what all its sites agreed on before any of them sealed."""

from __future__ import annotations

from collections.abc import Mapping

from confide.privacy.digest import digest

__all__ = ["transcript"]


def transcript(
    manifest: str, roster_version: int, key_epoch: int, round_: int, statements: Mapping[str, str], attempt: int = 0
) -> str:
    """X = H(manifest, roster, key epoch, round, attempt, sorted cohort, their signed `train` replies), hex.

    Args:
        manifest: The manifest's digest, hex.
        roster_version: Version of the roster frozen for the run.
        key_epoch: Which run secret is in force.
        round_: The round.
        statements: Site → digest of its `train` reply's envelope; the cohort is its keys.
        attempt: Which attempt to seal the round this is; masks and pads are never used twice.
    """
    parts = [manifest, str(roster_version), str(key_epoch), str(round_), str(attempt)]
    for site in sorted(statements):
        parts += [site, statements[site]]
    return digest("transcript", *(p.encode() for p in parts)).hex()
