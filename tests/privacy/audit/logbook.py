"""The logs of a finished run in the hands of somebody who holds keys: read, change, sign again.

A test says exactly which keys the liar holds: `write(party)` signs one party's log with that party's own key and leaves
everybody else's alone; `conspire()` has *all* parties rewrite what they recorded of each other, so that nothing but the
meaning of the entries can tell.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import confide
from confide.privacy.audit import records as r
from confide.privacy.audit.checkpoint import Checkpoint, sign_note
from confide.privacy.audit.entries import encode
from confide.privacy.audit.log import export_log, parse_line
from confide.privacy.audit.merkle import leaf_hash, tree_root
from confide.protocol.identity import Identity
from confide.simulations import keeping, place, world
from confide.simulations.result import Progress, Result

COORDINATOR = "coordinator"
Find = Callable[[r.Record], bool]


class KeyRing:
    """Identities by name: worlds made with one ring are run by the same people with the same keys."""

    def __init__(self) -> None:
        self.identities: dict[str, Identity] = {}

    def generate(self, name: str) -> Identity:
        """In place of `Identity.generate`."""
        return self.identities.setdefault(name, Identity.generate(name))

    def simulate(
        self,
        tree: Mapping[str, Any],
        out: Path,
        progress: Callable[[Progress], None] = lambda _: None,
        before_round: Callable[[world.World, int], None] = lambda _w, _r: None,
    ) -> Result:
        """`confide.simulate` under these keys; `before_round` is told of the world."""
        ring = self

        class RingWorld(world.World):
            def before_round(self, round_: int) -> None:
                super().before_round(round_)
                before_round(self, round_)

        class RingIdentity(Identity):
            @classmethod
            def generate(cls, name: str) -> Identity:
                return ring.generate(name)

        with (
            mock.patch.object(world, "Identity", RingIdentity),
            mock.patch.object(keeping.Keeping, "identity", lambda _, party: ring.generate(party)),
            mock.patch.object(place, "World", RingWorld),
        ):
            return confide.simulate(tree, out=out, progress=progress)


def databases(folder: Path) -> dict[Path, Path]:
    """The logs of a run as its parties hold them, by the place of their exports."""
    found = {folder / "logs" / f"{COORDINATOR}.log": folder / "sites" / f"{COORDINATOR}.db"}
    for site in sorted(p for p in (folder / "sites").iterdir() if p.is_dir()):
        found[folder / "logs" / f"{site.name}.log"] = site / "federated.db"
        found[site / "local.log"] = site / "local.db"
    return found


def export_left(folder: Path) -> None:
    """Export every log of a run that did not come to do it, without a key."""
    for path, database in databases(folder).items():
        export_log(database, path)


@dataclass(frozen=True)
class Run:
    """A run's output folder, and the keys of everybody who took part."""

    folder: Path
    keys: Mapping[str, Identity]
    tree: Mapping[str, Any]
    result: Result | None = None

    def copy(self, to: Path) -> Run:
        """The same files elsewhere; what a checker never reads (databases, ledgers, figures) stays behind."""
        shutil.copytree(self.folder, to, ignore=shutil.ignore_patterns("*.db*", "ledgers", "figures"))
        return replace(self, folder=to)

    @property
    def sites(self) -> list[str]:
        """The sites' names, sorted."""
        return sorted(set(self.keys) - {COORDINATOR})

    def log(self, party: str, *, local: bool = False) -> Path:
        """Path of an exported log."""
        return self.folder / "sites" / party / "local.log" if local else self.folder / "logs" / f"{party}.log"

    def all_logs(self) -> list[Path]:
        """Every exported log in the folder: coordinator's, federated, local."""
        return [
            *(self.log(p) for p in (COORDINATOR, *self.sites)),
            *(self.log(s, local=True) for s in self.sites),
        ]

    def records(self, party: str, *, local: bool = False) -> list[r.Record]:
        """What a log says."""
        return [parse_line(line)[1] for line in self.log(party, local=local).read_bytes().splitlines()]


@dataclass(eq=False)
class Line:
    """One entry that may be changed."""

    record: r.Record
    at: int
    salt: bytes

    @property
    def data(self) -> bytes:
        """The line in the file."""
        return self.salt.hex().encode() + b" " + encode(self.record, self.at) + b"\n"

    @property
    def leaf(self) -> bytes:
        """Its leaf hash."""
        return leaf_hash(self.salt + encode(self.record, self.at))


class Logbook:
    """The logs of a run, entry by entry."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.logs: dict[str, list[Line]] = {p: self._read(p) for p in (COORDINATOR, *run.sites)}
        self._original = {party: list(lines) for party, lines in self.logs.items()}
        self._read_before = {party: run.log(party).read_bytes() for party in self.logs}
        self._states = {
            self.checkpoint(party, size).short: (party, size)
            for party, lines in self.logs.items()
            for size in range(len(lines) + 1)
        }

    def _read(self, party: str) -> list[Line]:
        found = []
        for line in self.run.log(party).read_bytes().splitlines():
            _, record, at = parse_line(line)
            found.append(Line(record, at, bytes.fromhex(line.split(b" ")[0].decode())))
        return found

    def index(self, party: str, kind: type[r.Record], **where: Any) -> int:
        """Number of the first entry of a kind with these fields."""
        for number, line in enumerate(self.logs[party]):
            if isinstance(line.record, kind) and all(getattr(line.record, k) == v for k, v in where.items()):
                return number
        raise LookupError(f"{party} has no {kind.__name__} with {where}")

    def change(self, party: str, number: int, **changes: Any) -> None:
        """Give an entry other contents, unchecked."""
        line = self.logs[party][number]
        changed = r.Record.__new__(type(line.record))
        values = {f.name: getattr(line.record, f.name) for f in fields(line.record)} | changes
        for name, value in values.items():
            object.__setattr__(changed, name, value)
        line.record = changed

    def insert(self, party: str, number: int, record: r.Record) -> None:
        """A new entry before `number`, at the same time."""
        lines = self.logs[party]
        at = lines[min(number, len(lines) - 1)].at
        lines.insert(number, Line(record, at, secrets.token_bytes(16)))

    def checkpoint(self, party: str, size: int | None = None) -> Checkpoint:
        """State of a log at a size, default the whole."""
        lines = self.logs[party][:size]
        kind = COORDINATOR if party == COORDINATOR else "federated"
        return Checkpoint(f"confide/simulation/{party}/{kind}", len(lines), tree_root([x.leaf for x in lines]))

    def write(self, party: str, *, sign: bool = True) -> None:
        """Write one party's log, and sign its checkpoint with that party's own key."""
        path, identity = self.run.log(party), self.run.keys[party]
        path.write_bytes(b"".join(line.data for line in self.logs[party]))
        if sign:
            note = sign_note(self.checkpoint(party), party, identity.public_key, identity.sign)
            path.with_suffix(".checkpoint").write_text(note, encoding="utf-8")

    def restore(self, party: str) -> None:
        """The log as it was read (its checkpoint stays as it is)."""
        self.run.log(party).write_bytes(self._read_before[party])

    def conspire(self) -> None:
        """Everybody signs, and everybody records of each other what the changed logs say."""
        for _ in range(200):
            changed = False
            for party, lines in self.logs.items():
                for number, line in enumerate(lines):
                    references = self._references(line.record)
                    if any(getattr(line.record, k) != v for k, v in references.items()):
                        self.change(party, number, **references)
                        changed = True
            if not changed:
                break
        else:
            raise RuntimeError("the logs' references to each other never settle")
        for party in self.logs:
            self.write(party)

    def _references(self, record: r.Record) -> dict[str, Any]:
        """Every `size:root` in the record, whoever's it is, as the changed logs have it."""
        found: dict[str, Any] = {}
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, str):
                found[field.name] = self._moved(value)
            elif isinstance(value, list):
                found[field.name] = [self._moved(part) for part in value]
        return found

    def _moved(self, seen: str) -> str:
        """The state of the changed log that holds what the original held at this state; other text stays."""
        if seen not in self._states:
            return seen
        party, before = self._states[seen]
        held = set(map(id, self._original[party][:before]))
        size = max((i + 1 for i, line in enumerate(self.logs[party]) if id(line) in held), default=0)
        moved = self.checkpoint(party, size).short
        self._states[moved] = (party, before)  # references are remade until nothing changes any more
        return moved
