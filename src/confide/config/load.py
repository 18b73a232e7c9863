"""The one cascade: defaults < file < `--set`. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from confide.config.experiment import Experiment, describe_value
from confide.errors import ConfigError

_C = TypeVar("_C", bound=BaseModel)

__all__ = ["load_experiment", "parse_assignment", "read_toml", "validate"]


_KIND = ("strategy", "kind")


def load_experiment(source: Path | Mapping[str, Any], assignments: Iterable[str] = ()) -> Experiment:
    """Read an experiment.

    Args:
        source: A TOML file, or the same as nested mappings.
        assignments: `a.b=value` overrides; the value is TOML, or else a plain string.

    Raises:
        ConfigError: The file cannot be read or parsed, a key is unknown, or a value is not allowed.
    """
    where = str(source) if isinstance(source, Path) else "experiment"
    tree = read_toml(source) if isinstance(source, Path) else _copy(source)
    parsed = [(*parse_assignment(assignment), assignment) for assignment in assignments]
    # A kind brings its own options, in whatever order they are given.
    for path, value, text in sorted(parsed, key=lambda item: item[0] != _KIND):
        _assign(tree, path, value, text)
    return validate(Experiment, tree, where, "mend the experiment, or override a key with --set section.key=value")


def validate(kind: type[_C], tree: Mapping[str, Any], where: str, hint: str) -> _C:
    """A configuration from its tree.

    Raises:
        ConfigError: A key is unknown (with the nearest known one), or a value is not allowed; `hint` says what to do.
    """
    _refuse_unknown(kind, tree, (), where)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where, hint) from None


def read_toml(path: Path, name: str = "give the path of an experiment file") -> dict[str, Any]:
    """Parse a TOML file; `name` says what to give where there is none.

    Raises:
        ConfigError: It is missing, not UTF-8, or not TOML (with line and column).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path), hint=name) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path), hint="give a readable UTF-8 TOML file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not valid TOML: {error}", where=str(path), hint="mend that line and try again") from None


def parse_assignment(text: str) -> tuple[tuple[str, ...], Any]:
    """Split `a.b=value`; the value is read as TOML and, where it is not, as a plain string."""
    key, equals, raw = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"{text!r} is not an assignment", where="--set", hint="write it as section.key=value")
    try:
        found = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return path, raw.strip()
    return path, found["value"] if len(found) == 1 else raw.strip()


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _assign(tree: dict[str, Any], path: tuple[str, ...], value: Any, text: str) -> None:
    # Two ways of saying one thing exclude each other; the override wins over the file.
    if path[:2] in (("consent", "file"), ("consent", "simulate")) and isinstance(tree.get("consent"), dict):
        for other in ("simulate",) if path[1] == "file" else ("file", "format", "mapping"):
            tree["consent"].pop(other, None)
    # Another kind of strategy leaves the options of the one in the file behind: they are not its own.
    if path == _KIND and isinstance(tree.get("strategy"), dict) and tree["strategy"].get("kind") != value:
        tree["strategy"] = {}
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{part!r} in {text!r} is a value, not a section", where="--set", hint="shorten the key")
    tree[path[-1]] = value


def _refuse_unknown(annotation: Any, tree: Any, path: tuple[str, ...], where: str) -> None:
    """Follow the sections, also inside lists and named tables, and name the nearest known key."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        _refuse_unknown(inner[0], tree, path, where)
    elif origin is dict and isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_unknown(inner[1], value, (*path, str(key)), where)
    elif origin is tuple and isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            _refuse_unknown(inner[0], value, (*path, str(number)), where)
    elif origin in (Union, types.UnionType):
        sections = [a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)]
        kinds = [m for m in sections if isinstance(tree, dict) and tree.get("kind") in _kinds(m)]
        for section in sections if len(sections) == 1 else kinds:
            _refuse_unknown(section, tree, path, where)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(tree, dict):
        fields = {field.alias or name: field for name, field in annotation.model_fields.items()}
        for key, value in tree.items():
            if key not in fields:
                raise _unknown(str(key), path, list(fields), where)
            _refuse_unknown(fields[key].annotation, value, (*path, key), where)


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _unknown(key: str, path: tuple[str, ...], known: list[str], where: str) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {'.'.join((*path, near[0]))}?" if near else f"known here: {', '.join(sorted(known))}"
    return ConfigError(f"unknown key {'.'.join((*path, key))}", where=where, hint=hint)


def _explain(error: ValidationError, where: str, hint: str) -> ConfigError:
    lines = []
    for item in error.errors():
        parts = list(item["loc"])
        if parts[:2] == ["schema", "features"] and len(parts) > 3:
            del parts[3]  # pydantic puts the tag of a union into the path
        loc = ".".join(map(str, parts))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            lines.append(f"{loc} is required")
        elif item["type"] == "extra_forbidden":
            lines.append(f"unknown key {loc}")
        elif isinstance(item["input"], dict | BaseModel):
            lines.append(f"{loc}: {message}" if loc else message)
        else:
            lines.append(f"{loc} = {describe_value(item['input'])}: {message[0].lower()}{message[1:]}")
    return ConfigError("; ".join(lines), where=where, hint=hint)
