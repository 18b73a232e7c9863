"""The coordinator's end of the network: Flower's link to the nodes, in this process. See ADR 15.

This module and `linkstate` are all of the server side that uses Flower's private interfaces; they are those of the
pinned version.

Invariants:
1. Only Flower's *fleet* interface is served, behind the `Fence`. Its interfaces for submitting runs and for taking
   tasks are not there at all: the coordinator is in this process and needs no door.
2. Only nodes of the roster are known, each by its public key; a node's number follows from its key, so that it is the
   same after a restart and no node can claim another's.
3. TLS always; a node's signature (over the time, NIST-EC) in every request.
4. The bundle that Flower hands to nodes holds no code.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import io
import logging
import threading
import time
import zipfile
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from flwr.app import DEFAULT_TTL, Error, Message, Metadata, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.config_utils import get_fab_metadata
from flwr.common.constant import (
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SubStatus,
)
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.error import http_error_translator
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.run import Run
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from confide.errors import ConfigError, PeerError
from confide.server.fence import Fence
from confide.server.linkstate import RosterState
from confide.server.nodes import node_keys, node_number

__all__ = ["FLOWER", "Link", "LinkConfig", "empty_bundle"]

_log = logging.getLogger(__name__)
#: The version whose private interfaces these are.
FLOWER = "1.41.0"
_START_SECONDS = 30.0
_UNREADABLE = 203  # beside the codes of the sites' own error replies


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """Where the link listens, and to whom.

    Args:
        host: Address to bind.
        port: Port to bind; 0 takes a free one.
        certificate: The server's TLS certificate (PEM), with its chain.
        key: Its private key (PEM).
        nodes: Each site's node key: an OpenSSH public key of a NIST curve.
    """

    host: str
    port: int
    certificate: Path
    key: Path
    nodes: Mapping[str, str]


class Link:
    """The link of one coordinator; a context manager.

    Raises:
        ConfigError: A node's key cannot be read or appears twice, another Flower is installed, or the address is taken.
    """

    def __init__(self, config: LinkConfig) -> None:
        _check_flower()
        self._config = config
        keys = node_keys(config.nodes)
        #: The site on each node, by the key that the node signs with.
        self.sites: Mapping[int, str] = {node_number(key): site for site, key in keys.items()}
        self._state = RosterState({node_number(key): key for key in keys.values()})
        self._store = self._state.object_store
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        #: Runs that are open, by number, and the task that stands for this process in each.
        self._tasks: dict[int, int] = {}
        #: What a message is made of is kept once, also where several runs send it: it comes and goes under this lock.
        self._lock = self._state.lock
        #: Messages without a reply yet, to hand out again: (message without content, tree, objects).
        self._outstanding: dict[str, tuple[Message, Any, dict[str, bytes]]] = {}
        self._fence = Fence(
            _fleet_app(self._state, len(keys)),
            FLEET_HTTP_PUBLIC_KEY_HEADER.lower(),
            [b64encode(key).decode("ascii") for key in keys.values()],
        )

    # --- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Link:
        config = self._config
        settings = uvicorn.Config(
            self._fence, host=config.host, port=config.port, log_config=None, access_log=False, server_header=False,
            ssl_certfile=str(config.certificate), ssl_keyfile=str(config.key), timeout_graceful_shutdown=2, ws="none",
            lifespan="on", proxy_headers=False, loop="asyncio",
        )  # fmt: skip
        try:
            settings.load()
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"cannot be used ({type(error).__name__})",
                where=f"certificate {config.certificate}",
                hint="both it and its key are PEM files, and belong together",
            ) from None
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=_serve, args=(self._server,), name="link", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ConfigError("cannot be listened on", where=f"{config.host}:{config.port}",
                                  hint="is another coordinator running there?")  # fmt: skip
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._state.close()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=10)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        if self._server is None or not self._server.servers:
            raise PeerError("is not listening", where="link")
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    # --- runs and messages --------------------------------------------------------------------------------------

    def open_run(self, bundle: bytes | None = None) -> Run:
        """A Flower run of a coordinator in this process; there may be several at once.

        Args:
            bundle: What Flower hands to nodes as the run's app; default: one without code.
        """
        content = empty_bundle() if bundle is None else bundle
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        name, version = get_fab_metadata(content)
        state = self._state
        with self._lock:
            state.store_fab(fab)
            run_id = state.create_run(
                name, version, fab.hash_str, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
            )
            task = state.get_run_info(run_ids=[run_id])[0].primary_task_id or 0
            if not (state.claim_task(task) and state.activate_task(task)):
                raise PeerError("a run could not be opened", where="link")
            self._tasks[run_id] = task
            found: Run = state.get_run_info(run_ids=[run_id])[0]
            return found

    def close_run(self, run: Run) -> None:
        """End a run: nobody is handed what it still asks for, and nodes drop what they hold of it."""
        with self._lock:
            for name in [n for n, (bare, *_) in self._outstanding.items() if bare.metadata.run_id == run.run_id]:
                self._drop(name)
            if (task := self._tasks.pop(run.run_id, None)) is not None:
                self._state.finish_task(task, SubStatus.COMPLETED, "")

    def message(self, run: Run, content: RecordDict, kind: str, node: int, group: str, ttl: float | None) -> Message:
        """A message of a run. Flower's own way to make one asks the process which run it is in: here are several."""
        metadata = Metadata(
            run_id=run.run_id, message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=node, reply_to_message_id="",
            group_id=group, created_at=now().timestamp(), ttl=ttl or DEFAULT_TTL, message_type=kind,
            src_task_id=self._tasks.get(run.run_id, 0),
        )  # fmt: skip
        made: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]  # not declared
        return made

    def online(self) -> list[int]:
        """Nodes that are there now."""
        return sorted(node.node_id for node in self._state.get_node_info(statuses=[NodeStatus.ONLINE]))

    def push(self, message: Message) -> str:
        """Hand a message over for its node; what it is called. It replaces one of the same run that the node has not
        answered: who sends another has stopped waiting for that, and nobody should work on it later.

        Raises:
            PeerError: There is no such node.
        """
        with no_object_id_recompute():
            identifier = str(message.object_id)
            message.metadata.__dict__["_message_id"] = identifier  # as Flower's grids do
            tree = get_object_tree(message)
            objects = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        # Objects first: a node that waits takes the message at once.
        bare = remove_content_from_message(message)
        with self._lock:
            for older in [n for n, (held, *_) in self._outstanding.items() if _same_place(held, bare)]:
                self._drop(older)
            self._outstanding[identifier] = (bare, tree, objects)
            self._put(identifier)
            if self._state.store_message_ins(bare) is None:
                self._drop(identifier)
                raise PeerError("is not known to the link", where=f"node {bare.metadata.dst_node_id}")
        return identifier

    def pull(self, identifier: str) -> Message | None:
        """The reply to a message once it is there in full; then both are forgotten. Flower's own error reply where the
        node has been silent for a minute, or where what it sent is none. A message that a node lost by dying is handed
        out again."""
        with self._lock:
            if identifier not in self._outstanding:
                return None
            bare = self._outstanding[identifier][0]
        try:
            found = self._whole_reply(identifier, bare.metadata.run_id)
            if found is None:
                return None
            reply = self._inflate(*found)
        except Exception as error:  # whatever a node's bytes do to Flower's parser, they end no run
            _log.warning("a reply cannot be read: %s", type(error).__name__)
            reply = Message(Error(code=_UNREADABLE, reason="unreadable"), reply_to=bare)
        with self._lock:
            self._drop(identifier)
        return reply

    def _whole_reply(self, identifier: str, run: int) -> tuple[str, dict[str, bytes]] | None:
        """(name, parts) of a reply that is there in full."""
        with self._lock:
            name = self._state.reply_to(identifier)
            whole = name is None or all(self._store.get(part) for part in self._parts(name))
            found = self._state.get_message_res({identifier}, run) if whole else []
            if not found:
                if self._state.lost(identifier):
                    self._put(identifier)
                    self._state.hand_out_again(identifier)
                return None
            named = str(found[0].metadata.message_id)
            return named, {part: self._store.get(part) or b"" for part in self._parts(named)}

    def _inflate(self, name: str, contents: Mapping[str, bytes]) -> Message:
        reply = inflate_object_from_contents(name, dict(contents))
        with self._lock:
            self._store.delete(name)
        if not isinstance(reply, Message):
            raise TypeError("not a message")
        reply.metadata.__dict__["_message_id"] = name
        return reply

    def _put(self, identifier: str) -> None:
        bare, tree, objects = self._outstanding[identifier]
        self._store.preregister(bare.metadata.run_id, tree)
        for name, content in objects.items():
            self._store.put(name, content)

    def _drop(self, identifier: str) -> None:
        self._outstanding.pop(identifier, None)
        self._store.delete(identifier)
        self._state.forget(identifier)

    def _parts(self, name: str) -> list[str]:
        return [str(tree.object_id) for tree in iterate_object_tree(self._store.get_object_tree(name))]


def _same_place(one: Message, other: Message) -> bool:
    """Are they of one run, and for one node?"""
    first, second = one.metadata, other.metadata
    return bool((first.run_id, first.dst_node_id) == (second.run_id, second.dst_node_id))


@cache
def empty_bundle() -> bytes:
    """A Flower app bundle with a description and no code."""
    description = b"""[project]
name = "confide"
version = "1.0.0"
dependencies = []
license = "Apache-2.0"
[tool.flwr.app]
publisher = "confide"
[tool.flwr.app.components]
serverapp = "none:none"
clientapp = "none:none"
"""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as bundle:
        bundle.writestr(zipfile.ZipInfo("pyproject.toml", date_time=(1980, 1, 1, 0, 0, 0)), description)
    return content.getvalue()


def _fleet_app(state: RosterState, nodes: int) -> FastAPI:
    """Flower's fleet interface alone, as its own service builds it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A waiting request holds a thread: one for each node, beside those that Starlette counts on.
        anyio.to_thread.current_default_thread_limiter().total_tokens += 2 * nodes
        yield

    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )  # fmt: skip
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    factory.state_instance = state
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    app.include_router(fleet_router)
    return app


def _serve(server: uvicorn.Server) -> None:
    async def until_told() -> None:
        await server.serve()
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # a peer that does not say goodbye is not waited for
        # Nor one in the middle of its TLS handshake, of which only the loop itself knows.
        for transport in list(getattr(asyncio.get_running_loop(), "_transports", {}).values()):
            transport.abort()
        await asyncio.sleep(0.05)

    try:
        asyncio.run(until_told())
    except SystemExit:  # uvicorn's way to say that it cannot bind; the main thread notices
        return


def _check_flower() -> None:
    installed = importlib.metadata.version("flwr")
    if installed != FLOWER:
        raise ConfigError(f"deployment needs flwr {FLOWER}, not {installed}", where="installation",
                          hint=f"pip install flwr=={FLOWER}")  # fmt: skip
