"""A network that can be cut: bytes between a site and its coordinator go through here, or nowhere."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LOOPBACK = "127.0.0.1"
_LOOK_SECONDS = 0.2


class Wire:
    """Forwards connections of the loopback interface to another port of it. Cut, it takes connections and bytes and
    does nothing with them, as a network does that drops packets; whatever was connected then stays dead for ever."""

    def __init__(self, target: int) -> None:
        self._target, self._stop, self._cut = target, threading.Event(), threading.Event()
        #: Connections that were through when the wire was cut are of an earlier life.
        self._life = 0
        #: How many connections came while it was cut.
        self.swallowed = 0
        self._server = socket.create_server((LOOPBACK, 0))
        self._server.settimeout(_LOOK_SECONDS)
        self.port = int(self._server.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """From now on nothing comes through."""
        self._cut.set()
        self._life += 1

    def heal(self) -> None:
        """New connections come through again."""
        self._life += 1
        self._cut.clear()

    def close(self) -> None:
        """End every thread."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=10)
        self._server.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            with suppress(TimeoutError):
                client, _ = self._server.accept()
                thread = threading.Thread(target=self._serve, args=(client, self._life), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket, life: int) -> None:
        with client:
            if self._cut.is_set():
                self.swallowed += 1
                self._stop.wait()
                return
            with suppress(OSError), socket.create_connection((LOOPBACK, self._target), timeout=10) as target:
                back = threading.Thread(target=self._pump, args=(target, client, life), daemon=True)
                back.start()
                self._pump(client, target, life)
                back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, life: int) -> None:
        source.settimeout(_LOOK_SECONDS)
        try:
            while not self._stop.is_set():
                try:
                    data = source.recv(65536)
                except TimeoutError:
                    continue
                if life != self._life:
                    self._stop.wait()  # dead, and nobody is told
                    return
                if not data:
                    break
                sink.sendall(data)
        except OSError:
            pass
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def wire(target: int) -> Iterator[Wire]:
    """As long as the block lasts."""
    made = Wire(target)
    try:
        yield made
    finally:
        made.close()
