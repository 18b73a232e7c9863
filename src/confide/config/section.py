"""What every section of an experiment file has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Scalar", "Section"]

Scalar = bool | int | float | str


class Section(BaseModel):
    """Frozen; every unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")
