"""Parts of messages that never change, and may keep what was computed from them."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict

__all__ = ["Frozen"]

_F = TypeVar("_F", bound=BaseModel)


class Frozen(BaseModel):
    """A value. What its `cached_property`s found belongs to it alone: a changed copy computes them anew."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    def __copy__(self) -> Self:
        return _forget(super().__copy__())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return _forget(super().__deepcopy__(memo))


def _forget(copied: _F) -> _F:
    for name in set(copied.__dict__) - set(type(copied).model_fields):
        del copied.__dict__[name]
    return copied
