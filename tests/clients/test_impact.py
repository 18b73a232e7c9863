"""Which models and rounds a withdrawal touches: told to the consent officer, from the site's own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import confide as product
from confide.privacy.consent import from_micros, now_micros
from tests.cli.command import confide, files_under
from tests.support import experiment_tree, write_people

PURPOSE = "research/test"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, everybody consented."""
    base = tmp_path_factory.mktemp("run")
    tree = experiment_tree(
        str(write_people(base, people=12)), run={"rounds": 2}, sites={"min_subjects": 2},
        training={"local_steps": 1}, sealing={"profile": "masked"}, consent={"simulate": {"fraction": 1.0}},
    )  # fmt: skip
    product.simulate(tree, out=base / "out")
    return base / "out"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to do something to."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def impact(run: Path, *arguments: str) -> dict[str, Any]:
    told = confide("consent", "impact", *arguments, "--run", run, "--json")
    assert told.code == 0, told.err
    return told.last_line


def officer(run: Path, command: str, person: str, *more: str) -> None:
    site = person.partition("-")[0]
    where = ("--registry", run / "sites" / site, "--key", run / "ledgers" / site / "site.key")
    assert confide("consent", command, person, *more, *where).code == 0


def roles(run: Path, site: str) -> dict[str, str]:
    return {f"{site}-{n}": confide("audit", "exposure", f"{site}-{n}", run, "--json").last_line["role"]
            for n in range(12)}  # fmt: skip


def test_a_person_touches_the_rounds_that_her_role_was_used_in(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    before = {name: data for name, data in files_under(finished).items() if name.endswith(".db")}
    for person, role in list(roles(finished, "ash").items())[:6]:
        found = impact(finished, person)
        (only,) = found["runs"]
        assert (found["persons"], only["persons"], only["site"], only["run"]) == (1, 1, "ash", result["run_id"])
        assert only["rounds"] == ([1, 2] if role == "train" else [3])
        assert only["model"] is not None
        assert 0 < only["epsilon"] <= 4.0
    both = impact(finished, "ash-0", "birch-0")
    assert (both["persons"], [r["site"] for r in both["runs"]]) == (2, ["ash", "birch"])
    assert {name: data for name, data in files_under(finished).items() if name.endswith(".db")} == before


def test_since_finds_whoever_has_left_the_erased_too_and_not_who_came_back(run: Path) -> None:
    since = from_micros(now_micros()).isoformat()
    assert impact(run, "--since", since) == {"persons": 0, "runs": [], "policies": ["retain", "retrain"]}
    found = roles(run, "ash")
    gone, back, erased = [person for person, role in found.items() if role == "train"][:3]
    for person in (gone, back):
        officer(run, "withdraw", person, "--purpose", PURPOSE)
    officer(run, "erase", erased, "--yes")
    officer(run, "withdraw", "birch-0", "--purpose", "marketing", "--anyway")
    told = impact(run, "--since", since)
    (only,) = told["runs"]
    assert (told["persons"], only["site"], only["persons"], only["rounds"]) == (4, "ash", 3, [1, 2])
    officer(run, "grant", back, "--purpose", PURPOSE)
    (only,) = impact(run, "--since", since)["runs"]
    assert only["persons"] == 2
    later = from_micros(now_micros() + 10**9).isoformat()
    assert impact(run, "--since", later)["runs"] == []
    refused = confide("consent", "impact", erased, "--run", run)
    assert refused.code == 4
    assert "--since" in refused.err


def test_the_officer_reads_what_can_be_done_and_what_cannot(finished: Path) -> None:
    text = confide("consent", "impact", "ash-0", "--run", finished).words
    for words in ("retain", "retrain", "--retrain-after", "not erasure", "ε ≤"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [((), 2), (("ash-0", "--since", "2026-01-01T00:00Z"), 2), (("--since", "soon"), 2), (("nobody",), 4)],
)
def test_a_question_that_has_no_answer_is_refused(finished: Path, arguments: tuple[str, ...], code: int) -> None:
    assert confide("consent", "impact", *arguments, "--run", finished).code == code


def test_a_folder_without_sites_is_refused(tmp_path: Path) -> None:
    assert confide("consent", "impact", "ann", "--run", tmp_path).code == 2
