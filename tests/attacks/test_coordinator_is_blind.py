"""Whatever a coordinator's process could reach during a sealed run, there is no site's secret, update, or sum in it.

The walk follows every reference from the coordinator: attributes, slots, containers, closures, bound methods; bytes
are searched for secrets, arrays compared. It stops at modules, classes, and the world's own objects (the sites live in
the same process here, behind the grid).
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from numpy.typing import NDArray
from sqlalchemy import select

from confide.clients.keys import RunKeys
from confide.clients.run import SiteRun
from confide.clients.site import Site
from confide.clients.store import SiteStore
from confide.privacy.sealing import open as open_profile
from confide.privacy.sealing.authentication import SumMac
from confide.privacy.sealing.bfv import BfvLock
from confide.privacy.sealing.lattice import _new_memory_file
from confide.privacy.sealing.masks import CohortMasks, PairKeys
from confide.privacy.sealing.profile import Opened, Session
from confide.privacy.sealing.slots import Lock, SlotSession
from confide.protocol.envelope import Envelope
from confide.server.coordinator import Coordinator
from confide.server.runs import RunStore
from confide.server.tables import metadata
from tests.attacks.federation import Federation, header_of, open_federation

_KEYS = (
    seal.SecretKey, seal.Decryptor, seal.Encryptor, seal.KeyGenerator, Lock, PairKeys, CohortMasks, SumMac, RunKeys,
    Session, Site, SiteRun, SiteStore,
)  # fmt: skip
_ATOMS = (int, float, bool, complex, type(None), types.ModuleType, type, types.CodeType, types.BuiltinFunctionType)


def walk(root: object, stop: set[int]) -> Iterator[object]:
    """Every object that can be reached, each once, by reference only."""
    seen, waiting = set(stop), [root]
    keep: list[object] = []  # identities are only unique while their objects live
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _ATOMS):
            continue
        seen.add(id(thing))
        keep.append(thing)
        yield thing
        waiting.extend(_referents(thing))


def _referents(thing: object) -> Iterator[object]:
    if isinstance(thing, str | bytes | bytearray | memoryview):
        return
    if isinstance(thing, Mapping):
        yield from thing.keys()
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, np.ndarray):
        if thing.dtype == object:
            yield from thing.ravel().tolist()
        if thing.base is not None:
            yield thing.base
    if isinstance(thing, types.FunctionType):
        yield from thing.__defaults__ or ()
        yield from (thing.__kwdefaults__ or {}).values()
        for cell in thing.__closure__ or ():
            yield cell.cell_contents
    if isinstance(thing, types.MethodType):
        yield thing.__self__
        yield thing.__func__
    if isinstance(thing, types.GeneratorType) and thing.gi_frame is not None:
        yield from thing.gi_frame.f_locals.values()
    yield from getattr(thing, "__dict__", {}).values()
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                yield getattr(thing, name)


class Secrets:
    """What sites hold during a run, collected at the sites themselves."""

    def __init__(self, federation: Federation) -> None:
        self._federation, self.blobs = federation, dict[str, bytes]()
        self.vectors: dict[str, NDArray[np.float64]] = {}

    def collect(self) -> None:
        """Every key of every site; called while they live."""
        run = self._federation.manifest.run
        for name, site in self._federation.sites.items():
            self.blobs[f"signing key of {name}"] = site.identity.key.private_bytes_raw()
            keys = site._runs[run].keys
            self.blobs[f"ephemeral key of {name}"] = keys._private
            self.blobs[f"storage key of {name}"] = keys.storage
            for trained in range(self._federation.manifest.rounds):  # that of the last one is given with the model
                self.blobs[f"naming key of round {trained}"] = keys.model_key(trained)
            session = keys._session
            if isinstance(session, SlotSession):
                self.blobs["MAC key"] = session._mac_key
                self.blobs[f"own-mask key of {name}"] = session._own_key
                if isinstance(session._lock, BfvLock):
                    self.blobs["BFV key"] = session._lock._key
                for peer, shared in session._pairs._shared.items():
                    self.blobs[f"pair {name}, {peer}"] = shared

    def found_in(self, root: object, stop: set[int]) -> set[str]:
        """Names of everything secret that can be reached from `root`."""
        found: set[str] = set()
        floats = {name: tuple(v.astype(kind).tobytes() for kind in ("<f8", "<f4")) for name, v in self.vectors.items()}
        for thing in walk(root, stop):
            if isinstance(thing, _KEYS):
                found.add(f"a {type(thing).__name__}")
            if isinstance(thing, np.ndarray) and thing.dtype.kind == "f":
                found |= {n for n, v in self.vectors.items() if _holds(thing, v)}
            if isinstance(thing, list | tuple) and thing and all(isinstance(x, float) for x in thing):
                found |= {n for n, v in self.vectors.items() if _holds(np.array(thing), v)}
            for data in _bytes_of(thing):
                found |= {
                    name for name, blob in self.blobs.items() if blob and (blob in data or blob.hex().encode() in data)
                }
                found |= {name for name, forms in floats.items() if any(form in data for form in forms)}
        return found


def _holds(array: NDArray[Any], vector: NDArray[np.float64]) -> bool:
    flat = array.ravel()
    if len(flat) < len(vector):
        return False
    starts = np.flatnonzero(np.isclose(flat[: len(flat) - len(vector) + 1], vector[0], rtol=1e-6, atol=0))
    return any(np.allclose(flat[s : s + len(vector)], vector, rtol=1e-6, atol=0) for s in starts)


def _bytes_of(thing: object) -> Iterator[bytes]:
    if isinstance(thing, bytes | bytearray | memoryview):
        yield bytes(thing)
    elif isinstance(thing, str):
        yield thing.encode("utf-8", "surrogatepass")
    elif isinstance(thing, np.ndarray) and thing.dtype != object:
        yield thing.tobytes()


def memory_files() -> list[str]:
    """Files in memory that SEAL could have left something in."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that listed the folder is closed by now
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [link for link in links if "memfd:confide" in link]


class Watched:
    """A whole run that is looked through after every round."""

    def __init__(self, federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
        self.federation, self.secrets = federation, Secrets(federation)
        self.found: dict[int, set[str]] = {}
        self.objects = 0
        compute, size = SiteRun.compute, federation.manifest.layout.size
        self._grid = federation.grid(tamper=self._arrives)

        def computed(run: SiteRun, round_: int, *rest: Any) -> Any:
            vector = compute(run, round_, *rest)
            self.secrets.vectors[f"vector of {run.site}, round {round_}"] = vector.copy()
            return vector

        opened = SlotSession.open

        def opening(session: SlotSession, total: Any, *rest: Any) -> Opened:
            found = opened(session, total, *rest)
            if len(found.values) == size or len(found.values) > 20:  # a sum of metrics alone is released by the run
                self.secrets.vectors[f"sum of {len(found.values)} coordinates"] = found.values[:size].copy()
            return found

        monkeypatch.setattr(SiteRun, "compute", computed)
        monkeypatch.setattr(SlotSession, "open", opening)
        self.store_path = federation.folder / "runs.db"
        self.store = RunStore(f"sqlite:///{self.store_path}")
        self.coordinator: Coordinator = federation.coordinator(self._grid, after_round=self._look, store=self.store)

    def _arrives(self, site: str, _request: Envelope, reply: Envelope) -> Envelope:
        """What a site sends to be summed is added to the sum as it arrives, and not kept."""
        header = header_of(reply)
        if header.step == "seal":
            self.secrets.blobs[f"payload of {site}, round {header.round}"] = b"".join(reply.chunks)
        return reply

    def _look(self, outcome: Any) -> None:
        self.secrets.collect()
        names = self.federation.names
        model = self.federation.model(names[0])
        if model.round:
            self.secrets.vectors[f"model after round {model.round}"] = model.weights.astype(np.float64)
        stop = {id(self.federation), id(self.federation.world), id(self), id(self._grid._app), id(self._grid._drop)}
        stop.add(id(self.store._engine))  # what lies in the database is looked at row by row instead
        self.objects = sum(1 for _ in walk(self.coordinator, stop))
        assert memory_files() == [], "SEAL's objects are never left lying in a file"
        self.found[outcome.round] = self.secrets.found_in([self.coordinator, outcome, self.stored()], stop)

    def stored(self) -> list[Any]:
        """Every row of the run store."""
        with self.store._engine.connect() as db:
            rows = [tuple(row) for table in metadata.sorted_tables for row in db.execute(select(table))]
        assert len(rows) > 5, "it holds something"
        return rows


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """A sealed run."""
    with open_federation(tmp_path / "f", sealing=getattr(request, "param", {})) as federation:
        yield Watched(federation, monkeypatch)


@pytest.mark.parametrize("watched", [{}, {"retry": True}], ids=["", "that may retry"], indirect=True)
def test_in_a_sealed_run_the_coordinator_never_holds_a_secret_an_update_or_a_sum(watched: Watched) -> None:
    released = watched.coordinator.run()
    rounds = watched.federation.manifest.rounds
    assert watched.found == {r: set() for r in range(1, rounds + 2)}
    assert watched.objects > 200, "the walk went somewhere"
    kinds = {name.split()[0] for name in (*watched.secrets.blobs, *watched.secrets.vectors)}
    assert kinds == {
        "signing", "ephemeral", "storage", "naming", "own-mask", "pair", "MAC", "BFV", "payload", "vector", "sum",
        "model",
    }, "and knew what to look for"  # fmt: skip
    assert released.weights.tobytes() == watched.federation.model("ash").weights.tobytes()


PLANTS = {
    "MAC key": lambda w: w.secrets.blobs["MAC key"],
    "ephemeral key of ash": lambda w: {"deep": [("inside", w.secrets.blobs["ephemeral key of ash"] + b"padding")]},
    "pair ash, birch": lambda w: bytearray(w.secrets.blobs["pair ash, birch"]),
    "signing key of doum": lambda w: w.secrets.blobs["signing key of doum"].hex(),
    "vector of cedar, round 1": lambda w: w.secrets.vectors["vector of cedar, round 1"].astype(np.float32),
    "vector of birch, round 2": lambda w: (lambda kept: lambda: kept)(w.secrets.vectors["vector of birch, round 2"]),
    "vector of ash, round 1": lambda w: w.secrets.vectors["vector of ash, round 1"].tobytes(),
    "sum of 4 coordinates": lambda w: w.secrets.vectors["sum of 4 coordinates"].tolist(),
    "BFV key": lambda w: [w.secrets.blobs["BFV key"]],
    "own-mask key of cedar": lambda w: {w.secrets.blobs["own-mask key of cedar"]},
    "naming key of round 1": lambda w: (w.secrets.blobs["naming key of round 1"].hex(),),
    "storage key of ash": lambda w: memoryview(w.secrets.blobs["storage key of ash"]),
    "payload of birch, round 2": lambda w: Envelope(b"", b"", b"", (w.secrets.blobs["payload of birch, round 2"],)),
    "a SlotSession": lambda w: w.federation.sites["ash"]._runs[w.federation.manifest.run].keys,
    "a SecretKey": lambda _w: seal.SecretKey(),
}


@pytest.mark.parametrize("name", PLANTS)
def test_what_is_planted_in_the_coordinator_is_found(watched: Watched, name: str) -> None:
    """The control: the walk does find each kind of secret, wherever it hides."""
    looking = watched._look

    def plant_then_look(outcome: Any) -> None:
        watched.secrets.collect()
        if outcome.round == 3:
            watched.coordinator._members.joined["planted"] = PLANTS[name](watched)
        looking(outcome)

    watched.coordinator._after_round = plant_then_look
    try:
        watched.coordinator.run()
    finally:
        watched.coordinator._members.joined.pop("planted", None)
    assert name in watched.found[3]
    assert name not in watched.found[2]


def test_a_file_in_memory_would_be_found() -> None:
    """The control of the look for them."""
    with _new_memory_file():
        assert len(memory_files()) == 1
    assert memory_files() == []


def test_the_coordinators_files_hold_no_secret_update_or_sum(watched: Watched) -> None:
    watched.coordinator.run()
    path, store = watched.coordinator.log.path, watched.store_path
    lying = [path.read_bytes(), path.with_name(f"{path.name}-wal").read_bytes()]
    kept = [store.read_bytes(), store.with_name(f"{store.name}-wal").read_bytes()]
    travelling = watched.federation.exported("coordinator")
    files = [*lying, travelling]
    assert watched.federation.manifest.run.encode() in travelling
    assert any(watched.federation.manifest.run.encode() in data for data in lying), "the control: entries can be read"
    assert watched.secrets.found_in(files, set()) == set()
    assert watched.secrets.found_in(kept, set()) == {"model after round 3"}, "the released one, and nothing else"
    planted = [*files, b"line " + watched.secrets.blobs["MAC key"].hex().encode()]
    assert watched.secrets.found_in(planted, set()) == {"MAC key"}, "the control"


def test_in_an_open_run_the_coordinator_does_hold_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another control, without planting: the profile that hides nothing."""
    with open_federation(tmp_path / "f", sealing={"profile": "open"}) as federation:
        watched = Watched(federation, monkeypatch)
        opened = open_profile._OpenSession.open

        def opening(session: Any, total: Any, *rest: Any) -> Opened:
            found = opened(session, total, *rest)
            if len(found.values) != 20:
                watched.secrets.vectors["open sum"] = found.values[: federation.manifest.layout.size].copy()
            return found

        monkeypatch.setattr(open_profile._OpenSession, "open", opening)
        rows: dict[int, list[Any]] = {}
        watched.coordinator._after_round = lambda outcome: rows.update({outcome.round: watched.stored()})
        watched.coordinator.run()
        assert "open sum" in watched.secrets.found_in([rows[3]], set()), "until everybody has applied it"
        assert "open sum" not in watched.secrets.found_in([rows[4]], set())
