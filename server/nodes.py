"""Which nodes the link listens to: one a site, known by its public key (NIST curve, OpenSSH form)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from confide.errors import ConfigError

__all__ = ["node_keys", "node_number"]


def node_keys(nodes: Mapping[str, str]) -> dict[str, bytes]:
    """Each site's node key as Flower compares them (PEM).

    Args:
        nodes: By site, an OpenSSH public key line.

    Raises:
        ConfigError: A key cannot be read, is of another kind, or is two sites'.
    """
    found: dict[str, bytes] = {}
    for site, line in nodes.items():
        try:
            key = load_ssh_public_key(line.encode())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ConfigError("is not an OpenSSH public key of a NIST curve", where=f"node key of site {site}",
                              hint="ssh-keygen -t ecdsa makes one")  # fmt: skip
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if pem in found.values():
            raise ConfigError("is another site's too", where=f"node key of site {site}",
                              hint="each node has a key of its own")  # fmt: skip
        found[site] = pem
    return found


def node_number(key: bytes) -> int:
    """A node's number: 63 bits of its key's digest; never 0 or 1, which Flower keeps for itself."""
    return 2 + int.from_bytes(hashlib.sha256(b"confide/node/" + key).digest()[:8], "big") % (2**63 - 2)
