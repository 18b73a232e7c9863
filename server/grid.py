"""The Flower `Grid` of a deployed coordinator, over the link in its own process: no polling of a network.

Invariant: what a node says counts as said by the site whose key that node signs with, or not at all. A signed reply
that somebody else's node delivers is dropped: nobody can draw another site's messages to a node of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from pydantic import ValidationError

from confide.errors import PeerError, SealingError
from confide.protocol.envelope import MAX_REPLY_BODY, Header
from confide.protocol.flower import from_records
from confide.server.link import Link

__all__ = ["LinkGrid"]

_POLL_SECONDS = 0.05
_NOT_ITS_OWN = 202  # beside the codes of the sites' own error replies


class LinkGrid(Grid):
    """Opens a run of its own on the link, beside those of others.

    Args:
        link: Already listening.
        bundle: What Flower hands to nodes as the run's app; default: one without code.
    """

    def __init__(self, link: Link, bundle: bytes | None = None) -> None:
        self._link = link
        self._run = link.open_run(bundle)

    def set_run(self, run: Run) -> None:
        """Flower's interface."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's interface."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's interface."""
        return self._link.message(self._run, content, message_type, dst_node_id, group_id, ttl)

    def close(self) -> None:
        """The run is over, or nobody waits for its replies any more."""
        self._link.close_run(self._run)

    def get_node_ids(self) -> list[int]:
        """Nodes that are there now."""
        return self._link.online()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Flower's interface; a message for a node that the link does not know has no name."""
        names = []
        for message in messages:
            try:
                names.append(self._link.push(message))
            except PeerError:
                names.append("")
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that are there in full."""
        found = (self._link.pull(identifier) for identifier in list(message_ids))
        return [self._own(reply) for reply in found if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Flower's interface."""
        waiting = [name for name in self.push_messages(messages) if name]
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            arrived = self.pull_messages(waiting)
            replies += arrived
            answered = {reply.metadata.reply_to_message_id for reply in arrived}
            waiting = [name for name in waiting if name not in answered]
            if waiting:
                time.sleep(_POLL_SECONDS)
        return replies

    def wait_for_nodes(self, number: int, timeout: float, *, all_within: float = 0.0) -> list[int]:
        """Wait until so many nodes are there.

        Args:
            number: The fewest to go on with.
            timeout: Seconds after which fewer are an error.
            all_within: Seconds to wait for the whole roster before fewer do.

        Raises:
            PeerError: They did not come.
        """
        begun = time.monotonic()
        while True:
            online, waited = self.get_node_ids(), time.monotonic() - begun
            if len(online) == len(self._link.sites) or (len(online) >= number and waited >= all_within):
                return online
            if waited >= timeout:
                missing = sorted(site for node, site in self._link.sites.items() if node not in online)
                raise PeerError(f"only {len(online)} of at least {number} nodes came within {timeout:g} s",
                                where="link", hint=f"not there: {', '.join(missing)}")  # fmt: skip
            time.sleep(_POLL_SECONDS)

    def _own(self, reply: Message) -> Message:
        if reply.has_error():
            return reply
        site = self._link.sites.get(reply.metadata.src_node_id)
        try:
            header = from_records(reply.content).header
            if len(header) > MAX_REPLY_BODY:
                return reply
            said = Header.model_validate_json(header).sender
        except (SealingError, ValidationError):
            return reply  # not ours to judge: the exchange rejects it, and notes that
        if said == site:
            return reply
        return Message(Error(code=_NOT_ITS_OWN, reason="signed by another site"), reply_to=reply)
