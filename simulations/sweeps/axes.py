"""The axes of a sweep, from text: `section.key=v1,v2,…` each, and the points of their grid."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confide.config import parse_assignment
from confide.errors import ConfideError, ConfigError

__all__ = ["AxisPoint", "name_cell", "points_of", "read_axes", "values_of"]


@dataclass(frozen=True, slots=True)
class AxisPoint:
    """A point of the grid: its assignments as text, in the order of the axes."""

    texts: Mapping[str, str]

    @property
    def label(self) -> str:
        return ", ".join(f"{key}={text}" for key, text in self.texts.items())

    @property
    def assignments(self) -> list[str]:
        return [f"{key}={text}" for key, text in self.texts.items()]

    @property
    def values(self) -> dict[str, Any]:
        """What the texts mean."""
        return {key: parse_assignment(text)[1] for key, text in zip(self.texts, self.assignments, strict=True)}

    def folder(self, number: int) -> str:
        """`001-epsilon-0.5`: the number makes it unique, the rest is for people."""
        words = "-".join(f"{key.rpartition('.')[2]}-{text}" for key, text in self.texts.items())
        return f"{number:03d}-{re.sub(r'[^A-Za-z0-9.+_-]+', '-', words)[:80]}".rstrip("-.")


def points_of(axes: Mapping[str, Sequence[str]]) -> list[AxisPoint]:
    """Every combination; the last axis changes fastest."""
    return [AxisPoint(dict(zip(axes, texts, strict=True))) for texts in itertools.product(*axes.values())]


def values_of(axes: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
    """Key → values, as they are meant."""
    return {key: [parse_assignment(f"{key}={text}")[1] for text in texts] for key, texts in axes.items()}


def name_cell(error: ConfideError, label: str) -> None:
    """Let the error tell which cell it is about."""
    error.where = f"cell {label}: {error.where}" if error.where else f"cell {label}"


def read_axes(over: Iterable[str], overrides: Sequence[str]) -> dict[str, list[str]]:
    """The axes in the order given: key → values as text.

    Raises:
        ConfigError: An axis is malformed, empty, said twice, or holds a value twice.
    """
    axes: dict[str, list[str]] = {}
    given = {".".join(parse_assignment(text)[0]) for text in overrides}
    for text in over:
        key, equals, raw = text.partition("=")
        key = ".".join(part.strip() for part in key.split("."))
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{text!r} is not an axis", where="--over", hint="write it as section.key=v1,v2")
        values = [value.strip() for value in _split(raw)]
        if not all(values):
            raise ConfigError(f"{text!r} holds an empty value", where="--over",
                              hint="write it as section.key=v1,v2, without a comma too many")  # fmt: skip
        if key in axes or key in given:
            other = "--over" if key in axes else "--set"
            raise ConfigError(f"{key} is given twice", where="--over", hint=f"say it once: it is in {other} already")
        parsed = [parse_assignment(f"{key}={value}")[1] for value in values]
        twice = next((v for i, v in enumerate(parsed) if _among(v, parsed[:i])), None)
        if twice is not None:
            raise ConfigError(f"{key} = {twice!r} is given twice", where="--over",
                              hint="name each value once; repeat a point with --over run.seed=1,2,3")  # fmt: skip
        axes[key] = values
    if not axes:
        raise ConfigError("names no axis", where="--over", hint="for example --over privacy.epsilon=0.5,1,2")
    return axes


def _among(value: Any, others: Sequence[Any]) -> bool:
    """Equality as TOML means it: 1 is 1.0 but not true."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in others)


def _split(raw: str) -> list[str]:
    """At the commas outside brackets and quotes: `[64,32],[16]` is two lists."""
    parts, depth, quote = [""], 0, ""
    for character in raw:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts
