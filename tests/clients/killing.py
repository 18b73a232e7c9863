"""Kills a site at named points of a round, with SIGKILL, and has it go on. Run as a program by `test_killed`.

A federation lives in a forked process of its own. Its victim is wrapped from outside: what it calls while it answers a
request is known by name, and right before or right after one such call the process is killed. What left the victim is
noted, durably, *before* it is handed to the grid, so no kill can hide it. Afterwards another process restarts the
victim on what lies on the disk and repeats the request; then a fresh run uses the same ledgers to its end, unless one
has begun with a ledger that says the same.

Jobs come as lines of JSON on stdin; what was found lies in each job's folder.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message as FlowerMessage

from confide.clients.participants import ParticipantSource
from confide.clients.rounds import RoundSteps
from confide.clients.run import SiteRun
from confide.clients.site import Site
from confide.clients.snapshots import SnapshotStore
from confide.clients.store import SiteStore
from confide.errors import BudgetError, ConfideError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.consent import Registry
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role, rdp_epsilon
from confide.privacy.dp.personal import PersonalLosses
from confide.privacy.sealing import vault as vault_module
from confide.privacy.sealing.slots import SlotSession
from confide.privacy.sealing.vault import Vault
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from confide.protocol.flower import from_records
from confide.simulations.engines.grid import LocalGrid
from tests.attacks.federation import Federation, header_of
from tests.forked import answer_jobs, wrap

VICTIM = "ash"
PASSPHRASE = "a few small words"
PEOPLE = 10
#: Seconds after which a process that hangs is ended.
_PATIENCE = 180


# --- the table of points ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A moment: right before or right after the n-th `action` of answering a request for `step`.

    `needs` names what a round must have for the moment to come at all.
    """

    step: str
    moment: str
    action: str
    nth: int = 1
    needs: str = ""

    @property
    def after(self) -> list[str]:
        """What has become durable since the point before it: one thing at most."""
        committed = self.action in ("put model", "take") or self.action.endswith(": COMMIT")
        return ["commit"] if self.moment == "after" and committed else []


def _entry(step: str, kind: str, what: str, nth: int = 1, needs: str = "") -> dict[str, Point]:
    """The moments of one entry in a log: its row comes before the checkpoint over it, in one transaction."""
    inside = f"append {kind}"
    return {
        f"{step}: about to append '{what}'": Point(step, "before", inside, nth, needs),
        f"{step}: appending '{what}' has begun": Point(step, "after", f"{inside}: BEGIN", nth, needs),
        f"{step}: '{what}' is written": Point(step, "after", f"{inside}: INSERT entry", nth, needs),
        f"{step}: '{what}' is committed": Point(step, "after", f"{inside}: COMMIT", nth, needs),
    }


def _charge(role: str, nth: int, needs: str = "") -> dict[str, Point]:
    """The moments of one charge."""
    inside = f"reserve {role}"
    return {
        f"train: about to charge {role}": Point("train", "before", inside, 1, needs),
        f"train: charging {role} has begun": Point("train", "after", f"{inside}: BEGIN", 1, needs),
        f"train: the charge for {role} is written": Point("train", "after", f"{inside}: INSERT entry", 1, needs),
        f"train: the charge for {role} is committed": Point("train", "after", f"{inside}: COMMIT", 1, needs),
        **_entry("train", "charged", f"charged {role}", nth, needs),
    }


def _hold(which: str, nth: int, needs: str = "") -> dict[str, Point]:
    """The moments of noting whom one charge holds."""
    return {
        f"train: noting whom the {which} charge holds has begun": Point("train", "after", "hold: BEGIN", nth, needs),
        f"train: whom the {which} charge holds is written": Point("train", "after", "hold: INSERT held", nth, needs),
        f"train: whom the {which} charge holds is committed": Point("train", "after", "hold: COMMIT", nth, needs),
    }


def _peers(step: str) -> dict[str, Point]:
    """The moments of noting how long the peers' logs are."""
    return {
        f"{step}: about to note the peers' logs": Point(step, "before", "note sightings"),
        f"{step}: noting the peers' logs has begun": Point(step, "after", "note sightings: BEGIN"),
        f"{step}: the peers' logs are written": Point(step, "after", "note sightings: INSERT sighting"),
        f"{step}: the peers' logs are noted": Point(step, "after", "note sightings: COMMIT"),
    }


def _reply(step: str, effect: str = "") -> dict[str, Point]:
    """The moments of a reply: durable, then noted by the harness as having left, then with the coordinator."""
    made = {f"{step}: the reply is being stored": Point(step, "after", "commit reply: BEGIN")}
    if effect:
        made[f"{step}: the row that says {effect} is written"] = Point(step, "after", f"commit reply: INSERT {effect}")
    return made | {
        f"{step}: the reply is written": Point(step, "before", "commit reply: COMMIT"),
        f"{step}: the reply is committed": Point(step, "after", "commit reply: COMMIT"),
        f"{step}: the reply is about to leave": Point(step, "before", "hand over"),
        f"{step}: the reply has left": Point(step, "after", "hand over"),
    }


#: Every point, in the order in which a round comes by.
POINTS: dict[str, Point] = {
    "train: the request has arrived": Point("train", "before", "handle"),
    **_entry("train", "opened", "opened", needs="a sum before it"),
    "train: the model is replaced": Point("train", "after", "put model", 1, "a sum before it"),
    **_entry("train", "settled", "settled", needs="an unsent update"),
    "train: about to give an unsent charge back": Point("train", "before", "settle", 1, "an unsent update"),
    "train: giving back has begun": Point("train", "after", "settle: BEGIN", 1, "an unsent update"),
    "train: what is given back is written": Point("train", "after", "settle: INSERT entry", 1, "an unsent update"),
    "train: what is given back is committed": Point("train", "after", "settle: COMMIT", 1, "an unsent update"),
    **_charge("train", 1),
    **_charge("held_out", 2, "metrics"),
    "train: about to take the snapshot": Point("train", "before", "take"),
    "train: the snapshot is taken": Point("train", "after", "take"),
    "train: the update is computed": Point("train", "after", "compute"),
    "train: consent was looked at again": Point("train", "after", "take", 2),
    "train: about to note whom the charges hold": Point("train", "before", "hold"),
    **_hold("first", 1),
    **_hold("second", 2, "metrics"),
    "train: about to keep the snapshot": Point("train", "before", "keep"),
    "train: keeping the snapshot has begun": Point("train", "after", "keep: BEGIN"),
    "train: the snapshot is written": Point("train", "after", "keep: INSERT snapshot"),
    "train: the snapshot is kept": Point("train", "after", "keep: COMMIT"),
    **_entry("train", "local_snapshot", "local snapshot"),
    **_entry("train", "snapshot_taken", "snapshot taken"),
    **_entry("train", "update_committed", "update committed"),
    **_reply("train"),
    "seal: the request has arrived": Point("seal", "before", "handle"),
    **_peers("seal"),
    "seal: about to be sealed": Point("seal", "before", "session seal"),
    "seal: sealed in memory": Point("seal", "after", "session seal"),
    **_entry("seal", "sealed", "sealed"),
    **_reply("seal", "sealed"),
    "unlock: the request has arrived": Point("unlock", "before", "handle", 1, "retries"),
    "unlock: about to be unlocked": Point("unlock", "before", "session unlock", 1, "retries"),
    "unlock: unlocked in memory": Point("unlock", "after", "session unlock", 1, "retries"),
    **_entry("unlock", "unlocked", "unlocked", needs="retries"),
    **{name: Point(**{**asdict(p), "needs": "retries"}) for name, p in _reply("unlock", "unlocked").items()},
    "release: the request has arrived": Point("release", "before", "handle"),
    **_entry("release", "opened", "opened"),
    "release: the model is replaced": Point("release", "after", "put model"),
    **_peers("release"),
    **_entry("release", "model_released", "model released"),
    **{name: p for name, p in _reply("release").items() if "hand over" not in p.action},
    "release: about to let the charges expire": Point("release", "before", "expire"),
    "release: expiring has begun": Point("release", "after", "expire: BEGIN"),
    "release: that the first charge has expired is written": Point("release", "after", "expire: INSERT entry"),
    "release: that the charges have expired is committed": Point("release", "after", "expire: COMMIT"),
}


# --- rounds that somebody is killed in --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Which round, of what kind, and what went wrong before it.

    Attributes:
        round: The round of interest.
        rounds: Of the run; 0: it ends with that round.
        has: What of `Point.needs` it has.
        metrics_every: Of the experiment.
        attempt: Which attempt of sealing it is about.
        lost: The first round's seal request to this site is lost (an attempt's, where another one follows).
        others: Sites besides the victim.
        steps: What of the round is watched.
        kills: In which of these steps somebody is killed, up to `last`: code that other scenes go through as well is
            watched, but not killed in again.
    """

    round: int = 1
    rounds: int = 0
    has: frozenset[str] = frozenset()
    metrics_every: int = 9
    attempt: int = 0
    lost: str = ""
    others: tuple[str, ...] = ("birch", "cedar")
    steps: tuple[str, ...] = ("train", "seal", "unlock")
    kills: tuple[str, ...] = ("train", "seal", "unlock")
    last: str = ""

    @property
    def retries(self) -> bool:
        """May its rounds be sealed again?"""
        return "retries" in self.has

    def points(self, *steps: str) -> list[str]:
        """Names of the points that it comes by, in order."""
        return [
            name
            for name, point in POINTS.items()
            if point.step in (steps or self.steps) and (not point.needs or point.needs in self.has)
        ]

    def deaths(self, step: str) -> list[str]:
        """Names of the points of a step at which somebody is killed."""
        names = self.points(step) if step in self.kills and step in self.steps else []
        return names[: names.index(self.last) + 1] if self.last in names else names


_UNSENT, _AGAIN, _METRICS = frozenset({"an unsent update"}), frozenset({"retries"}), frozenset({"metrics"})
_LATER = frozenset({"a sum before it"})
_SEALING, _PAID = ("seal", "unlock"), "train: about to take the snapshot"
_SETTLED = "train: what is given back is committed"
SCENES: dict[str, Scene] = {
    "a plain round": Scene(),
    "a metric round": Scene(round=2, has=_METRICS | _LATER, metrics_every=1, kills=_SEALING),
    "a plain round that may be retried": Scene(has=_AGAIN, kills=_SEALING),
    "a metric round that may be retried": Scene(
        round=2, has=_METRICS | _LATER | _AGAIN, metrics_every=1, kills=("train",)
    ),
    "a second attempt": Scene(has=_AGAIN, attempt=1, lost="doum", others=("birch", "cedar", "doum"), steps=_SEALING),
    "a round after an unsent one": Scene(round=2, has=_UNSENT, lost=VICTIM, last=_SETTLED, kills=("train",)),
    "a round after an unsent one that could be retried": Scene(
        round=2, has=_UNSENT | _AGAIN, lost=VICTIM, last=_SETTLED, kills=("train",)
    ),
    "a round after one that was sealed in vain": Scene(round=2, has=_AGAIN, lost="birch", last=_PAID, kills=("train",)),
    "the end of a run": Scene(round=3, rounds=1, steps=("release",), kills=("release",)),
}


class Machines(Federation):
    """A federation whose sites have vaults, and end and start as processes do."""

    def __init__(
        self, folder: Path, scene: Scene, *, rounds: int, ledgers: Path | None = None, limit: float = 12.0
    ) -> None:
        names = (VICTIM, *scene.others)
        super().__init__(
            folder,
            people={"people": PEOPLE, "sites": names},
            ledgers=ledgers,
            run={"rounds": rounds, "report_metrics_every": scene.metrics_every},
            sites={"min_sites": 3, "min_subjects": 1, "population": {"default": PEOPLE}},
            training={"local_steps": 2},
            privacy={"epsilon": 2.0, "site_epsilon_limit": limit},
            sealing={"retry": scene.retries},
        )
        self._ledgers = ledgers or folder / "ledgers"
        for name in self.names:
            self.sites[name]._vault = Vault(folder / "vaults" / name, PASSPHRASE)

    def stop(self, site: str) -> None:
        """End a site's process; nothing of its memory is left."""
        self.sites[site].close()

    def start(self, site: str) -> Site:
        """Start another one on the files that lie there now."""
        old, folder, ledgers = self.sites[site], self.folder / "sites" / site, self._ledgers / site
        reopened: dict[str, Any] = {
            "registry": Registry(folder / "consent.db", old._key),
            "personal": PersonalLosses(ledgers / "personal.db"),
            "ledger": Ledger(ledgers / "ledger.db", old.ledger.budget, held_out=self.manifest.held_out),
            "store": SiteStore(folder / "state.db"),
            "log": old.identity.open_log(old.log.path, "federated", self.manifest.federation),
            "local_log": old.identity.open_log(old.local_log.path, "local", self.manifest.federation),
            "vault": Vault(self.folder / "vaults" / site, PASSPHRASE),
        }
        kept = {
            name: getattr(old, name) if hasattr(old, name) else getattr(old, f"_{name}")
            for name in inspect.signature(Site.__init__).parameters
            if name not in ("self", *reopened)
        }
        self.world.sites[site] = Site(**kept, **reopened)
        return self.world.sites[site]


# --- what a victim is wrapped in --------------------------------------------------------------------------------------


@dataclass
class Harness:
    """Watches the victim of one run, and ends its process at a point.

    Args:
        folder: The job's.
        scene: The round of interest.
        victim: What the victim keeps on its disk.
        point: Where to kill; empty: nowhere, but what is passed on the way is written down.
    """

    folder: Path
    scene: Scene
    victim: tuple[Path, ...]
    point: str = ""
    step: str = ""
    inside: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    trace: list[list[Any]] = field(default_factory=list)
    leaving: Envelope | None = None
    on_delivered: Callable[[str], None] = lambda _step: None

    def __post_init__(self) -> None:
        self._wire = os.open(self.folder / "wire.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._fsync, self._write, self._names = os.fsync, os.write, {p: n for n, p in POINTS.items()}
        self._files = self._look()

    def note(self, **what: Any) -> None:
        """Keep, durably and outside of the product, what happened."""
        self._write(self._wire, json.dumps(what).encode() + b"\n")
        self._fsync(self._wire)

    def reach(self, moment: str, action: str) -> str:
        """A moment has come: the name of the point that it is, if any. Does not return where the victim is killed."""
        if not self.step:
            return ""
        key = f"{moment} {action}"
        self.counts[key] += 1
        name = self._names.get(Point(self.step, moment, action, self.counts[key])) or next(
            (self._names[p] for p in self._needing(moment, action, self.counts[key]) if p in self._names), ""
        )
        if name and not self.point:
            files = self._look()
            changed = sorted(f for f in files.keys() | self._files.keys() if files.get(f) != self._files.get(f))
            self.trace.append(["point", name, sorted({f.removesuffix("-wal") for f in changed})])
            self._files = files
        if name and name == self.point:
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    def _needing(self, moment: str, action: str, nth: int) -> Iterator[Point]:
        return (Point(self.step, moment, action, nth, needs) for needs in self.scene.has)

    def durable(self, what: str, file: str) -> None:
        """Something was made durable by the victim."""
        if self.step and not self.point:
            self.trace.append(["durable", what, file])

    @contextmanager
    def around(self, action: str) -> Iterator[None]:
        """Right before and right after something; what is called meanwhile is inside of it."""
        self.reach("before", action)
        self.inside.append(action)
        try:
            yield
        finally:
            self.inside.pop()
        self.reach("after", action)

    def mine(self, path: Path | str) -> str:
        """The name of a file among the victim's; empty for anybody else's."""
        full = Path(path).absolute()
        return next((str(full.relative_to(root.parent)) for root in self.victim if full.is_relative_to(root)), "") or (
            full.name if full.parent == self.folder / "logs" and full.stem.lstrip(".") == VICTIM else ""
        )

    def _look(self) -> dict[str, str]:
        """A digest of every file of the victim's."""
        roots = [*self.victim, *(self.folder / "logs").glob(f"{VICTIM}.*")]
        files = [f for root in roots for f in ([root] if root.is_file() else sorted(root.rglob("*"))) if f.is_file()]
        return {self.mine(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if not f.name.endswith("-shm")}

    # --- the wrapping ---------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Wrap everything; for the rest of this process's life."""
        wrap(Site, "handle", self._handle)
        wrap(
            Ledger, "reserve", lambda real, s, charge, event: self._in(f"reserve {event.role}", real, s, charge, event)
        )
        wrap(Ledger, "expire", lambda real, *rest: self._in("expire", real, *rest))
        wrap(Ledger, "settle", lambda real, *rest: self._in("settle", real, *rest))
        wrap(Log, "append", lambda real, log, *entries: self._in(f"append {entries[0].KIND}", real, log, *entries))
        wrap(ParticipantSource, "take", lambda real, *rest: self._in("take", real, *rest))
        wrap(ParticipantSource, "hold", lambda real, *rest: self._in("hold", real, *rest))
        # Its connections are older than the watch over them; how far its clock has come is all that it writes here.
        wrap(Registry, "_put_forward", lambda real, *rest: [
            real(*rest), self.durable("commit", f"{VICTIM}/consent.db")][0])  # fmt: skip
        wrap(SnapshotStore, "put", lambda real, *rest: self._in("keep", real, *rest))
        wrap(SiteRun, "compute", self._compute)
        wrap(SiteStore, "put_model", lambda real, *rest: self._in("put model", real, *rest))
        wrap(SiteStore, "note_sightings", lambda real, *rest: self._in("note sightings", real, *rest))
        wrap(SiteStore, "commit_reply", lambda real, *rest, **named: self._in("commit reply", real, *rest, **named))
        wrap(SlotSession, "seal", lambda real, *rest: self._in("session seal", real, *rest))
        wrap(SlotSession, "unlock", lambda real, *rest: self._in("session unlock", real, *rest))
        wrap(LocalGrid, "_deliver", self._deliver)
        wrap(os, "write", self._os_write)
        wrap(os, "fsync", self._os_fsync)
        wrap(os, "replace", self._os_replace)
        connect, harness = sqlite3.connect, self

        class Watched(sqlite3.Connection):
            """Statements by name, and what they make durable."""

            file = ""

            def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
                return self._watched(super().execute, sql, *rest)

            def executemany(self, sql: str, *rest: Any) -> sqlite3.Cursor:
                return self._watched(super().executemany, sql, *rest)

            def _watched(self, real: Callable[..., sqlite3.Cursor], sql: str, *rest: Any) -> sqlite3.Cursor:
                verb = _verb(sql)
                within = f"{harness.inside[-1]}: {verb}" if harness.inside else verb
                before, open_before = self.total_changes, self.in_transaction
                harness.reach("before", within)
                done = real(sql, *rest)
                alone = not open_before and self.total_changes > before
                if not self.in_transaction and (alone or verb == "COMMIT") and self.file:
                    harness.durable("commit", self.file)
                harness.reach("after", within)
                return done

        def watched(path: Any, *args: Any, **kwargs: Any) -> sqlite3.Connection:
            made = connect(path, *args, factory=Watched, **kwargs)
            made.file = harness.mine(path)
            return made

        sqlite3.connect = watched  # type: ignore[assignment]

    def _in(self, action: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.around(action):
            return real(*args, **kwargs)

    def _handle(self, real: Callable[..., Envelope], site: Site, step: str, request: Envelope) -> Envelope:
        if site.name != VICTIM:
            return real(site, step, request)
        header = header_of(request)
        attempt = self.scene.attempt if step in ("seal", "unlock") else 0
        if (header.round, header.attempt) == (self.scene.round, attempt) and step in self.scene.steps:
            self.step, self.inside = step, []
            self.counts.clear()
            _keep_request(self.folder, step, request)
        self.reach("before", "handle")
        reply = real(site, step, request)
        answer = header_of(reply)
        shown = _shown(request) if step == "seal" else {}
        self.note(left=step, run=header.run, round=header.round, attempt=header.attempt, type=answer.type, shown=shown)
        self.reach("before", "hand over")
        return reply

    def _deliver(self, real: Callable[..., FlowerMessage], grid: LocalGrid, message: FlowerMessage) -> FlowerMessage:
        delivered = real(grid, message)
        if grid._site_of[message.metadata.dst_node_id] == VICTIM:
            self.reach("after", "hand over")
            self.step = ""
            self.on_delivered(message.metadata.group_id)
        return delivered

    def _compute(self, real: Callable[..., Any], run: SiteRun, round_: int, model: Any, *units: Any) -> Any:
        if run.site == VICTIM:
            persons = run.trainer._records.person_of
            train, held_out = ([int(i) for i in np.unique(persons[u])] for u in units)
            width = run.manifest.metric_width(round_)
            used = {"train": train if run.manifest.trains_in(round_) else [], "held_out": held_out if width else []}
            self.note(used=used, run=run.manifest.run, round=round_)
        return self._in("compute", real, run, round_, model, *units)

    def _os_write(self, real: Callable[..., int], descriptor: int, data: Any) -> int:
        done = real(descriptor, data)
        if file := self._file(descriptor):
            self.durable("write", file)
        return done

    def _os_fsync(self, real: Callable[..., None], descriptor: int) -> None:
        real(descriptor)
        if file := self._file(descriptor):
            self.durable("fsync", file)

    def _os_replace(self, real: Callable[..., None], source: Any, target: Any) -> None:
        real(source, target)
        if file := self.mine(target):
            self.durable("replace", file)

    def _file(self, descriptor: int) -> str:
        return self.mine(os.readlink(f"/proc/self/fd/{descriptor}")) if self.step else ""


def _verb(sql: str) -> str:
    words = sql.split()
    into = re.match(r"INSERT (?:OR \w+ )?INTO (\w+)", sql)
    return f"INSERT {into.group(1)}" if into else words[0]


def _shown(request: Envelope) -> dict[str, int]:
    """How long the log of each site was when it signed what a seal request holds of it."""
    statements = m.SealRequest.model_validate_json(request.body).statements
    return {s.site: int(header_of(s.envelope()).checkpoint.partition(":")[0]) for s in statements}


def _keep_request(folder: Path, step: str, request: Envelope) -> None:
    parts = {k: getattr(request, k).hex() for k in ("header", "signature", "body")}
    whole = {"step": step, **parts, "chunks": [c.hex() for c in request.chunks]}
    (folder / "request.json").write_text(json.dumps(whole))


# --- products that are broken on purpose ------------------------------------------------------------------------------


def _charge_late(harness: Harness) -> None:
    """The charge is written once the sealed update is with the coordinator."""
    late: list[tuple[Any, ...]] = []
    reserve = Ledger.reserve
    Ledger.reserve = lambda *args: late.append(args)  # type: ignore[method-assign]

    def pay(step: str) -> None:
        while step == "seal" and late:
            reserve(*late.pop())

    harness.on_delivered = pay


def _hold_nobody(_: Harness) -> None:
    """Whom a charge holds is not noted."""
    ParticipantSource.hold = lambda *_args: None  # type: ignore[method-assign]


def _log_first(_: Harness) -> None:
    """A charge is logged before it is made."""
    waiting: list[tuple[Any, ...]] = []
    reserve = Ledger.reserve
    Ledger.reserve = lambda *args: waiting.append(args)  # type: ignore[method-assign]

    def append(real: Callable[..., None], log: Log, *entries: audit.Record) -> None:
        real(log, *entries)
        while isinstance(entries[0], audit.Charged) and waiting:
            reserve(*waiting.pop())

    wrap(Log, "append", append)


def _give_back_first(harness: Harness) -> None:
    """A charge is given back before that is logged."""
    settle = Ledger.settle
    Ledger.settle = lambda *_args: None  # type: ignore[method-assign]
    ledgers: list[Ledger] = []
    wrap(Ledger, "open_charges", lambda real, ledger, prefix: [ledgers.append(ledger), real(ledger, prefix)][1])

    def append(real: Callable[..., None], log: Log, *entries: audit.Record) -> None:
        if isinstance(entries[0], audit.Settled):
            with harness.around("settle"):
                settle(ledgers[-1], entries[0].charge, entries[0].steps)
        real(log, *entries)

    wrap(Log, "append", append)


def _give_nothing_back(_: Harness) -> None:
    """What the log says was given back never is, and the round goes on."""
    Ledger.settle = lambda *_args: None  # type: ignore[method-assign]


def _note_no_peers(_: Harness) -> None:
    """What was seen of the peers' logs is forgotten."""
    SiteStore.note_sightings = lambda *_args: None  # type: ignore[method-assign]


def _log_nothing_sealed(_: Harness) -> None:
    """What is sealed is not logged."""
    wrap(Log, "append", lambda real, log, *e: None if isinstance(e[0], audit.Sealed) else real(log, *e))


def _log_in_two_transactions(_: Harness) -> None:
    """An entry is committed before the checkpoint over it."""

    def signed(real: Callable[..., str], log: Log) -> str:
        log._db.execute("COMMIT")
        log._db.execute("BEGIN IMMEDIATE")
        return real(log)

    wrap(Log, "_signed", signed)


def _give_back_what_left(_: Harness) -> None:
    """A site forgets that it has sealed, and takes the charge back in the next round."""

    def seal(real: Callable[..., Any], steps: RoundSteps, run: SiteRun, *rest: Any) -> Any:
        pending = run.pending
        answer = real(steps, run, *rest)
        run.pending, run.attempts = pending, {}
        return answer

    wrap(RoundSteps, "seal", seal)


def _write_something_more(_: Harness) -> None:
    """A new durable step, which no point knows."""

    def hold(real: Callable[..., None], source: ParticipantSource, *rest: Any) -> None:
        real(source, *rest)
        with open(source._personal._path.with_name("more"), "a") as stream:
            stream.write("more")
            stream.flush()
            os.fsync(stream.fileno())

    wrap(ParticipantSource, "hold", hold)


def _write_something_more_unsynced(_: Harness) -> None:
    """The same, and nothing tells that it was written but the file."""
    wrap(SlotSession, "seal", lambda real, session, *rest: [
        Path(_HERE[0], "sites", VICTIM, "more").write_text("more"), real(session, *rest)][1])  # fmt: skip


def _commit_twice(_: Harness) -> None:
    """One more transaction in a database that is known."""

    def reserve(real: Callable[..., None], ledger: Ledger, charge: str, event: Any) -> None:
        real(ledger, charge, event)
        real(ledger, f"{charge}/more", event)

    wrap(Ledger, "reserve", reserve)


def _log_twice(_: Harness) -> None:
    """One more entry."""

    def append(real: Callable[..., None], log: Log, *entries: audit.Record) -> None:
        real(log, *entries)
        if isinstance(entries[0], audit.SnapshotTaken):
            real(log, *entries)

    wrap(Log, "append", append)


def _hold_twice(_: Harness) -> None:
    """Whom a charge holds is noted once more."""
    wrap(PersonalLosses, "hold", lambda real, *args: [real(*args), real(*args)][1])


#: The folder of the job in this process.
_HERE: list[Path] = []
BROKEN: dict[str, Callable[[Harness], None]] = {
    "charges late": _charge_late,
    "holds nobody": _hold_nobody,
    "logs first": _log_first,
    "gives back first": _give_back_first,
    "gives nothing back": _give_nothing_back,
    "notes no peers": _note_no_peers,
    "logs nothing sealed": _log_nothing_sealed,
    "logs in two transactions": _log_in_two_transactions,
    "gives back what left": _give_back_what_left,
    "writes something more": _write_something_more,
    "writes something more, unsynced": _write_something_more_unsynced,
    "commits twice": _commit_twice,
    "logs twice": _log_twice,
    "holds twice": _hold_twice,
    # These are broken after the kill.
    "computes again": lambda _: None,
    "lets nothing expire": lambda _: None,
    "takes everything back at the start": lambda _: None,
}


# --- processes that share a ledger ------------------------------------------------------------------------------------

SHARED = RenyiBudget.for_limit(2.0, 1e-5)
PIECE = PrivacyEvent(
    role=Role.TRAIN, unit="subject", noise_multiplier=8.0, sample_rate=0.5, steps=1, max_grad_norm=1.0
)  # fmt: skip


@cache
def all_but_one() -> int:
    """How many pieces leave room for one more, and no second one."""
    pieces = 1
    while SHARED.admits([replace(PIECE, steps=pieces + 2)]):
        pieces += 1
    return pieces


def _reserve_until_refused(folder: Path, number: int, job: dict[str, Any]) -> None:
    """Charge until the budget refuses; note each charge once it was admitted."""
    ledger, admitted = Ledger(folder / "ledger.db", SHARED), 0
    meet(folder, "opened", job["processes"])  # opening takes the lock as well
    if job.get("one dies") and number == 0:

        def die(real: Callable[..., None], ledger: Ledger, charge: str, *rest: Any) -> None:
            real(ledger, charge, *rest)
            if charge == "0/3":  # written, not committed, and everybody else waits
                meet(folder, "waiting", job["processes"])
                time.sleep(0.05)  # until they ask for the lock
                os.kill(os.getpid(), signal.SIGKILL)

        wrap(Ledger, "_append", die)
    elif job.get("one dies"):
        while not list(folder.glob("waiting-*")):
            time.sleep(0.001)
        (folder / f"waiting-{os.getpid()}").touch()
    with (folder / f"admitted-{number}").open("a") as stream:
        while True:
            try:
                ledger.reserve(f"{number}/{admitted + 1}", PIECE)
            except BudgetError as error:
                stream.write(f"refused: {error.what}\n")
                return
            admitted += 1
            stream.write(f"{number}/{admitted}\n")
            stream.flush()
            time.sleep(0.002)


def _take_the_last(folder: Path, number: int, job: dict[str, Any]) -> None:
    """Open, wait until everybody has, and charge once."""
    if job.get("broken"):
        exclusive = Ledger._exclusive

        def reserve(ledger: Ledger, charge: str, event: PrivacyEvent) -> None:
            ledger.check([event])
            meet(folder, "checked", job["processes"])
            with exclusive(ledger):
                ledger._append(charge, "reserve", event)

        Ledger.reserve = reserve  # type: ignore[method-assign]
    ledger = Ledger(folder / "ledger.db", SHARED)
    meet(folder, "opened", job["processes"])
    try:
        ledger.reserve(f"{number}/1", PIECE)
    except BudgetError as error:
        (folder / f"admitted-{number}").write_text(f"refused: {error.what}\n")
    else:
        (folder / f"admitted-{number}").write_text(f"{number}/1\n")


def _run_a_federation(folder: Path, number: int, _: dict[str, Any]) -> None:
    """A whole run, as `simulate` does it; its limit admits one of them."""
    try:
        machines = Machines(folder / f"run-{number}", Scene(), rounds=1, ledgers=folder / "ledgers", limit=3.0)
        machines.world.check()
        machines.coordinator().run()
        said = "finished"
    except ConfideError as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said-{number}").write_text(said)


def meet(folder: Path, where: str, processes: int) -> None:
    """Wait until so many have come here."""
    (folder / f"{where}-{os.getpid()}").touch()
    while len(list(folder.glob(f"{where}-*"))) < processes:
        time.sleep(0.001)


_TOGETHER: dict[str, Callable[[Path, int, dict[str, Any]], None]] = {
    "reserve until refused": _reserve_until_refused,
    "take the last": _take_the_last,
    "run a federation": _run_a_federation,
}


def play_together(job: dict[str, Any]) -> None:
    """Do one thing in several processes that start at the same moment; how each ended."""
    folder, ends = Path(job["folder"]), []
    if job["together"] == "take the last":
        ledger = Ledger(folder / "ledger.db", SHARED)
        ledger.reserve("before", replace(PIECE, steps=all_but_one()))
        ledger.close()
    if job["together"] == "run a federation":
        first = Machines(folder / "first", Scene(), rounds=1, ledgers=folder / "ledgers", limit=3.0)
        first.world.check()  # enrols everybody
        first.world.close()
    for number in range(job["processes"]):
        pid = os.fork()
        if pid == 0:
            signal.alarm(_PATIENCE)
            try:
                meet(folder, "started", job["processes"])
                _TOGETHER[job["together"]](folder, number, job)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        ends.append(pid)
    (folder / "ends.json").write_text(json.dumps([os.waitpid(pid, 0)[1] for pid in ends]))


# --- a job ------------------------------------------------------------------------------------------------------------


def gaps(trace: list[list[Any]]) -> list[tuple[str, str, list[str], list[str]]]:
    """(point, next point, what was made durable between them, files that changed between them)."""
    points = [i for i, (what, *_) in enumerate(trace) if what == "point"]
    return [
        (trace[i][1], trace[j][1], [f"{what} {file}" for _, what, file in trace[i + 1 : j]], trace[j][2])
        for i, j in pairwise(points)
    ]


def _killed(machines: Machines, job: dict[str, Any], folder: Path, scene: Scene) -> None:
    """The process that is killed, or that comes to its end where no point is named."""
    here = machines.folder.absolute()
    victim = tuple(here / part / VICTIM for part in ("sites", "ledgers", "vaults"))
    harness = Harness(here, scene, victim, job.get("point", ""))
    if job.get("broken"):
        BROKEN[job["broken"]](harness)
    harness.install()
    for name in machines.names:
        machines.start(name)

    def drop(message: FlowerMessage, site: str) -> bool:
        if site != scene.lost or message.metadata.group_id != "seal":
            return False
        header = header_of(from_records(message.content))
        return header.round == 1 and (scene.attempt == 0 or header.attempt < scene.attempt)

    machines.coordinator(machines.grid(drop)).run()
    (folder / "trace.json").write_text(json.dumps(harness.trace))


def _restarted(machines: Machines, broken: str) -> dict[str, Any]:
    """Start the victim on what is there, and send the request again that it died over."""
    computed: list[int] = []
    wrap(SiteRun, "compute", lambda real, run, round_, *rest: [computed.append(round_), real(run, round_, *rest)][1])
    if broken == "computes again":
        Ledger.stands = lambda *_: False  # type: ignore[method-assign]
    if broken in ("lets nothing expire", "takes everything back at the start"):
        Ledger.expire = lambda *_: None  # type: ignore[method-assign]
    try:
        site = machines.start(VICTIM)
    except ConfideError as error:
        return {"starts": f"{type(error).__name__}: {error.what}"}
    asked = json.loads((machines.folder / "request.json").read_text())
    parts = (bytes.fromhex(asked[k]) for k in ("header", "signature", "body"))
    request = Envelope(*parts, tuple(bytes.fromhex(c) for c in asked["chunks"]))
    header = header_of(request)
    place = machines.address(asked["step"], header.round, attempt=header.attempt)
    stored = site._store.reply_digest(place.model_copy(update={"key_epoch": header.key_epoch}))
    answer = site.handle(asked["step"], request)
    site.close()
    try:
        machines.start(VICTIM).close()
    except ConfideError as error:
        return {"starts": f"{type(error).__name__}: {error.what}"}
    said = header_of(answer).type
    reason = m.Refusal.model_validate_json(answer.body).reason if said == m.Refusal.TYPE else ""
    return {"starts": "", "step": asked["step"], "round": header.round, "stored": stored, "digest": answer.digest,
            "type": said, "reason": reason, "computed": list(computed)}  # fmt: skip


#: By scene: the folder that a federation was built in, and the federation; its sites are stopped.
_BUILT: dict[str, tuple[Path, Machines]] = {}


def _build(folder: Path, scene: Scene) -> tuple[Path, Machines]:
    """A federation whose paths are relative, and whose victim has persons of both roles."""
    for attempt in count():
        made = folder.absolute() / f"{attempt}"
        made.mkdir(parents=True)
        os.chdir(made)
        machines = Machines(Path(), scene, rounds=scene.rounds or scene.round)
        roles = set(machines.sites[VICTIM].source(machines.manifest)._held_out)
        for name in machines.names:
            machines.stop(name)
        if len(roles) == 2:
            break
    return made, machines


def _job(job: dict[str, Any]) -> None:
    """Kill, restart, and run again."""
    folder, scene, (made, machines) = Path(job["folder"]), SCENES[job["scene"]], _BUILT[job["scene"]]
    # Its paths are relative: where this process is, they name a copy of what was built.
    shutil.copytree(made, folder / "run")
    os.chdir(folder / "run")
    _HERE[:] = [folder / "run"]
    victim = machines.sites[VICTIM]
    facts: dict[str, Any] = {
        "manifest": machines.manifest.to_bytes().decode(),
        "keys": victim.identity.key.private_bytes_raw().hex(),
        "places": [int(i) for i in victim.source(machines.manifest)._places],
    }
    pid = os.fork()
    if pid == 0:
        signal.alarm(_PATIENCE)
        _killed(machines, job, folder, scene)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    facts["signal"] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    if job.get("point") and facts["signal"] == signal.SIGKILL:
        _copy(machines, folder / "killed")
        facts["restart"] = _restarted(machines, job.get("broken", ""))
        _copy(machines, folder / "restarted")
        if job.get("next", True) and not facts["restart"]["starts"] and _is_new(machines, job.get("seen", "")):
            following = Machines(folder / "next", Scene(), rounds=1, ledgers=machines.folder / "ledgers")
            if job.get("broken") == "takes everything back at the start":
                ledger = following.sites[VICTIM].ledger
                for charge in ledger.open_charges(""):
                    ledger.settle(charge, 0)
            facts["next"] = following.manifest.to_bytes().decode()
            facts["finished"] = following.coordinator().run().model
            following.world.close()
    (folder / "facts.json").write_text(json.dumps(facts))


def _is_new(machines: Machines, seen: str) -> bool:
    """Does what a fresh run would find of the victim (its ledger folder, closed in good order) say what none said
    before that was seen in this folder?"""
    if not seen:
        return True
    folder = machines.folder / "ledgers" / VICTIM
    tables = {"ledger.db": ("genesis", "entry", "roles"), "personal.db": ("person", "held", "forgotten", "kept")}
    assert {f.name for f in folder.iterdir()} == {*tables, "site.key"}
    said = []
    for file, names in tables.items():
        with closing(sqlite3.connect(folder / file)) as db:
            of_schema = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            assert {name for (name,) in of_schema} == set(names)
            said += [db.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in names]  # noqa: S608
    text = repr(said)
    try:
        (Path(seen) / hashlib.sha256(text.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _copy(machines: Machines, to: Path) -> None:
    """What the victim keeps, as it is now."""
    shutil.copytree(machines.folder / "ledgers" / VICTIM, to / "ledger")
    shutil.copytree(machines.folder / "sites" / VICTIM, to / "site")
    shutil.copy(machines.folder / "wire.jsonl", to)


def main(warm: Path, at_once: int) -> None:
    """Answer each line of jobs with a line of their exit codes."""
    torch.set_num_threads(1)
    for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
        setattr(vault_module, name, cheap)
    # Everything that is slow for the first time (imports, calibration) is done once, here, and then forked.
    for kind, scene in {(scene.rounds or scene.round, scene.metrics_every): scene for scene in SCENES.values()}.items():
        warmed = Machines(warm / "-".join(map(str, kind)), scene, rounds=scene.rounds or scene.round)
        warmed.coordinator().run()
        warmed.world.close()
    for number, (name, scene) in enumerate(SCENES.items()):
        _BUILT[name] = _build(warm / f"{number}", scene)
    all_but_one()
    rdp_epsilon([PIECE], SHARED.delta)
    answer_jobs(lambda job: (_job if "scene" in job else play_together)(job), at_once, 2 * _PATIENCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
