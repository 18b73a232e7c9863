"""The round loop among sites that die, lag, disagree or lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage

import confide.server.exchange as exchange_module
from confide.clients.training.trainer import LocalTrainer
from confide.errors import ConfideError, PeerError, SealingError
from confide.privacy.audit import records as audit
from confide.privacy.digest import digest
from confide.privacy.sealing.accumulate import LatticeAccumulator
from confide.privacy.sealing.lattice import SUMMED_BYTES
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from confide.protocol.flower import from_records
from confide.server.coordinator import Coordinator, RoundOutcome
from confide.simulations.engines.grid import LocalGrid
from tests.attacks.federation import Federation, header_of, open_federation, resign

Drop = Callable[[FlowerMessage, str], bool]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Four sites, three rounds."""
    with open_federation(tmp_path / "f") as made:
        yield made


class Script:
    """Drops or changes messages by step, round and site; the round is the coordinator's own."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.round = federation, 0
        self.down: set[tuple[str, int, str]] = set()
        self.lies: dict[tuple[str, int, str], Callable[[Envelope], Envelope | None]] = {}
        self.outcomes: list[RoundOutcome] = []

    def drop(self, message: FlowerMessage, site: str) -> bool:
        """Is the node down for this message?"""
        return (message.metadata.message_type.split(".")[1], self.round, site) in self.down

    def tamper(self, site: str, request: Envelope, reply: Envelope) -> Envelope | None:
        """What arrives in place of a site's reply; None if nothing does."""
        header = header_of(request)
        return self.lies.get((header.step, header.round, site), lambda e: e)(reply)

    def coordinator(self) -> Coordinator:
        """The real coordinator over the scripted grid."""
        return self.federation.coordinator(
            self.federation.grid(self.drop, self.tamper),
            before_round=lambda round_: setattr(self, "round", round_),
            after_round=self.outcomes.append,
        )

    def cohorts(self) -> list[tuple[str, ...]]:
        """Of every round; empty brackets for an abandoned one."""
        return [() if o.abandoned else o.cohort for o in self.outcomes]


@pytest.fixture
def script(federation: Federation) -> Script:
    """An empty script."""
    return Script(federation)


def digests(federation: Federation) -> set[bytes]:
    """Models of all sites."""
    return {federation.model(s).weights.tobytes() for s in federation.names}


def steps(federation: Federation, site: str, round_: int) -> int:
    """Training steps that a round still costs a site."""
    return sum(n for charge, n in federation.charges(site, round_).items() if charge.endswith("train"))


def test_an_undisturbed_run_holds_every_site_in_every_round(federation: Federation, script: Script) -> None:
    """The control of the file."""
    coordinator = script.coordinator()
    released = coordinator.run()
    assert script.cohorts() == [federation.names] * 4
    assert coordinator.refusals == {}
    assert faults(federation) == []
    assert digests(federation) == {released.weights.astype("<f4").tobytes()}
    assert [o.metrics_round for o in script.outcomes] == [None, None, None, 3]
    assert released.metrics_round == 4


@pytest.mark.parametrize(
    "sealing",
    [
        {"profile": "open"}, {"profile": "masked"}, {"profile": "ckks"}, {"profile": "masked", "retry": True},
        {"profile": "sealed", "retry": True, "rotation": True, "bits": 10},
    ],
    ids=lambda sealing: " ".join(map(str, sealing.values())),
)  # fmt: skip
def test_every_profile_ends_with_one_model_at_all_sites(tmp_path: Path, sealing: dict[str, Any]) -> None:
    with open_federation(tmp_path / "f", sealing=sealing) as federation:
        script = Script(federation)
        coordinator = script.coordinator()
        released = coordinator.run()
        assert script.cohorts() == [federation.names] * 4
        assert coordinator.refusals == {}
        assert digests(federation) == {released.weights.astype("<f4").tobytes()}
        assert released.weights.tobytes() != federation.weights, "and it has learnt something"
        assert released.metrics_round == 4


def test_a_site_that_dies_while_training_is_left_out_and_the_run_goes_on(
    federation: Federation, script: Script
) -> None:
    script.down = {("train", 2, "birch")}
    released = script.coordinator().run()
    rest = tuple(n for n in federation.names if n != "birch")
    assert script.cohorts() == [federation.names, rest, federation.names, federation.names]
    assert steps(federation, "birch", 2) == 0
    assert steps(federation, "ash", 2) == federation.manifest.training.local_steps
    assert digests(federation) == {released.weights.tobytes()}, "and it has caught up"
    assert faults(federation) == [("train", 2, "birch", "the node cannot be reached")]


def faults(federation: Federation) -> list[tuple[str, int, str, str]]:
    """Step, round, site and reason of what the coordinator's log holds of sites that gave no answer."""
    entries = federation.world.log.entries()
    return [(e.step, e.round, e.party, e.reason) for e in entries if isinstance(e, audit.Fault)]


def test_a_fault_at_a_site_is_noted_without_what_it_was(federation: Federation, script: Script) -> None:
    def fail(_reply: Envelope) -> Envelope:
        raise ValueError("birch-7 has a cholesterol of 4711")

    script.lies = {("train", 2, "birch"): fail}
    script.coordinator().run()
    assert faults(federation) == [("train", 2, "birch", "a fault at the site")]
    federation.world.export()
    assert not [p for p in (federation.folder / "logs").iterdir() if b"cholesterol" in p.read_bytes()]


def test_too_few_left_abandon_the_round_and_nobody_seals(federation: Federation, script: Script) -> None:
    script.down = {("train", 2, "birch"), ("train", 2, "cedar")}
    released = script.coordinator().run()
    assert script.cohorts() == [federation.names, (), federation.names, federation.names]
    run = federation.manifest.run
    assert [federation.sites[s]._store.sealed_transcript(run, 2) for s in federation.names] == [None] * 4
    assert steps(federation, "ash", 2) == 0, "its update never left, so its charge shrank to nothing"
    assert digests(federation) == {released.weights.tobytes()}


@pytest.mark.parametrize("lost", ["the request", "the reply"])
def test_one_that_dies_while_sealing_abandons_the_round_and_the_charge_stands(
    federation: Federation, script: Script, lost: str
) -> None:
    if lost == "the request":
        script.down = {("seal", 2, "birch")}
    else:
        script.lies = {("seal", 2, "birch"): lambda _: None}
    coordinator, left = script.coordinator(), dict[str, Any]()

    def look(outcome: RoundOutcome) -> None:
        script.outcomes.append(outcome)
        if outcome.round == 2:
            left.update({s: federation.sites[s]._runs[federation.manifest.run].pending for s in federation.names})

    coordinator._after_round = look
    released = coordinator.run()
    assert script.cohorts() == [federation.names, (), federation.names, federation.names]
    sealed = {s for s in federation.names if lost == "the reply" or s != "birch"}
    for site in sealed:
        assert steps(federation, site, 2) == federation.manifest.training.local_steps
        assert federation.sites[site]._store.sealed_transcript(federation.manifest.run, 2) is not None
        assert left[site] is None, "and the update is gone"
    assert digests(federation) == {released.weights.tobytes()}
    assert np.isfinite(released.weights).all()


def test_a_site_that_missed_rounds_replays_the_sums_and_ends_with_the_same_model(
    federation: Federation, script: Script
) -> None:
    script.down = {("train", 1, "doum"), ("train", 2, "doum"), ("train", 3, "doum")}
    released = script.coordinator().run()
    rest = federation.names[:3]
    assert script.cohorts() == [rest, rest, rest, federation.names]
    assert digests(federation) == {released.weights.tobytes()}
    assert federation.model("doum").round == federation.manifest.rounds + 1


def test_a_site_that_is_back_only_for_the_release_changes_nothing_for_the_others(
    federation: Federation, script: Script
) -> None:
    script.down = {("train", r, "doum") for r in range(1, 5)}
    released = script.coordinator().run()
    assert script.cohorts() == [federation.names[:3]] * 4
    final, first = released.weights.tobytes(), federation.weights
    assert [federation.model(s).weights.tobytes() for s in federation.names[:3]] == [final] * 3
    assert federation.model("doum").weights.tobytes() in (final, first)


def test_a_restarted_site_takes_no_part_any_more_and_the_others_finish(federation: Federation, script: Script) -> None:
    coordinator = script.coordinator()
    before = coordinator._before_round

    def restart(round_: int) -> None:
        before(round_)
        if round_ == 2:
            federation.restart("birch")

    coordinator._before_round = restart
    released = coordinator.run()
    rest = tuple(n for n in federation.names if n != "birch")
    assert script.cohorts() == [federation.names, rest, rest, rest]
    assert federation.model("ash").weights.tobytes() == released.weights.tobytes()


@pytest.mark.parametrize("joined", [0, 2])
def test_fewer_than_min_sites_do_not_start(federation: Federation, script: Script, joined: int) -> None:
    script.down = {("join", 0, s) for s in federation.names[joined:]}
    with pytest.raises(PeerError, match="fewer than 3 sites joined"):
        script.coordinator().run()
    assert script.outcomes == []


def test_three_of_four_do_start(federation: Federation, script: Script) -> None:
    script.down = {("join", 0, "doum")}
    script.coordinator().run()
    assert script.cohorts() == [federation.names[:3]] * 4


def agreed_epochs(federation: Federation) -> dict[str, list[tuple[int, str]]]:
    """Epoch and maker of every secret that a site took, by site."""
    found = {}
    for name in federation.names:
        entries = federation.sites[name].log.entries()
        found[name] = [(e.epoch, e.maker) for e in entries if isinstance(e, audit.KeysAgreed)]
    return found


def test_where_everybody_takes_the_first_secret_no_other_is_made(federation: Federation, script: Script) -> None:
    """The control of those below."""
    script.coordinator().run()
    assert agreed_epochs(federation) == {name: [(0, "ash")] for name in federation.names}


@pytest.mark.parametrize("site", ["ash", "birch", "cedar", "doum"])
def test_a_site_that_dies_after_joining_leaves_the_others_to_agree_on_keys(
    federation: Federation, script: Script, site: str
) -> None:
    """Whatever its place in the order of makers."""
    script.down = {("secret", 0, site), ("keys", 0, site)}
    script.coordinator().run()
    rest = tuple(n for n in federation.names if n != site)
    assert script.cohorts() == [rest] * 4
    assert agreed_epochs(federation)[site] == []
    assert len({tuple(agreed_epochs(federation)[n][-1:]) for n in rest}) == 1, "all under the same secret"


#: What a hostile maker answers, signed, and with everything as it should be but this.
MAKERS: dict[str, Callable[[Federation, Envelope], Envelope | None]] = {
    "nothing": lambda _f, _e: None,
    "a wrap too few": lambda f, e: resign(f.sites["ash"], e, chunks=e.chunks[:-1]),
    "a wrap too many": lambda f, e: resign(f.sites["ash"], e, chunks=(*e.chunks, e.chunks[0])),
    "nonsense for one": lambda f, e: resign(f.sites["ash"], e, chunks=(*e.chunks[:3], b"nonsense")),
    "nonsense for all others": lambda f, e: resign(f.sites["ash"], e, chunks=(e.chunks[0], b"a", b"b", b"c")),
    "two exchanged": lambda f, e: resign(f.sites["ash"], e, chunks=(*e.chunks[:2], *e.chunks[:1:-1])),
    "under another epoch": lambda f, e: f.sign(
        "secret", 0, "coordinator", m.SecretReply(), e.chunks, identity=f.sites["ash"].identity,
        address=f.address("secret", 0).model_copy(update={"key_epoch": 1}), request=header_of(e).request,
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", MAKERS)
def test_a_hostile_maker_does_not_decide_who_takes_part(federation: Federation, script: Script, lie: str) -> None:
    """Another one is asked, under a key epoch of its own; everybody ends with that secret, and the run with it."""
    script.lies = {("secret", 0, "ash"): lambda e: MAKERS[lie](federation, e)}
    released = script.coordinator().run()
    assert script.cohorts() == [federation.names] * 4
    assert {taken[-1] for taken in agreed_epochs(federation).values()} == {(1, "birch")}
    assert digests(federation) == {released.weights.tobytes()}


def test_a_hostile_last_maker_does_not_undo_what_others_agreed_on(federation: Federation, script: Script) -> None:
    """doum is dead, so that every maker is asked in turn; cedar, the last, lets nobody but itself have its secret."""
    script.down = {("keys", 0, "doum")}
    script.lies = {
        ("secret", 0, "cedar"): lambda e: resign(federation.sites["cedar"], e, chunks=(b"a", b"b", e.chunks[2], b"d"))
    }
    script.coordinator().run()
    assert script.cohorts() == [federation.names[:3]] * 4
    taken = agreed_epochs(federation)
    assert taken["ash"] == taken["birch"] == [(0, "ash"), (1, "birch"), (3, "birch")]
    assert taken["cedar"] == [(0, "ash"), (1, "birch"), (2, "cedar"), (3, "birch")]


def test_three_hostile_makers_of_four_end_the_run_before_anything_is_trained(
    federation: Federation, script: Script
) -> None:
    for maker in federation.names[:3]:
        script.lies["secret", 0, maker] = lambda e, maker=maker: resign(federation.sites[maker], e, chunks=(b"x",) * 4)
    with pytest.raises(PeerError, match="fewer than 3 sites agreed on keys"):
        script.coordinator().run()
    assert script.outcomes == []
    assert all(not federation.charges(s, 1) for s in federation.names)


def test_sites_whose_models_differ_stop_the_run(
    federation: Federation, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drift(round_: int) -> None:
        if round_ == 3:
            store, run = federation.sites["cedar"]._store, federation.manifest.run
            key = federation.sites["cedar"]._runs[run].keys.storage
            model = store.model(run, key)
            store.put_model(run, replace(model, weights=np.nextafter(model.weights, np.float32(np.inf))), key)

    coordinator = script.coordinator()
    coordinator._before_round = drift
    with pytest.raises(SealingError, match="not bit-identical"):
        coordinator.run()
    assert len(script.outcomes) == 2
    assert all(not o.abandoned for o in script.outcomes)


# --- replies as they arrive -------------------------------------------------------------------------------------------


def test_each_sealed_update_is_added_before_the_next_one_is_held(
    federation: Federation, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of one sum and one payload, whatever the number of sites."""
    seen: list[str] = []
    add = LatticeAccumulator.add

    def adding(accumulator: LatticeAccumulator, payload: Any) -> None:
        add(accumulator, payload)
        seen.append("added")

    def arrives(site: str, _request: Envelope, reply: Envelope) -> Envelope:
        if header_of(reply).step == "seal":
            seen.append(site)
        return reply

    monkeypatch.setattr(LatticeAccumulator, "add", adding)
    federation.coordinator(federation.grid(tamper=arrives)).run()
    assert seen == [x for name in federation.names for x in (name, "added")] * 4


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class LateGrid(LocalGrid):
    """What birch answers to the requests of a round's step is there only after so many seconds; never, for infinity."""

    late: tuple[str, int, float]
    clock: Clock
    asked: dict[str, float]

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        found = []
        for identifier in message_ids:
            message = self._outbox.get(identifier)
            if message is None:
                continue
            header = header_of(from_records(message.content))
            step, round_, seconds = self.late
            due = self.asked.setdefault(identifier, self.clock.now) + seconds
            if (header.step, header.round, header.recipient) != (step, round_, "birch") or self.clock.now >= due:
                found += super().pull_messages([identifier])
        return found


@pytest.mark.parametrize("step", ["train", "seal"])
@pytest.mark.parametrize(
    ("seconds", "timeout", "waited"), [(20.0, 60.0, True), (20.0, None, True), (90.0, 60.0, False)]
)
def test_a_late_answer_is_waited_for_until_the_timeout(
    federation: Federation, script: Script, monkeypatch: pytest.MonkeyPatch, step: str, seconds: float,
    timeout: float | None, waited: bool,
) -> None:  # fmt: skip
    clock = Clock()
    monkeypatch.setattr(exchange_module, "time", clock)
    grid = federation.grid()
    grid.__class__ = LateGrid
    grid.late, grid.clock, grid.asked = (step, 2, seconds), clock, {}  # type: ignore[attr-defined]
    federation.coordinator(grid, after_round=script.outcomes.append, timeout=timeout).run()
    rest = tuple(n for n in federation.names if n != "birch")
    second = federation.names if waited else rest if step == "train" else ()
    assert script.cohorts() == [federation.names, second, federation.names, federation.names]
    assert seconds <= clock.now < seconds + 1 if waited else 60 <= clock.now < 61, "and no longer than that"
    assert faults(federation) == ([] if waited else [(step, 2, "birch", "no answer in time")])


def test_the_manifest_says_how_long_is_waited(
    federation: Federation, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(exchange_module, "time", clock)
    federation.world.manifest = federation.world.manifest.model_copy(update={"wait_seconds": 60})
    grid = federation.grid()
    grid.__class__ = LateGrid
    grid.late, grid.clock, grid.asked = ("train", 2, 90.0), clock, {}  # type: ignore[attr-defined]
    federation.coordinator(grid, after_round=script.outcomes.append, timeout=1000.0).run()
    assert "birch" not in script.cohorts()[1]
    assert 60 <= clock.now < 61


# --- hostile replies --------------------------------------------------------------------------------------------------

#: What arrives in place of a sealed update, and what the coordinator notes of it.
HOSTILE: dict[str, tuple[Callable[[Federation, Envelope], Envelope], str]] = {
    "no chunk": (lambda f, e: resign(f.sites["birch"], e, chunks=()), "is not complete"),
    "a chunk too many": (lambda f, e: resign(f.sites["birch"], e, chunks=e.chunks * 2), "is not complete"),
    "a short chunk": (lambda f, e: resign(f.sites["birch"], e, chunks=(e.chunks[0][:-1],)), "has a length"),
    "a long chunk": (lambda f, e: resign(f.sites["birch"], e, chunks=(e.chunks[0] + b"\0",)), "has a length"),
    "an empty chunk": (lambda f, e: resign(f.sites["birch"], e, chunks=(b"",)), "has a length"),
    "the form of a sum": (
        lambda f, e: resign(f.sites["birch"], e, chunks=(bytes(SUMMED_BYTES),)), "has a length"),
    "residues that are none": (
        lambda f, e: resign(f.sites["birch"], e, chunks=(b"\xff" * len(e.chunks[0]),)), "is not below q"),
    "no tag": (lambda f, e: resign(f.sites["birch"], e, tags=()), "is not complete"),
    "a tag too many": (lambda f, e: resign(f.sites["birch"], e, tags=("1", "2")), "is not complete"),
    "a tag out of range": (lambda f, e: resign(f.sites["birch"], e, tags=("f" * 16,)), "holds a tag out of range"),
    "another transcript": (lambda f, e: resign(f.sites["birch"], e, transcript="00" * 32), "for another cohort"),
    "another attempt": (lambda f, e: _elsewhere(f, e, attempt=1), "belongs to another attempt"),
    "another key epoch": (lambda f, e: _elsewhere(f, e, key_epoch=1), "belongs to another key_epoch"),
    "not its signature": (lambda f, e: Envelope(e.header, bytes(64), e.body, e.chunks), "the signature is not"),
    "another site's reply": (lambda f, e: resign(f.sites["cedar"], e), "the signature is not"),
    "a refusal": (lambda f, e: _refusing(f, e), "abstains"),
    "another type": (lambda f, e: resign(f.sites["birch"], _as_train(f, e)), "expected a seal.reply"),
}  # fmt: skip


def _elsewhere(federation: Federation, reply: Envelope, **place: int) -> Envelope:
    header = header_of(reply)
    address = federation.address(header.step, header.round).model_copy(update=place)
    return federation.sign(
        header.step, header.round, "coordinator", m.SealReply.model_validate_json(reply.body), reply.chunks,
        identity=federation.sites["birch"].identity, address=address, request=header.request,
    )  # fmt: skip


def _refusing(federation: Federation, reply: Envelope) -> Envelope:
    header = header_of(reply)
    return federation.sign(
        header.step, header.round, "coordinator", m.Refusal(kind="abstains", reason="abstains"),
        identity=federation.sites["birch"].identity, request=header.request,
    )  # fmt: skip


def _as_train(federation: Federation, reply: Envelope) -> Envelope:
    header = header_of(reply)
    body = m.TrainReply(
        commitment="00" * 32, model="00" * 32, state="00" * 32, secret="00" * 32, coordinator="1:" + "00" * 32
    )
    return federation.sign(
        header.step, header.round, "coordinator", body,
        identity=federation.sites["birch"].identity, request=header.request,
    )  # fmt: skip


def noted(coordinator: Coordinator) -> list[tuple[str, int, str, str]]:
    """Kind, round, step and reason of what the coordinator's log holds of birch's refusals and of what was none."""
    return [
        (e.KIND, e.round, e.step, e.reason)
        for e in coordinator.log.entries()
        if isinstance(e, audit.Refused | audit.Rejected) and e.party == "birch"
    ]


@pytest.mark.parametrize("lie", HOSTILE)
def test_hostile_bytes_of_one_site_abandon_the_round_and_no_other(
    federation: Federation, script: Script, lie: str
) -> None:
    change, reason = HOSTILE[lie]
    script.lies = {("seal", 2, "birch"): lambda e: change(federation, e)}
    coordinator = script.coordinator()
    released = coordinator.run()
    assert script.cohorts() == [federation.names, (), federation.names, federation.names]
    assert digests(federation) == {released.weights.tobytes()}
    assert np.isfinite(released.weights).all()
    ((kind, round_, step, told),) = noted(coordinator)
    assert (kind, round_, step) == ("refused" if lie == "a refusal" else "rejected", 2, "seal")
    assert reason in told


#: Well-formed, and not what the site computed: nobody can tell by looking at it.
WELL_FORMED: dict[str, Callable[[Federation, Envelope], Envelope]] = {
    "a wrong tag": lambda f, e: resign(
        f.sites["birch"], e, tags=(f"{int(m.SealReply.model_validate_json(e.body).tags[0], 16) ^ 1:x}",)
    ),
    "zeros": lambda f, e: resign(f.sites["birch"], e, chunks=(bytes(len(e.chunks[0])),)),
    "another seed": lambda f, e: resign(f.sites["birch"], e, chunks=(e.chunks[0][:-64] + bytes(64),)),
}


@pytest.mark.parametrize("lie", WELL_FORMED)
def test_content_that_its_tag_does_not_fit_makes_a_sum_that_every_site_refuses(
    federation: Federation, script: Script, lie: str
) -> None:
    before: list[set[bytes]] = []

    def lies(reply: Envelope) -> Envelope:
        before.append(digests(federation))
        return WELL_FORMED[lie](federation, reply)

    script.lies = {("seal", 2, "birch"): lies}
    with pytest.raises(PeerError, match="was not authentic"):
        script.coordinator().run()
    assert script.cohorts() == [federation.names] * 2, "the coordinator could not tell"
    assert [digests(federation)] == before, "nothing of round 2 was applied anywhere"
    run = federation.manifest.run
    assert all(federation.sites[s]._store.stopped(run) for s in federation.names)
    assert all(federation.sites[s]._runs[run].keys.destroyed for s in federation.names)


#: What arrives in place of a join reply, honest in everything else, and what the coordinator notes of it.
JOINS: dict[str, tuple[Callable[[Federation, Envelope], Envelope], str]] = {
    "step": (lambda f, e: _join(f, e, step="train"), "belongs to another step"),
    "request": (lambda f, e: _join(f, e, request="00" * 32), "belongs to another request"),
    "type": (lambda f, e: _join(f, e, body=m.SecretReply()), "expected a join.reply"),
    "key epoch": (lambda f, e: _join(f, e, key_epoch=1), "belongs to another key_epoch"),
    "attempt": (lambda f, e: _join(f, e, attempt=1), "belongs to another attempt"),
    "run": (lambda f, e: _join(f, e, run="another"), "belongs to another run"),
    "bulk": (lambda f, e: resign(f.sites["birch"], e, chunks=(b"more",)), "that no site can use"),
    "key": (lambda f, e: resign(f.sites["birch"], e, ephemeral="00" * 32), "that no site can use"),
}


def _join(
    federation: Federation, reply: Envelope, body: m.Message | None = None, request: str | None = None, **place: Any
) -> Envelope:
    return federation.sign(
        "join", 0, "coordinator", body or m.JoinReply.model_validate_json(reply.body),
        identity=federation.sites["birch"].identity, address=federation.address("join", 0).model_copy(update=place),
        request=header_of(reply).request if request is None else request,
    )  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_a_hostile_join_leaves_out_one_site_only(federation: Federation, script: Script, name: str) -> None:
    """Signed by a member, and wrong in some way: the run must not depend on one site's good will."""
    lie, reason = JOINS[name]
    script.lies = {("join", 0, "birch"): lambda e: lie(federation, e)}
    coordinator = script.coordinator()
    try:
        coordinator.run()
    except ConfideError as error:
        pytest.fail(f"a join reply with another {name} from one site ended the run: {error.what}")
    assert script.cohorts() == [tuple(n for n in federation.names if n != "birch")] * 4
    ((kind, round_, step, told),) = noted(coordinator)
    assert (kind, round_, step) == ("rejected", 0, "join")
    assert reason in told


@pytest.mark.parametrize(
    ("reason", "counts_as"),
    [
        ("no", "abstains"),
        ("\x1b[2J\u2028\U0001f600\n" + "x" * 400, "abstains"),
        ("x" * 501, "sealing"),
        ("x" * 100_000, "sealing"),
    ],
    ids=["plain", "odd text", "long", "longer than any reply"],
)
def test_a_refusal_of_any_text_is_no_more_than_a_refusal(
    federation: Federation, script: Script, reason: str, counts_as: str
) -> None:
    def lie(reply: Envelope) -> Envelope:
        header = header_of(reply)
        return federation.sign(
            header.step, header.round, "coordinator",
            m.Refusal.model_construct(kind="abstains", reason=reason),
            identity=federation.sites["birch"].identity, request=header.request,
        )  # fmt: skip

    script.lies = {("train", 2, "birch"): lie}
    coordinator = script.coordinator()
    coordinator.run()
    rest = tuple(n for n in federation.names if n != "birch")
    assert script.cohorts() == [federation.names, rest, federation.names, federation.names]
    assert coordinator.refusals["birch"].kind == counts_as
    assert len(coordinator.refusals["birch"].reason) <= 500


# --- the release ------------------------------------------------------------------------------------------------------


FORGED = np.full(4, 7, dtype="<f4").tobytes()
#: What the only site that answers hands out in place of the model that all of the last cohort signed.
RELEASES: dict[str, Callable[[Envelope], dict[str, Any]]] = {
    "other bytes": lambda e: {"chunks": (FORGED, *e.chunks[1:])},
    "other bytes and their digest": lambda e: {
        "chunks": (FORGED, *e.chunks[1:]), "model": digest("model", FORGED).hex()},
    "other bytes, their digest, another key": lambda e: {
        "chunks": (FORGED, *e.chunks[1:]), "model": digest("model", FORGED).hex(), "key": "11" * 32},
    "another digest": lambda _: {"model": digest("model", FORGED).hex()},
    "another key": lambda _: {"key": "11" * 32},
}  # fmt: skip


@pytest.mark.parametrize("what", RELEASES)
def test_a_released_model_that_the_last_cohort_did_not_sign_is_not_written(
    federation: Federation, script: Script, what: str
) -> None:
    end = federation.manifest.rounds + 2
    script.lies = {("release", end, s): lambda _: None for s in federation.names if s != "birch"}
    script.lies[("release", end, "birch")] = lambda e: resign(federation.sites["birch"], e, **RELEASES[what](e))
    with pytest.raises(SealingError, match="not the one that the sites signed"):
        script.coordinator().run()


def test_one_honest_site_is_enough_for_the_release(federation: Federation, script: Script) -> None:
    """The control of those above."""
    end = federation.manifest.rounds + 2
    script.lies = {("release", end, s): lambda _: None for s in federation.names if s != "birch"}
    released = script.coordinator().run()
    assert released.weights.tobytes() == federation.model("birch").weights.tobytes()


@pytest.mark.parametrize("field", ["bytes", "digest", "key"])
def test_sites_that_release_different_models_stop_the_run(federation: Federation, script: Script, field: str) -> None:
    def lie(reply: Envelope) -> Envelope:
        if field == "digest":
            return resign(federation.sites["birch"], reply, model="00" * 32)
        if field == "key":
            return resign(federation.sites["birch"], reply, key="00" * 32)
        return resign(federation.sites["birch"], reply, chunks=(bytes(16), *reply.chunks[1:]))

    script.lies = {("release", federation.manifest.rounds + 2, "birch"): lie}
    with pytest.raises(SealingError, match="different models"):
        script.coordinator().run()


def test_sites_that_report_different_metrics_stop_the_run(federation: Federation, script: Script) -> None:
    script.lies = {("train", 4, "birch"): lambda e: resign(federation.sites["birch"], e, chunks=(bytes(160),))}
    with pytest.raises(SealingError, match="different metrics"):
        script.coordinator().run()


def test_a_site_whose_policy_does_not_allow_the_release_keeps_the_model(federation: Federation, script: Script) -> None:
    for site in federation.names:
        federation.set_policy(site, release=site == "ash")
    coordinator = script.coordinator()
    released = coordinator.run()
    assert released.weights.size == 4
    assert set(coordinator.refusals) == set(federation.names) - {"ash"}
    run = federation.manifest.run
    assert all(federation.sites[s]._runs[run].keys.destroyed for s in federation.names), "its part is over all the same"


def test_where_no_site_may_release_nothing_comes_out(federation: Federation, script: Script) -> None:
    for site in federation.names:
        federation.set_policy(site, release=False)
    with pytest.raises(PeerError, match="release is not allowed"):
        script.coordinator().run()


def test_after_the_release_no_site_has_keys_or_can_read_the_model_that_it_stored(
    federation: Federation, script: Script
) -> None:
    run, kept = federation.manifest.run, dict[str, Any]()

    def look(outcome: RoundOutcome) -> None:
        kept.update({s: federation.sites[s].current_model(run) for s in federation.names})

    coordinator = script.coordinator()
    coordinator._after_round = look
    released = coordinator.run()
    assert {m.weights.tobytes() for m in kept.values()} == {released.weights.tobytes()}, (
        "the control: until then it can"
    )
    for site in federation.sites.values():
        assert site._runs[run].keys.destroyed
        with pytest.raises(SealingError, match="destroyed"):
            site.current_model(run)
        with pytest.raises(SealingError, match="holds no keys"):
            _ = site._runs[run].keys.session
        assert isinstance(list(site.log.entries())[-1], audit.KeysDestroyed)


# --- the same request, and another one --------------------------------------------------------------------------------


def test_the_same_request_twice_gets_the_stored_answer_and_is_neither_trained_nor_charged_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.agree()
    trained: list[str] = []
    train = LocalTrainer.train

    def counting(trainer: LocalTrainer, *rest: Any) -> Any:
        trained.append("once")
        return train(trainer, *rest)

    monkeypatch.setattr(LocalTrainer, "train", counting)
    requests = {s: federation.sign("train", 1, s, m.TrainRequest(sums=())) for s in federation.names}
    first = {s: federation.sites[s].handle("train", r) for s, r in requests.items()}
    assert len(trained) == 4
    ledgers = {s: federation.sites[s].ledger.used() for s in federation.names}
    assert {s: federation.sites[s].handle("train", r) for s, r in requests.items()} == first
    assert len(trained) == 4
    assert {s: federation.sites[s].ledger.used() for s in federation.names} == ledgers
    federation.train(2)
    assert len(trained) == 8, "the control: another round is trained and charged"
    assert federation.sites["ash"].ledger.used() > ledgers["ash"] * 0.99


@pytest.mark.parametrize("step", ["train", "seal", "secret", "keys", "release"])
def test_another_request_for_the_same_step_is_refused_as_an_equivocation(federation: Federation, step: str) -> None:
    federation.agree()
    total = federation.round(1)
    last = federation.manifest.rounds + 2
    round_ = {"train": 1, "seal": 1, "secret": 0, "keys": 0, "release": last}[step]
    if step == "release":
        total, ended = federation.finish(total)
        body = federation.release_request(total, ended=ended)
        assert header_of(federation.ask("ash", step, round_, body, total.chunks)).type == m.ReleaseReply.TYPE
    other = federation.ask("ash", step, round_, m.TrainRequest(sums=(total.reference,)), total.chunks)
    refusal = m.Refusal.model_validate_json(other.body)
    assert refusal.kind == "sealing"
    assert "contradicts itself" in refusal.reason
    assert b"contradicts itself" in federation.exported("ash"), "and it is in the log"
