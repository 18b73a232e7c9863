"""What may reach the link from the network: ten requests of the roster's nodes, and nothing else.

Invariants:
1. A path that is not listed does not exist here, from wherever the connection comes: no client can submit a run, take
   a task, register a node or read how the interface looks.
2. A request without a key of the roster is refused before a byte of its body is read. Whether the key's owner sent it
   is checked after this, by the signature.
3. A request says how long it is, and no honest one is longer than `MAX_BODY`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

__all__ = ["MAX_BODY", "OPEN_PATHS", "Fence"]

#: What an authenticated node needs of Flower's fleet interface.
OPEN_PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run",
        "get-fab", "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
#: Bytes. Flower sends large contents in pieces of 5 MiB; what lists those pieces is smaller still.
MAX_BODY = 16 * 2**20
_DIGITS = len(str(MAX_BODY))

_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class Fence:
    """An ASGI application around another one.

    Args:
        inner: Flower's fleet interface.
        key_header: Name of the header in which a node shows its public key, in lower case.
        keys: That header's values for the roster's nodes.
    """

    def __init__(self, inner: _App, key_header: str, keys: Collection[str]) -> None:
        self._inner = inner
        self._header, self._keys = key_header.encode(), frozenset(key.encode() for key in keys)

    async def __call__(
        self, scope: _Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """ASGI's interface."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        status = self._refusal(scope)
        if status is None:
            await self._inner(scope, receive, send)
        elif scope["type"] == "http":
            # Closing spares the reading of whatever body still comes.
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: _Scope) -> int | None:
        """The HTTP status to refuse with; None where the request may pass."""
        if scope["type"] != "http" or scope["path"] not in OPEN_PATHS or scope["method"] != "POST":
            return 404
        shown = [value for name, value in scope["headers"] if name == self._header]
        if len(shown) != 1 or shown[0] not in self._keys:
            return 401
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if len(lengths) != 1 or not lengths[0].isdigit():
            return 411
        if len(lengths[0]) > _DIGITS or int(lengths[0]) > MAX_BODY:
            return 413
        return None
