"""A sweep runs every cell of its grid, tells which was best only under its watermark, and refuses private data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import confide
from confide.errors import BudgetError, ConfigError, DataError, PolicyError
from confide.privacy.dp import Ledger, RenyiBudget, Role
from confide.simulations.result import Epsilon, Result
from confide.simulations.sweeps.charts import curves
from confide.simulations.sweeps.frontier import WATERMARK, Line, Panel, Point, write_frontier
from confide.simulations.sweeps.page import write_sweep_page
from confide.simulations.sweeps.result import Cell, Sweep
from tests.support import experiment_tree, write_people

SHORT = {"rounds": 1, "report_metrics_every": 1}


@pytest.fixture
def experiment(make_experiment: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """One round over four clinics, on public data."""
    tree = make_experiment()
    tree["run"] |= SHORT
    tree["training"]["local_steps"] = 2
    return tree


def made(folder: Path) -> list[str]:
    """What is there beside the table of people."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "people.csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> confide.Sweep:
    """Two ε by two seeds, and what no privacy would give; nobody changes it."""
    folder = tmp_path_factory.mktemp("sweep")
    tree = experiment_tree(str(write_people(folder)), training={"local_steps": 2, "learning_rate": 0.5})
    tree["run"] |= SHORT
    over = ["privacy.epsilon=4,inf", "run.seed=1,2"]
    return confide.sweep(tree, over=over, overrides=["privacy.sample_rate=0.5"], out=folder / "out")


def test_every_combination_is_a_run_of_its_own_with_a_ledger_of_its_own(finished: confide.Sweep) -> None:
    assert [cell.values for cell in finished.cells] == [
        {"privacy.epsilon": 4, "run.seed": 1}, {"privacy.epsilon": 4, "run.seed": 2},
        {"privacy.epsilon": math.inf, "run.seed": 1}, {"privacy.epsilon": math.inf, "run.seed": 2},
    ]  # fmt: skip
    folders = [cell.result.out for cell in finished.cells]
    assert [f.name for f in folders] == [
        "001-epsilon-4-seed-1", "002-epsilon-4-seed-2", "003-epsilon-inf-seed-1", "004-epsilon-inf-seed-2",
    ]  # fmt: skip
    for cell, folder in zip(finished.cells, folders, strict=True):
        assert json.loads((folder / "result.json").read_text())["run_id"] == cell.result.run_id
        assert json.loads((folder / "experiment.json").read_text())["privacy"]["sample_rate"] == 0.5
        ledger = Ledger(folder / "ledgers" / "ash" / "ledger.db", RenyiBudget.for_limit(8.0, 1e-5), held_out=0.25)
        steps = sum(event.steps for event in ledger.events(Role.TRAIN))
        ledger.close()
        assert steps == (0 if math.isinf(cell.result.epsilon.max) else 2)


def test_the_watermark_stands_wherever_the_best_cell_is_told(finished: confide.Sweep) -> None:
    tree = json.loads((finished.out / "sweep.json").read_text())
    keys = list(tree)
    assert keys[keys.index("best") + 1] == "watermark"
    assert tree["best"]["values"] == {"privacy.epsilon": 4}
    assert tree["watermark"] == finished.watermark == WATERMARK == "hypothetical ε; selection not private"
    figure = (finished.out / "figures" / "frontier.svg").read_text()
    assert figure.count(WATERMARK) == 2  # drawn, and in the description that is read aloud
    page = (finished.out / "index.html").read_text()
    assert f"{WATERMARK}</dd>" in page.split("<dt>best</dt>")[1].splitlines()[0]


def test_folder_object_and_json_tell_the_same(finished: confide.Sweep) -> None:
    tree = json.loads((finished.out / "sweep.json").read_text())
    assert tree == finished.to_json()
    assert tree["axes"] == {"privacy.epsilon": [4, "inf"], "run.seed": [1, 2]}
    assert [s["cells"] for s in tree["settings"]] == [[1, 2], [3, 4]]
    aucs = sorted(cell["metrics"]["auc"] for cell in tree["cells"][:2])
    assert tree["best"]["auc"] == {"median": pytest.approx(sum(aucs) / 2), "low": aucs[0], "high": aucs[1]}
    status = json.loads((finished.out / "status.json").read_text())
    assert status == {"status": "finished", "cells": 4, "finished": 4, "cell": None}


def test_the_page_needs_nothing_from_anywhere_and_links_to_every_cell(finished: confide.Sweep) -> None:
    page = (finished.out / "index.html").read_text()
    assert 'src="data:image/svg+xml;base64,' in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    for cell in finished.cells:
        assert f'href="cells/{cell.result.out.name}/index.html"' in page
        assert (finished.out / "cells" / cell.result.out.name / "index.html").exists()


def test_the_tables_have_a_row_a_cell_and_a_row_a_cell_and_round(finished: confide.Sweep) -> None:
    results, rounds = (pd.read_parquet(finished.out / f"{name}.parquet") for name in ("results", "rounds"))
    assert list(results["setting"]) == [1, 1, 2, 2]
    assert list(results["privacy.epsilon"]) == [4, 4, math.inf, math.inf]
    assert list(results["epsilon"]) == [c.result.epsilon.max for c in finished.cells]
    assert list(results["exact.auc"]) == [(c.result.metrics or {})["auc"] for c in finished.cells]
    assert list(results["folder"]) == [f"cells/{c.result.out.name}" for c in finished.cells]
    assert (results["uplink_bytes"] > 0).all()
    assert (results["downlink_bytes"] > 0).all()
    assert list(zip(rounds["cell"], rounds["round"], strict=True)) == [(c, r) for c in (1, 2, 3, 4) for r in (0, 1)]
    assert list(rounds["exact.auc"]) == [point["auc"] for c in finished.cells for point in c.result.curve]
    for name, table in (("results", results), ("rounds", rounds)):
        pd.testing.assert_frame_equal(pd.read_csv(finished.out / f"{name}.csv"), table, check_dtype=False)


def test_without_an_axis_of_epsilon_there_is_a_page_but_no_frontier(experiment: dict[str, Any], tmp_path: Path) -> None:
    over = ["training.learning_rate=0.5,2"]
    found = confide.sweep(experiment, over=over, out=tmp_path / "out")
    assert not (found.out / "figures").exists()
    page = (found.out / "index.html").read_text()
    assert "data:image" not in page
    assert WATERMARK in page.split("<dt>best</dt>")[1].splitlines()[0]


# --- which is the best ----------------------------------------------------------------------------------------------


def cell(number: int, epsilon: float, metrics: dict[str, float] | None, **values: Any) -> Cell:
    """A finished run as far as a comparison looks at it."""
    result = Result(
        run_id=f"r{number}", rounds=1, sites=[], profile="open", metrics=metrics, released_metrics=None,
        epsilon=Epsilon(epsilon, {}), delta=1e-5, unit="subject", neighbours="add or remove one", placement="site",
        bytes_per_parameter=4.0, rounds_abandoned=0, seconds=1.0, out=Path(f"cells/{number}"), curve=[],
        epsilon_curve=[], ledger={}, consent_is_simulated=True, saturated=0.0, exposure=(),
        released_intervals=None, learned={}, warnings=(),
    )  # fmt: skip
    return Cell(number=number, label="", values=values, result=result)


def sweep_of(*cells: Cell) -> Sweep:
    return Sweep(name="tiny", axes={}, cells=cells, seconds=1.0, out=Path("out"))


def test_the_best_is_the_highest_median_over_seeds_not_the_luckiest_seed() -> None:
    lucky = [cell(i, 1.0, {"auc": a}, x=1, **{"run.seed": i}) for i, a in enumerate((0.5, 0.5, 0.9))]
    steady = [cell(3 + i, 1.0, {"auc": 0.6}, x=2, **{"run.seed": i}) for i in range(3)]
    best = sweep_of(*lucky, *steady).best
    assert best is not None
    assert (best.values, best.cells) == ({"x": 2}, (3, 4, 5))


def test_a_baseline_without_privacy_is_the_best_only_among_its_like() -> None:
    private, baseline = cell(1, 2.0, {"auc": 0.6}, x=1), cell(2, math.inf, {"auc": 0.9}, x=2)
    best = sweep_of(private, baseline).best
    assert best is not None
    assert best.cells == (1,)
    alone = sweep_of(baseline).best
    assert alone is not None
    assert alone.cells == (2,)


def test_of_two_equals_the_one_with_the_lower_epsilon_is_the_best() -> None:
    best = sweep_of(cell(1, 2.0, {"auc": 0.6}, x=1), cell(2, 1.0, {"auc": 0.6}, x=2)).best
    assert best is not None
    assert best.cells == (2,)


def test_cells_without_a_common_metric_are_not_compared() -> None:
    found = sweep_of(cell(1, 2.0, {"auc": 0.6}, x=1), cell(2, 1.0, {}, x=2))
    assert (found.quality, found.settings, found.best) == (None, (), None)
    assert found.to_json()["best"] is None


def test_a_page_compares_profiles_and_rounds_in_words_and_numbers(tmp_path: Path) -> None:
    def ran(number: int, profile: str, seed: int, curve: list[float]) -> Cell:
        made = cell(number, 2.0, {"auc": curve[-1]}, **{"sealing.profile": profile, "run.seed": seed})
        curve_ = [{"auc": value} for value in curve]
        return replace(made, result=replace(made.result, curve=curve_), uplink_bytes=31_000, downlink_bytes=900)

    cells = (ran(1, "open", 1, [0.5, 0.6]), ran(2, "open", 2, [0.5, 0.8]), ran(3, "<sealed>", 1, [0.5, 0.9]))
    found = replace(sweep_of(*cells), axes={"sealing.profile": ["open", "<sealed>"], "run.seed": [1, 2]}, out=tmp_path)
    page = write_sweep_page(found).read_text()
    assert [(c.median, c.low, c.high) for c in curves(found)] == [
        ([0.5, pytest.approx(0.7)], [0.5, 0.6], [0.5, 0.8]), ([0.5, 0.9], [0.5, 0.9], [0.5, 0.9]),
    ]  # fmt: skip
    assert "setting 2 ends at 0.900" in page  # read aloud
    assert f"Held-out AUC by round; {WATERMARK}" in page
    assert "0.600 to 0.800" in page
    assert page.count('class="s1 bar"') == 2  # one a round; a single cell has no spread
    assert "&lt;sealed&gt;" in page
    assert "<sealed>" not in page
    assert "31.0 kB" in page
    assert "900 B" in page
    assert 'aria-label="Cost by profile"' in page


def test_of_many_settings_the_best_are_drawn_and_the_page_says_so(tmp_path: Path) -> None:
    cells = []
    for number in range(1, 10):
        made = cell(number, 2.0, {"auc": number / 10}, x=number)
        cells.append(replace(made, result=replace(made.result, curve=[{"auc": 0.1}, {"auc": number / 10}])))
    page = write_sweep_page(replace(sweep_of(*cells), out=tmp_path)).read_text()
    assert page.count("<polyline") == 6
    assert "The 6 best of 9 settings are drawn." in page
    assert "x 9 ends at 0.900" in page
    assert "x 3 ends" not in page


def test_a_name_with_dollars_and_angle_brackets_is_text_in_the_figure(tmp_path: Path) -> None:
    point = Point(1.0, 0.6, 0.5, 0.7)
    panel = Panel("<b>", [Line("a=$x$", [point]), Line("b", [point, Point(math.inf, 0.8, 0.8, 0.8)])])
    figure = write_frontier([panel], tmp_path / "f.svg", title="1 < 2", x_label="ε", y_label="AUC").read_text()
    assert '<title id="figure-title">1 &lt; 2</title>' in figure
    assert "a=$x$" in figure
    assert "&lt;b&gt;: a=$x$: 0.600 at ε = 1; b: 0.600 at ε = 1, 0.800 at ε = ∞." in figure
    assert "<b>" not in figure


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["privacy.epsilon=1,2", "data.public=true,false"])
def test_private_data_are_refused_before_anything_is_read_or_written(
    experiment: dict[str, Any], tmp_path: Path, over: str
) -> None:
    # The table is not there either: that would be another error, had anybody looked.
    experiment["data"] |= {"public": False, "file": "nowhere.csv"}
    experiment["sealing"]["profile"] = "sealed"
    with pytest.raises(PolicyError, match="a release of all its cells") as refused:
        confide.sweep(experiment, over=[over], out=tmp_path / "out")
    assert refused.value.exit_code == 9
    assert "data.public = true" in refused.value.hint
    assert "--ledger" in refused.value.hint
    assert made(tmp_path) == []


def test_no_privacy_at_all_is_refused_on_private_data(experiment: dict[str, Any], tmp_path: Path) -> None:
    experiment["data"]["public"] = False
    with pytest.raises(ConfigError, match=r"privacy.epsilon = inf needs data.public = true") as refused:
        confide.sweep(experiment, over=["privacy.epsilon=inf"], out=tmp_path / "out")
    assert refused.value.where.startswith("cell privacy.epsilon=inf: ")
    assert made(tmp_path) == []


@pytest.mark.parametrize(
    ("over", "overrides", "told"),
    [
        ([], [], "names no axis"),
        (["privacy.epsilon"], [], "is not an axis"),
        (["=1,2"], [], "is not an axis"),
        (["privacy..epsilon=1"], [], "is not an axis"),
        (["privacy.epsilon="], [], "holds an empty value"),
        (["privacy.epsilon=1,,2"], [], "holds an empty value"),
        (["privacy.epsilon=1,2,"], [], "holds an empty value"),
        (["privacy.epsilon=1,2,1.0"], [], "privacy.epsilon = 1.0 is given twice"),
        (["privacy.epsilon=1", "privacy.epsilon=2"], [], "privacy.epsilon is given twice"),
        (["privacy.epsilon=1,2"], ["privacy.epsilon=3"], "privacy.epsilon is given twice"),
        (["privacy.epsilonn=1,2"], [], "unknown key privacy.epsilonn"),
        (["privacy.epsilon=1,-2"], [], "privacy.epsilon = -2"),
        (["privacy.epsilon=1,9"], [], "above privacy.site_epsilon_limit"),
    ],
)
def test_a_malformed_axis_is_refused_before_anything_is_written(
    experiment: dict[str, Any], tmp_path: Path, over: list[str], overrides: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        confide.sweep(experiment, over=over, overrides=overrides, out=tmp_path / "out")
    assert made(tmp_path) == []


@pytest.mark.parametrize(
    ("over", "error", "where"),
    [
        ("sites.min_subjects=10,40", DataError, "cell sites.min_subjects=40: site "),
        ("data.label.column=sick,none", DataError, "cell data.label.column=none: people.csv"),
        ("privacy.delta=1e-5,1e-12", BudgetError, "cell privacy.delta=1e-12"),  # nothing makes that cost ε = 0.03
    ],
)
def test_a_cell_that_cannot_run_is_found_before_the_first_one_runs(
    experiment: dict[str, Any], tmp_path: Path, over: str, error: type[Exception], where: str
) -> None:
    seen: list[confide.SweepProgress] = []
    with pytest.raises(error) as refused:
        confide.sweep(
            experiment, over=[over], overrides=["privacy.epsilon=0.03"], out=tmp_path / "out", progress=seen.append
        )
    assert getattr(refused.value, "where").startswith(where)  # noqa: B009  # of any of our errors
    assert all(p.round is None and p.result is None for p in seen)
    assert made(tmp_path) == []


def test_lists_and_quoted_text_are_values_too(experiment: dict[str, Any], tmp_path: Path) -> None:
    over = ["model.hidden=[2, 2],[3]", "run.name='a','b'"]
    found = confide.sweep(experiment, over=over, overrides=["model.kind=mlp"], out=tmp_path / "out")
    assert found.axes == {"model.hidden": [[2, 2], [3]], "run.name": ["a", "b"]}
    assert [c.result.run_id[0] for c in found.cells] == ["a", "b", "a", "b"]
    assert json.loads((found.out / "sweep.json").read_text())["cells"][0]["values"]["model.hidden"] == [2, 2]
    table = pd.read_parquet(found.out / "results.parquet")
    assert list(table["model.hidden"]) == ["[2, 2]", "[2, 2]", "[3]", "[3]"]
    assert list(table["run.name"]) == ["a", "b", "a", "b"]


def test_a_folder_that_holds_something_is_left_as_it_is(experiment: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        confide.sweep(experiment, over=["privacy.epsilon=1,2"], out=tmp_path / "out")
    assert made(tmp_path) == ["out", "out/mine.txt"]


# --- what does not end well -----------------------------------------------------------------------------------------


def test_interrupted_the_finished_cells_stay_and_the_folder_says_so(experiment: dict[str, Any], tmp_path: Path) -> None:
    def stop(progress: confide.SweepProgress) -> None:
        if progress.cell == 2 and progress.round is not None:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        confide.sweep(experiment, over=["privacy.epsilon=2,3,4"], out=out, progress=stop)
    status = json.loads((out / "status.json").read_text())
    assert status == {"status": "interrupted", "cells": 3, "finished": 1, "cell": "privacy.epsilon=3"}
    tree = json.loads((out / "sweep.json").read_text())
    assert [c["cell"] for c in tree["cells"]] == [1]
    assert tree["watermark"] == WATERMARK
    assert (out / "cells" / "001-epsilon-2" / "model.safetensors").exists()
    assert json.loads((out / "cells" / "002-epsilon-3" / "status.json").read_text())["status"] == "interrupted"
    assert not (out / "cells" / "003-epsilon-4").exists()
    assert not (out / "index.html").exists()


def test_a_cell_that_fails_stops_the_sweep_and_is_named(experiment: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def break_second(progress: confide.SweepProgress) -> None:
        if progress.cell == 1 and progress.result is not None:
            # What the second cell reads is no longer what was checked.
            Path(experiment["data"]["file"]).unlink()

    with pytest.raises(DataError) as failed:
        confide.sweep(experiment, over=["privacy.epsilon=2,3,4"], out=out, progress=break_second)
    assert failed.value.where.startswith("cell privacy.epsilon=3: ")
    status = json.loads((out / "status.json").read_text())
    assert status == {"status": "failed", "cells": 3, "finished": 1, "cell": "privacy.epsilon=3"}
    assert sorted(p.name for p in (out / "cells").iterdir()) == ["001-epsilon-2"]
