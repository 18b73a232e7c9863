"""A sweep on data that are not public: all cells are charged to the same ledgers, together, or none is run."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import confide
from confide.errors import BudgetError, ConfigError
from confide.privacy.dp import Ledger, PrivacyEvent, Role, person_epsilon
from confide.privacy.dp.accounting import rdp_epsilon
from confide.privacy.dp.events import merge_events
from confide.simulations.sweeps import cells
from tests.cli import command
from tests.cli.command import to_toml
from tests.simulations.test_sweep import SHORT, made
from tests.support import experiment_tree, write_people

OVER = ["training.learning_rate=0.5,1.0"]
CHAOS = bool(os.environ.get("CONFIDE_CHAOS"))


def private_tree(folder: Path, **privacy: Any) -> dict[str, Any]:
    tree = experiment_tree(str(write_people(folder)), sealing={"profile": "masked"}, training={"local_steps": 2})
    tree["run"] |= SHORT
    tree["data"]["public"] = False
    tree["privacy"] |= {"epsilon": 1.0} | privacy
    return tree


def charges_in(ledgers: Path, site: str = "ash") -> dict[str, PrivacyEvent]:
    with closing(Ledger.open(ledgers / site / "ledger.db")) as ledger:
        return ledger.charges()


def runs_in(ledgers: Path) -> list[str]:
    """The runs that charged something, each once, in order."""
    return list(dict.fromkeys(name.partition("/")[0] for name in charges_in(ledgers)))


@pytest.fixture(scope="module")
def charged(tmp_path_factory: pytest.TempPathFactory) -> confide.Sweep:
    """Two cells, charged to one set of ledgers; nobody changes it."""
    folder = tmp_path_factory.mktemp("charged")
    return confide.sweep(private_tree(folder), over=OVER, out=folder / "out", ledger=folder / "ledgers")


def test_every_cell_is_charged_to_the_same_ledgers_and_the_total_is_their_composition(charged: confide.Sweep) -> None:
    ledgers = charged.out.parent / "ledgers"
    held = charges_in(ledgers)
    assert runs_in(ledgers) == [cell.result.run_id for cell in charged.cells]
    assert charged.cost is not None
    merged = merge_events(held.values())
    assert {e.role: e.steps for e in merged} == {Role.TRAIN: 2 * 2, Role.HELD_OUT: 2 * 1}
    assert charged.cost.epsilon == person_epsilon(merged, 1e-5)
    each = max(cell.result.epsilon.max for cell in charged.cells)
    assert each < charged.cost.epsilon < 2 * each
    after = max(rdp_epsilon([e for e in held.values() if e.role is role], 1e-5) for role in Role)
    assert {one.epsilon_after for one in charged.cost.ledgers.values()} == {after}
    assert charged.cells[-1].result.ledger["ash"][0] == after
    assert not any((cell.result.out / "ledgers").exists() for cell in charged.cells)


def test_what_is_shown_is_what_was_released_and_what_all_of_it_cost(charged: confide.Sweep) -> None:
    assert all(cell.result.metrics is None for cell in charged.cells)
    assert charged.cost is not None
    assert not charged.exact
    released = [cell.result.released_metrics or {} for cell in charged.cells]
    # From noise an AUC cannot always be read.
    common = [name for name in ("auc", "accuracy") if all(found.get(name) is not None for found in released)]
    assert charged.quality == (common[0] if common else None)
    assert [s.median for s in charged.settings] == [found[name] for name in common[:1] for found in released]
    tree = json.loads((charged.out / "sweep.json").read_text())
    assert tree["metrics"] == "released"
    assert tree["cost"]["epsilon"] == charged.cost.epsilon
    assert {cell["epsilon_of_sweep"] for cell in tree["cells"]} == {charged.cost.epsilon}
    whole = f"{charged.cost.epsilon:.2f}"
    assert tree["watermark"] == f"selection paid for: all 2 cells together cost ε = {float(whole):g} per subject"
    page = " ".join((charged.out / "index.html").read_text().split())
    assert "Released metrics, noised and charged" in page
    assert "asked of every site’s ledger before the first cell ran" in page
    assert page.count(f'<td class="n">{whole}</td>') == 2
    assert "nobody has charged" not in page
    results = pd.read_csv(charged.out / "results.csv")
    assert not [c for c in results if c.startswith("exact.")]
    assert set(results["epsilon_of_sweep"]) == {charged.cost.epsilon}
    rounds = pd.read_csv(charged.out / "rounds.csv")
    assert not [c for c in rounds if c.startswith("exact.")]


def test_a_plan_tells_the_total_and_writes_nothing(charged: confide.Sweep, tmp_path: Path) -> None:
    tree = private_tree(tmp_path)
    quote = confide.plan_sweep(tree, over=OVER, ledger=tmp_path / "ledgers")
    assert made(tmp_path) == []
    assert quote.cost is not None
    assert charged.cost is not None
    assert quote.cost.epsilon == charged.cost.epsilon
    assert quote.cost.ledgers == charged.cost.ledgers
    assert [c["epsilon"] for c in quote.cells] == [c.result.epsilon.max for c in charged.cells]
    # On top of what is there already.
    again = confide.plan_sweep(tree, over=OVER, ledger=charged.out.parent / "ledgers")
    assert again.cost is not None
    assert again.cost.worst.epsilon_before == charged.cost.worst.epsilon_after
    assert again.cost.worst.epsilon_after > charged.cost.worst.epsilon_after
    assert again.cost.epsilon == charged.cost.epsilon
    assert again.cost.admitted
    assert confide.SweepCost.from_json(json.loads(json.dumps(again.cost.to_json()))) == again.cost
    public = confide.plan_sweep(tree, over=OVER, overrides=["data.public=true"])
    assert public.cost is None


def test_a_sweep_that_would_overspend_is_refused_before_its_first_cell(tmp_path: Path) -> None:
    """Each cell fits by itself: it is all of them that do not."""
    tree = private_tree(tmp_path, epsilon=1.0, site_epsilon_limit=2.0)
    over = ["training.learning_rate=0.1,0.2,0.3,0.4"]
    assert confide.plan(tree, ledger=tmp_path / "ledgers").admitted
    quote = confide.plan_sweep(tree, over=over, ledger=tmp_path / "ledgers")
    assert quote.cost is not None
    assert not quote.cost.admitted
    with pytest.raises(BudgetError, match=r"for 4 cells together: the privacy budget does not suffice") as refused:
        confide.sweep(tree, over=over, out=tmp_path / "out", ledger=tmp_path / "ledgers")
    assert refused.value.exit_code == 5
    assert str(tmp_path / "ledgers") in refused.value.where
    assert made(tmp_path) == []
    # The control: fewer cells fit, and a ledger that was charged meanwhile does not hold the same again.
    fits = ["training.learning_rate=0.1,0.2"]
    confide.sweep(tree, over=fits, out=tmp_path / "out", ledger=tmp_path / "ledgers")
    before = charges_in(tmp_path / "ledgers")
    with pytest.raises(BudgetError, match="for 2 cells together: "):
        confide.sweep(tree, over=fits, out=tmp_path / "more", ledger=tmp_path / "ledgers")
    assert charges_in(tmp_path / "ledgers") == before
    assert not (tmp_path / "more").exists()


def test_a_folder_that_cannot_be_made_leaves_no_ledger_behind(tmp_path: Path) -> None:
    tree = private_tree(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        confide.sweep(tree, over=OVER, out=tmp_path / "file" / "out", ledger=tmp_path / "ledgers")
    assert made(tmp_path) == ["file"]
    with pytest.raises(ConfigError, match="cannot be made"):
        confide.sweep(tree, over=OVER, out=tmp_path / "out", ledger=tmp_path / "file" / "ledgers")


def test_cells_that_deal_people_out_differently_are_refused(tmp_path: Path) -> None:
    """What she has lost would stand partly in one ledger, partly in another."""
    tree = private_tree(tmp_path)
    tree["partition"] = {"kind": "iid", "sites": 4, "alpha": 50.0}
    for over in (["run.seed=1,2"], ["partition.kind=iid,quantity"], ["partition.overlap=0,0.2"]):
        with pytest.raises(ConfigError, match=r"other people at its sites|differs between cells"):
            confide.sweep(tree, over=over, out=tmp_path / "out", ledger=tmp_path / "ledgers")
    for over in (["privacy.delta=1e-5,1e-6"], ["privacy.site_epsilon_limit=6,8"], ["data.held_out=0.2,0.3"]):
        with pytest.raises((ConfigError, BudgetError)) as refused:
            confide.sweep(tree, over=over, out=tmp_path / "out", ledger=tmp_path / "ledgers")
        assert "fixed" in str(refused.value)
    assert made(tmp_path) == []
    natural = private_tree(tmp_path)
    quote = confide.plan_sweep(natural, over=["run.seed=1,2"], ledger=tmp_path / "ledgers")  # nobody moves
    assert quote.cost is not None


def test_a_killed_sweep_goes_on_and_no_finished_cell_is_charged_again(tmp_path: Path) -> None:
    tree, out, ledgers = private_tree(tmp_path), tmp_path / "out", tmp_path / "ledgers"
    tree["run"]["rounds"] = 3

    class Killed(BaseException):
        pass

    def kill(progress: confide.SweepProgress) -> None:
        if progress.cell == 2 and progress.round is not None and progress.round.round == 1:
            raise Killed

    with pytest.raises(Killed):
        confide.sweep(tree, over=OVER, out=out, ledger=ledgers, progress=kill)
    before = charges_in(ledgers)
    assert len(runs_in(ledgers)) == 2
    with pytest.raises(ConfigError, match="ledgers are in"):
        confide.sweep(resume=True, out=out, ledger=tmp_path / "others")
    found = confide.sweep(resume=True, out=out, ledger=ledgers)
    held = charges_in(ledgers)
    assert before.items() <= held.items()
    assert runs_in(ledgers) == [cell.result.run_id for cell in found.cells]
    assert found.cost is not None
    assert found.cost.worst.epsilon_after == pytest.approx(
        max(rdp_epsilon([e for e in held.values() if e.role is role], 1e-5) for role in Role)
    )
    # What was paid for is what was told beforehand, to the last step.
    assert sum(e.steps for e in held.values() if e.role is Role.TRAIN) == 2 * 3 * 2


def test_a_cell_that_died_while_it_ended_is_neither_lost_nor_charged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record lay there; its folder did not say yet that it had finished. And the other way round, as of old."""
    tree, out, ledgers = private_tree(tmp_path), tmp_path / "out", tmp_path / "ledgers"

    class Killed(BaseException):
        pass

    written = cells.write_json

    def die(path: Path, tree: Any) -> None:
        written(path, tree)
        if path.name == "cell.json":
            raise Killed

    monkeypatch.setattr(cells, "write_json", die)
    with pytest.raises(Killed):
        confide.sweep(tree, over=OVER, out=out, ledger=ledgers)
    monkeypatch.undo()
    (run,) = runs_in(ledgers)
    first = next((out / "cells").iterdir())
    assert (first / "cell.json").is_file()
    found = confide.sweep(resume=True, out=out)
    assert [cell.result.run_id for cell in found.cells] == runs_in(ledgers)
    assert run == found.cells[0].result.run_id
    # A finished run whose record somebody took away is not run, and charged, again.
    (out / "status.json").write_text(json.dumps({"status": "failed", "cells": 2, "finished": 2, "cell": None}))
    (first / "cell.json").unlink()
    before = charges_in(ledgers)
    with pytest.raises(ConfigError, match="run it again would be charged again"):
        confide.sweep(resume=True, out=out)
    assert charges_in(ledgers) == before


def test_a_resumed_sweep_asks_again_for_what_is_left(tmp_path: Path) -> None:
    """Somebody else has used the ledgers in the meantime."""
    tree, out, ledgers = private_tree(tmp_path, site_epsilon_limit=1.7), tmp_path / "out", tmp_path / "ledgers"

    class Killed(BaseException):
        pass

    def kill(progress: confide.SweepProgress) -> None:
        if progress.cell == 1 and progress.state == "finished":
            raise Killed

    with pytest.raises(Killed):
        confide.sweep(tree, over=OVER, out=out, ledger=ledgers, progress=kill)
    kept = shutil.copytree(ledgers, tmp_path / "kept")
    confide.simulate(tree, out=tmp_path / "other", ledger=ledgers)
    before = charges_in(ledgers)
    with pytest.raises(BudgetError, match="the privacy budget does not suffice"):
        confide.sweep(resume=True, out=out)
    assert charges_in(ledgers) == before
    # The control: had nobody, it goes on.
    shutil.rmtree(ledgers)
    shutil.copytree(kept, ledgers)
    assert len(confide.sweep(resume=True, out=out).cells) == 2


def test_workers_beside_each_other_share_the_ledgers_and_spend_what_was_told(tmp_path: Path) -> None:
    tree = private_tree(tmp_path, site_epsilon_limit=4.0)
    over = ["training.learning_rate=0.25,0.5,1.0"]
    found = confide.sweep(tree, over=over, out=tmp_path / "out", ledger=tmp_path / "ledgers", workers=2)
    assert found.beside == 2
    assert found.cost is not None
    for site in found.cost.ledgers:
        held = charges_in(tmp_path / "ledgers", site)
        assert sorted({name.partition("/")[0] for name in held}) == sorted(c.result.run_id for c in found.cells)
        with closing(Ledger.open(tmp_path / "ledgers" / site / "ledger.db")) as ledger:
            assert ledger.used() <= 1.0
            assert ledger.used() == pytest.approx(found.cost.ledgers[site].used_after)
    assert len({(tmp_path / "ledgers" / s / "site.key").read_bytes() for s in found.cost.ledgers}) == 4


def test_bounds_that_are_learned_first_are_part_of_the_total(tmp_path: Path) -> None:
    tree = private_tree(tmp_path, epsilon=8.0, site_epsilon_limit=30.0)
    tree["schema"] = {"bounds": "learn", "features": {"age": {"kind": "number"}}}
    tree["sites"]["population"] = {"default": 40}
    quote = confide.plan_sweep(tree, over=OVER, ledger=tmp_path / "ledgers")
    found = confide.sweep(tree, over=OVER, out=tmp_path / "out", ledger=tmp_path / "ledgers")
    assert found.cost == quote.cost
    held = merge_events(charges_in(tmp_path / "ledgers").values())
    assert {e.role: e.steps for e in held} == {Role.TRAIN: 2 * 2, Role.HELD_OUT: 2 * (2 + 1)}
    assert quote.cost is not None
    assert quote.cost.epsilon == person_epsilon(held, 1e-5)
    assert len(runs_in(tmp_path / "ledgers")) == 4


def test_the_command_shows_the_total_and_refuses_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment.toml").write_text(to_toml(private_tree(tmp_path, site_epsilon_limit=2.0)))
    monkeypatch.chdir(tmp_path)
    fits = ("sweep", "experiment.toml", "--over", OVER[0], "--ledger", "ledgers")
    planned = command.confide(*fits, "--dry-run")
    assert planned.code == 0
    assert "all 2 cells together: ε = 1.4" in planned.words
    assert "0.00 → " in planned.words
    assert "would be refused" not in planned.words
    assert not (tmp_path / "ledgers").exists()
    too_many = ("sweep", "experiment.toml", "--over", "training.learning_rate=1,2,3,4", "--ledger", "ledgers")
    planned = command.confide(*too_many, "--dry-run")
    assert (planned.code, "would be refused" in planned.words) == (0, True)
    assert command.confide(*too_many, "--dry-run", "--json").last_line["cost"]["admitted"] is False
    refused = command.confide(*too_many, "--out", "out")
    assert refused.code == 5
    assert "for 4 cells together: " in refused.err
    assert not (tmp_path / "out").exists()
    done = command.confide(*fits, "--out", "out", "--workers", "1")
    assert done.code == 0
    assert "metrics: as released, noised and charged" in done.words
    assert "costs what all of them cost: ε = 1.4" in done.words
    unpaid = command.confide("sweep", "experiment.toml", "--over", OVER[0], "--dry-run")
    assert unpaid.code == 9
