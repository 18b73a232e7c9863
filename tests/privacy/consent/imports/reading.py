"""Reading bytes with a format, for tests."""

from __future__ import annotations

import io
import json
from typing import Any

from confide.privacy.consent.imports import FORMATS, ColumnMapping, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.formats import reader_of


def read(
    form: str, data: bytes | Any, options: Options | None = None, mapping: ColumnMapping | None = None
) -> tuple[list[ImportedEvent], list[Rejection]]:
    """(events, rejections); a tree is written as JSON first."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    chosen = options or Options(values=mapping.values if mapping is not None else {})
    items = list(reader_of(FORMATS[form], mapping)(io.BytesIO(data), chosen))
    return [i for i in items if isinstance(i, ImportedEvent)], [i for i in items if isinstance(i, Rejection)]


def refused(form: str, data: bytes | Any, **kwargs: Any) -> Rejection:
    """The only rejection; nothing came beside it."""
    events, rejections = read(form, data, **kwargs)
    assert events == []
    (found,) = rejections
    return found
