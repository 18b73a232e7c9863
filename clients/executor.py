"""The two processes that an agent supervises: `python -m confide.clients.executor node` is Flower's SuperNode, `… site`
holds the site's data and keys and answers its requests.

The agent's end of standard input says what to do, in lines of JSON, the first of which is the whole order; when it
closes, the agent is gone, and so is the process. Nothing secret stands in arguments or the environment.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from confide.environment import silence_third_parties

__all__ = ["GIVE_UP", "main", "resolve_factory"]

_log = logging.getLogger("confide.executor")
#: Not an error to try again after: the operator has to change something first.
GIVE_UP = 64


def resolve_factory(reference: str) -> Callable[..., Any]:
    """The function behind `package.module:function`.

    Raises:
        ConfigError: There is none.
    """
    from confide.errors import ConfigError

    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not callable(found):
        raise ConfigError(
            "names no function", where=f"site factory {reference[:200]!r}", hint="package.module:function"
        )
    return found  # type: ignore[no-any-return]  # whatever it makes is used as a Site


def main() -> None:
    """The entry point of both processes."""
    silence_third_parties()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "httpcore", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    role, order, code = sys.argv[1], json.loads(sys.stdin.readline()), 0
    try:
        _node(order) if role == "node" else _site(order)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:
        # By type only: an exception's text may hold data.
        _log.error("ended with %s", type(error).__name__, exc_info=_log.isEnabledFor(logging.DEBUG))
        code = 1
    logging.shutdown()
    os._exit(code)  # Flower leaves threads behind that would keep the process, and the agent would not notice


def _node(order: dict[str, Any]) -> None:
    from confide.clients.supernode import run_supernode

    flower = logging.getLogger("flwr")  # it brings a terminal's handler of its own, with colours
    flower.handlers.clear()
    flower.setLevel(logging.INFO)
    threading.Thread(target=_until_orphaned, daemon=True).start()
    run_supernode(
        superlink=order["superlink"], ca=Path(order["ca"]), node_key=_node_key(order),
        secret_file=Path(order["secret_file"]), port=order["port"],
    )  # fmt: skip


def _node_key(order: dict[str, Any]) -> Path:
    """Flower wants a file. One that lies on no disk goes with the process."""
    if "node_key" in order:
        return Path(order["node_key"])
    descriptor = os.memfd_create("node_key")
    os.write(descriptor, order.pop("node_key_text").encode("ascii"))
    return Path(f"/proc/self/fd/{descriptor}")


def _site(order: dict[str, Any]) -> None:
    from confide.clients.app import make_client_app
    from confide.clients.supernode import serve
    from confide.errors import ConfideError

    stop, place = threading.Event(), list[str | None]([None])
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the agent, which stops us in order
    try:
        site = resolve_factory(order["factory"])(**order["arguments"])
    except ConfideError as error:
        # Only texts that may leave a site stand in a file that an operator may send to somebody.
        _log.error(
            "the site cannot start: %s", error if error.shareable or error.kind == "configuration" else error.kind
        )
        raise SystemExit(1 if error.kind == "storage" or _for_want_of_space(error) else GIVE_UP) from None
    threading.Thread(target=_follow, args=(place,), daemon=True).start()
    _log.info("site %s answers", site.name)
    try:
        serve(make_client_app(lambda _context: site), lambda: place[0], bytes.fromhex(order["secret"]), stop)
    finally:
        site.close()


def _for_want_of_space(error: BaseException | None) -> bool:
    """Does an error, whatever it says, come from a disk that is full? There may be space later."""
    from confide.privacy.database import full_disk

    while error is not None:
        if full_disk(error, "") is not None or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            return True
        error = error.__cause__ or error.__context__
    return False


def _follow(place: list[str | None]) -> None:
    """The SuperNode comes, and comes back, on ports of its own; the agent says where."""
    for line in sys.stdin:
        place[0] = str(json.loads(line)["address"])
    os._exit(1)


def _until_orphaned() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
