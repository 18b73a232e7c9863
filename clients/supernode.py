"""A site's end of the network: Flower's SuperNode and what takes tasks from it. See ADR 15.

This is the one module of the client side that uses Flower's private interfaces; they are those of the pinned version.

Invariants:
1. The app that answers is the one passed to `serve`. The bundle that comes with a run is never unpacked, looked into or
   imported.
2. Tasks are handed out on the loopback interface only, to who knows the secret.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import flwr.supernode.start_client_internal as flower_loop
import httpx
from flwr.clientapp import ClientApp
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from confide.errors import ConfigError

__all__ = ["FLOWER", "run_supernode", "serve"]

_log = logging.getLogger(__name__)
#: The version whose private interfaces these are.
FLOWER = "1.41.0"
_METHOD = "/flwr.proto.Runtime/AcquireTask"
_COMPONENT = "flwr-clientapp"
_ASK_SECONDS = 0.1
_HEARTBEAT_SECONDS = 10.0


class _Clock:
    """`time` as Flower's loop sees it. The loop sleeps for 3 s when there was no message, and looks for a reply twice a
    second; both are constants in its text. Our link holds a request until there is a message, so nobody need sleep."""

    _SHORTEST = 0.05

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, self._SHORTEST))


def run_supernode(*, superlink: str, ca: Path, node_key: Path, secret_file: Path, port: int) -> None:
    """Run Flower's SuperNode in this process until it is told to stop.

    Args:
        superlink: The link's `host:port`.
        ca: PEM file of the certificates that may vouch for the link.
        node_key: The node's private key in OpenSSH form.
        secret_file: Holds the secret for taking tasks.
        port: Loopback port where tasks are handed out.

    Raises:
        ConfigError: Another Flower is installed.
    """
    _check_flower()
    setattr(flower_loop, "time", _Clock())  # noqa: B010  # to type checkers a module's imports are constants
    sys.argv = [
        "flower-supernode", "--superlink", superlink, "--root-certificates", str(ca),
        "--auth-supernode-private-key", str(node_key), "--isolation", "process", "--host", "127.0.0.1",
        "--port", str(port), "--superexec-auth-secret-file", str(secret_file),
    ]  # fmt: skip
    flower_supernode()


def serve(app: ClientApp, address: Callable[[], str | None], secret: bytes, stop: threading.Event) -> None:
    """Take tasks and answer them with `app`, one after the other, until `stop` is set.

    Args:
        app: The installed app.
        address: Where the SuperNode hands out tasks right now; None while there is none.
        secret: For taking tasks.
        stop: Ends the loop after the task at hand.

    Raises:
        ConfigError: Another Flower is installed.
    """
    _check_flower()
    client, known = None, None
    while not stop.is_set():
        place = address()
        if place != known:
            if client is not None:
                client.close()
            client, known = (None if place is None else _client(place, secret=secret)), place
        token = "" if client is None else _acquire(client)
        if token and known is not None:
            _answer(app, _client(known, token=token))
        else:
            stop.wait(_ASK_SECONDS)


def _acquire(client: RuntimeHttpClient) -> str:
    """A task's token, or nothing."""
    try:
        return str(client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token)
    except httpx.HTTPError:
        return ""  # the SuperNode is starting, or gone; the agent starts another


def _answer(app: ClientApp, client: RuntimeHttpClient) -> None:
    """One task. A SuperNode that dies meanwhile loses the reply; a repeated request gets it from the site's state."""
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(client, done), name="heartbeat", daemon=True)
    heart.start()
    try:
        message, context, _run, _bundle = pull_task_input(client)
        reply = app(message=message, context=context)
        push_message(client, reply, context)
        push_task_output(client, context, "completed", "")
    except Exception as error:
        # By type only: an exception's text may hold data.
        _log.warning("a task was not finished: %s", type(error).__name__)
    finally:
        done.set()
        heart.join()
        client.close()


def _beat(client: RuntimeHttpClient, done: threading.Event) -> None:
    """Tell the SuperNode that its task is being worked on, however long that takes."""
    while not done.wait(_HEARTBEAT_SECONDS):
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            continue


def _client(address: str, *, secret: bytes | None = None, token: str | None = None) -> RuntimeHttpClient:
    interceptors: list[ProtobufClientInterceptor] = [RuntimeVersionHttpInterceptor(component_name=_COMPONENT)]
    if secret is not None:
        interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_METHOD}))
    if token is not None:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    return RuntimeHttpClient.from_server_address(address, True, None, interceptors=interceptors)


def _check_flower() -> None:
    installed = importlib.metadata.version("flwr")
    if installed != FLOWER:
        raise ConfigError(f"deployment needs flwr {FLOWER}, not {installed}", where="installation",
                          hint=f"pip install flwr=={FLOWER}")  # fmt: skip
