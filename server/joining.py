"""Which site lives on which node, and who takes part: the coordinator's invitation and the sites' signed answers to it.

Nodes say nothing of themselves that is believed: a member is found by its signature. Sites answer the same invitation
the same way, so that members are found again after a restart, and on another node.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.audit import records as audit
from confide.privacy.sealing.wrapping import usable
from confide.protocol import messages as m
from confide.protocol.envelope import EVERYBODY, MAX_REPLY_BODY, Envelope, Header, verify
from confide.protocol.manifest import Manifest
from confide.protocol.sightings import unpack_sightings
from confide.server.exchange import Exchange
from confide.server.journal import Journal
from confide.server.software import software_versions

__all__ = ["Directory", "Members"]


@runtime_checkable
class Directory(Protocol):
    """A grid that knows where sites live."""

    def node_of(self, site: str) -> int | None:
        """The node of a site; None for a site that it does not know."""


class Members:
    """The sites of one run that have joined.

    Args:
        grid: Flower's way to the nodes.
        exchange: The run's messages; it is told which node each site lives on.
        journal: Where the answers lie.
        manifest: The run.
        initial_model: The first weights.
    """

    def __init__(
        self, grid: Grid, exchange: Exchange, journal: Journal, manifest: Manifest, initial_model: NDArray[np.float32]
    ) -> None:
        self._grid, self._exchange, self._journal = grid, exchange, journal
        self._manifest, self._initial = manifest, initial_model
        #: Nodes that were asked which site lives there.
        self._asked: set[int] = set()
        #: Signed `join` replies by site.
        self.joined: dict[str, Envelope] = {}

    def invite(self, only: Collection[str] | None = None) -> int:
        """Ask everybody, or these sites, the first time; how many have joined, in earlier processes too."""
        self.joined = self._journal.replies(self._exchange.address("join"))
        self.find(only)
        return len(self.joined)

    def close(self) -> None:
        """Nobody else joins."""
        self._journal.close(self._exchange.address("join"))

    def find(self, only: Collection[str] | None = None) -> None:
        """Ask which site lives there: the nodes that were not asked yet (as long as a member is missing: all unknown
        ones), or those where one of `only` may live. Whoever joins after keys were agreed on is in no cohort."""
        found = self._exchange.nodes
        new = self._unknown_nodes() if only is None else self._nodes_of(only)
        if not new:
            return
        request, place = self._invitation(), self._exchange.address("join")
        open_, joined = not self._journal.closed(place), self.joined
        known = {envelope.digest: site for site, envelope in joined.items()}
        self._asked.update(new)
        for node, envelope in self._exchange.send("join", dict.fromkeys(new, request)):
            if not isinstance(envelope, Envelope):
                continue  # nobody knows yet which site lives on that node
            site = known.get(envelope.digest)
            if site is None and open_ and (site := self._who_joins(envelope, request)) is not None:
                self._journal.put_reply(place, site, envelope)
                joined[site] = envelope
            if site is not None:
                found[site] = node

    def _unknown_nodes(self) -> list[int]:
        found = self._exchange.nodes
        lost = not self._journal.applied().keys() <= found.keys()
        nodes = [node for node in self._grid.get_node_ids() if node not in found.values()]
        return [node for node in nodes if lost or node not in self._asked]

    def _nodes_of(self, sites: Collection[str]) -> list[int]:
        """Where a grid says that sites live (only a hint: members are known by their signatures), those nodes."""
        missing = [site for site in sites if site not in self._exchange.nodes]
        if missing and isinstance(self._grid, Directory):
            return [node for site in missing if (node := self._grid.node_of(site)) is not None]
        return self._unknown_nodes() if missing else []

    def _who_joins(self, envelope: Envelope, request: Envelope) -> str | None:
        """The member whose valid reply to the invitation this is; None where it is nobody's, or a refusal."""
        try:
            sender = json.loads(envelope.header)["sender"]
            member = self._manifest.member(sender)
            if member is None or sender in self.joined:
                return None
            key = bytes.fromhex(member.public_key)
            header = verify(envelope, key, sender=member.site, max_body=MAX_REPLY_BODY)
        except (SealingError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return sender if self._joins(header, envelope, request, sender) else None

    def _invitation(self) -> Envelope:
        """The signed `join` request, the same for everybody and for ever."""
        place = self._exchange.address("join")
        found = self._journal.requests(place).get(EVERYBODY)
        if found is None:
            manifest = self._manifest.to_bytes()
            self._journal.append_once(
                audit.RunCreated(run=self._manifest.run, manifest=manifest.decode(), software=software_versions())
            )
            chunks = (manifest, self._initial.astype("<f4").tobytes())
            found = self._exchange.sign(place, EVERYBODY, m.JoinRequest(), chunks)
            self._journal.put_requests(place, {EVERYBODY: found})
        return found

    def _joins(self, header: Header, envelope: Envelope, request: Envelope, site: str) -> bool:
        """Is this a reply that every other site will accept too? One site's nonsense must not end the run."""
        place = self._exchange.address("join")
        try:
            reply = self._exchange.accept(header, envelope, request, place, site, m.JoinReply)
            if reply is not None and not (len(envelope.chunks) == 1 and usable(bytes.fromhex(reply.ephemeral))):
                raise SealingError("a join reply that no site can use", where=f"site {site}")
            if reply is not None:
                unpack_sightings(envelope.chunks[0])
        except SealingError as error:
            self._exchange.reject(place, site, error)
            return False
        return reply is not None
