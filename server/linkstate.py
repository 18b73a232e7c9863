"""What the link knows of nodes and messages: Flower's state in memory, for a fixed roster. See ADR 15.

Uses Flower's private interfaces, like `link`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping

from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

__all__ = ["RosterState"]

#: Seconds that a node's request for a message is held while there is none: nodes need not ask again and again.
_HOLD = 10.0
#: Seconds that a message waits for a node that was not there yet, before it counts as unavailable.
_PATIENCE = 60.0


class RosterState(InMemoryLinkState):
    """Three things that Flower's own does not do.

    A request for a message waits for one. A node that died without a word and comes back is taken back at once, though
    it still counts as online. What had been handed to a node before that is known, so that it can be handed out again.

    Args:
        keys: The nodes' public keys (PEM) by number; there are no others, ever.
    """

    def __init__(self, keys: Mapping[int, bytes]) -> None:
        super().__init__(NoOpFederationManager(), ObjectStoreFactory().store())
        self._changed = threading.Condition(self.lock)
        self._requests: Counter[int] = Counter()
        self._starts: Counter[int] = Counter()
        self._handed_at: dict[str, int] = {}
        self._closed = False
        for node, key in keys.items():
            self.nodes[node] = NodeInfo(
                node_id=node, owner_aid=NOOP_FLWR_AID, owner_name=NOOP_ACCOUNT_NAME, status=NodeStatus.OFFLINE,
                registered_at=now().isoformat(), public_key=key, online_until=now().timestamp() + _PATIENCE,
            )  # fmt: skip
            self.node_public_key_to_node_id[key] = node
            self.owner_to_node_ids.setdefault(NOOP_FLWR_AID, set()).add(node)

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """A node starts: whatever it was doing before, it no longer is."""
        with self._changed:
            self._starts[node_id] += 1
            self._requests[node_id] += 1
            self._changed.notify_all()
            self.deactivate_node(node_id)
            return bool(super().activate_node(node_id, heartbeat_interval))

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """What there is for a node, as soon as there is some. An older request than its newest may be a dead node's."""
        deadline = time.monotonic() + _HOLD
        with self._changed:
            self._requests[node_id] += 1
            mine = self._requests[node_id]
            if node_id in self.nodes and self.nodes[node_id].status != NodeStatus.ONLINE:
                self.acknowledge_node_heartbeat(node_id, HEARTBEAT_DEFAULT_INTERVAL)
            while mine == self._requests[node_id] and not self._closed:
                found: list[Message] = super().get_message_ins(node_id, limit, run_id=run_id)
                for message in found:
                    self._handed_at[message.metadata.message_id] = self._starts[node_id]
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._changed.wait(left)
        return []

    def store_message_ins(self, message: Message) -> str | None:
        """Keep a message for its node, which may be waiting for it."""
        with self._changed:
            stored: str | None = super().store_message_ins(message)
            self._changed.notify_all()
        return stored

    def lost(self, message_id: str) -> bool:
        """Was the message handed to a node that has started anew since? Whatever is still missing then never comes."""
        with self.lock:
            message = self.message_ins_store.get(message_id)
            if message is None or message_id not in self._handed_at:
                return False
            return self._handed_at[message_id] != self._starts[message.metadata.dst_node_id]

    def reply_to(self, message_id: str) -> str | None:
        """What the reply is called, complete or not."""
        with self.lock:
            found: str | None = self.message_ins_id_to_message_res_id.get(message_id)
            return found

    def hand_out_again(self, message_id: str) -> None:
        """Forget that a message was handed out, and half a reply; its objects must be there again."""
        with self._changed:
            half = self.message_ins_id_to_message_res_id.pop(message_id, None)
            if half is not None:
                self.message_res_store.pop(half, None)
                self.object_store.delete(half)
            self._handed_at.pop(message_id, None)
            self.message_ins_store[message_id].metadata.delivered_at = ""
            self._changed.notify_all()

    def forget(self, message_id: str) -> None:
        """The message is answered."""
        with self.lock:
            self._handed_at.pop(message_id, None)
            self.delete_messages({message_id})

    def close(self) -> None:
        """Let every waiting request go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _cleanup_expired_task_tokens_locked(self) -> None:
        """The one task of a run is the coordinator in this process: it cannot die alone, and sends no heartbeat."""
