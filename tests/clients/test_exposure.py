"""The answer to one person: everything about her, nothing about anybody else, nothing changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import confide as product
from confide.clients.data.source import read_table
from confide.privacy.dp import Ledger, Role
from tests.cli.command import confide, files_under
from tests.support import experiment_tree, write_people

GRANT = "{id},{person},research/test,{type},2020-01-01T00:00:00+00:00,,sha256:ab,GDPR-6-1-a,DE,form-{id},{limit}\n"
HEAD = (
    "event_id,subject,purpose,type,effective_at,valid_until,notice_digest,lawful_basis,jurisdiction,evidence_ref,"
    "max_epsilon\n"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds; ash-0 has a limit of her own, ash-1 refused, birch-0 is on no record."""
    base = tmp_path_factory.mktemp("run")
    path = write_people(base)
    rows = []
    for number, person in enumerate(sorted(set(read_table(path)["person"]))):
        if person != "birch-0":
            rows.append(GRANT.format(
                id=number, person=person, type="refused" if person == "ash-1" else "given",
                limit="0.001" if person == "ash-0" else "",
            ))  # fmt: skip
    (base / "consent.csv").write_text(HEAD + "".join(rows))
    tree = experiment_tree(str(path), run={"rounds": 2}, sealing={"profile": "sealed"})
    tree["consent"] = {"file": str(base / "consent.csv")}
    product.simulate(tree, out=base / "out")
    return base / "out"


def answer(run: Path, person: str) -> dict[str, Any]:
    told = confide("audit", "exposure", person, run, "--json")
    assert told.code == 0
    return told.last_line


def people(run: Path, role: str) -> list[dict[str, Any]]:
    """Answers to everybody at ash with a role and without a limit of her own."""
    found = [answer(run, f"ash-{n}") for n in range(2, 12)]
    return [a for a in found if a["role"] == role]


def test_the_answer_is_what_the_ledger_and_the_registry_hold(finished: Path) -> None:
    ledger = Ledger.open(finished / "ledgers" / "ash" / "ledger.db")
    run = json.loads((finished / "result.json").read_text())["run_id"]
    for role, rounds in ((Role.TRAIN, [1, 2]), (Role.HELD_OUT, [3])):
        asked = people(finished, role.value)
        assert asked
        for found in asked:
            (only,) = found["runs"]
            assert (only["run"], only["rounds"], only["purpose"]) == (run, rounds, "research/test")
            assert only["recipients"][0] == "sites birch, cedar, doum: sums over the cohort"
            assert "update" not in " ".join(only["recipients"])
            assert found["epsilon"] == pytest.approx(ledger.epsilon(role))
            assert 0 < only["epsilon"] <= found["epsilon"] <= 8
            (consent,) = found["consent"]
            assert (consent["type"], consent["lawful_basis"], consent["at"]) == (
                "given", "GDPR-6-1-a", "2020-01-01T00:00:00+00:00",
            )  # fmt: skip
            assert found["decisions"] == [{"purpose": "research/test", "status": "given"}]
    ledger.close()


def test_whoever_took_part_in_nothing_is_told_so(finished: Path) -> None:
    limited, refused, unknown = (answer(finished, p) for p in ("ash-0", "ash-1", "birch-0"))
    for found in (limited, refused, unknown):
        assert found["runs"] == []
        assert found["epsilon"] == 0
    assert limited["consent"][0]["max_epsilon"] == 0.001
    assert refused["decisions"] == [{"purpose": "research/test", "status": "refused"}]
    assert unknown["known"], "her records are there, though nothing was ever computed from them"
    assert not answer(finished, "nobody")["known"]


def test_an_answer_names_nobody_else_and_changes_nothing(finished: Path, tmp_path: Path) -> None:
    before = {n: d for n, d in files_under(finished).items() if n.endswith(".db")}
    page = tmp_path / "answer.html"
    told = confide("audit", "exposure", "ash-3", finished, "--out", page)
    assert told.code == 0
    for text in (told.out, page.read_text(), json.dumps(answer(finished, "ash-3"))):
        assert "ash-3" in text
        assert not any(f"{site}-{n}" in text for site in ("ash", "birch") for n in range(40) if (site, n) != ("ash", 3)
                       and f"{site}-{n}" not in "ash-3")  # fmt: skip
    after = {n: d for n, d in files_under(finished).items() if n.endswith(".db")}
    assert after == before


def test_the_page_says_everything_the_answer_does(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "answer.html"
    confide("audit", "exposure", "ash-3", finished, "--out", page)
    text, found = page.read_text(), answer(finished, "ash-3")
    for value in (found["runs"][0]["run"], f"{found['epsilon']:.2f}", "GDPR-6-1-a", "sha256:ab", "form-",
                  found["how_to_withdraw"].split("’")[0], found["runs"][0]["model"][:16]):  # fmt: skip
        assert value in text
    assert "http" not in text.replace("https://www.w3.org", "")
    confide("audit", "exposure", "nobody", finished, "--out", page)
    assert "holds nothing about such a person" in page.read_text()


def test_the_losses_of_several_runs_on_one_ledger_add_up(finished: Path, tmp_path: Path) -> None:
    person = people(finished, "train")[0]
    experiment = json.loads((finished / "experiment.json").read_text())
    product.simulate(experiment, out=tmp_path / "second", ledger=finished / "ledgers")
    where = ("--ledger", finished / "ledgers")
    later = confide("audit", "exposure", person["subject"], tmp_path / "second", *where, "--json")
    found = later.last_line
    assert found["epsilon"] > person["epsilon"]
    assert [run["purpose"] for run in found["runs"]] == [None, "research/test"], "the first run's files lie elsewhere"


@pytest.mark.parametrize("missing", ["site.key", "ledger.db", "personal.db"])
def test_missing_files_are_told_and_not_made(finished: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "ledgers" / "ash" / missing).unlink()
    refused = confide("audit", "exposure", "ash-3", tmp_path / "run")
    assert refused.code in (4, 5)
    assert missing in refused.err
    assert not (tmp_path / "run" / "ledgers" / "ash" / missing).exists()
    assert confide("audit", "exposure", "ash-3", tmp_path).code == 2


def test_what_a_killed_run_left_is_exported_by_a_command(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "logs")
    refused = confide("audit", "verify", tmp_path / "run")
    assert refused.code == 7
    assert "confide audit export" in refused.err
    done = confide("audit", "export", tmp_path / "run", "--json")
    assert done.last_line["parties"] == ["coordinator", "ash", "birch", "cedar", "doum"]
    assert confide("audit", "verify", tmp_path / "run").code == 0
    assert confide("audit", "export", tmp_path).code == 7
