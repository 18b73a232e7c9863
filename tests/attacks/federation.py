"""A small real federation for attacks: real sites, and a coordinator whose signing key the attacker holds.

`Federation` speaks to `Site.handle` with signed envelopes of its own making, so that an attack may send what an honest
coordinator never would; `coordinator()` gives the honest one over the in-process grid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.app import Message as FlowerMessage

from confide.clients.app import make_client_app
from confide.clients.site import Site
from confide.clients.store import ModelState, SiteStore
from confide.config import load_experiment
from confide.privacy.audit.log import CHECKPOINT_SUFFIX, LOG_SUFFIX
from confide.privacy.sealing import Payload, make_profile
from confide.privacy.sealing.lattice import pack_residues
from confide.privacy.sealing.transcript import transcript
from confide.protocol import messages as m
from confide.protocol.envelope import EVERYBODY, Address, Envelope, Header, chunk_digests, seal_envelope
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.sightings import watchers_of
from confide.server.coordinator import Coordinator
from confide.simulations.engines.grid import NODE_CONFIG_SITE, LocalGrid
from confide.simulations.sources import load_sources
from confide.simulations.world import World
from tests.support import experiment_tree, write_people

Chunks = tuple[bytes, ...]
CHECKPOINT = "1:" + "0" * 64


@dataclass(frozen=True)
class Sum:
    """A round's sum as the coordinator holds it."""

    reference: m.SumReference
    chunks: Chunks

    def changed(self, *, chunks: Chunks | None = None, **fields: Any) -> Sum:
        """The same with something else in it; nothing is validated, as an attacker would not."""
        data = self.chunks if chunks is None else chunks
        return Sum(self.reference.model_copy(update={"chunks": len(data), **fields}), data)


def header_of(envelope: Envelope) -> Header:
    """What a message says about itself, unverified."""
    return Header.model_validate_json(envelope.header)


def is_refusal(envelope: Envelope) -> bool:
    """Did the site say no?"""
    return header_of(envelope).type == m.Refusal.TYPE


def refusal_of(envelope: Envelope) -> m.Refusal:
    """What the site says no with; fails where it said yes."""
    assert is_refusal(envelope), f"the site answered with a {header_of(envelope).type}"
    return m.Refusal.model_validate_json(envelope.body)


class Federation:
    """The sites of one run, and every power of a coordinator.

    Args:
        folder: Where all files lie.
        people: How the table is made, see `people_table`.
        ledgers: Where ledgers and site keys lie, if an earlier federation left them.
        sections: Of the experiment; the profile is `sealed` unless they say otherwise.
    """

    def __init__(
        self,
        folder: Path,
        people: Mapping[str, Any] | None = None,
        ledgers: Path | None = None,
        **sections: dict[str, Any],
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        tree = experiment_tree(str(write_people(folder, **(people or {}))), sealing={"profile": "sealed"})
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        sources = load_sources(load_experiment(tree, ()), folder)
        self.world = World(sources, folder / "sites", ledgers or folder / "ledgers", folder / "logs")
        self.manifest: Manifest = self.world.manifest
        self.weights: bytes = self.world.initial.astype("<f4").tobytes()
        self.joined: dict[str, Envelope] = {}
        self.made: Envelope | None = None
        self.digests: dict[str, dict[str, str]] = {}
        self.maker = ""
        self.key_epoch = 0
        self.participants: tuple[str, ...] = ()
        #: Storage keys as they were before the sites destroyed them, so that a test can look at the end of a run.
        self._kept: dict[str, bytes] = {}

    @property
    def sites(self) -> dict[str, Site]:
        """The sites by name."""
        return self.world.sites

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sites, sorted."""
        return tuple(sorted(self.world.sites))

    # --- the attacker's pen ---------------------------------------------------------------------------------------

    def address(self, step: str, round_: int, manifest: Manifest | None = None, *, attempt: int = 0) -> Address:
        """Where in the run a message belongs."""
        of = manifest or self.manifest
        return Address(
            federation=of.federation, roster_version=of.roster_version, run=of.run, manifest=of.digest,
            key_epoch=0 if step in ("join", "end") else self.key_epoch, round=round_, step=step, attempt=attempt,
        )  # fmt: skip

    def sign(
        self,
        step: str,
        round_: int,
        recipient: str,
        message: m.Message,
        chunks: Chunks = (),
        *,
        identity: Identity | None = None,
        address: Address | None = None,
        request: str = "",
        manifest: Manifest | None = None,
        checkpoint: str = CHECKPOINT,
    ) -> Envelope:
        """A message under the coordinator's key, or under `identity`'s."""
        return seal_envelope(
            identity or self.world.coordinator,
            address or self.address(step, round_, manifest),
            recipient=recipient,
            type_=message.TYPE,
            body=message.to_bytes(),
            checkpoint=checkpoint,
            chunks=chunks,
            request=request,
        )

    def ask(
        self, site: str, step: str, round_: int, message: m.Message, chunks: Chunks = (), *, attempt: int = 0
    ) -> Envelope:
        """Send a request of the attacker's making; the site's answer, which may be a refusal."""
        recipient, place = EVERYBODY if step == "join" else site, self.address(step, round_, attempt=attempt)
        return self.sites[site].handle(step, self.sign(step, round_, recipient, message, chunks, address=place))

    # --- the steps of an honest run -------------------------------------------------------------------------------

    def join(self, sites: Sequence[str] | None = None, manifest: Manifest | None = None) -> dict[str, Envelope]:
        """Every site's answer to the invitation."""
        of = manifest or self.manifest
        request = self.sign("join", 0, EVERYBODY, m.JoinRequest(), (of.to_bytes(), self.weights), manifest=of)
        return {s: self.sites[s].handle("join", request) for s in sites or self.names}

    def agree(self, sites: Sequence[str] | None = None) -> Federation:
        """Join and agree on keys."""
        self.participants = tuple(sites or self.names)
        self.joined = self.join(self.participants)
        assert not any(map(is_refusal, self.joined.values()))
        self.maker = self.participants[0]
        self.made = self.ask(self.maker, "secret", 0, m.SecretRequest(statements=self.statements()))
        for site in self.participants:
            assert not is_refusal(self.hand_over(site))
        return self

    def statements(self) -> tuple[m.Statement, ...]:
        """The participants' signed `join` replies."""
        return tuple(m.Statement.of(s, self.joined[s]) for s in self.participants)

    def hand_over(self, site: str, **changes: Any) -> Envelope:
        """Pass the wrapped run secret on to a site."""
        assert self.made is not None
        fields: dict[str, Any] = {
            "statements": self.statements(),
            "made": m.Statement.of(self.maker, self.made),
            "wraps": chunk_digests(self.made.chunks),
            "wrapped": self.made.chunks[self.participants.index(site)],
            "round": 0,
        } | changes
        seen = tuple(
            c for w in watchers_of(self.manifest, site) if w in self.participants for c in self.joined[w].chunks
        )
        body = m.KeysRequest(statements=fields["statements"], made=fields["made"], wraps=fields["wraps"])
        return self.ask(site, "keys", fields["round"], body, (fields["wrapped"], *fields.get("seen", seen)))

    def train(self, round_: int, *sums: Sum, sites: Sequence[str] | None = None) -> dict[str, Envelope]:
        """Every site's commitment for a round, or its refusal."""
        body = m.TrainRequest(sums=tuple(s.reference for s in sums))
        chunks = tuple(c for s in sums for c in s.chunks)
        return {s: self.ask(s, "train", round_, body, chunks) for s in sites or self.participants}

    def seal_request(self, cohort: Sequence[str], committed: Mapping[str, Envelope]) -> m.SealRequest:
        """The request to seal for a cohort."""
        return m.SealRequest(cohort=tuple(cohort), statements=tuple(m.Statement.of(s, committed[s]) for s in cohort))

    def seal(
        self,
        round_: int,
        committed: Mapping[str, Envelope],
        cohort: Sequence[str] | None = None,
        *,
        attempt: int = 0,
    ) -> dict[str, Envelope]:
        """Every cohort member's payload, or its refusal."""
        members = tuple(sorted(cohort or committed))
        chosen = {s: committed[s] for s in members}
        self.digests[self.transcript(round_, chosen, attempt)] = {s: e.digest for s, e in chosen.items()}
        body = self.seal_request(members, committed)
        return {s: self.ask(s, "seal", round_, body, attempt=attempt) for s in members}

    def unlock(self, round_: int, sealed: Mapping[str, Envelope], *, attempt: int = 0) -> dict[str, Envelope]:
        """Every cohort member's seed for an attempt, or its refusal."""
        body = m.UnlockRequest(statements=tuple(m.Statement.of(s, e) for s, e in sorted(sealed.items())))
        return {s: self.ask(s, "unlock", round_, body, attempt=attempt) for s in sorted(sealed)}

    def add(
        self,
        round_: int,
        sealed: Mapping[str, Envelope],
        *,
        cohort: Sequence[str] | None = None,
        unlocked: Mapping[str, Envelope] | None = None,
        attempt: int = 0,
    ) -> Sum:
        """Add the payloads; `cohort` is what the sum claims to be over."""
        gather = self.manifest.single_updates
        accumulator = make_profile(self.manifest.sealing, len(self.manifest.members), gather=gather).accumulator(
            self.manifest.vector_size(round_)
        )
        replies = {s: m.SealReply.model_validate_json(e.body) for s, e in sealed.items()}
        for site, envelope in sealed.items():
            accumulator.add(Payload(envelope.chunks, tuple(int(tag, 16) for tag in replies[site].tags)))
        total = accumulator.total()
        members, bound = tuple(sorted(cohort or sealed)), next(iter(replies.values())).transcript
        digests = self.digests.get(bound, {})
        reference = m.SumReference(
            round=round_, cohort=members, statements=tuple(digests.get(s, "00" * 32) for s in members),
            transcript=bound, chunks=len(total.chunks), tags=tuple(f"{tag:x}" for tag in total.tags), attempt=attempt,
            unlocked=tuple(m.Statement.of(s, e) for s, e in sorted((unlocked or {}).items())),
            sealed=tuple(m.Statement.of(s, e) for s, e in sealed.items()) if gather else (),
        )  # fmt: skip
        return Sum(reference, total.chunks)

    def round(self, round_: int, *sums: Sum) -> Sum:
        """A whole honest round."""
        return self.add(round_, self.seal(round_, self.train(round_, *sums)))

    def transcript(self, round_: int, committed: Mapping[str, Envelope], attempt: int = 0) -> str:
        """X of a round over these commitments."""
        of, digests = self.manifest, {s: e.digest for s, e in committed.items()}
        return transcript(of.digest, of.roster_version, self.key_epoch, round_, digests, attempt)

    def release_request(self, *sums: Sum, ended: Mapping[str, Envelope] | None = None) -> m.ReleaseRequest:
        """Ask for the model, showing the replies of the evaluation round where there are any."""
        statements = tuple(m.Statement.of(s, e) for s, e in (ended or {}).items())
        return m.ReleaseRequest(sums=tuple(s.reference for s in sums), statements=statements)

    def finish(self, first: Sum) -> tuple[Sum, dict[str, Envelope]]:
        """All rounds after the first; the last sum, and the replies of the evaluation round."""
        total, committed = first, dict[str, Envelope]()
        for round_ in range(2, self.manifest.rounds + 2):
            committed = self.train(round_, total)
            total = self.add(round_, self.seal(round_, committed))
        return total, committed

    # --- looking, and restarting ----------------------------------------------------------------------------------

    def model(self, site: str) -> ModelState:
        """The model that a site holds, or held when its keys were destroyed."""
        self._keep_storage_keys()
        return self.sites[site]._store.model(self.manifest.run, self._kept[site])

    def _keep_storage_keys(self) -> None:
        for name, site in self.sites.items():
            run = site._runs.get(self.manifest.run)
            if run is not None and not run.keys.destroyed:
                # The first one counts: a site restarted without a vault has a new key, and nothing that it opens.
                self._kept.setdefault(name, run.keys.storage)

    def models(self) -> set[bytes]:
        """Every distinct model among the participants."""
        return {self.model(s).weights.tobytes() for s in self.participants or self.names}

    def charges(self, site: str, round_: int) -> dict[str, int]:
        """Steps that a round still costs at a site, by charge."""
        ledger = self.sites[site].ledger
        prefix = f"{self.manifest.run}/{round_}/"
        reserved = {c: e.steps for c, e in ledger._reserved.items() if c.startswith(prefix)}
        return reserved | {c: e.steps for c, e in ledger._settled.items() if c in reserved}

    def restart(self, site: str) -> Site:
        """End a site's process and start another one on the same files."""
        old = self.sites[site]
        path = Path(old._store._db.execute("PRAGMA database_list").fetchone()[2])
        old._store.close()
        parts = {
            name: getattr(old, name) if hasattr(old, name) else getattr(old, f"_{name}")
            for name in inspect.signature(Site.__init__).parameters
            if name not in ("self", "store")
        }
        self.world.sites[site] = Site(**parts, store=SiteStore(path))
        return self.world.sites[site]

    def exported(self, party: str) -> bytes:
        """What travels of a party's log, as it is now: its entries and its checkpoint."""
        self.world.export()
        path = self.folder / "logs" / f"{party}{LOG_SUFFIX}"
        return path.read_bytes() + path.with_suffix(CHECKPOINT_SUFFIX).read_bytes()

    def set_policy(self, site: str, **changes: Any) -> None:
        """What one site's operator allows."""
        self.sites[site].policy = replace(self.sites[site].policy, **changes)

    # --- the honest coordinator -----------------------------------------------------------------------------------

    def grid(
        self,
        drop: Callable[[FlowerMessage, str], bool] = lambda _m, _s: False,
        tamper: Callable[[str, Envelope, Envelope], Envelope | None] | None = None,
    ) -> LocalGrid:
        """The in-process grid; `tamper(site, request, reply)` stands between a site and the wire."""

        def find(context: Context) -> Any:
            self._keep_storage_keys()
            site = self.sites[str(context.node_config[NODE_CONFIG_SITE])]
            return site if tamper is None else _Tampered(site, tamper)

        return LocalGrid(make_client_app(find), self.sites, drop=drop)

    def coordinator(self, grid: LocalGrid | None = None, **options: Any) -> Coordinator:
        """The real coordinator."""
        world = self.world
        return Coordinator(grid or self.grid(), world.coordinator, world.manifest, world.initial, world.log, **options)


class _Tampered:
    """A site whose replies somebody changes."""

    def __init__(self, site: Site, tamper: Callable[[str, Envelope, Envelope], Envelope | None]) -> None:
        self._site, self._tamper = site, tamper
        self.policy, self.note_reply = site.policy, site.note_reply

    def handle(self, step: str, request: Envelope) -> Envelope:
        changed = self._tamper(self._site.name, request, self._site.handle(step, request))
        if changed is None:
            raise OSError("the reply was lost")
        return changed


def resign(site: Site, envelope: Envelope, *, chunks: Chunks | None = None, **body: Any) -> Envelope:
    """A site's own reply with other contents, under the site's own key: what a hostile member can send."""
    header = header_of(envelope)
    kinds = {kind.TYPE: kind for kind in m.Message.__subclasses__()}
    message = kinds[header.type].model_validate_json(envelope.body).model_copy(update=body)
    return seal_envelope(
        site.identity,
        Address(**{name: getattr(header, name) for name in Address.model_fields}),
        recipient=header.recipient,
        type_=header.type,
        body=message.to_bytes(),
        checkpoint=header.checkpoint,
        chunks=envelope.chunks if chunks is None else chunks,
        request=header.request,
    )


@contextmanager
def open_federation(folder: Path, **sections: Any) -> Iterator[Federation]:
    """A federation whose files are released at the end."""
    federation = Federation(folder, **sections)
    try:
        yield federation
    finally:
        federation.world.close()


def forged_ciphertext(first: Sequence[int], second: Sequence[int]) -> bytes:
    """Bytes of a summed ciphertext with chosen polynomials (coefficients below q): anybody can write them."""
    return pack_residues(np.array([*first, *second], dtype=np.uint64))
