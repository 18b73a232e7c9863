"""Signed requests out, verified replies in: the coordinator's side of the wire.

A reply counts only if it is signed by the roster's key of the site it was asked of, answers this very request, and is
of the type asked for. Anything else is a refusal by that site, whatever it meant.

Requests are stored before they are sent, and replies as they arrive: where an earlier process of the run has come by
here, its requests go out again, byte for byte, to those whose replies it did not keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from confide.errors import PeerError, SealingError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.protocol import messages as m
from confide.protocol.envelope import (
    MAX_REPLY_BODY,
    Address,
    Envelope,
    Header,
    chunk_digests,
    expect,
    seal_envelope,
    verify,
)
from confide.protocol.flower import from_records, to_records
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.server.journal import Journal

__all__ = ["Exchange", "Interrupted"]

#: What came for a request: an unverified envelope, or why there is none.
_Arrived = Envelope | SealingError | PeerError
#: What a site's own error codes mean (`confide.clients.app`); all others are Flower's.
_FAULTS = {200: "the request was not authentic there", 201: "a fault at the site"}
_POLL_SECONDS = 0.2

_MESSAGE_TYPES = {
    "join": "query.join",
    "secret": "query.secret",
    "keys": "query.keys",
    "train": "train.train",
    "seal": "train.seal",
    "unlock": "train.unlock",
    "release": "query.release",
    "end": "query.end",
}


class Interrupted(Exception):
    """Whoever waits is to end now, and nothing is wrong: the run is as it would be after a kill."""


class Exchange:
    """One run's messages.

    Args:
        grid: Flower's way to the nodes.
        identity: The coordinator's name and signing key.
        manifest: The run.
        log: The coordinator's log; its state stands in every request, and refusals are noted in it.
        journal: The run in the coordinator's store.
        timeout: Seconds to wait for replies; None waits for ever.
        between: Called again and again while replies are waited for; what it raises ends the waiting. What has come by
            then is kept.
    """

    def __init__(
        self,
        grid: Grid,
        identity: Identity,
        manifest: Manifest,
        log: Log,
        journal: Journal,
        timeout: float | None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._between = between
        self._grid, self._identity, self._manifest, self.log, self._timeout = grid, identity, manifest, log, timeout
        self.journal, self.refusals = journal, journal.refusals()
        #: Which node each participating site lives on.
        self.nodes: dict[str, int] = {}
        #: Which run secret is in force.
        self.key_epoch = 0
        #: Digests of chunks that were signed just now, by identity: most requests of a step carry the same ones.
        self._digests: dict[int, tuple[bytes, str]] = {}

    def ask(
        self, place: Address, make: Callable[[], Mapping[str, Envelope]], kind: type[m._M]
    ) -> dict[str, tuple[Envelope, m._M]]:
        """Send a signed request to each site; authentic, positive replies come back by site, and are kept.

        Args:
            place: The step.
            make: Signs the requests, where none was stored for the step.
            kind: The reply's type.
        """
        kept = self.journal.replies(place)
        found = {s: (e, m.decode(kind, kind.TYPE, e.body)) for s, e in kept.items()}
        if not self.journal.closed(place):
            for site, envelope, reply in self.each(place, make, kind, skip=frozenset(kept)):
                self.journal.put_reply(place, site, envelope)
                found[site] = envelope, reply
        return {site: found[site] for site in sorted(found)}

    def each(
        self,
        place: Address,
        make: Callable[[], Mapping[str, Envelope]],
        kind: type[m._M],
        skip: frozenset[str] = frozenset(),
    ) -> Iterator[tuple[str, Envelope, m._M]]:
        """One reply at a time as they arrive: (site, envelope, reply). None is kept here."""
        requests = self.journal.requests(place)
        if not requests and (requests := dict(make())):
            self._digests.clear()
            self.journal.put_requests(place, requests)
        by_node = {self.nodes[s]: (s, request) for s, request in requests.items() if s in self.nodes and s not in skip}
        del requests
        silent = {site for site, _ in by_node.values()}
        for arrived in self.send(place.step, {n: r for n, (_, r) in by_node.items()}):
            node, envelope = arrived
            if node not in by_node:
                continue  # nobody asked it
            site, request = by_node[node]
            silent.discard(site)
            reply = self._reply(place, site, request, envelope, kind)
            if reply is not None and isinstance(envelope, Envelope):
                yield site, envelope, reply
            del arrived, envelope, reply  # before the next one is asked for
        for site in sorted(silent):
            self._failed(place, site, "no answer in time")

    def _reply(self, place: Address, site: str, request: Envelope, envelope: _Arrived, kind: type[m._M]) -> m._M | None:
        """What a site says, if it is authentic and not a refusal; else that is noted."""
        member = self._manifest.member(site)
        if member is None:
            return None
        if isinstance(envelope, PeerError):
            self._failed(place, site, envelope.what)
            return None
        try:
            if isinstance(envelope, SealingError):
                raise envelope
            header = verify(envelope, bytes.fromhex(member.public_key), sender=site, max_body=MAX_REPLY_BODY)
            return self.accept(header, envelope, request, place, site, kind)
        except SealingError as error:
            self.reject(place, site, error)
            return None

    def _failed(self, place: Address, site: str, reason: str) -> None:
        """Note that a site gave no answer. Why is known there only."""
        self.log.append(
            audit.Fault(run=self._manifest.run, round=place.round, step=place.step, party=site, reason=reason)
        )

    def reject(self, place: Address, site: str, error: SealingError) -> None:
        """Note that what came from a site counts as a refusal, and why."""
        self._refused(site, m.Refusal(kind="sealing", reason=error.what))
        self.log.append(
            audit.Rejected(run=self._manifest.run, round=place.round, step=place.step, party=site, reason=error.what)
        )

    def accept(
        self,
        header: Header,
        envelope: Envelope,
        request: Envelope,
        place: Address,
        site: str,
        kind: type[m._M],
    ) -> m._M | None:
        """The reply's body; None where it is a refusal, which is noted.

        Raises:
            SealingError: It does not answer this request at this place.
        """
        expect(header, place, sender=site, recipient=self._identity.name, request=request.digest)
        if header.type == m.Refusal.TYPE:
            refusal = m.decode(m.Refusal, header.type, envelope.body)
            self._refused(site, refusal)
            self.log.append(
                audit.Refused(
                    run=self._manifest.run, round=place.round, step=place.step, party=site, reason=refusal.reason
                )
            )
            return None
        return m.decode(kind, header.type, envelope.body)

    def _refused(self, site: str, refusal: m.Refusal) -> None:
        self.refusals[site] = refusal
        self.journal.refuse(site, refusal)

    def send(self, step: str, requests: Mapping[int, Envelope]) -> Iterator[tuple[int, _Arrived]]:
        """Send each node its request; (node, unverified reply, or why it is none) as they arrive, one at a time.

        Flower's own `send_and_receive` would hold all replies at once.
        """
        # A record object of its own for each node: nodes must not share what they may change.
        waiting = {
            identifier: node
            for node, request in requests.items()
            for identifier in self._grid.push_messages(
                [self._grid.create_message(to_records(request), _MESSAGE_TYPES[step], node, group_id=step)]
            )
        }
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while waiting:
            self._between()
            for identifier, node in list(waiting.items()):
                replies = list(self._grid.pull_messages([identifier]))
                if replies:
                    waiting.pop(identifier, None)
                while replies:
                    yield _parse(replies.pop(), node)
            if waiting and deadline is not None and time.monotonic() > deadline:
                return
            if waiting:
                time.sleep(_POLL_SECONDS)

    def sign(self, place: Address, site: str, body: m.Message, chunks: tuple[bytes, ...] = ()) -> Envelope:
        """A request to a site."""
        return seal_envelope(
            self._identity,
            place,
            recipient=site,
            type_=body.TYPE,
            body=body.to_bytes(),
            checkpoint=self.log.checkpoint().short,
            chunks=chunks,
            digests=[self._digest(chunk) for chunk in chunks],
        )

    def _digest(self, chunk: bytes) -> str:
        known = self._digests.get(id(chunk))
        if known is None or known[0] is not chunk:
            (digest,) = chunk_digests([chunk])
            known = self._digests[id(chunk)] = (chunk, digest)
        return known[1]

    def address(self, step: str, round_: int = 0, *, attempt: int = 0) -> Address:
        """Where in the run a message of this step belongs."""
        manifest = self._manifest
        return Address(
            federation=manifest.federation,
            roster_version=manifest.roster_version,
            run=manifest.run,
            manifest=manifest.digest,
            key_epoch=0 if step in ("join", "end") else self.key_epoch,
            round=round_,
            step=step,
            attempt=attempt,
        )


def _parse(reply: Message, asked: int) -> tuple[int, _Arrived]:
    """(node, unverified envelope, or why there is none). An error may be the link's own: it is about who was asked."""
    if reply.has_error():
        reason = _FAULTS.get(reply.error.code, "the node cannot be reached")
        return asked, PeerError(reason)
    try:
        return reply.metadata.src_node_id, from_records(reply.content)
    except SealingError as error:
        return reply.metadata.src_node_id, error
