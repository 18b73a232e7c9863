"""A Flower `Grid` without network: the same coordinator and client apps, in one process.

Every message is serialised to Flower's wire form and parsed again on both ways, so what works here works deployed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from uuid import uuid4

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_to_proto,
)
from flwr.common.serde_utils import metadata_to_proto
from flwr.proto.message_pb2 import Message as WireMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from confide.simulations.engines.grouping import Grouping
from confide.simulations.engines.together import answer_together

__all__ = ["NODE_CONFIG_SITE", "LocalGrid", "SimulatedGrid", "context_of", "off_the_wire", "on_the_wire"]

NODE_CONFIG_SITE = "site"
_RUN_ID = 1
_SERVER_NODE = 1
_FIRST_NODE = 100
_TRAINING = "train.train"
_UNAVAILABLE = 5  # Flower's own code for a node that does not answer


class SimulatedGrid(Grid, ABC):
    """Nodes of a simulation. What is asked waits until the reply is pulled.

    Args:
        sites: Name of the site on each node.
        drop: Says of a message that its node is down (scenarios and tests).
        grouping: Which nodes train at once.
    """

    def __init__(
        self, sites: Iterable[str], drop: Callable[[Message, str], bool], grouping: Grouping | None = None
    ) -> None:
        self._drop, self._grouping = drop, grouping or Grouping()
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

    @abstractmethod
    def _reply(self, identifier: str) -> Message | None:
        """The reply to a message; None for one that nobody sent."""

    def _dropped(self, message: Message) -> Message | None:
        """What a node that is down leaves to say; None where it is up."""
        if not self._drop(message, self._site_of[message.metadata.dst_node_id]):
            return None
        return Message(Error(code=_UNAVAILABLE, reason="node unavailable"), reply_to=message)

    def _group(self, message: Message) -> int:
        return self._grouping.of(message.metadata.dst_node_id - _FIRST_NODE)

    def _trains_in_stack(self, message: Message) -> bool:
        return self._grouping.stack > 1 and message.metadata.message_type == _TRAINING


class LocalGrid(SimulatedGrid):
    """Nodes are called in turn, in this process, each when its reply is pulled: no two replies are held at once. Only
    what asks for training may go to several at once, whose replies are short.

    Args:
        client_app: The app that answers, the same for all nodes; it finds its site by the context.
        sites: Name of the site on each node.
        drop: Says of a message that its node is down (scenarios and tests).
        grouping: Which nodes train at once.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: Iterable[str],
        drop: Callable[[Message, str], bool] = lambda _m, _s: False,
        grouping: Grouping | None = None,
    ) -> None:
        super().__init__(sites, drop, grouping)
        self._app = client_app

    def _reply(self, identifier: str) -> Message | None:
        if identifier in self._ready:
            return self._ready.pop(identifier)
        message = self._outbox.pop(identifier, None)
        if message is None:
            return None
        if not self._trains_in_stack(message):
            return self._deliver(message)
        group = self._group(message)
        others = [i for i, m in self._outbox.items() if self._trains_in_stack(m) and self._group(m) == group]
        del others[self._grouping.stack - 1 :]
        messages = [message, *(self._outbox.pop(i) for i in others)]
        first, *rest = answer_together([partial(self._deliver, m) for m in messages])
        self._ready |= zip(others, rest, strict=True)
        return first

    def _deliver(self, message: Message) -> Message:
        if (dropped := self._dropped(message)) is not None:
            return dropped
        node = message.metadata.dst_node_id
        data = on_the_wire(message)
        self.bytes_down += len(data)
        data = on_the_wire(self._app(message=off_the_wire(data), context=context_of(node, self._site_of[node])))
        self.bytes_up += len(data)
        return off_the_wire(data)


def context_of(node: int, site: str) -> Context:
    """A message's. A site's state is on its own disk; Flower's context carries nothing from message to message."""
    config = {NODE_CONFIG_SITE: site}
    return Context(run_id=_RUN_ID, node_id=node, node_config=config, state=RecordDict(), run_config={})  # type: ignore[arg-type]  # its values may be strings


def on_the_wire(message: Message) -> bytes:
    """A message in Flower's wire form, byte for byte: `message_to_proto` puts each array into a message of its own,
    that into another, and so on, and copies it each time; here arrays are put where they belong."""
    if not message.has_content() or message.has_error():
        return bytes(message_to_proto(message).SerializeToString())
    wire = WireMessage(metadata=metadata_to_proto(message.metadata))
    wire.content.SetInParent()
    for name, record in message.content.items():
        if not isinstance(record, ArrayRecord):
            wire.content.items.extend(recorddict_to_proto(RecordDict({name: record})).items)
            continue
        arrays = wire.content.items.add(key=name).array_record
        arrays.SetInParent()  # where there is no array, too
        for key, array in record.items():
            found = arrays.items.add(key=key).value
            found.dtype, found.stype, found.data = array.dtype, array.stype, array.data
            found.shape.extend(array.shape)
    return bytes(wire.SerializeToString())


def off_the_wire(data: bytes) -> Message:
    """Inverse of `on_the_wire`."""
    return message_from_proto(WireMessage.FromString(data))
