"""What several attacks share."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock by so many seconds."""
    real = time.time_ns

    def by(seconds: float) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: real() + int(seconds * 1e9))

    return by
