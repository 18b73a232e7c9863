"""What a coalition holds, and the most that can be made of it.

`Recorded` is a real run of which everything is kept: all envelopes, copies of all disks after every step, all memories.
`Holdings` is the part of it that one coalition has. `Attacker` is the attack, written once: it is given holdings and
nothing else, so what it reaches with them is what they expose.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from confide.clients.ranges import segments
from confide.clients.site import Site
from confide.clients.store import ModelState, SiteStore
from confide.errors import SealingError
from confide.privacy.atrest import open_box
from confide.privacy.digest import framed
from confide.privacy.sealing import CkksProfile, MaskedProfile, OpenProfile, Payload, make_profile
from confide.privacy.sealing import ckks as ckks_module
from confide.privacy.sealing.bfv import BfvLock
from confide.privacy.sealing.encoding import Encoder
from confide.privacy.sealing.lattice import FRESH_BYTES
from confide.privacy.sealing.masks import PairKeys, remove_own
from confide.privacy.sealing.slots import MAC_KEY_BYTES
from confide.privacy.sealing.vault import Vault, open_vault_file
from confide.privacy.sealing.wrapping import unwrap
from confide.protocol import messages as m
from confide.protocol.envelope import EVERYBODY, Envelope, Header
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from tests.attacks.federation import Federation, header_of
from tests.attacks.forging import lattice_of, packing_of, sealed

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
Disk = dict[str, bytes]
PASSPHRASE = "four words nobody guesses"
_KINDS: dict[str, type[m.Message]] = {kind.TYPE: kind for kind in m.Message.__subclasses__()}


@dataclass(frozen=True)
class Seen:
    """A request and the answer to it, as they crossed the wire."""

    site: str
    request: Envelope
    reply: Envelope


@dataclass
class Holdings:
    """What a coalition has.

    Attributes:
        members: Sites of the coalition.
        traffic: Messages that it saw.
        memories: Bytes that lay in its members' memory while the run went on.
        disks: Copies of disks, in the order they were made.
        long_term: Signing and site keys.
        passphrase: Of vaults on those disks, if it has it.
        vectors: Its members' own updates, by site and round.
        pen: The coordinator's signing key, to send requests with.
    """

    members: tuple[str, ...] = ()
    traffic: list[Seen] = field(default_factory=list)
    memories: list[bytes] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    long_term: list[bytes] = field(default_factory=list)
    passphrase: str | None = None
    vectors: dict[tuple[str, int], Floats] = field(default_factory=dict)
    pen: Identity | None = None


class Recorded(Federation):
    """A federation of which everything is kept."""

    def __init__(self, folder: Path, *, vaults: bool = True, **sections: Any) -> None:
        super().__init__(folder, **sections)
        self.traffic: list[Seen] = []
        self.disks: list[Disk] = []
        self.memories: dict[str, list[bytes]] = {}
        self.vectors: dict[tuple[str, int], Floats] = {}
        self._interned: dict[bytes, bytes] = {}
        for name, site in self.sites.items():
            site._vault = Vault(folder / "sites" / name / "vault", PASSPHRASE) if vaults else None

    def ask(
        self, site: str, step: str, round_: int, message: m.Message, chunks: tuple[bytes, ...] = (), *, attempt: int = 0
    ) -> Envelope:
        """As in the base class, and kept."""
        recipient, place = EVERYBODY if step == "join" else site, self.address(step, round_, attempt=attempt)
        request = self.sign(step, round_, recipient, message, chunks, address=place)
        reply = self.sites[site].handle(step, request)
        self.traffic.append(Seen(site, request, reply))
        if step == "train" and (pending := self.sites[site]._runs[self.manifest.run].pending) is not None:
            self.vectors[site, round_] = pending[1].copy()
        return reply

    def join(self, sites: Sequence[str] | None = None, manifest: Manifest | None = None) -> dict[str, Envelope]:
        """As in the base class, and kept."""
        of = manifest or self.manifest
        chunks = (of.to_bytes(), self.weights)
        return {s: self.ask(s, "join", 0, m.JoinRequest(), chunks) for s in sites or self.names}

    def agree(self, sites: Sequence[str] | None = None) -> Recorded:
        """Join, and agree on keys where the profile has any."""
        if self.manifest.sealing.profile == "open":
            self.participants = tuple(sites or self.names)
            self.joined = self.join(self.participants)
        else:
            super().agree(sites)
        self.keep()
        return self

    def keep(self) -> None:
        """Copy every disk and every memory."""
        disk = {}
        self.world.export()
        for path in sorted(p for part in ("sites", "ledgers", "logs") for p in (self.folder / part).rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                disk[str(path.relative_to(self.folder))] = self._interned.setdefault(
                    hashlib.sha256(data).digest(), data
                )
        self.disks.append(disk)
        for name in self.names:
            self.memories.setdefault(name, []).extend(memory_of(self.sites[name], self.manifest))

    def long_term_keys(self) -> list[bytes]:
        """Signing keys of everybody, and site keys."""
        found = [self.world.coordinator.key.private_bytes_raw()]
        for site in self.sites.values():
            found += [site.identity.key.private_bytes_raw(), site._key.secret]
        return found

    def held_by(self, *members: str, coordinator: bool = False) -> Holdings:
        """What these sites hold, with the coordinator or without."""
        return Holdings(
            members=members,
            traffic=[s for s in self.traffic if coordinator or s.site in members],
            memories=[blob for name in members for blob in self.memories[name]],
            vectors={place: v for place, v in self.vectors.items() if place[0] in members},
            pen=self.world.coordinator if coordinator else None,
        )

    def held_by_outsider(self) -> Holdings:
        """Every envelope, every disk after every step and at the end, every long-term key; the run's keys are gone."""
        return Holdings(
            traffic=list(self.traffic), disks=list(self.disks), long_term=self.long_term_keys(),
            pen=self.world.coordinator,
        )  # fmt: skip

    def true_keys(self) -> list[bytes]:
        """Every key there ever was, so that a search for keys in a haystack can be done by looking for them."""
        return sorted({blob for blobs in self.memories.values() for blob in blobs})

    def restore(self, name: str, disk: Disk) -> Site:
        """Start a site's process on a restored copy of its disk."""
        old = self.sites[name]
        parts = {
            key: getattr(old, key) if hasattr(old, key) else getattr(old, f"_{key}")
            for key in inspect.signature(Site.__init__).parameters
            if key not in ("self", "store")
        }
        old._store.close()
        folder = self.folder / "sites" / name
        for path in folder.glob("state.db*"):
            path.unlink()
        for path, data in disk.items():
            if path.startswith(f"sites/{name}/state.db"):
                (self.folder / path).write_bytes(data)
        self.world.sites[name] = Site(**parts, store=SiteStore(folder / "state.db"))
        return self.world.sites[name]


def memory_of(site: Site, manifest: Manifest) -> list[bytes]:
    """The run's keys as they lie in a site's memory."""
    run = site._runs.get(manifest.run)
    if run is None or run.keys.destroyed:
        return []
    found = [run.keys._private, run.keys._storage]
    session = run.keys._session
    for name in ("_mac_key", "_own_key"):
        found.append(getattr(session, name, b""))
    key = getattr(getattr(session, "_lock", None), "_key", b"")
    if session is not None and getattr(session, "_mac_key", b""):
        found.append(key + session._mac_key)  # type: ignore[attr-defined]  # the whole run secret
    return [blob for blob in found if blob]


class Attacker:
    """The attack. It knows what is public (the manifest) and what it was given.

    Args:
        manifest: The run.
        held: What the coalition holds.
        true_keys: All keys that ever were. They are only looked for in what is held: a window of 32 bytes opens
            something only if it is such a key, so this is the same as to try every window of every file.
    """

    def __init__(self, manifest: Manifest, held: Holdings, true_keys: Iterable[bytes]) -> None:
        self.manifest, self.held = manifest, held
        self.profile = make_profile(manifest.sealing, len(manifest.members))
        self._seen = list(self._all_messages())
        self._sums: dict[int, list[Floats]] = {}
        self.keys = [*self._search(true_keys), *held.long_term, *self._converted(held.long_term)]
        self.publics: dict[str, bytes] = {}
        for header, body, _ in self._messages(m.JoinReply):
            self.publics[header.sender] = bytes.fromhex(m.JoinReply.model_validate_json(body).ephemeral)
        self.privates = {
            site: key for site, public in self.publics.items() for key in self.keys if _public_of(key) == public
        }
        self.secrets = list(dict.fromkeys(self._run_secrets()))

    # --- the attacks ----------------------------------------------------------------------------------------------

    def sums(self, round_: int) -> list[Floats]:
        """Everything that might be the sum of a round's updates."""
        if round_ not in self._sums:
            self._sums[round_] = list(self._find_sums(round_))
        return self._sums[round_]

    def _find_sums(self, round_: int) -> Iterator[Floats]:
        size, weight = self.manifest.layout.size, sum(self.manifest.weight(s.site) for s in self.manifest.members)
        for cohort, transcript, chunks in self._totals(round_):
            for values in self._readings(round_, chunks, transcript, len(cohort)):
                yield values[:size]
        for before, after in self._model_pairs():
            yield (after - before) * (weight / self.manifest.strategy.server_learning_rate)

    def updates(self, round_: int, victim: str) -> Iterator[Floats]:
        """Everything that might be a site's update of a round."""
        size = self.manifest.layout.size
        for header, body, chunks in self._messages(m.SealReply):
            if (header.sender, header.round) != (victim, round_) or not chunks:
                continue
            reply = m.SealReply.model_validate_json(body)
            for values in self._readings(round_, chunks, reply.transcript, 1, victim=victim):
                yield values[:size]
        own = [v[:size] for (site, of), v in self.held.vectors.items() if of == round_ and site != victim]
        for total in self.sums(round_):
            yield total - sum(own)

    # --- keys -----------------------------------------------------------------------------------------------------

    def _search(self, true_keys: Iterable[bytes]) -> list[bytes]:
        hay = {*self.held.memories, *(data for disk in self.held.disks for data in disk.values())}
        hay |= {part for s in self.held.traffic for e in (s.request, s.reply) for part in (e.header, e.body, *e.chunks)}
        if self.held.passphrase is not None:
            hay |= set(self._opened_vaults(self.held.passphrase))
        return [
            key
            for key in true_keys
            if any(form in blob for blob in hay for form in (key, key.hex().encode(), base64.b64encode(key)))
        ]

    def _opened_vaults(self, passphrase: str) -> Iterator[bytes]:
        for disk in self.held.disks:
            for path, data in disk.items():
                if path.endswith(".vault"):
                    try:
                        tree = json.loads(open_vault_file(data, passphrase, Path(path).stem))
                    except SealingError:  # an overwritten file
                        continue
                    yield from (base64.b64decode(key) for key in tree["keys"].values())

    @staticmethod
    def _converted(keys: Iterable[bytes]) -> list[bytes]:
        """Signing keys as Diffie–Hellman keys (the map from Ed25519 to X25519)."""
        return [hashlib.sha512(key).digest()[:32] for key in keys]

    def _run_secrets(self) -> Iterator[bytes]:
        named = {m.KeysReply.model_validate_json(body).secret for _, body, _ in self._messages(m.KeysReply)}
        yield from (key for key in self.keys if hashlib.sha256(b"confide/1/run-secret" + key).hexdigest() in named)
        for header, body, chunks in self._messages(m.KeysRequest):
            if (private := self.privates.get(header.recipient)) is None or not chunks:
                continue
            maker = m.KeysRequest.model_validate_json(body).made.site
            place = (header.manifest, str(header.roster_version), str(header.key_epoch), maker, header.recipient)
            yield unwrap(chunks[0], private, b"confide/1/run-secret" + framed(part.encode() for part in place))

    # --- traffic --------------------------------------------------------------------------------------------------

    def _messages(self, kind: type[m.Message]) -> Iterator[tuple[Header, bytes, tuple[bytes, ...]]]:
        """Every message of a kind that was seen, also where another message quotes it (then without its chunks)."""
        return (message for message in self._seen if message[0].type == kind.TYPE)

    def _all_messages(self) -> Iterator[tuple[Header, bytes, tuple[bytes, ...]]]:
        for envelope in (e for seen in self.held.traffic for e in (seen.request, seen.reply)):
            header = header_of(envelope)
            yield header, envelope.body, envelope.chunks
            for statement in _quoted(_KINDS[header.type].model_validate_json(envelope.body)):
                yield header_of(statement.envelope()), statement.body.encode(), ()

    def _totals(self, round_: int) -> Iterator[tuple[tuple[str, ...], str, tuple[bytes, ...]]]:
        """(cohort, transcript, chunks) of sums that were seen, or added up from payloads that were."""
        for kind in (m.TrainRequest, m.ReleaseRequest):
            for _, body, chunks in self._messages(kind):
                offset = 0
                for reference in kind.model_validate_json(body).sums:  # type: ignore[attr-defined]
                    part = chunks[offset : offset + reference.chunks]
                    offset += reference.chunks
                    if reference.round == round_ and len(part) == reference.chunks:
                        yield reference.cohort, reference.transcript, part
        payloads: dict[str, dict[str, tuple[bytes, ...]]] = {}
        for header, body, chunks in self._messages(m.SealReply):
            if header.round == round_ and chunks:
                payloads.setdefault(m.SealReply.model_validate_json(body).transcript, {})[header.sender] = chunks
        for transcript, found in payloads.items():
            accumulator = self.profile.accumulator(self.manifest.vector_size(round_))
            for chunks in found.values():
                accumulator.add(Payload(chunks, (0,) * int(self.profile.parameters.get("tags", 0))))
            yield tuple(sorted(found)), transcript, accumulator.total().chunks

    # --- locks and masks ------------------------------------------------------------------------------------------

    def _readings(
        self, round_: int, chunks: Sequence[bytes], transcript: str, sites: int, *, victim: str | None = None
    ) -> Iterator[Floats]:
        """What chunks say under each run secret; of one site's, also without the masks that can be computed."""
        parts = segments(self.manifest, round_)
        if isinstance(self.profile, OpenProfile):
            yield np.frombuffer(b"".join(chunks), "<f4" if victim else "<f8").astype(np.float64)
            return
        encoder = Encoder(parts, self.manifest.sealing.bits, transcript)
        for secret in self.secrets or [b""]:
            words = [self._unlock(chunk, secret) for chunk in chunks]
            if any(w is None for w in words):
                continue
            if victim is not None:
                words = [self._unmask(w, n, transcript, victim) for n, w in enumerate(words) if w is not None]
            if not isinstance(self.profile, CkksProfile):
                words = [packing_of(self.profile).unpack(w)[0] for w in words if w is not None]
            fields = np.concatenate([w for w in words if w is not None])[: encoder.size]
            yield encoder.decode([fields], sites).values

    def _unlock(self, chunk: bytes, secret: bytes) -> Words | None:
        if isinstance(self.profile, MaskedProfile):
            return np.frombuffer(chunk, "<u8").astype(np.uint64)
        if not secret:
            return None
        lattice, key = lattice_of(self.profile), secret[:-MAC_KEY_BYTES]
        whole = lattice.summed(lattice.parse(chunk, fresh=True)) if len(chunk) == FRESH_BYTES else chunk
        if isinstance(self.profile, CkksProfile):
            return ckks_module._Lock(key).open(whole)
        return BfvLock(sealed(self.profile).choice, key).open(whole)

    def _unmask(self, words: Words, number: int, transcript: str, victim: str) -> Words:
        if isinstance(self.profile, CkksProfile):
            return words
        modulus, cohort = packing_of(self.profile).modulus, self._cohort(transcript)
        for peer in cohort:
            if peer == victim or victim not in self.publics:
                continue
            if (private := self.privates.get(peer)) is not None:  # the peer's side of a mask cancels the victim's
                pair = PairKeys(peer, private, self.publics).for_cohort(tuple(sorted((peer, victim))), transcript)
                words = pair.apply(words, number, modulus)
            elif (private := self.privates.get(victim)) is not None:
                mine = PairKeys(victim, private, self.publics).for_cohort(tuple(sorted((peer, victim))), transcript)
                zero = np.zeros_like(words)
                words = (words + (np.uint64(modulus) - mine.apply(zero, number, modulus))) % np.uint64(modulus)
        return remove_own(words, self._seeds(transcript, victim), number, modulus)

    def _cohort(self, transcript: str) -> tuple[str, ...]:
        for header, body, _ in self._messages(m.SealReply):
            if m.SealReply.model_validate_json(body).transcript == transcript:
                for place, request, _ in self._messages(m.SealRequest):
                    if (place.round, place.attempt, place.recipient) == (header.round, header.attempt, header.sender):
                        return m.SealRequest.model_validate_json(request).cohort
        return ()

    def _seeds(self, transcript: str, site: str) -> list[bytes]:
        found = {
            reply.seed
            for header, body, _ in self._messages(m.UnlockReply)
            if header.sender == site and (reply := m.UnlockReply.model_validate_json(body)).transcript == transcript
        }
        return [bytes.fromhex(seed) for seed in found]

    # --- models ---------------------------------------------------------------------------------------------------

    def _model_pairs(self) -> Iterator[tuple[Floats, Floats]]:
        """Weights before and after: released, and from boxes on disks."""
        models = [np.frombuffer(chunks[1], "<f4") for _, _, chunks in self._messages(m.JoinRequest)][:1]
        models += self._boxed_models()
        models += [np.frombuffer(chunks[0], "<f4") for _, _, chunks in self._messages(m.ReleaseReply)][:1]
        for i, before in enumerate(models):
            for after in models[i + 1 :]:
                yield before.astype(np.float64), after.astype(np.float64)

    def _boxed_models(self) -> list[NDArray[np.float32]]:
        found: dict[bytes, NDArray[np.float32]] = {}
        looked: set[tuple[bytes, ...]] = set()
        for disk in self.held.disks:
            for path in disk:
                if not path.endswith("state.db"):
                    continue
                files = {p: disk[p] for p in (path, f"{path}-wal") if p in disk}
                if tuple(files.values()) in looked:
                    continue
                looked.add(tuple(files.values()))
                for run, round_, box in _boxes(files):
                    for model in self._opened(run, round_, box):
                        found.setdefault(model.weights.tobytes(), model.weights)
        return list(found.values())

    def _opened(self, run: str, round_: int, box: bytes) -> Iterator[ModelState]:
        for key in self.keys:
            if len(key) == 32:
                try:
                    yield ModelState.from_bytes(round_, open_box(key, f"confide/1/model/{run}/{round_}".encode(), box))
                except SealingError:
                    continue


def recovers(candidates: Iterable[Floats], truth: Floats, tolerance: float) -> bool:
    """Is one of them the truth, to within quantisation, in every coordinate?"""
    return any(len(c) == len(truth) and bool(np.abs(c - truth).max() <= tolerance) for c in candidates)


def _boxes(files: Mapping[str, bytes]) -> list[tuple[str, int, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        for path, data in files.items():
            (Path(folder) / Path(path).name).write_bytes(data)
        database = sqlite3.connect(Path(folder) / "state.db")
        try:
            return database.execute("SELECT run, round, box FROM model").fetchall()
        finally:
            database.close()


def _quoted(message: m.Message) -> Iterator[m.Statement]:
    for value in (getattr(message, name) for name in type(message).model_fields):
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, m.Statement):
                yield part
            elif isinstance(part, m.SumReference):
                yield from part.unlocked


def _public_of(key: bytes) -> bytes:
    if len(key) != 32:
        return b""
    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()
