"""A site is killed with SIGKILL at every step of a round: its ledger holds what left, and it goes on.

`killing.POINTS` is the table of moments; that it is complete is tested here as well, by watching rounds in which nobody
is killed. Each check has a control: a site that is broken on purpose and fails it.
"""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.privacy.audit import records as audit
from confide.privacy.audit.log import stored_entries
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role, rdp_epsilon
from confide.privacy.dp.events import event_from_json, merge_events
from confide.privacy.dp.personal import PersonalLosses
from confide.protocol import messages as m
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.sightings import watched_by
from tests.clients.conftest import Stage
from tests.clients.killing import POINTS, SCENES, VICTIM, gaps

SCENES_AND_STEPS = [
    pytest.param(scene, step, id=f"{step} in {scene}")
    for scene, what in SCENES.items()
    for step in ("train", "seal", "unlock", "release")
    if what.deaths(step)
]


@dataclass(frozen=True)
class Case:
    """What a job left."""

    folder: Path
    stack: ExitStack

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What its processes told."""
        return json.loads((self.folder / "facts.json").read_text())

    @cached_property
    def manifest(self) -> Manifest:
        """The run that was killed."""
        return Manifest.from_bytes(self.facts["manifest"].encode())

    @cached_property
    def wire(self) -> list[dict[str, Any]]:
        """What the harness noted of the victim, up to the kill."""
        return [json.loads(line) for line in (self.folder / "killed" / "wire.jsonl").read_text().splitlines()]

    @property
    def sealed(self) -> list[int]:
        """Rounds of which a sealed payload left."""
        return sorted({w["round"] for w in self.wire if w.get("type") == m.SealReply.TYPE})

    @property
    def committed(self) -> list[int]:
        """Rounds of which a commitment left."""
        return sorted({w["round"] for w in self.wire if w.get("type") == m.TrainReply.TYPE})

    def ledger(self, folder: Path) -> Ledger:
        """The victim's ledger as it lay there at a time."""
        privacy = self.manifest.privacy
        budget = RenyiBudget.for_limit(privacy.site_epsilon_limit, privacy.delta)
        opened = Ledger(folder / "ledger.db", budget, held_out=self.manifest.held_out)
        self.stack.callback(opened.close)
        return opened

    @cached_property
    def killed(self) -> Ledger:
        """Right after the kill."""
        return self.ledger(self.folder / "killed" / "ledger")

    @cached_property
    def restarted(self) -> Ledger:
        """After the victim was restarted and asked again."""
        return self.ledger(self.folder / "restarted" / "ledger")

    @cached_property
    def final(self) -> Ledger:
        """After a fresh run."""
        return self.ledger(self.folder / "run" / "ledgers" / VICTIM)

    @cached_property
    def personal(self) -> PersonalLosses:
        """Whom the charges hold, right after the kill."""
        opened = PersonalLosses(self.folder / "killed" / "ledger" / "personal.db")
        self.stack.callback(opened.close)
        return opened

    def log(self, kind: str) -> list[audit.Record]:
        """Entries of a log of the victim's, right after the kill; fails where it does not open and take another one."""
        identity = Identity(VICTIM, Ed25519PrivateKey.from_private_bytes(bytes.fromhex(self.facts["keys"])))
        path = self.folder / "killed" / "site" / f"{kind}.db"
        log = identity.open_log(path, kind, self.manifest.federation)
        self.stack.callback(log.close)
        entries = list(log.entries())
        log.append(audit.LocalRefusal(run=self.manifest.run, step="train", reason="one more"))
        assert [entry for entry, _ in stored_entries(path)][:-1] == entries
        assert log.checkpoint().size == len(entries) + 1
        return entries

    def charge(self, round_: int, role: Role) -> str:
        """What a charge is called."""
        return f"{self.manifest.run}/{round_}/{role.value}"


@pytest.fixture
def cases(stage: Stage) -> Iterator[Any]:
    """Plays jobs."""
    with ExitStack() as stack:
        yield lambda *jobs: [Case(folder, stack) for folder in stage.play(*jobs)]


# --- what must hold ---------------------------------------------------------------------------------------------------


def check_charged(case: Case) -> None:
    """ε of the ledger, for each role, covers what left."""
    left = [event for round_ in case.sealed for event in case.manifest.charges(round_)]
    for role in Role:
        of_role = [e for e in left if e.role is role]
        epsilon = rdp_epsilon(merge_events(of_role), case.manifest.privacy.delta)
        assert case.killed.epsilon(role) >= epsilon, f"less is charged to {role} than left"
    for round_ in case.committed:
        for event in case.manifest.charges(round_):
            assert case.charge(round_, event.role) in case.killed.charges(), "a commitment left for nothing"


def check_persons(case: Case) -> None:
    """Everybody whose records were read for what left is held by its charges."""
    places, charges, delta = case.facts["places"], case.killed.charges(), case.manifest.privacy.delta
    exposed: dict[int, list[PrivacyEvent]] = {}
    seen = set()
    for used in (w for w in case.wire if "used" in w and w["round"] in case.sealed):
        seen.add(used["round"])
        for event in case.manifest.charges(used["round"]):
            held = case.personal._held.get(case.charge(used["round"], event.role), np.zeros(len(places), np.bool_))
            for place in (places[i] for i in used["used"][event.role.value]):
                assert held[place], f"somebody was read in round {used['round']} whom no charge holds"
                exposed.setdefault(place, []).append(event)
    assert seen == set(case.sealed)
    assert bool(exposed) == bool(seen), "the control: somebody was read"
    epsilons = case.personal.epsilons(charges, delta)
    for place, events in exposed.items():
        assert epsilons[place] >= rdp_epsilon(merge_events(events), delta) * (1 - 1e-12)


def check_logs(case: Case) -> None:
    """The logs open and go on; a charge that they name is in the ledger, nothing is given back that they do not name,
    and what left is named."""
    entries, _ = case.log("federated"), case.log("local")
    settled, open_ = case.killed._settled, set(case.killed.open_charges(""))
    latest = next(reversed(case.killed.charges()), "").rpartition("/")[0]
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, audit.Charged):
            assert case.killed._reserved.get(entry.charge) == event_from_json(entry.event), "logged, but not charged"
        if isinstance(entry, audit.Settled):
            # The kill may have come between the two; nothing else does, in the log or in the ledger.
            between = entry.charge in open_ and number == len(entries) and latest == entry.charge.rpartition("/")[0]
            given_back = settled.get(entry.charge)
            assert between or (given_back and given_back.steps == entry.steps), "logged, but not given back"
    named = {e.charge: e.steps for e in entries if isinstance(e, audit.Settled)}
    assert {c: e.steps for c, e in settled.items()}.items() <= named.items(), "given back, but not logged"
    for kind, wanted in ((audit.Sealed, m.SealReply), (audit.Unlocked, m.UnlockReply), (audit.UpdateCommitted,
                                                                                        m.TrainReply)):  # fmt: skip
        named = {(e.round, getattr(e, "attempt", 0)) for e in entries if isinstance(e, kind)}
        left = {(w["round"], w["attempt"]) for w in case.wire if w.get("type") == wanted.TYPE}
        assert left <= named, f"{wanted.TYPE} left unlogged"
    charged = {e.charge for e in entries if isinstance(e, audit.Charged)}
    for round_ in case.committed:
        assert {case.charge(round_, e.role) for e in case.manifest.charges(round_)} <= charged


def check_peers(case: Case) -> None:
    """What a site has sealed with, it has kept: the state of each neighbour's log that the request showed."""
    seals = [w for w in case.wire if w.get("type") == m.SealReply.TYPE]
    watched = [case.manifest.member(s) for s in watched_by(case.manifest, VICTIM)]
    with closing(sqlite3.connect(case.folder / "killed" / "site" / "state.db")) as db:
        kept = dict(db.execute("SELECT key, size FROM sighting WHERE federation = ?", (case.manifest.federation,)))
    for shown in (w["shown"] for w in seals):
        seen = {member.public_key: shown[member.site] for member in watched if member and member.site in shown}
        assert seen, "the control: there are neighbours"
        assert all(kept.get(key, 0) >= size for key, size in seen.items()), "sealed with what it did not keep"


def check_restart(case: Case) -> None:
    """The site starts, and so it does once more. The same request again: the stored answer, or none; nothing is
    computed twice under one charge, and what the killed process charged stands for ever."""
    restart = case.facts["restart"]
    assert not restart["starts"], f"a restarted site does not start: {restart['starts']}"
    before, after = case.killed.charges(), case.restarted.charges()
    assert not before.keys() & set(case.restarted.open_charges("")), "charges of a dead process may be given back"
    paid = [c for c in before if c.startswith(f"{case.manifest.run}/{restart['round']}/")]
    assert {c: after.get(c) for c in before} == before, "a restart took something back"
    if restart["stored"] is not None:
        assert restart["digest"] == restart["stored"], "answered twice"
        assert restart["computed"] == []
    elif restart["step"] == "train" and not paid:
        assert restart["type"] == m.TrainReply.TYPE, f"a restarted site does not go on: {restart['reason']}"
        assert restart["computed"] == [restart["round"]]
        new = {case.charge(restart["round"], e.role): e for e in case.manifest.charges(restart["round"])}
        assert after == before | new
        return
    elif restart["step"] == "release":
        assert restart["type"] == m.ReleaseReply.TYPE, f"a restarted site does not go on: {restart['reason']}"
    else:
        assert restart["computed"] == [], "computed twice for one charge"
        assert restart["type"] == m.Refusal.TYPE
        assert "charged before" in restart["reason"] or "left to" in restart["reason"]
    assert after == before


def check_next_run(case: Case) -> None:
    """A fresh run finishes with the same ledger; its charges come on top, to the last step."""
    if "next" not in case.facts and case.facts["restart"]["starts"] == "":
        return  # another case made one, with a ledger that said the same
    following = Manifest.from_bytes(case.facts["next"].encode())
    assert case.facts["finished"]
    new = {
        f"{following.run}/{round_}/{event.role.value}": event
        for round_ in range(1, following.rounds + 2)
        for event in following.charges(round_)
    }
    old = case.restarted.charges()
    assert case.final.charges() == old | new, "the total is not what was there and what came"
    for role in Role:
        events = merge_events(e for e in [*old.values(), *new.values()] if e.role is role)
        assert case.final.epsilon(role) == pytest.approx(rdp_epsilon(events, case.manifest.privacy.delta))


CHECKS = (check_charged, check_persons, check_logs, check_peers, check_restart, check_next_run)


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scene", "step"), SCENES_AND_STEPS)
def test_wherever_a_site_is_killed_its_ledger_holds_what_left_and_it_goes_on(
    cases: Any, tmp_path: Path, scene: str, step: str
) -> None:
    """A fresh run is made with every ledger that says something new."""
    points = SCENES[scene].deaths(step)
    found, wrong = cases(*({"scene": scene, "point": point, "seen": str(tmp_path)} for point in points)), {}
    for point, case in zip(points, found, strict=True):
        assert case.facts["signal"] == signal.SIGKILL, f"nobody came by at {point!r}"
        for check in CHECKS:
            try:
                check(case)
            except Exception as error:
                wrong[f"{point} [{check.__name__}]"] = str(error).splitlines()[0]
    assert wrong == {}
    assert sum("next" in case.facts for case in found) == len(list(tmp_path.iterdir())) > 0
    if step == "seal":
        assert len({tuple(case.sealed) for case in found}) == 2 - (SCENES[scene].attempt > 0), "the control: some left"


@pytest.mark.parametrize("scene", SCENES)
def test_the_table_of_points_is_complete(cases: Any, scene: str) -> None:
    """Nobody is killed: every point is passed once, in order, and between two of them one thing at most is made
    durable: the one that the table says."""
    (case,) = cases({"scene": scene})
    assert case.facts["signal"] == 0
    trace = json.loads((case.folder / "trace.json").read_text())
    assert [name for what, name, *_ in trace if what == "point"] == SCENES[scene].points()
    assert incomplete(trace) == {}
    durable = {" ".join(d) for what, *d in trace if what == "durable"}
    assert {"commit ash/federated.db", "commit ash/state.db"} <= durable, "the control: it was watched"
    if "train" in SCENES[scene].steps:
        assert {"commit ash/ledger.db", "commit ash/personal.db", "commit ash/local.db"} <= durable


def incomplete(trace: list[list[Any]]) -> dict[str, list[str]]:
    """Neighbouring points between which something else is made durable than the table says, and what."""
    found = {}
    for before, after, durable, changed in gaps(trace):
        unexplained = [file for file in changed if file not in {d.split(" ", 1)[1] for d in durable}]
        if [d.split(" ", 1)[0] for d in durable] != POINTS[after].after or unexplained:
            found[f"{before} | {after}"] = [*durable, *unexplained]
    return found


@pytest.mark.parametrize(
    "broken", ["writes something more", "writes something more, unsynced", "commits twice", "logs twice", "holds twice"]
)
def test_a_new_durable_step_without_a_point_is_noticed(cases: Any, broken: str) -> None:
    (case,) = cases({"scene": "a plain round", "broken": broken})
    assert len(incomplete(json.loads((case.folder / "trace.json").read_text()))) == 1


def test_every_point_belongs_to_a_scene_that_somebody_is_killed_in() -> None:
    killed = {name for scene in SCENES.values() for step in scene.kills for name in scene.deaths(step)}
    assert killed == set(POINTS)
    assert len(set(POINTS.values())) == len(POINTS)


_LEFT, _LOGGED = "seal: the reply has left", "train: 'charged train' is committed"
_UNLOGGED, _PAYING = "train: 'settled' is written", "train: about to charge train"
BROKEN = [
    ("charges late", "a plain round", _LEFT, check_charged, "less is charged"),
    ("charges late", "a plain round", "train: the reply has left", check_charged, "for nothing"),
    ("charges late", "a plain round", "train: the reply has left", check_restart, "does not hold charge"),
    ("holds nobody", "a plain round", _LEFT, check_persons, "whom no charge holds"),
    ("logs first", "a plain round", _LOGGED, check_logs, "logged, but not charged"),
    ("logs first", "a plain round", _LOGGED, check_restart, "does not hold charge"),
    ("gives back first", "a round after an unsent one", _UNLOGGED, check_logs, "given back, but not logged"),
    ("gives back first", "a round after an unsent one", _UNLOGGED, check_restart, "gives back more"),
    ("gives nothing back", "a round after an unsent one", "train: the charge for train is committed", check_logs,
     "logged, but not given back"),
    ("logs nothing sealed", "a plain round", _LEFT, check_logs, "left unlogged"),
    ("logs in two transactions", "a plain round", _LOGGED, check_restart, "does not hold what its own checkpoint says"),
    ("notes no peers", "a plain round", _LEFT, check_peers, "did not keep"),
    ("gives back what left", "a metric round", _PAYING, check_charged, "less is charged"),
    ("gives back what left", "a round after one that was sealed in vain", _PAYING, check_charged, "less is charged"),
    ("computes again", "a plain round", "train: the charge for train is committed", check_restart, "computed twice"),
    ("lets nothing expire", "a plain round", _LEFT, check_restart, "may be given back"),
    ("takes everything back at the start", "a plain round", _LEFT, check_next_run, "the total is not"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "scene", "point", "check", "why"), BROKEN, ids=[f"{b[0]}-{b[2]}-{b[4]}" for b in BROKEN]
)
def test_a_site_that_is_broken_on_purpose_does_not_pass(
    cases: Any, broken: str, scene: str, point: str, check: Any, why: str
) -> None:
    """The control of everything above."""
    following = check is check_next_run
    honest, case = cases(
        {"scene": scene, "point": point, "next": following},
        {"scene": scene, "point": point, "broken": broken, "next": following},
    )
    assert honest.facts["signal"] == case.facts["signal"] == signal.SIGKILL
    check(honest)
    with pytest.raises(AssertionError, match=why):
        check(case)
