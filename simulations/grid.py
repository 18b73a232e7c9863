"""A Flower `Grid` in one process: the same coordinator and client apps, no Ray, no network.

Every message is serialised to Flower's wire form and parsed again on both ways, so what works here works deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as WireMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from confide.simulations.together import answer_together

__all__ = ["NODE_CONFIG_SITE", "LocalGrid"]

NODE_CONFIG_SITE = "site"
_RUN_ID = 1
_SERVER_NODE = 1
_FIRST_NODE = 100
_TRAINING = "train.train"
_UNAVAILABLE = 5  # Flower's own code for a node that does not answer


class LocalGrid(Grid):
    """Nodes are called in turn, in this process, each when its reply is pulled: no two replies are held at once. Only
    what asks for training may go to several at once, whose replies are short.

    Args:
        client_app: The app that answers, the same for all nodes; it finds its site by the context.
        sites: Name of the site on each node.
        drop: Says of a message that its node is down (scenarios and tests).
        together: How many nodes at most train at once.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: Iterable[str],
        drop: Callable[[Message, str], bool] = lambda _m, _s: False,
        together: int = 1,
    ) -> None:
        self._app, self._drop, self._together = client_app, drop, together
        self._ready: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=_RUN_ID)
        self._site_of = {_FIRST_NODE + i: site for i, site in enumerate(sites)}
        self._node_of = {site: node for node, site in self._site_of.items()}
        self._outbox: dict[str, Message] = {}
        #: Bytes that crossed, by direction.
        self.bytes_down = self.bytes_up = 0
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _SERVER_NODE, 1

    def set_run(self, run: Run) -> None:
        """Flower's interface."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's interface."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Flower's interface."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Flower's interface."""
        return list(self._site_of)

    def node_of(self, site: str) -> int | None:
        """Where a site lives."""
        return self._node_of.get(site)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep each message until its reply is asked for."""
        identifiers = []
        for message in messages:
            identifier = str(uuid4())
            message.metadata.__dict__["_message_id"] = identifier  # as Flower's SuperLink does on arrival
            self._outbox[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Flower's interface."""
        return [reply for i in list(message_ids) if (reply := self._reply(i)) is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Flower's interface; replies are there at once, so `timeout` never passes."""
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, identifier: str) -> Message | None:
        if identifier in self._ready:
            return self._ready.pop(identifier)
        message = self._outbox.pop(identifier, None)
        if message is None:
            return None
        if self._together < 2 or message.metadata.message_type != _TRAINING:
            return self._deliver(message)
        others = [i for i, m in self._outbox.items() if m.metadata.message_type == _TRAINING][: self._together - 1]
        messages = [message, *(self._outbox.pop(i) for i in others)]
        first, *rest = answer_together([partial(self._deliver, m) for m in messages])
        self._ready |= zip(others, rest, strict=True)
        return first

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        site = self._site_of[node]
        if self._drop(message, site):
            return Message(Error(code=_UNAVAILABLE, reason="node unavailable"), reply_to=message)
        arrived, size = _over_the_wire(message)
        self.bytes_down += size
        # A site's state is on its own disk; Flower's context carries nothing from message to message.
        context = Context(
            run_id=_RUN_ID,
            node_id=node,
            node_config={NODE_CONFIG_SITE: site},
            state=RecordDict(),
            run_config={},
        )
        reply, size = _over_the_wire(self._app(message=arrived, context=context))
        self.bytes_up += size
        return reply


def _over_the_wire(message: Message) -> tuple[Message, int]:
    data = message_to_proto(message).SerializeToString()
    return message_from_proto(WireMessage.FromString(data)), len(data)
