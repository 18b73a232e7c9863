"""Forward secrecy: who has every long-term key, all traffic and copies of all files opens nothing after the run.

The attacker here copies every file of every party after every message, keeps every request and reply, gets all identity
keys and site keys, and, once the run is over, whatever can still be reached from the sites' objects in memory. It then
tries everything it has as a key. Ephemeral keys, the run secret and the storage keys were destroyed: nothing opens.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from confide.clients.ranges import segments
from confide.clients.site import Site
from confide.clients.store import ModelState
from confide.errors import SealingError
from confide.privacy.atrest import open_box
from confide.privacy.digest import framed
from confide.privacy.sealing import Agreement, Payload, Profile, SealedProfile, make_profile
from confide.privacy.sealing.bfv import BfvLock, lattice_for
from confide.privacy.sealing.lattice import KEY_BYTES, Lattice
from confide.privacy.sealing.wrapping import unwrap
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from tests.attacks.federation import Federation, Sum, header_of, is_refusal

ROUNDS = 2
_KEY = 32
#: 32 uniform bytes have fewer different values than this with a probability below 2⁻⁴⁰.
_DIFFERENT = 20
_PAGE = 4096
#: What no object that outlives a run may be.
_SECRET_TYPES = (seal.SecretKey, seal.Decryptor, seal.Encryptor, X25519PrivateKey, BfvLock)


@dataclass
class Truth:
    """What the attacker wants; the test takes it from the living processes, before it is destroyed."""

    ephemeral: dict[str, bytes] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    secret: bytes = b""
    shared: set[bytes] = field(default_factory=set)
    updates: list[bytes] = field(default_factory=list)
    models: dict[int, bytes] = field(default_factory=dict)

    @property
    def keys(self) -> set[bytes]:
        """Every secret, in pieces that are long enough to be found by."""
        whole = {*self.ephemeral.values(), *self.storage.values(), *self.shared, self.secret}
        return {key[i : i + _KEY] for key in whole for i in range(0, len(key) - _KEY + 1, _KEY)}

    def look(self, site: Site, run: str) -> None:
        """Take what a living site holds right now."""
        held = site._runs[run]
        if held.keys.destroyed:
            return
        name, session = site.name, held.keys._session
        self.ephemeral[name], self.storage[name] = held.keys._private, held.keys._storage
        if session is not None:
            self.secret = session._lock._key + session._mac_key  # type: ignore[attr-defined]
            self.shared |= set(session._pairs._shared.values()) if hasattr(session, "_pairs") else set()
        model = site._store.model(run, held.keys._storage)
        if held.pending is not None and held.manifest.trains_in(held.pending[0]):
            update = held.pending[1][: held.manifest.layout.size]
            local = (model.weights + update).astype("<f4")  # what was trained here: all sites weigh the same
            self.updates += [update.tobytes(), local.tobytes()]
        self.models[model.round] = model.weights.tobytes()


class Eavesdropper:
    """Everything that was sent and everything that ever lay on a disk, of one run."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.run, self.truth = federation, federation.manifest.run, Truth()
        self.traffic: list[tuple[str, Envelope, Envelope]] = []
        self.pages: set[bytes] = set()
        self.boxes: dict[tuple[str, int], bytes] = {}
        for site in federation.sites.values():
            self._listen(site)
        self.copy()

    def _listen(self, site: Site) -> None:
        handle = site.handle

        def listening(step: str, request: Envelope) -> Envelope:
            reply = handle(step, request)
            self.traffic.append((site.name, request, reply))
            self.truth.look(site, self.run)
            self.copy()
            return reply

        site.handle = listening  # type: ignore[method-assign]

    def stop(self) -> None:
        """Hear no more; the sites' objects do not know this one any longer."""
        for site in self.federation.sites.values():
            vars(site).pop("handle", None)

    def copy(self) -> None:
        """All files of all parties as they lie, page by page; and the boxes of the models that lie in them."""
        for path in self.federation.folder.rglob("*"):
            if path.is_file() and path.suffix != ".csv":
                data = path.read_bytes()
                self.pages |= {data[i : i + _PAGE + _KEY - 1] for i in range(0, max(1, len(data)), _PAGE)}
        for name in self.federation.names:
            state = sqlite3.connect(self.federation.folder / "sites" / name / "state.db")
            self.boxes |= {(name, round_): box for round_, box in state.execute("SELECT round, box FROM model")}
            state.close()

    # --- what was recorded -----------------------------------------------------------------------------------------

    def chunks(self) -> set[bytes]:
        """All bulk that crossed the wire."""
        return {chunk for _, *pair in self.traffic for envelope in pair for chunk in envelope.chunks}

    def texts(self) -> set[bytes]:
        """All headers and bodies."""
        return {part for _, *pair in self.traffic for e in pair for part in (e.header, e.body, e.signature)}

    def replies(self, step: str) -> dict[str, Envelope]:
        """The sites' latest replies to a step."""
        return {s: e for s, _, e in self.traffic if header_of(e).step == step and not is_refusal(e)}

    def sums(self) -> list[Sum]:
        """Every sum that was sent to a site."""
        found = {}
        for _, request, _ in self.traffic:
            if header_of(request).step in ("train", "release"):
                kind = m.TrainRequest if header_of(request).step == "train" else m.ReleaseRequest
                offset = 0
                for reference in kind.model_validate_json(request.body).sums:
                    found[reference.round] = Sum(reference, request.chunks[offset : offset + reference.chunks])
                    offset += reference.chunks
        return list(found.values())

    def long_term_keys(self) -> set[bytes]:
        """Identities and site keys, and what one might make of them."""
        world = self.federation.world
        keys = {world.coordinator.key.private_bytes_raw(), *(s._key.secret for s in world.sites.values())}
        keys |= {s.identity.key.private_bytes_raw() for s in world.sites.values()}
        made = {digest(key).digest()[:_KEY] for key in keys for digest in (hashlib.sha256, hashlib.sha512)}
        return keys | made  # the first half of an Ed25519 seed's SHA-512 is an X25519 key


# --- what is left in memory -------------------------------------------------------------------------------------------


def reachable(roots: Iterable[object]) -> Iterator[object]:
    """Everything that can be reached from objects, but for code and what it names."""
    seen, waiting = set[int](), list(roots)
    kept = []  # so that no id is used twice
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, CodeType)):
            continue
        seen.add(id(thing))
        kept.append(thing)
        yield thing
        if isinstance(thing, FunctionType):
            waiting += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        elif isinstance(thing, FrameType):
            waiting += thing.f_locals.values()  # not who called it: that is this test
        else:
            waiting += gc.get_referents(thing)


def remains(roots: Iterable[object]) -> tuple[set[bytes], set[type]]:
    """(every piece of data, the types of every object) that can be reached."""
    gc.collect()
    found, types = set[bytes](), set[type]()
    for thing in reachable(roots):
        types.add(type(thing))
        if isinstance(thing, (bytes, bytearray, memoryview)):
            found.add(bytes(thing))
        elif isinstance(thing, str):
            found.add(thing.encode("utf-8", "replace"))
        elif isinstance(thing, np.ndarray) and thing.dtype != object:
            found.add(thing.tobytes())
        elif isinstance(thing, torch.Tensor):
            found.add(thing.detach().cpu().numpy().tobytes())
    return found, types


# --- everything as a key ----------------------------------------------------------------------------------------------


def windows(pages: Iterable[bytes], stride: int = 1) -> set[bytes]:
    """Every 32 bytes that could be a uniform key."""
    data = b"".join(page + bytes(_KEY) for page in pages)
    if len(data) < _KEY:
        return set()
    rows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, dtype=np.uint8), _KEY)[::stride]
    found = set[bytes]()
    for part in np.array_split(rows, len(rows) // 2**18 + 1):
        ordered = np.sort(part, axis=1)
        different = 1 + np.count_nonzero(np.diff(ordered, axis=1), axis=1)
        found |= {row.tobytes() for row in part[different >= _DIFFERENT]}
    return found


def written_out(texts: Iterable[bytes]) -> set[bytes]:
    """Keys that stand somewhere as hexadecimal or base64."""
    found = set[bytes]()
    for text in texts:
        for run in re.findall(rb"[0-9a-fA-F]{64,}", text):
            raw = bytes.fromhex(run[: len(run) // 2 * 2].decode())
            found |= {raw[i : i + _KEY] for i in range(len(raw) - _KEY + 1)}
        for run in re.findall(rb"[A-Za-z0-9+/_-]{43,}", text):
            raw = base64.b64decode(run[: len(run) // 4 * 4], altchars=b"-_" if b"-" in run or b"_" in run else None)
            found |= {raw[i : i + _KEY] for i in range(len(raw) - _KEY + 1)}
    return found


@dataclass
class Opened:
    """What an attack has opened."""

    secrets: set[bytes] = field(default_factory=set)
    sums: dict[int, np.ndarray[Any, np.dtype[np.float64]]] = field(default_factory=dict)
    models: dict[int, bytes] = field(default_factory=dict)
    locks: int = 0

    def __bool__(self) -> bool:
        return bool(self.secrets or self.sums or self.models or self.locks)


def attack(heard: Eavesdropper, keys: Iterable[bytes], blocks: Iterable[bytes]) -> Opened:
    """Try 32-byte strings as every kind of key, and longer ones as the run's BFV key."""
    opened, manifest = Opened(), heard.federation.manifest
    profile = make_profile(manifest.sealing, len(manifest.members))
    joined, made = heard.replies("join"), heard.replies("secret")
    public = {s: bytes.fromhex(m.JoinReply.model_validate_json(e.body).ephemeral) for s, e in joined.items()}
    owners = {key: site for site, key in public.items()}
    boxes = {site: (round_, box) for (site, round_), box in heard.boxes.items() if round_}
    for key in keys:
        site = owners.get(X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw())
        if site is not None:
            _unwrap(heard, opened, profile, (site, key), made, public)
        for round_, box in boxes.values():
            _open_box(opened, manifest.run, round_, box, key)
    for block in {*blocks, *(secret[:KEY_BYTES] for secret in opened.secrets)}:
        opened.locks += _opens(profile, block, heard.sums()[0].chunks[0])
    return opened


def _unwrap(
    heard: Eavesdropper, opened: Opened, profile: Profile, owner: tuple[str, bytes], made: Mapping[str, Envelope],
    public: Mapping[str, bytes],
) -> None:  # fmt: skip
    """The owner's run secret out of the recorded wraps, and with it every recorded sum."""
    (site, private), manifest = owner, heard.federation.manifest
    for maker, envelope in made.items():
        epoch = str(header_of(envelope).key_epoch)
        place = (manifest.digest, str(manifest.roster_version), epoch, maker, site)
        info = b"confide/1/run-secret" + framed(part.encode() for part in place)
        secret = unwrap(envelope.chunks[sorted(public).index(site)], private, info)
        opened.secrets.add(secret)
        session = profile.session(site, secret, private, public)
        for total in heard.sums():
            reference = total.reference
            payload = Payload(total.chunks, tuple(int(tag, 16) for tag in reference.tags))
            agreement = Agreement(reference.cohort, reference.transcript)
            opened.sums[reference.round] = session.open(payload, segments(manifest, reference.round), agreement).values


def _open_box(opened: Opened, run: str, round_: int, box: bytes, key: bytes) -> None:
    try:
        data = open_box(key, f"confide/1/model/{run}/{round_}".encode(), box)
    except SealingError:
        return
    opened.models[round_] = ModelState.from_bytes(round_, data).weights.tobytes()


def _opens(profile: Profile, block: bytes, chunk: bytes) -> bool:
    """Is a block the key that a sum's chunk is locked with?"""
    assert isinstance(profile, SealedProfile)
    try:
        BfvLock(profile.choice, block).open(chunk)
    except SealingError:
        return False
    return True


# --- the run ----------------------------------------------------------------------------------------------------------


def listen(folder: Path, **sections: Any) -> Eavesdropper:
    """A federation of three, every word of which is heard."""
    return Eavesdropper(
        Federation(
            folder, people={"people": 12, "sites": ("ash", "birch", "cedar")}, run={"rounds": ROUNDS},
            sites={"min_sites": 3, "min_subjects": 1, "population": {"default": 12}},
            model={"kind": "mlp", "hidden": [8]}, **sections,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Eavesdropper]:
    """A whole honest run, until its release."""
    found = listen(tmp_path_factory.mktemp("heard") / "f")
    found.federation.coordinator().run()
    found.federation.world.export()
    found.copy()
    yield found
    found.federation.world.close()


@pytest.fixture(scope="module")
def left(heard: Eavesdropper) -> tuple[set[bytes], set[type]]:
    """What the sites' objects still hold after the end."""
    heard.stop()
    return remains(heard.federation.sites.values())


@pytest.fixture(scope="module")
def loot(heard: Eavesdropper, left: tuple[set[bytes], set[type]]) -> tuple[set[bytes], set[bytes]]:
    """Everything that could be a key: (of 32 bytes, of the length of the run's key)."""
    chunks, texts, memory = heard.chunks(), heard.texts(), left[0]
    sent = windows(chunks)  # ciphertexts, which lie in the files too
    keys = windows(heard.pages) - sent | windows(chunks, stride=16)
    keys |= windows({piece for piece in memory if piece not in chunks}) - sent
    keys |= written_out({*texts, *heard.pages, *memory}) | heard.long_term_keys()
    blocks = {piece[i : i + KEY_BYTES] for piece in chunks | memory for i in (0, 16, 32, 48, 64, KEY_BYTES)}
    return keys, {block for block in blocks if len(block) == KEY_BYTES}


def in_between(heard: Eavesdropper) -> set[bytes]:
    """Models that were neither the first nor the released one."""
    first, released = heard.federation.weights, heard.replies("release")["ash"].chunks[0]
    return {w for w in heard.truth.models.values() if w not in (first, released)}


def test_the_run_that_is_listened_to_is_a_whole_one(heard: Eavesdropper) -> None:
    """The control: there is something to open, and the attacker has all that was sent and stored."""
    truth = heard.truth
    assert set(heard.replies("release")) == set(heard.federation.names)
    assert [s.reference.round for s in heard.sums()] == [1, 2, 3]
    assert len(truth.secret) == KEY_BYTES + 32
    assert len(in_between(heard)) == ROUNDS - 1
    assert len(truth.updates) >= 2 * 3 * ROUNDS
    assert len(truth.shared) == 3, "one secret a pair"
    assert {round_ for _, round_ in heard.boxes} == {0, 1, 2, 3}
    assert all(s._runs[heard.run].keys.destroyed for s in heard.federation.sites.values())


def test_with_every_long_term_key_all_traffic_and_all_files_nothing_opens(
    heard: Eavesdropper, loot: tuple[set[bytes], set[bytes]]
) -> None:
    keys, blocks = loot
    assert len(keys) > 10_000
    assert len(blocks) > 10
    assert not attack(heard, keys, blocks)


def test_with_one_ephemeral_key_the_recorded_sums_open(
    heard: Eavesdropper, loot: tuple[set[bytes], set[bytes]]
) -> None:
    """The control: the same attacker, had one site kept one key; so its destruction is what protects."""
    kept = heard.truth.ephemeral["birch"]
    assert kept not in loot[0]
    opened = attack(heard, [kept, *heard.long_term_keys()], ())
    assert opened.secrets == {heard.truth.secret}
    assert set(opened.sums) == {1, 2, 3}
    assert opened.locks == 1
    assert all(np.isfinite(values).all() for values in opened.sums.values())
    assert not opened.models, "the models at rest are under another key"


def test_with_one_storage_key_the_models_in_the_copies_open(
    heard: Eavesdropper, loot: tuple[set[bytes], set[bytes]]
) -> None:
    kept = heard.truth.storage["birch"]
    assert kept not in loot[0]
    opened = attack(heard, [kept], ())
    assert opened.models
    assert set(opened.models.values()) <= set(heard.truth.models.values())
    assert not opened.secrets
    assert not opened.sums


def test_no_secret_no_update_and_no_model_in_between_was_ever_on_a_disk_or_on_the_wire(heard: Eavesdropper) -> None:
    hay = b"|".join({*heard.pages, *heard.chunks(), *heard.texts()})
    truth = heard.truth
    for needle in (*truth.keys, *truth.updates, *in_between(heard)):
        assert needle not in hay
        assert needle.hex().encode() not in hay
        assert base64.b64encode(needle)[:-4] not in hay
    released = heard.replies("release")["ash"].chunks[0]
    assert released in hay, "the control: what was sent is found"
    assert heard.federation.sites["ash"]._key.secret in hay, "the control: and what lies on a disk"


def held(pieces: set[bytes], secrets: Iterable[bytes]) -> int:
    """How many secrets can be read in pieces of memory; of arrays, a layer may lie alone."""
    hay = b"|".join(pieces)
    arrays = {p for p in pieces if 64 <= len(p) <= 4096 and len(set(p)) >= _DIFFERENT}
    return sum(s in hay or any(a in s for a in arrays) for s in secrets)


def test_after_the_end_the_sites_objects_hold_no_secret_no_update_and_no_model_in_between(
    heard: Eavesdropper, left: tuple[set[bytes], set[type]]
) -> None:
    pieces, types = left
    found = [held(pieces, secrets) for secrets in (heard.truth.keys, heard.truth.updates, in_between(heard))]
    assert found == [0, 0, 0]
    assert not secret_kinds(types)


def test_memory_files_that_keys_go_through_are_empty_or_gone(
    heard: Eavesdropper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEAL reads and writes files only; ours live in memory, and hold a key for a moment."""
    made, largest, create, truth = list[int](), list[int](), os.memfd_create, heard.truth

    def noted(*arguments: Any) -> int:
        made.append(create(*arguments))
        return made[-1]

    def parse(lattice: Lattice, content: bytes) -> Any:
        found = load(lattice, content)
        largest.append(len(content))
        return found

    load = Lattice.parse_key
    monkeypatch.setattr(os, "memfd_create", noted)
    monkeypatch.setattr(Lattice, "parse_key", parse)
    lattice_for.cache_clear()
    profile = make_profile(heard.federation.manifest.sealing, 3)
    assert isinstance(profile, SealedProfile)
    BfvLock(profile.choice, truth.secret[:KEY_BYTES])
    assert made, "the control: there was one"
    assert largest == [KEY_BYTES], "the control: and a key went through it"
    for descriptor in made:
        with suppress(OSError):
            assert os.fstat(descriptor).st_size == 0


# --- runs that do not end as they should ------------------------------------------------------------------------------


@pytest.fixture
def halfway(tmp_path: Path) -> Iterator[tuple[Eavesdropper, Sum]]:
    """One round, and its sum."""
    found = listen(tmp_path / "f")
    found.federation.agree()
    yield found, found.federation.round(1)
    found.federation.world.close()


def test_a_living_run_does_hold_all_of_it(halfway: tuple[Eavesdropper, Sum]) -> None:
    """The control of the memory search: it finds keys and updates where there are some."""
    heard, total = halfway
    heard.federation.train(2, total)
    heard.stop()
    pieces, types = remains(heard.federation.sites.values())
    assert held(pieces, heard.truth.keys) == len(heard.truth.keys)
    assert held(pieces, heard.truth.updates[-2:-1]) == 1
    assert {seal.Decryptor, X25519PrivateKey, BfvLock} <= secret_kinds(types)


def secret_kinds(types: set[type]) -> set[type]:
    """Which kinds of key are among these types?"""
    return {kind for kind in _SECRET_TYPES for found in types if issubclass(found, kind)}


def refuse_a_forged_sum(heard: Eavesdropper, total: Sum) -> None:
    """All sites leave the run."""
    wrong = total.changed(tags=tuple(f"{int(tag, 16) ^ 1:x}" for tag in total.reference.tags))
    assert all(map(is_refusal, heard.federation.train(2, wrong).values()))
    assert all(s._runs[heard.run].keys.destroyed for s in heard.federation.sites.values())
    heard.stop()


def test_a_site_that_left_the_run_holds_none_of_its_keys(halfway: tuple[Eavesdropper, Sum]) -> None:
    """The refusal that it keeps for its operator must not keep the frames, and their keys, that it came from."""
    heard, total = halfway
    refuse_a_forged_sum(heard, total)
    pieces, types = remains(heard.federation.sites.values())
    found = held(pieces, heard.truth.keys)
    assert found == 0
    assert not secret_kinds(types)


def test_a_site_that_left_the_run_holds_no_update(halfway: tuple[Eavesdropper, Sum]) -> None:
    """What was trained last is given model plus update: it must go with the keys."""
    heard, total = halfway
    refuse_a_forged_sum(heard, total)
    pieces, _ = remains(site._runs for site in heard.federation.sites.values())
    found = held(pieces, heard.truth.updates)
    assert found == 0


def test_a_site_that_may_not_release_the_model_destroys_the_runs_keys_at_the_end_all_the_same(tmp_path: Path) -> None:
    heard = listen(tmp_path / "f")
    heard.federation.set_policy("birch", release=False)
    heard.federation.coordinator().run()
    heard.stop()
    assert heard.federation.sites["ash"]._runs[heard.run].keys.destroyed, "the control: who released it has none"
    pieces, types = remains(heard.federation.sites.values())
    secret = {heard.truth.secret[i : i + _KEY] for i in range(0, KEY_BYTES, _KEY)} | heard.truth.shared
    found = held(pieces, secret)
    assert found == 0
    assert not secret_kinds(types) & {seal.Decryptor, BfvLock}
    heard.federation.world.close()
