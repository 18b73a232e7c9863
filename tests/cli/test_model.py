"""`confide model`: a finished run's model is shown and applied."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import confide as package
from confide.clients.data.source import read_table
from confide.clients.training.artifact import load_model
from tests.cli.command import confide, files_under
from tests.support import experiment_tree, write_people


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run over `people.csv` beside it."""
    folder = tmp_path_factory.mktemp("model")
    people = write_people(folder)
    package.simulate(experiment_tree(str(people), run={"rounds": 1}), out=folder / "out")
    return folder / "out"


@pytest.fixture
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with new people to predict for."""
    monkeypatch.chdir(tmp_path)
    write_people(tmp_path, "new.csv", seed=9, people=5)
    return tmp_path


def test_predictions_go_to_stdout_with_the_rows_line_numbers(run: Path, folder: Path) -> None:
    model = run / "model.safetensors"
    answer = confide("model", "predict", "new.csv", "--model", model)
    assert (answer.code, answer.err) == (0, "")
    found = pd.read_csv(io.StringIO(answer.out))
    assert list(found.columns) == ["row", "probability"]
    table = read_table(folder / "new.csv")
    assert list(found["row"]) == list(range(2, len(table) + 2))
    direct = load_model(model).predict(table, "new.csv")
    assert np.allclose(found["probability"], direct["probability"], atol=1e-6)
    assert found["probability"].nunique() > 1


def test_predictions_go_to_a_new_file(run: Path, folder: Path) -> None:
    model = run / "model.safetensors"
    answer = confide("model", "predict", "new.csv", "--model", model, "--out", "predicted.csv", "--json")
    rows = len(read_table(folder / "new.csv"))
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    assert answer.last_line == {"rows": rows, "columns": ["probability"], "out": "predicted.csv"}
    assert (folder / "predicted.csv").read_text() == confide("model", "predict", "new.csv", "--model", model).out


def test_an_existing_file_is_never_overwritten(run: Path, folder: Path) -> None:
    (folder / "predicted.csv").write_text("years of work")
    answer = confide("model", "predict", "new.csv", "--model", run / "model.safetensors", "--out", "predicted.csv")
    assert (answer.code, answer.err) == (
        2,
        "configuration error predicted.csv: is there already\n  → name a new file\n",
    )
    assert (folder / "predicted.csv").read_text() == "years of work"


@pytest.mark.parametrize("place", ["none/predicted.csv", "new.csv/predicted.csv"])
def test_a_place_that_cannot_be_written_is_named(run: Path, folder: Path, place: str) -> None:
    before = files_under(folder)
    answer = confide("model", "predict", "new.csv", "--model", run / "model.safetensors", "--out", place)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"configuration error {place}: cannot be written: ")
    assert files_under(folder) == before


def test_json_without_a_file_is_refused_because_stdout_holds_the_predictions(run: Path, folder: Path) -> None:
    answer = confide("model", "predict", "new.csv", "--model", run / "model.safetensors", "--json")
    assert answer.code == 2
    assert answer.last_line["error"]["what"] == "--json needs --out: stdout cannot hold both"


def test_a_table_that_lacks_a_feature_is_refused(run: Path, folder: Path) -> None:
    pd.DataFrame({"age": [1]}).to_csv(folder / "short.csv", index=False)
    answer = confide("model", "predict", "short.csv", "--model", run / "model.safetensors")
    assert (answer.code, answer.out) == (3, "")
    assert answer.err == "data error short.csv: there is no column 'smoker'\n  → columns there: age\n"


def test_a_model_tells_what_it_is_and_what_it_costs(run: Path) -> None:
    model = run / "model.safetensors"
    shown, tree = confide("model", "show", model), confide("model", "show", model, "--json").last_line
    card = load_model(model).card
    assert tree == card.model_dump(mode="json")
    for line in (f"run {card.run}", "purpose research/test", "model logistic, 4 parameters", "label sick (binary)",
                 "features 2", f"digest {card.digest}"):  # fmt: skip
        assert line in shown.words
    assert card.privacy in shown.words
    assert "differentially private per subject (add or remove one subject). PRV: this run alone" in card.privacy


@pytest.mark.parametrize("command", [("show",), ("predict", "new.csv", "--model")])
def test_what_is_no_model_is_refused(folder: Path, command: tuple[str, ...]) -> None:
    for name in ("new.csv", "none.safetensors"):
        answer = confide("model", *command, name)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith(f"configuration error {name}: ")
        assert "give the model.safetensors of a finished run" in answer.err
