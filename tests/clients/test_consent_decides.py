"""Promise 1 through the whole path: whose records are read is decided by consent, in every round, until the cut-off."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import confide
from confide.clients.site import Site
from confide.errors import ConsentError
from confide.privacy.consent import ConsentEvent, EventType, Registry, now_micros
from confide.privacy.dp import PrivacyEvent, Role, rdp_epsilon
from confide.protocol.envelope import Envelope
from confide.protocol.manifest import Manifest
from tests.clients.watching import TrainCall, Watch, ledger_rows, watch_runs
from tests.support import SITES, experiment_tree, write_people

PEOPLE, ROUNDS, STEPS, DELTA = 40, 3, 2, 1e-5
PURPOSE = "research/test"
EVERYBODY = {f"{site}-{i}" for site in SITES for i in range(PEOPLE)}
#: What the people with i % 10 = key have decided; the others gave.
STORIES = {
    0: "unknown", 1: "withdrawn before", 2: "expired", 3: "small limit", 4: "withdraws before round 2",
    5: "restricted", 6: "limit of one round", 7: "gave for another purpose",
}  # fmt: skip


def group(story: str) -> set[str]:
    """Everybody of a story."""
    return {p for p in EVERYBODY if STORIES.get(int(p.rpartition("-")[2]) % 10, "gave") == story}


def write_consents(path: Path, one_round: float | None) -> None:
    """Everybody gave (`one_round` None: the control), or everybody according to the stories."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["event_id", "subject", "purpose", "type", "effective_at", "valid_until", "max_epsilon"])
        for person in sorted(EVERYBODY):
            story = "gave" if one_round is None else STORIES.get(int(person.rpartition("-")[2]) % 10, "gave")
            if story == "unknown":
                continue
            purpose = PURPOSE + "/other" if story == "gave for another purpose" else PURPOSE
            until = "2024-01-01T00:00Z" if story == "expired" else ""
            limit = {"small limit": 0.05, "limit of one round": one_round}.get(story, "")
            out.writerow([f"{person}/given", person, purpose, "given", "2023-01-01T00:00Z", until, limit])
            later = {"withdrawn before": "withdrawn", "restricted": "restricted"}.get(story)
            if later:
                out.writerow([f"{person}/later", person, purpose, later, "2023-06-01T00:00Z", "", ""])


def withdraw(registry: Registry, person: str) -> None:
    registry.append(
        [
            ConsentEvent(
                event_id=f"{person}/withdrawn", pseudonym=registry.enrol([person])[person], purpose=PURPOSE,
                type=EventType.WITHDRAWN, effective_at=now_micros(),
            )
        ]
    )  # fmt: skip


def registry_of(watch: Watch, site: str) -> Registry:
    assert watch.world is not None
    return watch.world.maker.registries[site]


@dataclass
class Observed:
    """A finished run and what was seen of it."""

    watch: Watch
    manifest: Manifest
    out: Path

    def moved(self) -> float:
        """How far the run moved any weight."""
        assert self.watch.world is not None
        final = np.concatenate([v.ravel() for v in load_file(self.out / "model.safetensors").values()])
        # Sorted, because the file keeps its own order of parameters.
        return float(np.abs(np.sort(final) - np.sort(self.watch.world.initial)).max())


def observe(folder: Path, name: str, watch: Watch, one_round: float | None = None) -> Observed:
    """Run the tiny federation at q = 1: everybody who may be drawn is drawn, in every step."""
    consents = folder / f"{name}.csv"
    write_consents(consents, one_round)
    tree = experiment_tree(
        str(write_people(folder, people=PEOPLE)),
        run={"rounds": ROUNDS},
        sites={"min_subjects": 3},
        training={"local_steps": STEPS},
        privacy={"sample_rate": 1.0},
    )
    tree["consent"] = {"file": str(consents)}
    with pytest.MonkeyPatch.context() as patch:
        watch_runs(patch, watch)
        confide.simulate(tree, out=folder / name)
    assert watch.world is not None
    return Observed(watch, watch.world.manifest, folder / name)


def spent(manifest: Manifest, rounds: int) -> float:
    """What the ledger says of a person trained on for so many rounds."""
    event = PrivacyEvent(
        role=Role.TRAIN, unit="subject", noise_multiplier=manifest.noise_multiplier, sample_rate=1.0,
        steps=rounds * STEPS, max_grad_norm=1.0,
    )  # fmt: skip
    return rdp_epsilon([event], DELTA)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Everybody gave consent."""
    return observe(tmp_path_factory.mktemp("control"), "run", Watch())


@pytest.fixture(scope="module")
def stories(control: Observed, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Everybody according to the stories."""

    def leave(watch: Watch) -> None:
        if watch.round == 2:
            for person in group("withdraws before round 2"):
                withdraw(registry_of(watch, person.partition("-")[0]), person)

    one_round = (spent(control.manifest, 1) + spent(control.manifest, 2)) / 2
    return observe(tmp_path_factory.mktemp("stories"), "run", Watch(on_round=leave), one_round)


@pytest.fixture(scope="module")
def trainees(control: Observed) -> set[str]:
    """Whose role is train: fixed by the site's key, which these runs share."""
    return control.watch.of("train")


def test_where_everybody_gave_consent_everybody_is_read_in_every_round(control: Observed, trainees: set[str]) -> None:
    """The control of every test below."""
    assert control.watch.of() == EVERYBODY
    for round_ in range(1, ROUNDS + 1):
        assert control.watch.of("train", rounds=range(round_, round_ + 1)) == trainees
    held_out = control.watch.of("metric")
    assert held_out == EVERYBODY - trainees
    assert 0.1 * len(EVERYBODY) < len(held_out) < 0.5 * len(EVERYBODY)


@pytest.mark.parametrize(
    "story", ["unknown", "withdrawn before", "expired", "restricted", "small limit", "gave for another purpose"]
)
def test_a_person_without_standing_consent_is_never_read(stories: Observed, trainees: set[str], story: str) -> None:
    people = group(story)
    assert people & trainees
    if story == "small limit":  # a limit is exceeded by the first charge of one's own role
        assert not stories.watch.of("train") & people
        assert not stories.watch.of("metric") & people
    else:
        assert not stories.watch.of() & people


def test_the_others_go_on(stories: Observed, trainees: set[str]) -> None:
    for round_ in range(1, ROUNDS + 1):
        seen = stories.watch.of("train", rounds=range(round_, round_ + 1))
        assert seen >= group("gave") & trainees
    assert stories.watch.of("metric") >= group("gave") - trainees


def test_who_withdrew_before_a_round_is_read_before_it_and_never_after(stories: Observed, trainees: set[str]) -> None:
    leaving = group("withdraws before round 2")
    assert stories.watch.of("train", rounds=range(1, 2)) & leaving == leaving & trainees
    assert not stories.watch.of(rounds=range(2, 100)) & leaving


def test_a_person_is_left_out_from_the_round_that_would_exceed_her_limit(stories: Observed, trainees: set[str]) -> None:
    people = group("limit of one round") & trainees
    assert people
    assert people <= stories.watch.of("train", rounds=range(1, 2))
    assert not stories.watch.of("train", rounds=range(2, 100)) & people


def test_nobodys_limit_or_absence_changes_the_noise_or_the_charges(control: Observed, stories: Observed) -> None:
    assert stories.manifest.noise_multiplier == control.manifest.noise_multiplier > 0
    assert stories.manifest.metrics_noise_multiplier == control.manifest.metrics_noise_multiplier > 0
    for site in SITES:
        assert ledger_rows(stories.out / "ledgers", site) == ledger_rows(control.out / "ledgers", site)


# --- the cut-off -----------------------------------------------------------------------------------------------------

MARK = 1e6  # sent, it is clipped to the public range, and still moves the model


def mark_first_attempt(withdrawing: bool) -> Callable[[Watch, str, TrainCall], NDArray[np.float64]]:
    """Sites train but answer with zeros, except for what `ash` computes first in round 2, which is marked; meanwhile
    (or not) one of the people it was computed with withdraws."""

    def on_train(watch: Watch, site: str, call: TrainCall) -> NDArray[np.float64]:
        nothing = call() * 0
        if (watch.round, site) != (2, "ash") or watch.attempts[2, "ash"] != 1:
            return nothing
        if withdrawing:
            withdraw(registry_of(watch, "ash"), min(watch.of("train", rounds=range(2, 3), site="ash")))
        return nothing + MARK

    return on_train


def attempts(observed: Observed) -> dict[int, set[str]]:
    """Whose records each of ash's attempts at round 2 read."""
    found: dict[int, set[str]] = {}
    for r in observed.watch.readings:
        if (r.round, r.site, r.purpose) == (2, "ash", "train"):
            found.setdefault(r.attempt, set()).update(r.persons)
    return found


def test_who_withdraws_while_a_round_is_computed_is_not_in_what_is_sent(tmp_path: Path) -> None:
    observed = observe(tmp_path, "run", Watch(on_train=mark_first_attempt(withdrawing=True)))
    tried = attempts(observed)
    assert list(tried) == [1, 2]
    (left,) = tried[1] - tried[2]
    assert left == min(tried[1])
    assert tried[2] == tried[1] - {left}
    assert observed.moved() < 1e-5  # what was computed with her was thrown away
    assert not observed.watch.of(rounds=range(3, 100)) & {left}


def test_a_round_that_is_computed_again_is_charged_once(tmp_path: Path, control: Observed) -> None:
    observed = observe(tmp_path, "run", Watch(on_train=mark_first_attempt(withdrawing=True)))
    assert observed.watch.attempts[2, "ash"] == 2
    rows = ledger_rows(observed.out / "ledgers", "ash")
    assert [row for row in rows if row[0].startswith("2/")] == [
        ("2/train", "reserve", STEPS),
        ("2/train", "expire", STEPS),
    ]
    assert rows == ledger_rows(control.out / "ledgers", "ash")  # nobody else can tell either


def test_without_the_withdrawal_the_same_computation_is_sent(tmp_path: Path) -> None:
    """The control: the mark does reach the model unless the update is computed again."""
    observed = observe(tmp_path, "run", Watch(on_train=mark_first_attempt(withdrawing=False)))
    assert list(attempts(observed)) == [1]
    assert observed.moved() > 0.1


def test_a_site_whose_consents_keep_changing_abstains_and_keeps_its_charge(tmp_path: Path) -> None:
    left = list[str]()

    def on_train(watch: Watch, site: str, call: TrainCall) -> NDArray[np.float64]:
        nothing = call() * 0
        if (watch.round, site) == (2, "ash"):
            present = watch.of("train", rounds=range(1, 2), site="ash") - set(left)
            left.append(min(present))
            withdraw(registry_of(watch, "ash"), left[-1])
            return nothing + MARK
        return nothing

    observed = observe(tmp_path, "run", Watch(on_train=on_train))
    assert len(left) > 1
    assert observed.moved() < 1e-5  # none of its attempts was sent
    assert ("2/train", "reserve", STEPS) in ledger_rows(observed.out / "ledgers", "ash")
    assert observed.watch.of("train", rounds=range(3, 4), site="ash")  # and it takes part again afterwards
    assert not observed.watch.of(rounds=range(3, 100)) & set(left)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Watch], None]:
    """While `ash` handles a request of round 2, its registry cannot be read."""
    watched: list[Watch] = []
    handling: list[str] = []
    handle, take = Site.handle, Registry.take

    def seen_handle(self: Site, step: str, request: Envelope) -> Envelope:
        handling.append(self.name)
        try:
            return handle(self, step, request)
        finally:
            handling.pop()

    def broken(self: Registry, *args: Any, **kwargs: Any) -> Any:
        if watched and watched[0].round == 2 and handling == ["ash"]:
            raise ConsentError("cannot be read (OperationalError)")
        return take(self, *args, **kwargs)

    monkeypatch.setattr(Site, "handle", seen_handle)
    monkeypatch.setattr(Registry, "take", broken)
    return watched.append


def test_a_site_that_cannot_reach_its_registry_reads_nobody(
    tmp_path: Path, unreachable: Callable[[Watch], None]
) -> None:
    watch = Watch()
    unreachable(watch)
    observed = observe(tmp_path, "run", watch)
    in_round_2 = range(2, 3)
    assert not observed.watch.of("train", rounds=in_round_2, site="ash")
    assert all(observed.watch.of("train", rounds=in_round_2, site=site) for site in SITES if site != "ash")
    assert observed.watch.of("train", rounds=range(1, 2), site="ash")  # control: it does in the other rounds
    assert observed.watch.of("train", rounds=range(3, 4), site="ash")
