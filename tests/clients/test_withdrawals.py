"""What a withdrawal does to a run, by when it comes; and that nobody outside the site can tell that there was one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import confide as product
from confide.clients.participants import ParticipantSource
from confide.errors import ConsentError
from confide.privacy.audit import records as audit
from confide.privacy.consent import Registry
from confide.privacy.consent.desk import ConsentDesk
from tests.cli.command import confide
from tests.clients.test_consent_decides import registry_of, withdraw
from tests.clients.transcripts import Transcript, read_logs, record_runs
from tests.clients.watching import TrainCall, Watch, watch_runs
from tests.support import SITES, experiment_tree, write_people

PEOPLE, ROUNDS, PURPOSE = 12, 3, "research/test"
Act = Callable[[Registry, str], None]
#: When the person at `ash` leaves, in round 2.
WHENS = ("before the snapshot", "before the cut-off", "after the cut-off")
ACTS: dict[str, Act] = {"withdraws": withdraw, "is erased": lambda registry, person: _erase(registry, person)}


def _erase(registry: Registry, person: str) -> None:
    registry.erase(person)


@dataclass
class Observed:
    """A finished run: who was read when, and what left."""

    watch: Watch
    transcript: Transcript
    out: Path

    def rounds_of(self, person: str) -> list[int]:
        """Rounds in which a person's records were read to train."""
        return sorted({r.round for r in self.watch.readings if person in r.persons and r.purpose == "train"})


def observe(folder: Path, act: Callable[[pytest.MonkeyPatch, Watch], None] = lambda _patch, _watch: None) -> Observed:
    """Run the tiny federation at q = 1, where everybody who may be drawn is drawn in every step."""
    tree = experiment_tree(
        str(write_people(folder, people=PEOPLE)), run={"rounds": ROUNDS}, sites={"min_subjects": 2},
        training={"local_steps": 1}, privacy={"sample_rate": 1.0}, sealing={"profile": "masked"},
        consent={"simulate": {"fraction": 1.0}},
    )  # fmt: skip
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        watch_runs(patch, watch)
        recorded = record_runs(patch)
        act(patch, watch)
        product.simulate(tree, out=folder / "out")
    (transcript,) = recorded
    return Observed(watch, read_logs(transcript, folder / "out"), folder / "out")


def leaving(when: str, act: Act, person: str) -> Callable[[pytest.MonkeyPatch, Watch], None]:
    """The person leaves once, in round 2, at this instant."""
    gone = list[str]()

    def go(watch: Watch) -> None:
        if watch.round == 2 and not gone:
            gone.append(person)
            act(registry_of(watch, "ash"), person)

    def on_train(watch: Watch, site: str, call: TrainCall) -> Any:
        vector = call()
        if site == "ash":
            go(watch)
        return vector

    def arrange(patch: pytest.MonkeyPatch, watch: Watch) -> None:
        if when == "before the snapshot":
            watch.on_round = go
        elif when == "before the cut-off":
            watch.on_train = on_train
        else:
            hold = ParticipantSource.hold  # the first thing that a site does after the cut-off

            def seen_hold(self: ParticipantSource, *args: Any) -> None:
                assert watch.world is not None
                if self is watch.world.sites["ash"].source(watch.world.manifest):
                    go(watch)
                hold(self, *args)

            patch.setattr(ParticipantSource, "hold", seen_hold)

    return arrange


@pytest.fixture(scope="module")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Nobody leaves."""
    return observe(tmp_path_factory.mktemp("nobody"))


@pytest.fixture(scope="module")
def person(nobody: Observed) -> str:
    """Somebody at `ash` who is trained on: roles are fixed by the site's key, which these runs share."""
    return min(nobody.watch.of("train", site="ash"))


CASES = [(when, "withdraws") for when in WHENS] + [(when, "is erased") for when in WHENS[1:]]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def left(
    request: pytest.FixtureRequest, person: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Observed]:
    """The same run, and one person leaves."""
    when, act = request.param
    return when, act, observe(tmp_path_factory.mktemp("left"), leaving(when, ACTS[act], person))


def test_from_when_on_a_persons_records_are_not_read(
    left: tuple[str, str, Observed], nobody: Observed, person: str
) -> None:
    when, _, observed = left
    assert nobody.rounds_of(person) == [1, 2, 3]  # the control
    attempts = {r.attempt: r.persons for r in observed.watch.readings if (r.round, r.site, r.purpose) ==
                (2, "ash", "train")}  # fmt: skip
    if when == "before the snapshot":
        assert observed.rounds_of(person) == [1]
        assert list(attempts) == [1]
    else:
        assert observed.rounds_of(person) == [1, 2]
        assert person in attempts[1]
    if when == "before the cut-off":
        assert list(attempts) == [1, 2]
        assert person not in attempts[2]  # and what the first attempt made was thrown away
    others = nobody.watch.of("train") - {person}
    for round_ in (1, 2, 3):
        assert observed.watch.of("train", rounds=range(round_, round_ + 1)) - {person} == others


def test_nobody_outside_can_tell_that_somebody_left(left: tuple[str, str, Observed], nobody: Observed) -> None:
    _, _, observed = left
    assert observed.transcript.messages == nobody.transcript.messages
    assert observed.transcript.logs == nobody.transcript.logs
    assert {f"{site}.log" for site in SITES} <= set(nobody.transcript.logs)
    assert len(nobody.transcript.messages) > 2 * len(SITES) * (ROUNDS + 3)


def test_the_evidence_of_the_run_holds_all_the_same(left: tuple[str, str, Observed]) -> None:
    _, _, observed = left
    assert confide("audit", "verify", observed.out).code == 0


def test_the_round_is_charged_and_held_as_its_snapshot_says(left: tuple[str, str, Observed], person: str) -> None:
    when, act, observed = left
    told = confide("audit", "exposure", person, observed.out, "--json").last_line
    (run,) = told["runs"]
    assert run["rounds"] == ([1, 2] if when == "after the cut-off" else [1])
    assert told["erased"] is (act == "is erased")
    assert told["known"]
    assert told["decisions"] == ([] if told["erased"] else [{"purpose": PURPOSE, "status": "refused"}])
    assert 0 < told["epsilon"] == told["charged_epsilon"]


def test_a_proof_of_her_part_can_be_made_unless_she_was_erased_and_of_the_others_always(
    left: tuple[str, str, Observed], person: str, nobody: Observed, tmp_path: Path
) -> None:
    when, act, observed = left
    other = max(nobody.watch.of("train", site="ash") - {person})
    for name, round_ in ((person, 1), (person, 2), (other, 2)):
        file = tmp_path / f"{name}-{round_}.json"
        made = confide("audit", "prove", observed.out, "--party", "ash", "--person", name, "--round", round_,
                       "--out", file)  # fmt: skip
        if name == person and act == "is erased":
            assert (made.code, file.exists()) == (4, False)
            assert "erased" in made.err
            continue
        assert made.code == 0
        role = confide("audit", "verify", file, "--json").last_line["person"]["role"]
        absent = name == person and round_ == 2 and when != "after the cut-off"
        assert role == (None if absent else "train")


def test_nor_that_somebody_left_whom_models_are_evaluated_on(nobody: Observed, tmp_path: Path) -> None:
    person = min(nobody.watch.of("metric", site="ash"))
    observed = observe(tmp_path, leaving("before the cut-off", withdraw, person))
    assert person not in observed.watch.of("metric", rounds=range(3, 100))
    assert person in nobody.watch.of("metric", rounds=range(3, 100))  # the control
    assert observed.watch.attempts[2, "ash"] == 2
    assert observed.transcript.messages == nobody.transcript.messages
    assert observed.transcript.logs == nobody.transcript.logs


def test_a_site_that_abstains_is_told_apart(nobody: Observed, tmp_path: Path) -> None:
    """The control of the transcripts: where a site does not answer for a person's sake, messages and logs differ."""

    def arrange(patch: pytest.MonkeyPatch, watch: Watch) -> None:
        take = Registry.take

        def abstaining(self: Registry, *args: Any, **kwargs: Any) -> Any:
            if watch.world is not None and watch.round == 2 and self is registry_of(watch, "ash"):
                raise ConsentError("consent kept changing")
            return take(self, *args, **kwargs)

        patch.setattr(Registry, "take", abstaining)
        patch.setattr(
            "confide.simulations.execution.Execution._exact", lambda _self, _weights: None
        )  # it asks sites, too

    observed = observe(tmp_path, arrange)
    assert observed.transcript.messages != nobody.transcript.messages
    assert observed.transcript.logs != nobody.transcript.logs
    refused = [m for m in observed.transcript.messages if m.refusal]
    assert {m.site for m in refused} == {"ash"}
    assert not [m for m in nobody.transcript.messages if m.refusal]


def test_an_entry_a_recomputation_would_be_told_apart(nobody: Observed, person: str, tmp_path: Path) -> None:
    """The control of sizes: a site that notes every attempt where it travels is found out."""

    def arrange(patch: pytest.MonkeyPatch, watch: Watch) -> None:
        leaving("before the cut-off", withdraw, person)(patch, watch)
        inner = watch.on_train

        def on_train(seen: Watch, site: str, call: TrainCall) -> Any:
            if seen.world is not None and site == "ash" and seen.attempts[seen.round, site] == 2:
                run = seen.world.manifest.run
                seen.world.sites["ash"].log.append(audit.SnapshotTaken(run=run, round=2, commitment="00" * 32))
            return inner(seen, site, call)

        watch.on_train = on_train

    observed = observe(tmp_path, arrange)
    assert observed.transcript.logs != nobody.transcript.logs


def test_after_the_run_a_withdrawal_changes_nothing_that_was_released(
    person: str, nobody: Observed, tmp_path: Path
) -> None:
    observed = observe(tmp_path)
    kept = {
        path: path.read_bytes() for path in (observed.out / "model.safetensors", *(observed.out / "logs").iterdir())
    }
    site = ("--registry", observed.out / "sites" / "ash", "--key", observed.out / "ledgers" / "ash" / "site.key")
    before = confide("audit", "exposure", person, observed.out, "--json").last_line
    assert confide("consent", "withdraw", person, "--purpose", PURPOSE, *site).code == 0
    after = confide("audit", "exposure", person, observed.out, "--json").last_line
    assert after["decisions"] == [{"purpose": PURPOSE, "status": "refused"}]
    assert (after["runs"], after["epsilon"]) == (before["runs"], before["epsilon"])
    assert [run["rounds"] for run in after["runs"]] == [[1, 2, 3]]
    assert {path: path.read_bytes() for path in kept} == kept
    assert confide("audit", "verify", observed.out).code == 0
    with ConsentDesk(observed.out / "sites" / "ash", observed.out / "ledgers" / "ash" / "site.key") as desk:
        assert not desk.standings(person, desk.now())[PURPOSE].may_participate
