"""A thread of the service, whose end somebody looks at."""

from __future__ import annotations

import threading
from collections.abc import Callable

from confide.server.exchange import Interrupted

__all__ = ["Worker"]


class Worker:
    """Begins at once. It holds nobody's process: what it works on must stand a kill.

    Args:
        name: The thread's.
        work: What it does. `Interrupted` ends it as if it had come to its end.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        #: What it ended with, if that was an error; final once it is not alive.
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Does it still work?"""
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait until it does not."""
        self._thread.join(timeout)

    def _live(self) -> None:
        try:
            self._work()
        except Interrupted:
            return
        except BaseException as error:
            self.error = error
