"""`schema.bounds = "learn"`: a statistics run of its own, paid for by the held-out persons, before the training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from confide.clients.site import Site
from confide.clients.training.artifact import load_model
from confide.config import SchemaConfig, load_experiment
from confide.errors import BudgetError, ConfigError, DataError, PeerError, PolicyError, StorageError
from confide.privacy.audit.verify import verify
from confide.privacy.dp import Ledger, RenyiBudget, Role, run_epsilon
from confide.privacy.dp.metrics import Floats
from confide.privacy.dp.statistics import RELEASES
from confide.protocol.manifest import Manifest
from confide.server.coordinator import Coordinator, Released
from confide.simulations import plan, simulate, statistics
from confide.simulations.sources import load_sources
from confide.simulations.world import World
from tests.support import SITES, experiment_tree, write_people

PEOPLE = 300
LEARNED = {"age": {"kind": "number"}, "cost": {"kind": "number"}, "smoker": {"kind": "category", "values": [0, 1]}}


def tree(folder: Path, **sections: Any) -> dict[str, Any]:
    """Four sites of three hundred people; the bounds of two columns are not declared."""
    file = folder / "people.csv"
    file = file if file.exists() else write_people(folder, people=PEOPLE)
    found = experiment_tree(
        str(file), run={"rounds": 2}, sites={"population": {"default": PEOPLE}}, privacy={"epsilon": 4.0},
        sealing={"profile": "sealed"},
    )  # fmt: skip
    found["schema"] = {"bounds": "learn", "features": LEARNED}
    for name, values in sections.items():
        found[name] = {**found.get(name, {}), **values}
    return found


def ledger(folder: Path, site: str = "ash") -> Ledger:
    return Ledger(folder / site / "ledger.db", RenyiBudget.for_limit(8.0, 1e-5), held_out=0.25)


def test_bounds_are_learned_and_the_whole_costs_what_was_asked(tmp_path: Path) -> None:
    result = simulate(tree(tmp_path), out=tmp_path / "out", ledger=tmp_path / "ledgers")
    bounds = json.loads((tmp_path / "out" / "statistics" / "learned.json").read_text())["bounds"]
    for low, high in bounds.values():  # both columns lie in 0…100
        assert -20 <= low < 40
        assert 60 < high <= 140
    assert result.metrics is not None
    assert result.metrics["auc"] > 0.75
    assert result.epsilon.max <= 4.0
    for evidence in (verify(tmp_path / "out"), verify(tmp_path / "out" / "statistics")):
        assert evidence.findings == []
    for site in SITES:
        held_out = ledger(tmp_path / "ledgers", site).events(Role.HELD_OUT)
        (event,) = held_out  # one σ: statistics and metrics are charged alike
        assert event.steps == RELEASES + 1
        assert run_epsilon(event, 1e-5) <= 4.0
        ((train,),) = [ledger(tmp_path / "ledgers", site).events(Role.TRAIN)]
        assert run_epsilon(train, 1e-5) <= 4.0


def test_the_released_model_says_with_which_bounds_its_inputs_are_scaled(tmp_path: Path) -> None:
    simulate(tree(tmp_path), out=tmp_path / "out")
    bounds = json.loads((tmp_path / "out" / "statistics" / "learned.json").read_text())["bounds"]
    schema = load_model(tmp_path / "out" / "model.safetensors").card.schema_
    assert schema.unknown_bounds == ()
    assert {n: list(schema.features[n].known_bounds) for n in bounds} == bounds  # type: ignore[union-attr]


def test_the_statistics_count_the_consenting_held_out_persons_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, in the open: each of them weighs √columns in all."""
    seen: list[Floats] = []
    spy = statistics.learned_bounds

    def watch(manifest: Manifest, first: Floats, second: Floats) -> Any:
        seen.extend((first, second))
        return spy(manifest, first, second)

    monkeypatch.setattr(statistics, "learned_bounds", watch)
    given = tree(tmp_path, privacy={"epsilon": math.inf}, sealing={"profile": "open", "bits": 20})
    simulate(given, out=tmp_path / "out", ledger=tmp_path / "ledgers")
    loaded = load_experiment(given, ())
    world = World(load_sources(loaded, tmp_path), tmp_path / "s", tmp_path / "ledgers", tmp_path / "l")
    counted = sum(int(site.participants(world.manifest).held_out.sum()) for site in world.sites.values())
    everybody = sum(len(site.records.persons) for site in world.sites.values())
    world.close()
    assert 0 < counted < everybody / 2
    for vector in seen:
        assert vector.sum() == pytest.approx(math.sqrt(2) * counted, rel=1e-3)


def test_what_both_runs_cost_is_checked_before_anything_is_charged(tmp_path: Path) -> None:
    """A ledger with room for the statistics or for the training, but not for both."""
    given = tree(tmp_path, privacy={"epsilon": 4.0, "site_epsilon_limit": 8.0})
    simulate(tree(tmp_path), out=tmp_path / "first", ledger=tmp_path / "ledgers")
    before = ledger(tmp_path / "ledgers").used()
    while True:
        used = ledger(tmp_path / "ledgers").used()
        try:
            simulate(given, out=tmp_path / f"out-{used:.6f}", ledger=tmp_path / "ledgers")
        except BudgetError:
            break
        before = used
    assert ledger(tmp_path / "ledgers").used() == used >= before, "the refused one was charged nothing"
    assert not (tmp_path / f"out-{used:.6f}").exists()


def test_the_plan_counts_the_statistics(tmp_path: Path) -> None:
    learned = plan(tree(tmp_path))
    declared = tree(tmp_path)
    declared["schema"] = {"features": LEARNED | {n: {"kind": "number", "bounds": [0, 100]} for n in ("age", "cost")}}
    plain = plan(declared)
    assert learned.metrics_noise_multiplier > plain.metrics_noise_multiplier
    assert learned.noise_multiplier == plain.noise_multiplier, "training pays nothing for it"
    assert learned.epsilon <= 4.0
    assert learned.learned == ["age", "cost"]
    assert plain.learned == []


def test_columns_that_the_noise_hides_end_the_run_and_what_was_charged_stands(tmp_path: Path) -> None:
    given = tree(tmp_path, privacy={"epsilon": 0.02})
    with pytest.raises(DataError, match="the noise hides the bounds of age") as refused:
        simulate(given, out=tmp_path / "out", ledger=tmp_path / "ledgers")
    assert "declare their bounds" in refused.value.hint
    (event,) = ledger(tmp_path / "ledgers").events(Role.HELD_OUT)
    assert event.steps == RELEASES
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"


def test_a_site_whose_policy_does_not_allow_statistics_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_experiment(tree(tmp_path), ())
    world = World(load_sources(loaded, tmp_path), tmp_path / "s", tmp_path / "ledgers", tmp_path / "l")
    site: Site = world.sites["ash"]
    site.check(world.manifest)
    site.policy = replace(site.policy, statistics=False)
    with pytest.raises(PolicyError, match="statistics allows none"):
        site.check(world.manifest)
    world.close()


def test_a_missing_value_counts_nowhere_and_stops_nothing(tmp_path: Path) -> None:
    path = write_people(tmp_path, people=PEOPLE)
    lines = path.read_text().splitlines()
    column = lines[0].split(",").index("age")
    for number in range(1, len(lines), 3):
        fields = lines[number].split(",")
        fields[column] = ""
        lines[number] = ",".join(fields)
    path.write_text("\n".join(lines) + "\n")
    given = tree(tmp_path)
    with pytest.raises(DataError, match="the value is missing"):
        simulate(given, out=tmp_path / "refused")
    given["schema"] = {**given["schema"], "missing": "midpoint"}
    assert simulate(given, out=tmp_path / "out").metrics is not None


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"features": LEARNED}, "feature age has no bounds"),
        ({"bounds": "guess", "features": LEARNED}, "bounds"),
        ({"bounds": "learn", "features": {"age": {"kind": "number", "bounds": [3, 1]}}}, "the lower first"),
    ],
)
def test_bounds_that_nobody_declares_or_learns_are_refused(tmp_path: Path, schema: dict[str, Any], what: str) -> None:
    given = tree(tmp_path)
    given["schema"] = schema
    with pytest.raises(ConfigError, match=what):
        load_experiment(given, ())


def test_a_manifest_never_trains_on_unscaled_columns_nor_learns_in_passing(tmp_path: Path) -> None:
    loaded = load_experiment(tree(tmp_path), ())
    world = World(load_sources(loaded, tmp_path), tmp_path / "s", tmp_path / "ledgers", tmp_path / "l")
    manifest = json.loads(world.manifest.to_bytes())
    known = SchemaConfig.model_validate(manifest["schema_"]).with_bounds({"age": (0, 1), "cost": (0, 1)})
    world.close()
    for changes in (
        {"statistics": False},
        {"schema_": json.loads(known.model_dump_json())},
        {"rounds": 5},
        {"metric_rounds": [1]},
    ):
        with pytest.raises(ValidationError, match=r"statistics|bounds"):
            Manifest.from_bytes(json.dumps(manifest | changes).encode())
    assert Manifest.from_bytes(json.dumps(manifest).encode()).statistics


@pytest.mark.parametrize("full", [False, True], ids=["with room to export", "without"])
def test_an_abandoned_release_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """And leaves its evidence, where there is room for it; where there is none, the first error is told."""
    run, export = Coordinator.run, World.export

    def without_the_first(self: Coordinator) -> Released:
        released = run(self)
        return replace(released, outcomes=tuple(replace(o, metrics=None) for o in released.outcomes))

    def exported(self: World) -> None:
        if full:
            raise StorageError("cannot be written: No space left on device")
        export(self)

    monkeypatch.setattr(Coordinator, "run", without_the_first)
    monkeypatch.setattr(World, "export", exported)
    with pytest.raises(PeerError, match="the statistics were not released"):
        simulate(tree(tmp_path), out=tmp_path / "out")
    assert np.isfinite(ledger(tmp_path / "out" / "ledgers").used())
    if not full:
        evidence = verify(tmp_path / "out" / "statistics")
        assert evidence.findings == []
        assert all(log.entries for log in (evidence.coordinator, *evidence.sites.values()))
