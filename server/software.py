"""Which software a run used, for its log and report."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["software_versions"]

_PACKAGES = ("confide", "cryptography", "flwr", "numpy", "opacus", "tenseal", "torch")
_FOLDERS = (".", "server", "clients", "privacy", "strategies", "simulations")


@lru_cache(maxsize=1)
def software_versions() -> dict[str, str]:
    """Versions of Python and the packages that decide results, and a digest of confide's own code."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {**found, "python": platform.python_version(), "confide_code_sha256": _code_digest()}


def _code_digest() -> str:
    spec = find_spec("confide")
    root = Path(spec.origin or "").parent if spec is not None else Path()
    hasher = hashlib.sha256()
    files = {p.resolve(): p for folder in _FOLDERS for p in (root / folder).rglob("*.py")}
    for path in sorted(files.values(), key=lambda p: p.relative_to(root).as_posix()):
        hasher.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()
