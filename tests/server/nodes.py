"""A node in this process, for tests of the link: Flower's own client of the fleet interface, with any key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from confide.server.link import Link, LinkConfig
from tests.integration.deployed import LOOPBACK, write_certificates


def public_line(key: ec.EllipticCurvePrivateKey) -> str:
    """A public key as it stands in a roster."""
    formats = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(*formats).decode()


def new_key() -> ec.EllipticCurvePrivateKey:
    """A node's key."""
    return ec.generate_private_key(ec.SECP384R1())


@contextmanager
def listening(folder: Path, host: str = LOOPBACK, **keys: ec.EllipticCurvePrivateKey) -> Iterator[Link]:
    """A link on a free loopback port that admits these sites' nodes."""
    write_certificates(folder)
    config = LinkConfig(
        host=host, port=0, certificate=folder / "server.pem", key=folder / "server.key",
        nodes={site: public_line(key) for site, key in keys.items()},
    )  # fmt: skip
    with Link(config) as link:
        try:
            yield link
        finally:
            while _open:
                _open.pop().close()


#: Clients of the test at hand: an open connection would outlive the link.
_open: list[FleetHttpClient] = []


class NodeClient:
    """What a SuperNode sends, request by request.

    Args:
        port: The link's.
        ca: Who vouches for it.
        signer: Signs the time in every request.
        shown: The public key that is shown; default: the signer's.
    """

    def __init__(
        self, port: int, ca: Path, signer: ec.EllipticCurvePrivateKey, shown: ec.EllipticCurvePrivateKey | None = None
    ) -> None:
        key = (shown or signer).public_key()
        self.key = public_key_to_bytes(key)
        self.client = FleetHttpClient.from_server_address(
            f"{LOOPBACK}:{port}", False, ca.read_bytes(),
            [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(signer, key)],
        )  # fmt: skip
        _open.append(self.client)
        self.number = 0

    def activate(self) -> NodeClient:
        """Say that the node is there."""
        request = ActivateNodeRequest(public_key=self.key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self.number = self.client.ActivateNode(request).node_id
        return self

    def live(self) -> None:
        """Say that the node is still there."""
        self.client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        )

    @property
    def node(self) -> NodeProto:
        """As it calls itself."""
        return NodeProto(node_id=self.number)

    def pull(self, *, confirm: bool = True) -> Message:
        """Wait for a message, and take it with all that belongs to it."""
        found = self.look(confirm=confirm)
        assert found is not None, "nobody has sent anything"
        return found

    def look(self, *, confirm: bool = True) -> Message | None:
        """The same, or nothing where none comes for as long as the link holds a request."""
        answer = self.client.PullMessages(PullMessagesRequest(node=self.node))
        if not answer.messages_list:
            return None
        wire, tree = answer.messages_list[0], answer.message_object_trees[0]
        contents = {}
        for part in iterate_object_tree(tree):
            found = self.client.PullObject(
                PullObjectRequest(node=self.node, run_id=wire.metadata.run_id, object_id=part.object_id)
            )
            assert found.object_available
            contents[part.object_id] = found.object_content
        name = wire.metadata.message_id
        if confirm:
            self.client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=wire.metadata.run_id, message_object_id=name)
            )
        message = inflate_object_from_contents(name, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = name
        assert message_from_proto(wire).metadata.dst_node_id == self.number
        return message

    def push(self, reply: Message, *, leave_out: int = 0, tree: Any = None) -> None:
        """Send a reply; `leave_out` of its objects never come."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            answer = self.client.PushMessages(
                PushMessagesRequest(
                    node=self.node, messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[tree or get_object_tree(reply)], clientapp_runtime_list=[0.0],
                )
            )  # fmt: skip
            parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        for name in list(answer.objects_to_push)[: len(answer.objects_to_push) - leave_out]:
            self.client.PushObject(
                PushObjectRequest(
                    node=self.node, run_id=reply.metadata.run_id, session_id=answer.session_id, object_id=name,
                    object_content=parts[name],
                )
            )  # fmt: skip


def status_of(error: httpx.HTTPStatusError) -> int:
    """The HTTP status that a request was refused with."""
    return error.response.status_code
