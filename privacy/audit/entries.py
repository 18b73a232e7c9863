"""A log's entries: records as canonical JSON (sorted ASCII keys, no floats: what is no integer is decimal text)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from confide.errors import AuditError
from confide.privacy.audit.records import KINDS, Record

__all__ = ["canonical", "decode", "encode"]

_VERSION = 1
_FITS: dict[str, Callable[[Any], bool]] = {
    "int": lambda v: type(v) is int and abs(v) < 2**63,
    "str": lambda v: isinstance(v, str),
    "list[str]": lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
    "dict[str, str]": lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
}


_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
#: What each kind's fields must fit.
_SPECS = {kind: tuple((f.name, _FITS[str(f.type)]) for f in fields(kind)) for kind in KINDS.values()}


def canonical(tree: Any) -> bytes:
    """Canonical JSON of a tree without floats."""
    return _encoder.encode(tree).encode()


def encode(record: Record, at: int) -> bytes:
    """An entry: the record with its kind, version and time (microseconds UTC)."""
    tree = {name: getattr(record, name) for name, _ in _SPECS[type(record)]}
    return canonical({**tree, "kind": record.KIND, "v": _VERSION, "at": at})


def decode(data: bytes) -> tuple[Record, int]:
    """Inverse of `encode`.

    Raises:
        AuditError: It is not an entry that this version writes, byte for byte.
    """
    try:
        tree = json.loads(data)
        if canonical(tree) != data:
            raise AuditError("is not in canonical form")
        at, version, kind = tree.pop("at"), tree.pop("v"), KINDS[tree.pop("kind")]
        spec = _SPECS[kind]
        if version != _VERSION or type(version) is not int or type(at) is not int or len(tree) != len(spec):
            raise ValueError
        if not all(fits(tree[name]) for name, fits in spec):
            raise ValueError
        return kind(**tree), at
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise AuditError("is not a log entry of this version") from None
