"""The digest of a package whose model code runs at a site: what the operator has read is what runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from confide.errors import ConfigError
from confide.privacy.digest import digest

__all__ = ["package_digest"]

#: Written by Python itself, from the files that count.
_DERIVED = ("__pycache__",)


def package_digest(kind: str) -> str:
    """SHA-256 over every file of the top-level package, or the one module, that `module:function` names. Hex.

    Nothing is imported or run. What that package imports from others is not in it: pin those as your site pins
    software.

    Raises:
        ConfigError: There is no such package.
    """
    top = kind.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        raise ConfigError("is not installed", where=f"package {top!r}",
                          hint="install the package, or add its folder to PYTHONPATH")  # fmt: skip
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = [(p, p.relative_to(f)) for f in folders for p in f.rglob("*") if p.is_file()]
    if not folders and spec.origin is not None:
        files = [(Path(spec.origin), Path(Path(spec.origin).name))]
    parts: list[bytes] = []
    for path, name in sorted(files, key=lambda pair: pair[1].as_posix()):
        if not set(_DERIVED) & set(name.parts):
            parts += [name.as_posix().encode(), path.read_bytes()]
    return digest("package", *parts).hex()
