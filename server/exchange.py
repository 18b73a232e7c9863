"""Signed requests out, verified replies in: the coordinator's side of the wire.

A reply counts only if it is signed by the roster's key of the site it was asked of, answers this very request, and is
of the type asked for. Anything else is a refusal by that site, whatever it meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from confide.errors import SealingError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.protocol import messages as m
from confide.protocol.envelope import Address, Envelope, Header, expect, seal_envelope, verify
from confide.protocol.flower import from_records, to_records
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest

__all__ = ["Exchange"]

_MESSAGE_TYPES = {
    "join": "query.join",
    "secret": "query.secret",
    "keys": "query.keys",
    "train": "train.train",
    "seal": "train.seal",
    "release": "query.release",
}


class Exchange:
    """One run's messages.

    Args:
        grid: Flower's way to the nodes.
        identity: The coordinator's name and signing key.
        manifest: The run.
        log: The coordinator's log; its state stands in every request, and refusals are noted in it.
        timeout: Seconds to wait for replies; None waits for ever.
    """

    def __init__(self, grid: Grid, identity: Identity, manifest: Manifest, log: Log, timeout: float | None) -> None:
        self._grid, self._identity, self._manifest, self.log, self._timeout = grid, identity, manifest, log, timeout
        self.refusals: dict[str, m.Refusal] = {}

    def ask(
        self, step: str, round_: int, nodes: Mapping[str, int], requests: Mapping[str, Envelope], kind: type[m._M]
    ) -> dict[str, tuple[Envelope, m._M]]:
        """Send a signed request to each site; authentic, positive replies come back by site."""
        by_node = {nodes[site]: (site, request) for site, request in requests.items()}
        found: dict[str, tuple[Envelope, m._M]] = {}
        for node, envelope in self.send(step, {n: r for n, (_, r) in by_node.items()}).items():
            site, request = by_node[node]
            member = self._manifest.member(site)
            if member is None:
                continue
            try:
                header = verify(envelope, bytes.fromhex(member.public_key), sender=site)
                reply = self.accept(header, envelope, request, step, round_, site, kind)
            except SealingError as error:
                self.refusals[site] = m.Refusal(kind="sealing", reason=error.what)
                continue
            if reply is not None:
                found[site] = (envelope, reply)
        return found

    def accept(
        self,
        header: Header,
        envelope: Envelope,
        request: Envelope,
        step: str,
        round_: int,
        site: str,
        kind: type[m._M],
    ) -> m._M | None:
        expect(
            header,
            self._address(step, round_),
            sender=site,
            recipient=self._identity.name,
            request=request.digest,
        )
        if header.type == m.Refusal.TYPE:
            refusal = m.decode(m.Refusal, header.type, envelope.body)
            self.refusals[site] = refusal
            self.log.append(
                audit.Refused(run=self._manifest.run, round=round_, step=step, party=site, reason=refusal.reason)
            )
            return None
        return m.decode(kind, header.type, envelope.body)

    def send(self, step: str, requests: Mapping[int, Envelope]) -> dict[int, Envelope]:
        outgoing: Sequence[Message] = [
            # A record object of its own for each node: nodes must not share what they may change.
            self._grid.create_message(to_records(request), _MESSAGE_TYPES[step], node, group_id=str(step))
            for node, request in requests.items()
        ]
        found = {}
        for reply in self._grid.send_and_receive(outgoing, timeout=self._timeout):
            if reply.has_error():
                continue
            try:
                found[reply.metadata.src_node_id] = from_records(reply.content)
            except SealingError:
                continue
        return found

    def sign(self, step: str, round_: int, site: str, body: m.Message, chunks: tuple[bytes, ...] = ()) -> Envelope:
        return seal_envelope(
            self._identity,
            self._address(step, round_),
            recipient=site,
            type_=body.TYPE,
            body=body.to_bytes(),
            checkpoint=self.log.checkpoint().short,
            chunks=chunks,
        )

    def _address(self, step: str, round_: int) -> Address:
        manifest = self._manifest
        return Address(
            federation=manifest.federation,
            roster_version=manifest.roster_version,
            run=manifest.run,
            manifest=manifest.digest,
            key_epoch=0,
            round=round_,
            step=step,
        )
