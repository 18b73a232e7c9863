"""The transcript X of a sealed sum: what all its sites agreed on before any of them sealed."""

from __future__ import annotations

from collections.abc import Mapping

from confide.protocol.digest import digest
from confide.protocol.manifest import Manifest

__all__ = ["transcript"]


def transcript(manifest: Manifest, key_epoch: int, round_: int, statements: Mapping[str, str]) -> str:
    """X = H(manifest, roster, key epoch, round, sorted cohort, their signed `train` replies).

    Args:
        manifest: The run.
        key_epoch: Which run secret is in force.
        round_: The round.
        statements: Site → digest of its `train` reply's envelope; the cohort is its keys.
    """
    parts = [manifest.digest, str(manifest.roster_version), str(key_epoch), str(round_)]
    for site in sorted(statements):
        parts += [site, statements[site]]
    return digest("transcript", *(p.encode() for p in parts)).hex()
