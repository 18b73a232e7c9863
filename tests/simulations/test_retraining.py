"""Training anew after withdrawals: without whoever has left, from the same start, paid for again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import confide as product
from confide.privacy.dp import Ledger
from tests.cli.command import confide
from tests.clients.transcripts import read_logs, record_runs
from tests.clients.watching import Watch, watch_runs
from tests.support import SITES, experiment_tree, write_people

PURPOSE = "research/test"


def tree(folder: Path) -> dict[str, Any]:
    """Everybody consents; at q = 1 everybody who may be drawn is drawn in every step."""
    return experiment_tree(
        str(write_people(folder, people=12)), run={"rounds": 2}, sites={"min_subjects": 2},
        training={"local_steps": 1}, privacy={"sample_rate": 1.0, "epsilon": 2.0, "site_epsilon_limit": 6.0},
        sealing={"profile": "masked"}, consent={"simulate": {"fraction": 1.0}},
    )  # fmt: skip


def watched(act: Callable[[], Any], watch: Watch | None = None) -> Watch:
    watch = watch or Watch()
    with pytest.MonkeyPatch.context() as patch:
        watch_runs(patch, watch)
        act()
    return watch


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    """A finished run in which everybody took part."""
    base = tmp_path_factory.mktemp("first")
    watch = watched(lambda: product.simulate(tree(base), out=base / "out"))
    return base / "out", watch


@pytest.fixture
def earlier(first: tuple[Path, Watch], tmp_path: Path) -> Path:
    """A copy of it, to do something to."""
    shutil.copytree(first[0], tmp_path / "first")
    return tmp_path / "first"


def leave(run: Path, command: str, person: str) -> None:
    site = person.partition("-")[0]
    where = ("--registry", run / "sites" / site, "--key", run / "ledgers" / site / "site.key")
    more = ("--purpose", PURPOSE) if command == "withdraw" else ("--yes",)
    assert confide("consent", command, person, *more, *where).code == 0


def runs_charged(ledgers: Path, site: str) -> dict[str, int]:
    ledger = Ledger.open(ledgers / site / "ledger.db")
    found: dict[str, int] = {}
    for charge in ledger.charges():
        found[charge.partition("/")[0]] = found.get(charge.partition("/")[0], 0) + 1
    ledger.close()
    return found


def test_whoever_has_left_is_in_no_round_of_the_new_run(
    first: tuple[Path, Watch], earlier: Path, tmp_path: Path
) -> None:
    trained = first[1].of("train", site="ash")
    gone = {min(trained): "withdraw", max(trained): "erase"}
    for person, command in gone.items():
        leave(earlier, command, person)
    before = (earlier / "model.safetensors").read_bytes()
    told = list[Any]()
    watch = watched(lambda: told.append(
        confide("simulate", "--retrain-after", earlier, "--out", tmp_path / "anew", "--json")
    ))  # fmt: skip
    (answer,) = told
    assert answer.code == 0, answer.err
    old, new = (json.loads((folder / "result.json").read_text()) for folder in (earlier, tmp_path / "anew"))
    assert (answer.last_line["retrained_after"], new["retrained_after"]) == (old["run_id"], old["run_id"])
    assert "retrained_after" not in old
    assert watch.of() == first[1].of() - set(gone)
    assert watch.world is not None
    assert first[1].world is not None
    assert np.array_equal(watch.world.initial, first[1].world.initial)
    for site in SITES:
        charged = runs_charged(earlier / "ledgers", site)
        assert charged[new["run_id"]] == charged[old["run_id"]] > 0
    assert (earlier / "model.safetensors").read_bytes() == before != (tmp_path / "anew/model.safetensors").read_bytes()
    assert confide("audit", "verify", tmp_path / "anew").code == 0
    page = (tmp_path / "anew" / "index.html").read_text()
    assert "not erasure" in page
    assert old["run_id"] in page


def test_an_ordinary_second_run_would_ask_its_own_sources(
    first: tuple[Path, Watch], earlier: Path, tmp_path: Path
) -> None:
    """The control: the earlier run's registries are what leaves her out."""
    person = min(first[1].of("train", site="ash"))
    leave(earlier, "withdraw", person)
    experiment = json.loads((earlier / "experiment.json").read_text())
    second = {"out": tmp_path / "second", "ledger": earlier / "ledgers"}
    assert person in watched(lambda: product.simulate(experiment, **second)).of()


def test_an_interrupted_retraining_is_resumed_without_her(
    first: tuple[Path, Watch], earlier: Path, tmp_path: Path
) -> None:
    person = min(first[1].of("train", site="ash"))
    leave(earlier, "withdraw", person)

    def stop(watch: Watch) -> None:
        if watch.round == 2:
            raise KeyboardInterrupt

    def begin() -> None:
        with pytest.raises(KeyboardInterrupt):
            product.simulate(out=tmp_path / "anew", retrain_after=earlier)

    watch = watched(begin, Watch(on_round=stop))
    again = watched(lambda: product.simulate(out=tmp_path / "anew", resume=True))
    assert watch.of("train", site="ash") == again.of("train", site="ash")
    assert person not in watch.of() | again.of()
    assert "retrained_after" in json.loads((tmp_path / "anew" / "result.json").read_text())


def test_nobody_can_tell_from_a_retraining_whether_anybody_had_left(first: tuple[Path, Watch], tmp_path: Path) -> None:
    """It begins whether or not somebody has, and looks the same."""
    seen = []
    for name in ("nobody", "somebody"):
        shutil.copytree(first[0], tmp_path / name)
        if name == "somebody":
            leave(tmp_path / name, "withdraw", min(first[1].of("train", site="ash")))
        with pytest.MonkeyPatch.context() as patch:
            recorded = record_runs(patch)
            product.simulate(out=tmp_path / f"{name}-anew", retrain_after=tmp_path / name)
        (transcript,) = recorded
        seen.append(read_logs(transcript, tmp_path / f"{name}-anew"))
    assert seen[0].messages == seen[1].messages
    assert seen[0].logs == seen[1].logs


def test_where_the_budget_is_spent_there_is_no_retraining(earlier: Path, tmp_path: Path) -> None:
    arguments = ("simulate", "--retrain-after", earlier, "--set", "privacy.epsilon=5.9", "--out", tmp_path / "anew")
    refused = confide(*arguments)
    assert refused.code == 5
    assert not (tmp_path / "anew").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--set", "run.purpose=research/other"), 2, "[run.purpose] is not the earlier run's"),
        (("--set", "run.seed=9"), 2, "[run.seed] is not the earlier run's"),
        (("--set", "data.held_out=0.3"), 2, "[data] is not the earlier run's"),
        (("--resume",), 2, "does not go with --resume"), (("--dry-run",), 2, "does not go with --dry-run"),
        (("--ledger", "nowhere"), 2, "name the earlier run's ledgers"),
    ],
)  # fmt: skip
def test_what_is_no_retraining_is_refused(
    earlier: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    refused = confide("simulate", "--retrain-after", earlier, "--out", tmp_path / "anew", *arguments)
    assert refused.code == code
    assert words in " ".join(refused.err.split())
    assert not (tmp_path / "anew").exists()


def test_ledgers_that_do_not_know_the_earlier_run_are_refused(earlier: Path, tmp_path: Path) -> None:
    product.simulate(tree(tmp_path), out=tmp_path / "other")
    refused = confide("simulate", "--retrain-after", earlier, "--ledger", tmp_path / "other" / "ledgers",
                      "--out", tmp_path / "anew")  # fmt: skip
    assert refused.code == 5
    assert "holds no charge of run" in refused.err


@pytest.mark.parametrize("damage", ["missing", "a site's folder is missing", "no registry"])
def test_without_an_earlier_registry_nobody_is_trained_on(earlier: Path, tmp_path: Path, damage: str) -> None:
    registry = earlier / "sites" / "ash" / "consent.db"
    if damage == "missing":
        registry.unlink()
    elif damage == "no registry":
        registry.write_bytes(b"no database at all")
    else:
        shutil.rmtree(registry.parent)
    refused = confide("simulate", "--retrain-after", earlier, "--out", tmp_path / "anew")
    assert refused.code in (2, 4)
    assert "consent.db" in refused.err
    assert not (tmp_path / "anew").exists()


def test_a_run_that_is_not_finished_is_no_start(earlier: Path, tmp_path: Path) -> None:
    (earlier / "status.json").write_text('{"status": "interrupted", "run_id": "x"}')
    refused = confide("simulate", "--retrain-after", earlier, "--out", tmp_path / "anew")
    assert (refused.code, (tmp_path / "anew").exists()) == (2, False)
    assert "holds no finished run" in refused.err
