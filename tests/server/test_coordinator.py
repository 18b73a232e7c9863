"""The round loop among sites that die, lag, disagree or lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage

from confide.clients.training.trainer import LocalTrainer
from confide.errors import ConfideError, PeerError, SealingError
from confide.privacy.digest import digest
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from confide.server.coordinator import Coordinator, RoundOutcome
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
    assert digests(federation) == {released.weights.astype("<f4").tobytes()}
    assert [o.metrics_round for o in script.outcomes] == [None, None, None, 3]
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
    released = script.coordinator().run()
    assert script.cohorts() == [federation.names, (), federation.names, federation.names]
    sealed = {s for s in federation.names if lost == "the reply" or s != "birch"}
    for site in sealed:
        assert steps(federation, site, 2) == federation.manifest.training.local_steps
        assert federation.sites[site]._store.sealed_transcript(federation.manifest.run, 2) is not None
        assert federation.sites[site]._store.pending(federation.manifest.run, 2) is None
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


def test_another_site_makes_the_secret_where_the_first_one_fails(federation: Federation, script: Script) -> None:
    script.down = {("secret", 0, "ash"), ("keys", 0, "ash")}
    script.coordinator().run()
    assert script.cohorts() == [federation.names[1:]] * 4


def test_sites_whose_models_differ_stop_the_run(
    federation: Federation, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drift(round_: int) -> None:
        if round_ == 3:
            store, run = federation.sites["cedar"]._store, federation.manifest.run
            model = store.model(run)
            moved = np.nextafter(model.weights, np.float32(np.inf))
            store.put_model(run, type(model)(model.round, moved, model.state, model.metrics))

    coordinator = script.coordinator()
    coordinator._before_round = drift
    with pytest.raises(SealingError, match="not bit-identical"):
        coordinator.run()
    assert len(script.outcomes) == 2
    assert all(not o.abandoned for o in script.outcomes)


# --- hostile replies --------------------------------------------------------------------------------------------------

HOSTILE: dict[str, Callable[[Federation, Envelope], Envelope]] = {
    "no chunk": lambda f, e: resign(f.sites["birch"], e, chunks=()),
    "a chunk too many": lambda f, e: resign(f.sites["birch"], e, chunks=e.chunks * 2),
    "a short chunk": lambda f, e: resign(f.sites["birch"], e, chunks=(e.chunks[0][:-1],)),
    "zeros": lambda f, e: resign(f.sites["birch"], e, chunks=(bytes(len(e.chunks[0])),)),
    "an empty chunk": lambda f, e: resign(f.sites["birch"], e, chunks=(b"",)),
    "a broken frame": lambda f, e: resign(f.sites["birch"], e, chunks=(e.chunks[0][:40] + bytes(32_932),)),
    "no tag": lambda f, e: resign(f.sites["birch"], e, tags=()),
    "a tag too many": lambda f, e: resign(f.sites["birch"], e, tags=("1", "2")),
    "a tag out of range": lambda f, e: resign(f.sites["birch"], e, tags=("f" * 16,)),
    "another transcript": lambda f, e: resign(f.sites["birch"], e, transcript="00" * 32),
    "not its signature": lambda f, e: Envelope(e.header, bytes(64), e.body, e.chunks),
    "another site's reply": lambda f, e: resign(f.sites["cedar"], e),
    "a refusal": lambda f, e: _refusing(f, e),
    "another type": lambda f, e: resign(f.sites["birch"], _as_train(f, e)),
}


def _refusing(federation: Federation, reply: Envelope) -> Envelope:
    header = header_of(reply)
    return federation.sign(
        header.step, header.round, "coordinator", m.Refusal(kind="abstains", reason="abstains"),
        identity=federation.sites["birch"].identity, request=header.request,
    )  # fmt: skip


def _as_train(federation: Federation, reply: Envelope) -> Envelope:
    header = header_of(reply)
    body = m.TrainReply(commitment="00" * 32, model="00" * 32, state="00" * 32, secret="00" * 32)
    return federation.sign(
        header.step, header.round, "coordinator", body,
        identity=federation.sites["birch"].identity, request=header.request,
    )  # fmt: skip


@pytest.mark.parametrize("lie", HOSTILE)
def test_hostile_bytes_of_one_site_abandon_the_round_and_no_other(
    federation: Federation, script: Script, lie: str
) -> None:
    script.lies = {("seal", 2, "birch"): lambda e: HOSTILE[lie](federation, e)}
    released = script.coordinator().run()
    assert script.cohorts() == [federation.names, (), federation.names, federation.names]
    assert digests(federation) == {released.weights.tobytes()}
    assert np.isfinite(released.weights).all()


def test_a_wrong_tag_makes_a_sum_that_every_site_refuses(federation: Federation, script: Script) -> None:
    before: list[set[bytes]] = []

    def lie(reply: Envelope) -> Envelope:
        before.append(digests(federation))
        tag = m.SealReply.model_validate_json(reply.body).tags[0]
        return resign(federation.sites["birch"], reply, tags=(f"{int(tag, 16) ^ 1:x}",))

    script.lies = {("seal", 2, "birch"): lie}
    with pytest.raises(PeerError, match="was not authentic"):
        script.coordinator().run()
    assert [digests(federation)] == before, "nothing of round 2 was applied anywhere"
    run = federation.manifest.run
    assert all(federation.sites[s]._store.stopped(run) for s in federation.names)


def test_a_hostile_join_leaves_out_one_site_only(federation: Federation, script: Script) -> None:
    """Signed by a member, and wrong in every other way: the run must not depend on one site's good will."""
    for name, lie in {
        "step": lambda e: federation.sign("train", 0, "coordinator", m.JoinReply(ephemeral="00" * 32),
                                          identity=federation.sites["birch"].identity, request=header_of(e).request),
        "request": lambda e: federation.sign("join", 0, "coordinator", m.JoinReply(ephemeral="00" * 32),
                                             identity=federation.sites["birch"].identity, request="00" * 32),
        "type": lambda e: federation.sign("join", 0, "coordinator", m.SecretReply(),
                                          identity=federation.sites["birch"].identity, request=header_of(e).request),
    }.items():  # fmt: skip
        script.lies = {("join", 0, "birch"): lie}
        coordinator = script.coordinator()
        try:
            coordinator._join()
        except ConfideError as error:
            pytest.fail(f"a join reply with another {name} from one site ended the run: {error.what}")
        assert set(coordinator._progress.nodes) == set(federation.names) - {"birch"}


@pytest.mark.parametrize("what", ["chunks", "zero key"])
def test_a_join_that_no_other_site_will_accept_leaves_out_one_site_only(
    federation: Federation, script: Script, what: str
) -> None:
    def lie(reply: Envelope) -> Envelope:
        if what == "chunks":
            return resign(federation.sites["birch"], reply, chunks=(b"more",))
        return resign(federation.sites["birch"], reply, ephemeral="00" * 32)

    script.lies = {("join", 0, "birch"): lie}
    try:
        script.coordinator().run()
    except ConfideError as error:
        pytest.fail(f"one site's join reply ended the run: {error.what}")
    assert all("birch" not in cohort for cohort in script.cohorts())


@pytest.mark.parametrize("kind", ["plain", "odd text"])
def test_a_refusal_of_any_text_is_no_more_than_a_refusal(federation: Federation, script: Script, kind: str) -> None:
    reason = "no" if kind == "plain" else "\x1b[2J\u2028\U0001f600\n" + "x" * 100_000

    def lie(reply: Envelope) -> Envelope:
        header = header_of(reply)
        return federation.sign(
            header.step, header.round, "coordinator", m.Refusal(kind="abstains", reason=reason),
            identity=federation.sites["birch"].identity, request=header.request,
        )  # fmt: skip

    script.lies = {("train", 2, "birch"): lie}
    coordinator = script.coordinator()
    coordinator.run()
    assert script.cohorts()[1] == tuple(n for n in federation.names if n != "birch")
    assert coordinator.refusals["birch"].kind == "abstains"


# --- the release ------------------------------------------------------------------------------------------------------


def test_a_released_model_whose_bytes_are_not_its_digest_is_not_written(federation: Federation, script: Script) -> None:
    """Only one site answers, and what it hands out is not what all of the last cohort signed."""
    end = federation.manifest.rounds + 2
    others = [n for n in federation.names if n != "birch"]
    script.lies = {("release", end, s): lambda _: None for s in others}
    script.lies[("release", end, "birch")] = lambda e: resign(
        federation.sites["birch"], e, chunks=(np.full(4, 7, dtype="<f4").tobytes(), *e.chunks[1:])
    )
    with pytest.raises(SealingError):
        script.coordinator().run()


def test_a_released_model_that_the_last_cohort_did_not_sign_is_not_written(
    federation: Federation, script: Script
) -> None:
    end = federation.manifest.rounds + 2
    forged = np.full(4, 7, dtype="<f4").tobytes()
    script.lies = {("release", end, s): lambda _: None for s in federation.names if s != "birch"}
    script.lies[("release", end, "birch")] = lambda e: resign(
        federation.sites["birch"], e, chunks=(forged, *e.chunks[1:]), model=digest("model", forged).hex()
    )
    with pytest.raises(SealingError):
        script.coordinator().run()


def test_one_honest_site_is_enough_for_the_release(federation: Federation, script: Script) -> None:
    """The control of the two above."""
    end = federation.manifest.rounds + 2
    script.lies = {("release", end, s): lambda _: None for s in federation.names if s != "birch"}
    released = script.coordinator().run()
    assert released.weights.tobytes() == federation.model("birch").weights.tobytes()


@pytest.mark.parametrize("field", ["bytes", "digest"])
def test_sites_that_release_different_models_stop_the_run(federation: Federation, script: Script, field: str) -> None:
    def lie(reply: Envelope) -> Envelope:
        if field == "digest":
            return resign(federation.sites["birch"], reply, model="00" * 32)
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


def test_where_no_site_may_release_nothing_comes_out(federation: Federation, script: Script) -> None:
    for site in federation.names:
        federation.set_policy(site, release=False)
    with pytest.raises(PeerError, match="release is not allowed"):
        script.coordinator().run()


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
    assert b"contradicts itself" in federation.sites["ash"].log.path.read_bytes(), "and it is in the log"
