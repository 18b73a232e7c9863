"""Kills a coordinator, or a whole simulated federation, at named points, with SIGKILL, and has another process go on.

Run as a program by `test_killed`. In the scene `the coordinator dies` the sites live on in a process of their own that
answers over a socket; in `everything dies` coordinator and sites are one process, like a simulation. What a coordinator
does is wrapped from outside: each thing that it makes durable, each entry of its log and each message has a name, and
right before or right after it the process is killed. What a site is asked and what it computes is noted, durably and
outside of the product, before a kill can hide it.

Jobs come as lines of JSON on stdin; what was found lies in each job's folder.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import sqlite3.dbapi2
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as WireMessage

from confide.clients.app import make_client_app
from confide.clients.run import SiteRun
from confide.clients.site import Site
from confide.config import load_experiment
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.audit.verify import verify
from confide.privacy.dp import Ledger
from confide.privacy.dp.events import event_to_json
from confide.protocol.envelope import Envelope
from confide.protocol.flower import from_records
from confide.server.coordinator import Coordinator
from confide.server.journal import Journal
from confide.server.runs import RunStore
from confide.simulations.engines.grid import NODE_CONFIG_SITE, LocalGrid
from confide.simulations.keeping import KEPT, Keeping
from confide.simulations.sources import load_sources
from confide.simulations.world import COORDINATOR, FEDERATION, World
from tests.attacks.federation import header_of
from tests.forked import answer_jobs, wrap
from tests.support import experiment_tree, write_people

SITES = ("ash", "birch", "cedar")
ROUNDS = 2
#: The round that somebody is killed in; the first leaves it a sum to hand on.
ROUND = 2
_PATIENCE = 120
#: Processes that may die before one is left alone.
_LIVES = 12


# --- the table of points ----------------------------------------------------------------------------------------------


def _around(action: str) -> list[str]:
    return [f"before {action}", f"after {action}"]


def _asked(step: str, where: str, sites: tuple[str, ...] = SITES, *, kept: bool = True) -> list[str]:
    """A step: its requests are stored, sent one by one, and the replies kept."""
    found = _around(f"store {where}")
    for site in sites:
        found += _around(f"{step} reaches {site} {where}")
        found += _around(f"keep {where} of {site}") if kept else []
    return found


def _joining() -> list[str]:
    found = _around("open the run") + _around("log run_created") + _around("store join")
    for site in SITES:
        found += _around(f"join reaches {site} join") + _around(f"keep join of {site}")
    found += _around("close join")
    found += _asked("secret", "secret", SITES[:1]) + _around("close secret")
    return found + _asked("keys", "keys") + _around("close keys") + _around("agree")


def _round(round_: int, *, retries: bool) -> list[str]:
    at = f"{round_}"
    found = _asked("train", f"train {at}") + (_around("log metrics_released") if round_ > ROUND else [])
    found += _around(f"close train {at}") + _around("log cohort") + _asked("seal", f"seal {at}", kept=False)
    found += _around(f"keep the sum {at}")
    found += _asked("unlock", f"unlock {at}") + _around(f"keep the sum {at}, unlocked") if retries else []
    return found + _around(f"end round {at}")


def _releasing() -> list[str]:
    last = ROUNDS + 2
    found = (
        _round(ROUNDS + 1, retries=False)
        + _asked("release", f"release {last}")
        + _around(f"close release {last}")
        + _around("log metrics_released")
    )
    return found + _around("log model_released") + _around("log run_ended") + _around("finish")


#: Of each part of a run: every moment that is named, in order.
PARTS: dict[str, list[str]] = {
    "joining": _joining(),
    "a round": _round(ROUND, retries=False),
    "a round that may be retried": _round(ROUND, retries=True),
    "releasing": _releasing(),
}
#: Where a process that holds everything is killed besides.
IN_A_SITE = [
    f"{site} has {what} {ROUND}"
    for site in ("ash", "cedar")
    for what in ("charged", "computed", "answered train", "logged its seal", "answered seal")
]
#: The same, in the round that only evaluates: all sites that a release needs must come through it.
AT_THE_END = [f"{site} has {what} {ROUNDS + 1}" for site in ("ash", "cedar") for what in ("charged", "computed")]


# --- what is watched --------------------------------------------------------------------------------------------------


@dataclass
class Harness:
    """Watches one process, and ends it at a point.

    Args:
        folder: The job's.
        part: The part of the run that is watched.
        point: Where to kill; empty: nowhere, but what is passed and what is made durable is written down.
        chance: Kill at each moment with this probability instead.
    """

    folder: Path
    part: str = ""
    point: str = ""
    chance: float = 0.0
    trace: list[list[str]] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    watching: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def note(self, **what: Any) -> None:
        """Keep, durably and outside of the product, what happened."""
        wire = os.open(self.folder / "wire.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(wire, json.dumps(what).encode() + b"\n")
        os.fsync(wire)
        os.close(wire)

    def reach(self, name: str) -> None:
        """A moment has come. Does not return where the process is killed."""
        if self.watching and not self.point:
            self.trace.append(["point", name])
        hit = self.watching and name == self.point
        if hit or (self.chance and random.random() < self.chance):  # noqa: S311
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def around(self, action: str) -> Iterator[None]:
        """Right before and right after something."""
        self._turn(action)
        self.reach(f"before {action}")
        self.inside.append(action)
        try:
            yield
        finally:
            self.inside.pop()
        self.reach(f"after {action}")
        if action in (f"end round {ROUND}", "agree", "finish"):
            self.watching = False

    def _turn(self, action: str) -> None:
        """Does the part begin here?"""
        begins = {"joining": "open the run", "releasing": f"store train {ROUNDS + 1}"}
        self.watching = self.watching or action == begins.get(self.part, f"store train {ROUND}")

    def durable(self, file: str) -> None:
        """Something was made durable by the coordinator."""
        if self.watching and not self.point:
            self.trace.append(["durable", file, self.inside[-1] if self.inside else ""])

    def install(self) -> None:
        """Wrap everything; for the rest of this process's life."""
        wrap(RunStore, "open", lambda real, *rest: self._in("open the run", real, *rest))
        places: dict[str, Callable[..., str]] = {
            "put_requests": lambda place, _r: f"store {_name(place)}",
            "put_reply": lambda place, site, _e: f"keep {_name(place)} of {site}",
            "close": lambda place: f"close {_name(place)}",
            "agree": lambda *_: "agree",
            "put_total": lambda total: f"keep the sum {total.round}" + (", unlocked" if total.unlocked else ""),
            "end_round": lambda outcome, *_: f"end round {outcome.round}",
            "refuse": lambda site, _: f"note the refusal of {site}",
            "finish": lambda: "finish",
        }
        for name, action in places.items():
            wrap(Journal, name, lambda real, journal, *rest, action=action: self._in(
                action(*rest), real, journal, *rest))  # fmt: skip
        wrap(Log, "append", self._append)
        wrap(LocalGrid, "_deliver", self._deliver)
        harness = self

        class Watched(sqlite3.Connection):
            """Notes what is committed."""

            file = ""
            before = 0

            def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
                done = super().execute(sql, *rest)
                if sql.split()[0] == "COMMIT":
                    self.noted()
                return done

            def commit(self) -> None:
                super().commit()
                self.noted()

            def noted(self) -> None:
                if self.total_changes > self.before and self.file:
                    harness.durable(self.file)
                self.before = self.total_changes

        connect = sqlite3.connect

        def watched(path: Any, *args: Any, **kwargs: Any) -> sqlite3.Connection:
            made = connect(path, *args, **{**kwargs, "factory": Watched})
            name = Path(str(path)).name
            made.file = name if name in ("runs.db", f"{COORDINATOR}.db") else ""
            return made

        sqlite3.connect = sqlite3.dbapi2.connect = watched  # type: ignore[assignment]

    def in_sites(self) -> None:
        """Watch what the sites of this process do, too."""

        def handle(real: Callable[..., Envelope], site: Site, step: str, request: Envelope) -> Envelope:
            header = header_of(request)
            place = [header.run, header.key_epoch, header.round, step, header.attempt]
            self.note(site=site.name, asked=place, request=request.digest)
            reply = real(site, step, request)
            self.note(site=site.name, answered=place, reply=reply.digest, type=header_of(reply).type)
            self.reach(f"{site.name} has answered {step} {header.round}")
            return reply

        def compute(real: Callable[..., Any], run: SiteRun, round_: int, *rest: Any) -> Any:
            self.note(site=run.site, run=run.manifest.run, computed=round_)
            vector = real(run, round_, *rest)
            self.reach(f"{run.site} has computed {round_}")
            return vector

        wrap(Site, "handle", handle)
        wrap(SiteRun, "compute", compute)

    def _in(self, action: str, real: Callable[..., Any], *args: Any) -> Any:
        with self.around(action):
            return real(*args)

    def _append(self, real: Callable[..., None], log: Log, *entries: Any) -> None:
        if log.path.stem != COORDINATOR:
            real(log, *entries)
            of = {"charged": "charged", "sealed": "logged its seal"}.get(entries[0].KIND)
            if of is not None:
                self.reach(f"{log.path.parent.name} has {of} {entries[0].round}")
            return
        with self.around(f"log {entries[0].KIND}"):
            real(log, *entries)

    def _deliver(self, real: Callable[..., FlowerMessage], grid: LocalGrid, message: FlowerMessage) -> FlowerMessage:
        header, site = header_of(from_records(message.content)), grid._site_of[message.metadata.dst_node_id]
        with self.around(f"{header.step} reaches {site} {_name(header)}"):
            return real(grid, message)


def _name(place: Any) -> str:
    """A step and, if it belongs to one, its round."""
    return f"{place.step} {place.round}" if place.round else place.step


# --- coordinators that are broken on purpose --------------------------------------------------------------------------


def _forget_requests(_: Harness) -> None:
    """Requests are not stored: after a restart other ones are signed."""
    Journal.put_requests = lambda *_args: None  # type: ignore[method-assign]


def _log_again(_: Harness) -> None:
    """What an earlier process logged is logged once more."""
    Journal.append_once = lambda journal, record: journal._log.append(record)  # type: ignore[method-assign]


def _send_first(_: Harness) -> None:
    """Requests are sent, and stored when the replies are there."""
    waiting: list[tuple[Any, ...]] = []
    store = Journal.put_requests
    Journal.put_requests = lambda *args: waiting.append(args)  # type: ignore[method-assign]

    def close(real: Callable[..., None], journal: Journal, *rest: Any) -> None:
        while waiting:
            store(*waiting.pop())
        real(journal, *rest)

    wrap(Journal, "close", close)


def _forget_sums(_: Harness) -> None:
    """A sum is dropped as soon as its round has ended."""
    wrap(Journal, "end_round", lambda real, journal, outcome, *rest: [
        real(journal, outcome, *rest), journal.put_total_dropped(outcome.round)])  # fmt: skip

    def dropped(journal: Journal, round_: int) -> None:
        from sqlalchemy import delete

        from confide.server import tables as t

        with journal._write() as db:
            db.execute(delete(t.total).where(t.total.c.round == round_))

    Journal.put_total_dropped = dropped  # type: ignore[attr-defined]


def _write_something_more(_: Harness) -> None:
    """A new durable step, which no point knows."""
    wrap(Journal, "requests", lambda real, journal, place: [journal_write(journal), real(journal, place)][1])


def _write_twice(_: Harness) -> None:
    """One more transaction inside of a step that is known."""
    wrap(Journal, "put_total", lambda real, journal, total: [journal_write(journal), real(journal, total)][1])


def _log_something_more(_: Harness) -> None:
    """One more entry."""
    wrap(Journal, "append_once", lambda real, journal, record: [real(journal, record), real(journal, record)][0])


def journal_write(journal: Journal) -> None:
    """A transaction that changes something."""
    with journal._write():
        pass


BROKEN: dict[str, Callable[[Harness], None]] = {
    "forgets requests": _forget_requests,
    "logs again": _log_again,
    "sends first": _send_first,
    "forgets sums": _forget_sums,
    "writes something more": _write_something_more,
    "writes twice": _write_twice,
    "logs something more": _log_something_more,
}


# --- sites in a process of their own ----------------------------------------------------------------------------------


class SocketGrid(LocalGrid):
    """Messages go to another process and come back, in Flower's wire form."""

    link: socket.socket

    def _deliver(self, message: FlowerMessage) -> FlowerMessage:
        return _wire_deliver(self, message)


def _wire_deliver(grid: SocketGrid, message: FlowerMessage) -> FlowerMessage:
    _send(grid.link, message_to_proto(message).SerializeToString())
    return message_from_proto(WireMessage.FromString(_receive(grid.link)))


def _send(link: socket.socket, data: bytes) -> None:
    link.sendall(struct.pack(">Q", len(data)) + data)


def _receive(link: socket.socket) -> bytes:
    """A message; empty where the other side is gone."""
    (size,) = struct.unpack(">Q", _exactly(link, 8) or bytes(8))
    return _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    parts, left = [], size
    while left:
        try:
            part = link.recv(min(left, 1 << 20))
        except ConnectionResetError:
            return b""
        if not part:
            return b""
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def serve(link: socket.socket, grid: LocalGrid) -> None:
    """Answer until the coordinator is gone."""
    while data := _receive(link):
        reply = LocalGrid._deliver(grid, message_from_proto(WireMessage.FromString(data)))
        try:
            _send(link, message_to_proto(reply).SerializeToString())
        except (BrokenPipeError, ConnectionResetError):
            return


# --- a job ------------------------------------------------------------------------------------------------------------


def experiment(folder: Path, job: dict[str, Any]) -> Any:
    """A small one, whose draws come from a seed where the job says so."""
    seeded = {"unsafe_noise_seed": 7} if job.get("seeded") else {}
    tree = experiment_tree(
        str(write_people(folder, people=10, sites=SITES)),
        run={"rounds": ROUNDS, "report_metrics_every": 1},
        sites={"min_sites": 3, "min_subjects": 1, "population": {"default": 10}},
        training={"local_steps": 2},
        privacy={"epsilon": 2.0, "site_epsilon_limit": 12.0, **seeded},
        sealing={"profile": "sealed", "retry": bool(job.get("retry"))},
    )
    return load_experiment(tree, ())


def open_world(folder: Path, job: dict[str, Any]) -> tuple[World, Keeping]:
    """The sites as they lie in a folder; new ones where nothing lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    keeping = Keeping(folder / KEPT)
    sources = load_sources(experiment(folder, job), folder)
    return World(sources, folder / "sites", folder / "ledgers", folder / "logs", keeping), keeping


def drive(world: World, keeping: Keeping, grid: LocalGrid, *, grown: bool = False) -> dict[str, Any]:
    """The coordinator, from wherever it has come to; what came of the run.

    The state of the log stands in every request: where it has `grown` meanwhile, a request that is signed again is
    another one.
    """
    log = world.coordinator.open_log(world.log.path, "coordinator", FEDERATION)
    store = keeping.store()
    coordinator = Coordinator(grid, world.coordinator, world.manifest, world.initial, log, store=store)
    if grown and log.size > 1:
        log.append(audit.Rejected(run=world.manifest.run, round=1, step="train", party=SITES[0], reason="for a change"))
    released = coordinator.run()
    found = {
        "model": released.model,
        "cohorts": [[] if o.abandoned else list(o.cohort) for o in released.outcomes],
        "metrics": [o.metrics_round for o in released.outcomes] + [released.metrics_round],
        "refusals": sorted(coordinator.refusals),
    }
    store.close()
    log.close()
    return found


def _grid(world: World, kind: type[LocalGrid] = LocalGrid) -> LocalGrid:
    def find(context: Context) -> Site:
        return world.sites[str(context.node_config[NODE_CONFIG_SITE])]

    return kind(make_client_app(find), world.sites)


def child(act: Callable[[], None], meanwhile: Callable[[], None] = lambda: None) -> int:
    """Do it in a process of its own; how that ended."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(_PATIENCE)
        try:
            act()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    meanwhile()
    return os.waitpid(pid, 0)[1]


def _process(folder: Path, job: dict[str, Any], harness: Harness) -> None:
    """Coordinator and sites in one process, to the end or to the point."""
    if job.get("broken"):
        BROKEN[job["broken"]](harness)
    harness.install()
    harness.in_sites()
    world, keeping = open_world(folder, job)
    found = drive(world, keeping, _grid(world), grown=bool(job.get("grown")))
    world.export()
    world.close()
    (harness.folder / "found.json").write_text(json.dumps({**found, "trace": harness.trace}))


def _coordinate(
    world: World, keeping: Keeping, job: dict[str, Any], harness: Harness, other: socket.socket, link: socket.socket
) -> None:
    """The coordinator alone, to the end or to the point."""
    other.close()
    if job.get("broken"):
        BROKEN[job["broken"]](harness)
    harness.install()
    wrap(SocketGrid, "_deliver", harness._deliver)
    grid = _grid(world, SocketGrid)
    grid.link = link  # type: ignore[attr-defined]
    found = drive(world, keeping, grid, grown=bool(job.get("grown")))
    (harness.folder / "found.json").write_text(json.dumps({**found, "trace": harness.trace}))


def _harness(folder: Path, job: dict[str, Any], lives: int) -> Harness:
    """The point is for the first process; a chance is for all but the last of them."""
    random.seed(f"{job.get('seed')}/{lives}")
    if lives == 0:
        return Harness(folder, job["part"], job.get("point", ""), job.get("chance", 0.0))
    return Harness(folder, chance=job.get("chance", 0.0) if lives < _LIVES else 0.0)


def the_coordinator_dies(folder: Path, job: dict[str, Any]) -> list[int]:
    """Sites live here; one coordinator after the other in processes of their own. How each ended."""
    watching = Harness(folder)
    watching.in_sites()
    world, keeping = open_world(folder / "run", job)
    world.log.close()  # it is the coordinator's
    grid, ends = _grid(world), list[int]()
    while not (folder / "found.json").exists():
        here, there = socket.socketpair()
        harness = _harness(folder, job, len(ends))

        def meanwhile(here: socket.socket = here, there: socket.socket = there) -> None:
            there.close()
            serve(here, grid)

        ends.append(child(partial(_coordinate, world, keeping, job, harness, here, there), meanwhile))
        here.close()
        if ends[-1] not in (0, signal.SIGKILL):
            break
    world.log = world.coordinator.open_log(world.log.path, "coordinator", FEDERATION)
    world.export()
    world.close()
    return ends


def everything_dies(folder: Path, job: dict[str, Any]) -> list[int]:
    """One process after the other, each with coordinator and sites."""
    ends: list[int] = []
    while not (folder / "found.json").exists():
        harness = _harness(folder, job, len(ends))
        ends.append(child(partial(_process, folder / "run", job, harness)))
        if ends[-1] not in (0, signal.SIGKILL):
            break
    return ends


def _job(job: dict[str, Any]) -> None:
    """Kill, go on, and tell what came of it."""
    folder = Path(job["folder"])
    ends = {"the coordinator dies": the_coordinator_dies, "everything dies": everything_dies}[job["scene"]](folder, job)
    run, wire = folder / "run", (folder / "wire.jsonl").read_text().splitlines()
    facts: dict[str, Any] = {"ends": ends, "wire": [json.loads(line) for line in wire]}
    if (folder / "found.json").exists():
        evidence = verify(run)
        facts |= json.loads((folder / "found.json").read_text())
        facts["findings"] = [str(finding) for finding in evidence.findings]
        facts["manifest"] = json.dumps(evidence.manifest)
        facts["charges"] = {}
        for site in SITES:
            ledger = Ledger.open(run / "ledgers" / site / "ledger.db")
            facts["charges"][site] = {charge: event_to_json(e) for charge, e in ledger.reservations().items()}
            ledger.close()
    (folder / "facts.json").write_text(json.dumps(facts))


def main(warm: Path, at_once: int) -> None:
    """Answer each line of jobs with a line of their exit codes."""
    torch.set_num_threads(1)
    for number, job in enumerate(
        ({}, {"seeded": True}, {"retry": True})
    ):  # what is slow for the first time is done once
        world, keeping = open_world(warm / f"{number}", job)
        drive(world, keeping, _grid(world))
        world.close()
        keeping.close()
    answer_jobs(_job, at_once, 3 * _PATIENCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
