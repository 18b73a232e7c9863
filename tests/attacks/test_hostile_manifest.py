"""A coordinator that writes the manifest, and asks for steps out of turn: what a site must not be talked into."""

from __future__ import annotations

import sqlite3
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.clients.membership import Membership
from confide.clients.store import ModelState, SiteStore
from confide.clients.training.models import build_model
from confide.config import ModelConfig
from confide.errors import BudgetError, ConfideError, ConfigError
from confide.privacy.audit.records import Sealed
from confide.privacy.consent import EventType
from confide.protocol import messages as m
from confide.protocol.envelope import EVERYBODY
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from tests.attacks.federation import Federation, header_of, is_refusal, open_federation, refusal_of


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Sites that have not joined yet."""
    with open_federation(tmp_path / "f") as made:
        yield made


def changed(manifest: Manifest, run: str = "hostile-1", **fields: Any) -> Manifest:
    """Another run's manifest; nothing is validated, as an attacker would not."""
    return manifest.model_copy(update={"run": run} | fields)


def invite(federation: Federation, manifest: Manifest, site: str = "ash") -> bool:
    """Does the site join?"""
    return not is_refusal(federation.join((site,), manifest)[site])


def test_an_honest_manifest_is_joined(federation: Federation) -> None:
    """The control of the whole file."""
    assert invite(federation, changed(federation.manifest))


def test_a_manifest_cannot_make_a_site_import_and_call_what_it_names(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    stowaway = types.ModuleType("stowaway")
    stowaway.boom = lambda *args, **options: called.append((args, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stowaway", stowaway)
    kind = ModelConfig(kind="stowaway:boom")
    assert not invite(federation, changed(federation.manifest, model=kind))
    assert not called, "code of the coordinator's choosing ran at the site"
    with pytest.raises(ConfigError):
        build_model(kind, 2, 1)
    assert called, "the control: building that model calls the function"


def test_min_subjects_cannot_be_moved_until_the_exact_number_of_consenting_people_is_known(
    federation: Federation,
) -> None:
    """Joining costs no budget, so a site that joins at 27 and refuses at 28 has told an exact count."""

    def probe(label: str) -> list[bool]:
        return [
            invite(federation, changed(federation.manifest, f"{label}-{least}", min_subjects=least))
            for least in range(15, 40)
        ]

    world, site = federation.world, federation.sites["ash"]
    before, counted = probe("before"), int(site.participants(federation.manifest).train.sum())
    marks = site.participants(federation.manifest)
    person = next(p for p, trains in zip(site.records.persons, marks.train, strict=True) if trains)
    world.maker.registries["ash"].append([world.maker.simulated("ash", person, EventType.WITHDRAWN, 1)])
    assert int(site.participants(federation.manifest).train.sum()) == counted - 1, "one person has withdrawn"
    assert probe("after") == before, (
        f"answers changed with one person; joined up to {15 + sum(before) - 1} of {counted}"
    )


def test_a_run_cannot_claim_less_epsilon_than_its_noise_gives(federation: Federation) -> None:
    federation.set_policy("ash", epsilon_limit=1.0)
    honest = federation.manifest
    assert honest.privacy.epsilon == 4.0
    assert not invite(federation, changed(honest)), "4 is above the policy's limit"
    claimed = honest.privacy.model_copy(update={"epsilon": 0.9})
    assert not invite(federation, changed(honest, "hostile-2", privacy=claimed)), "the noise is still that of 4"


def test_roles_are_for_ever_whatever_share_a_run_holds_out(federation: Federation) -> None:
    """Training and metrics are charged in parallel: who pays in both roles loses up to twice the ledger's limit."""
    site = federation.sites["ash"]
    runs = [changed(federation.manifest, f"run-{share}", held_out=share) for share in (0.25, 0.1, 0.5)]
    marks = [site.participants(r) for r in runs if invite(federation, r)]
    assert marks, "at least the first is joined"
    assert any(bool(a.train.any() and a.held_out.any()) for a in marks), "the control: within a run there are both"
    both = np.any([a.train for a in marks], axis=0) & np.any([a.held_out for a in marks], axis=0)
    assert int(both.sum()) == 0, f"{int(both.sum())} people are charged in one role and exposed in both"


def test_one_key_cannot_sit_in_the_roster_under_two_names(federation: Federation) -> None:
    members = federation.manifest.members
    twin = members[2].model_copy(update={"public_key": members[1].public_key})
    assert not invite(federation, changed(federation.manifest, members=(*members[:2], twin, members[3])))


def test_one_name_cannot_sit_in_the_roster_twice(federation: Federation) -> None:
    members = federation.manifest.members
    double = members[1].model_copy(update={"public_key": "11" * 32})
    assert not invite(federation, changed(federation.manifest, members=(*members[:3], double)))


def test_a_roster_that_names_another_key_for_this_site_is_refused(federation: Federation) -> None:
    members = tuple(
        x.model_copy(update={"public_key": Identity.generate("x").public_key.hex()}) if x.site == "ash" else x
        for x in federation.manifest.members
    )
    assert not invite(federation, changed(federation.manifest, members=members))


def test_a_second_run_cannot_fill_the_roster_with_sybils(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invite(federation, federation.manifest)
    members = tuple(
        x if x.site == "ash" else x.model_copy(update={"public_key": Identity.generate("x").public_key.hex()})
        for x in federation.manifest.members
    )
    crowd = changed(federation.manifest, members=members)
    assert not invite(federation, crowd)
    monkeypatch.setattr(Membership, "admit", lambda _, manifest: manifest.roster)
    assert invite(federation, crowd), "the control: nothing else keeps them out"


def test_a_site_that_is_not_in_the_roster_does_not_join(federation: Federation) -> None:
    members = federation.manifest.members[1:]
    assert members[0].site != "ash"
    assert not invite(federation, changed(federation.manifest, members=members))


@pytest.mark.parametrize(
    "fields",
    [
        {"federation": "another"},
        {"purpose": "marketing"},
        {"coordinator_key": "00" * 32},
        {"noise_multiplier": 0.0},
        {"metrics_noise_multiplier": 0.0},
        {"rounds": 10_000},
        {"initial_model": "00" * 32},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_the_policy_or_the_ledger_does_not_allow_is_refused(
    federation: Federation, fields: dict[str, Any]
) -> None:
    assert not invite(federation, changed(federation.manifest, **fields))


def test_a_run_once_joined_keeps_its_manifest(federation: Federation) -> None:
    assert invite(federation, federation.manifest)
    assert not invite(federation, changed(federation.manifest, federation.manifest.run, rounds=2))
    assert invite(federation, federation.manifest)


def test_a_refusal_over_the_budget_tells_nothing_of_the_sites_disk(federation: Federation) -> None:
    ledger = federation.sites["ash"].ledger

    def exhaust() -> None:
        for spent in range(50):
            for event in federation.manifest.all_charges():
                ledger.reserve(f"spent-{spent}-{event.role.value}", event)

    with pytest.raises(BudgetError) as caught:
        exhaust()
    assert str(federation.folder) in str(caught.value), "the control: the operator is told which file"
    refusal = refusal_of(federation.join(("ash",))["ash"])
    assert refusal.kind in ("budget", "abstains")
    assert str(federation.folder) not in refusal.reason
    assert "/" not in refusal.reason


# --- steps out of turn ------------------------------------------------------------------------------------------------


def test_a_model_is_released_at_the_end_only(federation: Federation) -> None:
    """Profile `sealed` promises the coordinator nothing until the release: not a model after every round."""
    federation.agree()
    first = federation.round(1)
    request = federation.release_request(first)
    federation.set_policy("birch", release=False)
    early = {r: federation.ask("ash", "release", r, request, first.chunks) for r in (2, 3, 0, 77)}
    early |= {-r: federation.ask("birch", "release", r, request, first.chunks) for r in (2, 5)}
    assert not any(federation.sites[s]._runs[federation.manifest.run].keys.destroyed for s in federation.names)
    total, ended = federation.finish(first)
    body = federation.release_request(total, ended=ended)
    end = federation.ask("ash", "release", federation.manifest.rounds + 2, body, total.chunks)
    assert not is_refusal(end), "the control: the release that the run is for"
    assert [r for r, answer in early.items() if not is_refusal(answer)] == []


def test_skipping_to_the_last_round_at_one_site_releases_nothing_early(federation: Federation) -> None:
    """One site is led to the end after round 1 and asked for the model, while the others go on; next round another."""
    federation.agree()
    first, last = federation.round(1), federation.manifest.rounds + 1
    assert not is_refusal(federation.train(2, first, sites=federation.names[1:])["birch"]), "the others go on"
    ended = federation.train(last, first, sites=("ash",))
    request = federation.release_request(first, ended=ended)
    assert is_refusal(federation.ask("ash", "release", last + 1, request, first.chunks))


def test_rounds_only_go_forward(federation: Federation) -> None:
    federation.agree()
    first = federation.round(1)
    assert not is_refusal(federation.train(3, first, sites=("ash",))["ash"]), "a round may be missed"
    assert is_refusal(federation.train(2, first, sites=("ash",))["ash"]), "but not be made up for later"
    assert sum(federation.charges("ash", 2).values()) == 0


def test_roles_stay_with_the_ledger_also_where_the_operator_changes_the_share_held_out(tmp_path: Path) -> None:
    """The ledger outlives runs and policies; with another share held out, people would pay in one role for both."""
    ledgers = tmp_path / "ledgers"
    with open_federation(tmp_path / "one", ledgers=ledgers, data={"held_out": 0.1}) as federation:
        assert invite(federation, federation.manifest)
        first = federation.sites["ash"].participants(federation.manifest)
        persons = list(federation.sites["ash"].records.persons)
    try:
        with open_federation(tmp_path / "two", ledgers=ledgers, data={"held_out": 0.5}) as federation:
            assert list(federation.sites["ash"].records.persons) == persons
            joined = invite(federation, federation.manifest)
            second = federation.sites["ash"].participants(federation.manifest)
    except ConfideError:
        return
    both = int(((first.train & second.held_out) | (first.held_out & second.train)).sum())
    assert not joined or both == 0, f"{both} people changed their role under one ledger"


def test_the_same_ledger_takes_another_run_with_the_same_share_held_out(tmp_path: Path) -> None:
    """The control of the one above."""
    for name in ("one", "two"):
        with open_federation(tmp_path / name, ledgers=tmp_path / "ledgers", data={"held_out": 0.25}) as federation:
            assert invite(federation, federation.manifest)


def test_keys_are_agreed_on_in_round_zero_only(federation: Federation) -> None:
    federation.agree()
    statements = federation.statements()
    answers = [
        federation.ask("ash", "secret", 3, m.SecretRequest(statements=statements)),
        federation.hand_over("ash", round=3),
        federation.ask("ash", "join", 3, m.JoinRequest(), (federation.manifest.to_bytes(), federation.weights)),
    ]
    assert {refusal_of(a).reason for a in answers} == {"keys are agreed on before the first round only"}


@pytest.mark.parametrize("round_", [0, 5, 100])
def test_there_is_no_round_outside_the_run(federation: Federation, round_: int) -> None:
    federation.agree()
    assert federation.manifest.rounds + 1 == 4
    assert is_refusal(federation.ask("ash", "train", round_, m.TrainRequest(sums=())))
    assert not federation.charges("ash", round_)


def test_what_a_site_says_it_sealed_stays_charged_also_where_its_disk_lost_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log tells of the sealing: a charge taken back after that would look like a lie to every auditor."""
    commit = SiteStore.commit_reply

    def full(store: SiteStore, place: Any, *rest: Any, **options: Any) -> None:
        if place.step == "seal":
            raise sqlite3.OperationalError("database or disk is full")
        commit(store, place, *rest, **options)

    with open_federation(tmp_path / "f", sealing={"retry": True}) as federation:
        committed = federation.agree().train(1)
        monkeypatch.setattr(SiteStore, "commit_reply", full)
        assert {refusal_of(a).kind for a in federation.seal(1, committed).values()} == {"abstains"}
        federation.train(2)
        federation.train(3)
        whole = federation.manifest.training.local_steps
        for site in federation.names:
            assert any(isinstance(e, Sealed) for e in federation.sites[site].log.entries())
            assert sum(federation.charges(site, 1).values()) == whole
            assert sum(federation.charges(site, 2).values()) == 0, "the control: what was never sealed is given back"


def test_a_restarted_site_charges_nothing_for_rounds_that_it_cannot_seal(federation: Federation) -> None:
    federation.agree()
    federation.restart("ash")
    assert "holds no keys" in refusal_of(federation.ask("ash", "train", 1, m.TrainRequest(sums=()))).reason
    assert sum(federation.charges("ash", 1).values()) == 0


def test_a_join_with_bytes_that_are_no_model_is_refused_by_name(federation: Federation) -> None:
    for weights in (b"", b"abc", federation.weights + b"x", federation.weights[:-4]):
        request = federation.sign("join", 0, EVERYBODY, m.JoinRequest(), (federation.manifest.to_bytes(), weights))
        assert header_of(federation.sites["ash"].handle("join", request)).type == m.Refusal.TYPE


@pytest.mark.parametrize("label", [{"column": "cost", "bounds": [0, 100]}, {"column": "sick", "classes": [0, 1]}])
@pytest.mark.parametrize("model", [{"kind": "logistic"}, {"kind": "mlp", "hidden": [4]}])
def test_weights_that_overflow_for_some_people_only_do_not_carry_them_past_the_noise(
    tmp_path: Path, model: dict[str, Any], label: dict[str, Any]
) -> None:
    """Near the largest float32 an output is infinite, or not a number, for old smokers only. One NaN makes a whole
    vector NaN, whatever noise is added: the coordinator, who sends the first weights, reads an attribute from it."""
    with open_federation(tmp_path / "f", data={"label": label}, model=model) as federation:
        site, last = federation.sites["ash"], federation.manifest.rounds + 1
        run, people = site._run(federation.manifest), site.participants(federation.manifest)
        train, held_out = site.records.units_of(people.train), site.records.units_of(people.held_out)
        rng, size = np.random.default_rng(0), federation.manifest.layout.size
        for _ in range(8):
            weights = rng.choice([-1, 1], size) * rng.choice([3e38, 1e20, 1.0], size)
            state = ModelState(0, weights.astype(np.float32), (), None)
            for round_ in (1, last):
                with np.errstate(all="ignore"):
                    vector = run.compute(round_, state, train, held_out)
                assert np.isfinite(vector).all(), f"round {round_}, weights {weights}: {vector}"
