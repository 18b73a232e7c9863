"""Rounds that are drawn for some of the sites: who takes part, what is handed over, what nobody can slip in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from confide import simulate
from confide.errors import ConfideError, ConfigError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import stored_entries
from confide.privacy.audit.verify import verify
from confide.protocol import messages as m
from confide.server.catchup import CatchUp
from confide.simulations.engines import grouping
from tests.attacks.federation import Federation, refusal_of
from tests.support import experiment_tree, write_people

NAMES = tuple(f"site{i:02d}" for i in range(14))
PEOPLE = {"sites": NAMES, "people": 16}
DRAWN = {"per_round": 4, "min_subjects": 1, "population": {"default": 16}}


def tree(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    more = {"sites": DRAWN, "run": {"rounds": 5}, "privacy": {"epsilon": float("inf"), "unsafe_noise_seed": 5}}
    for name, values in sections.items():
        more[name] = {**more.get(name, {}), **values}
    return experiment_tree(str(write_people(folder, **PEOPLE)), **more)


def entries(out: Path, kind: type[audit.Record]) -> list[Any]:
    found = [record for path in (out / "sites").glob("*/federated.db") for record, _ in stored_entries(path)]
    found += [record for record, _ in stored_entries(out / "sites" / "coordinator.db")]
    return [record for record in found if isinstance(record, kind)]


def weights(out: Path) -> np.ndarray[Any, Any]:
    return np.concatenate([part.ravel() for _, part in sorted(load_file(out / "model.safetensors").items())])


def test_each_round_is_for_those_it_was_drawn_for_and_the_rest_costs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = simulate(tree(tmp_path), out=out)
    cohorts = {e.round: tuple(e.cohort) for e in entries(out, audit.Cohort)}
    assert sorted(cohorts) == [1, 2, 3, 4, 5, 6]
    assert all(len(cohort) == 4 for cohort in cohorts.values())
    assert len(set(cohorts.values())) > 1
    taken = {site for cohort in cohorts.values() for site in cohort}
    assert {path.name for path in (out / "sites").iterdir() if path.is_dir()} == taken
    assert set(result.ledger) == taken < set(NAMES)
    assert result.rounds_abandoned == 0
    assert entries(out, audit.TakenOver)  # who comes late has missed rounds
    assert [f for f in verify(out).findings if f.severity != "low"] == []


def test_a_seed_repeats_the_run_however_many_sites_train_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number, at_once in enumerate((50, 50, 1)):
        monkeypatch.setattr(grouping, "TOGETHER", at_once)
        out = tmp_path / f"out{number}"
        simulate(tree(tmp_path), out=out)
        found.append(weights(out))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=0, atol=1e-5)
    out = tmp_path / "other"
    simulate(tree(tmp_path, privacy={"unsafe_noise_seed": 6}), out=out)
    assert not np.allclose(found[0], weights(out), atol=1e-3)  # control: another seed is another run


def test_sites_that_were_closed_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number, places in enumerate((200, 1)):
        monkeypatch.setattr("confide.simulations.world._OPEN", places)
        out = tmp_path / f"out{number}"
        sections = tree(tmp_path, run={"rounds": 8}, consent={"withdrawals": [{"round": 3, "fraction": 0.3}]})
        simulate(sections, out=out)
        found.append(weights(out))
        assert verify(out).findings == []
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("change", ["weights", "too few", "none"])
def test_a_model_that_the_cohort_did_not_sign_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    honest = CatchUp._handover

    def forged(self: CatchUp, before: int) -> tuple[m.Handover | None, tuple[bytes, ...]]:
        handover, chunks = honest(self, before)
        if handover is None or change == "none":
            return handover, chunks
        if change == "too few":
            return handover.model_copy(update={"statements": handover.statements[:2]}), chunks
        return handover, (bytes(len(chunks[0])), *chunks[1:])

    monkeypatch.setattr(CatchUp, "_handover", forged)
    out = tmp_path / "out"
    if change == "none":  # control
        simulate(tree(tmp_path), out=out)
        assert entries(out, audit.TakenOver)
        return
    with pytest.raises(ConfideError):  # too few are left
        simulate(tree(tmp_path), out=out)
    assert entries(out, audit.TakenOver) == []
    reasons = " ".join(e.reason for e in entries(out, audit.Refused))
    assert ("began with another model" if change == "weights" else "fewer than min_sites") in reasons


def test_a_site_does_not_train_in_a_round_that_was_not_drawn_for_it(tmp_path: Path) -> None:
    federation = Federation(tmp_path, sealing={"profile": "open"}, sites={"per_round": 3}, privacy={"epsilon": 4.0})
    drawn = federation.manifest.drawn(1)
    (other,) = set(federation.names) - set(drawn)
    federation.join()
    body = m.TrainRequest(sums=())
    assert "was not drawn" in refusal_of(federation.ask(other, "train", 1, body)).reason
    assert federation.sites[other].ledger.charges() == {}
    federation.ask(drawn[0], "train", 1, body)
    assert federation.sites[drawn[0]].ledger.charges() != {}  # control


def test_everybody_draws_the_same_and_every_site_comes_up(tmp_path: Path) -> None:
    manifest = Federation(tmp_path, sealing={"profile": "open"}, sites={"per_round": 3}).manifest
    assert manifest.drawn(7) == type(manifest).from_bytes(manifest.to_bytes()).drawn(7)
    rounds = [manifest.drawn(r) for r in range(1, 60)]
    assert {site for drawn in rounds for site in drawn} == {member.site for member in manifest.members}
    assert all(len(set(drawn)) == 3 for drawn in rounds)
    renamed = manifest.model_copy(update={"run": "another"})
    assert any(renamed.drawn(r) != manifest.drawn(r) for r in range(1, 60))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"sealing": {"profile": "sealed"}}, "per_round"),
        ({"sites": {"per_round": 15}}, "more than the run's 14 sites"),
        ({"sites": {"per_round": 3, "min_sites": 4}}, "below min_sites"),
        ({"strategy": {"kind": "scaffold"}}, "keeps something of every site"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_starts(
    tmp_path: Path, sections: dict[str, dict[str, Any]], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        simulate(tree(tmp_path, **sections), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
