"""`confide simulate`: plans, runs and interruptions as a person at a terminal, or a script, meets them."""

from __future__ import annotations

import html
import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import confide as package
from confide.clients.training.artifact import load_model
from confide.privacy.dp import Ledger, RenyiBudget, Role
from confide.privacy.dp.metrics import NAMES
from tests.cli.command import SCRIPT, confide, files_under, spawn, to_toml

RESULT_KEYS = [
    "run_id", "rounds", "sites", "profile", "metrics", "released_metrics", "released_intervals", "epsilon", "delta",
    "unit", "neighbours", "placement", "bytes_per_parameter", "rounds_abandoned", "seconds", "out", "warnings",
]  # fmt: skip
SITES = ["ash", "birch", "cedar", "doum"]


@pytest.fixture
def folder(make_experiment: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `experiment.toml` over four clinics."""
    (tmp_path / "experiment.toml").write_text(to_toml(make_experiment()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_ledger(path: Path) -> Ledger:
    """A ledger as the experiment's sites made it."""
    return Ledger(path, RenyiBudget.for_limit(8.0, 1e-5), held_out=0.25)


# --- what the program says about itself -----------------------------------------------------------------------------


def test_it_tells_its_version() -> None:
    answer = confide("--version")
    assert (answer.code, answer.out, answer.err) == (0, f"confide {package.__version__}\n", "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(flag: str) -> None:
    answer = confide(flag)
    assert answer.code == 0
    assert {"simulate", "data", "model"} <= set(answer.out.split())


def test_help_of_simulate_names_every_option_and_says_what_the_argument_is() -> None:
    answer = confide("simulate", "--help")
    assert answer.code == 0
    assert {"--set", "--out", "--ledger", "--engine", "--dry-run", "--json"} <= set(answer.out.split())
    assert "Default: example:rand_health" in " ".join(answer.out.replace("│", " ").split())


def test_without_a_command_it_shows_help() -> None:
    answer = confide()
    assert "Usage: confide" in answer.out + answer.err
    assert answer.code in (0, 2)


@pytest.mark.parametrize("arguments", [("simulate", "--no-such-option"), ("no-such-command",), ("simulate", "a", "b")])
def test_a_wrong_command_line_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    answer = confide(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert "Usage: confide" in answer.err


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_would_happen_and_writes_nothing(folder: Path) -> None:
    before = files_under(folder)
    answer = confide("simulate", "experiment.toml", "--dry-run")
    assert (answer.code, answer.err) == (0, "")
    assert files_under(folder) == before
    plan = package.plan(folder / "experiment.toml")
    for line in (
        "Plan of tiny: nothing has run",
        "purpose research/test",
        "model 4 parameters",
        "rounds 3 × 4 local steps; metrics leave after rounds 2, 3",
        "sites 4 profile open: updates travel readable, as float32",
        "kB down a site and training round (5.00 bytes a parameter up; float32 is 4) ε of this run",
        f"ε of this run {plan.epsilon:.2f} (per subject, δ = 1e-05, neighbours: add or remove one subject; "
        "PRV: this run alone, its parameters fixed beforehand)",
        f"noise multiplier σ {plan.noise_multiplier:g} training, {plan.metrics_noise_multiplier:g} metrics",
        "sample rate q, clip C 0.3, 1",
        "ledger limit ε = 8 (RDP filter: sound although later runs are chosen after seeing earlier ones)",
        *(
            f"{s.site} 40 40 0.00 → {s.epsilon_after:.2f} 0% → {s.used_after:.0%}"
            for s in plan.sites
        ),
    ):  # fmt: skip
        assert line in answer.words
    assert [s.site for s in plan.sites] == SITES
    assert 0 < plan.epsilon <= 4.0


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        (
            "sealed",
            ("BFV (N = 4096", "30.8 kB up and 61.4 kB down", "padding: a small model pays for one whole cipher"),
        ),
        ("ckks", ("CKKS (N = 4096", "without masks", "30.8 kB up and 61.4 kB down", "pays for one whole ciphertext")),
        ("masked", ("no encryption of the sum", "(6.00 bytes a parameter up; float32 is 4); 16.7% of it is padding ε")),
    ],
)
def test_a_dry_run_tells_how_sums_are_protected_and_what_they_cost(
    folder: Path, profile: str, told: tuple[str, ...]
) -> None:
    words = confide("simulate", "experiment.toml", "--set", f"sealing.profile='{profile}'", "--dry-run").words
    assert f"profile {profile}: 20 bits a coordinate" in words
    for line in told:
        assert line in words


def test_a_dry_run_as_json_is_one_object_with_every_number(folder: Path) -> None:
    answer = confide("simulate", "experiment.toml", "--dry-run", "--json")
    assert (answer.code, answer.err, answer.out.count("\n")) == (0, "", 1)
    plan = answer.last_line
    assert plan == package.plan(folder / "experiment.toml").to_json()
    assert {"rounds", "epsilon", "delta", "noise_multiplier", "sites", "admitted", "profile"} <= set(plan)
    assert plan["admitted"] is True


def test_a_plan_of_private_data_does_not_tell_how_many_people_there_are(folder: Path) -> None:
    arguments = ("simulate", "experiment.toml", "--set", "data.public=false", "--dry-run", "--json")
    sites = confide(*arguments).last_line.get("sites", [])
    assert all(site["subjects"] is None for site in sites)


def test_a_plan_of_a_baseline_says_that_epsilon_is_infinite(folder: Path) -> None:
    arguments = ("simulate", "experiment.toml", "--set", "privacy.epsilon=inf", "--dry-run")
    assert "ε of this run ∞" in confide(*arguments).words
    assert confide(*arguments, "--json").last_line["epsilon"] == "inf"


def test_a_plan_foretells_the_epsilon_of_the_run_and_of_its_ledgers(folder: Path) -> None:
    plan = confide("simulate", "experiment.toml", "--dry-run", "--json").last_line
    done = confide("simulate", "experiment.toml", "--out", "out", "--ledger", "ledgers", "--json").last_line
    assert done["epsilon"]["max"] == pytest.approx(plan["epsilon"], abs=1e-9)
    for site in plan["sites"]:
        ledger = open_ledger(folder / "ledgers" / site["site"] / "ledger.db")
        assert max(ledger.epsilon(role) for role in Role) == pytest.approx(site["epsilon_after"], abs=1e-9)
        ledger.close()
    before = files_under(folder)
    again = confide("simulate", "experiment.toml", "--ledger", "ledgers", "--dry-run", "--json").last_line
    assert files_under(folder) == before
    for first, second in zip(plan["sites"], again["sites"], strict=True):
        assert second["epsilon_before"] == pytest.approx(first["epsilon_after"], abs=1e-9)
        assert second["used_after"] == pytest.approx(2 * first["used_after"], abs=1e-9)


def test_a_plan_that_a_ledger_does_not_admit_says_so(folder: Path) -> None:
    arguments = ("simulate", "experiment.toml", "--ledger", "ledgers", "--set", "privacy.epsilon=6")
    assert confide(*arguments, "--out", "first").code == 0
    assert "This run would be refused: the budget of a site does not suffice." in confide(*arguments, "--dry-run").words
    assert confide(*arguments, "--dry-run", "--json").last_line["admitted"] is False
    assert confide(*arguments, "--out", "second").code == 5  # and it is


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_tells_each_round_on_stderr_and_the_outcome_on_stdout(folder: Path) -> None:
    answer = confide("simulate", "experiment.toml", "--out", "out")
    assert answer.code == 0
    lines = [line for line in answer.err.splitlines() if line]
    assert [line.split("  ")[0] for line in lines] == ["round 0/3", "round 1/3", "round 2/3", "round 3/3"]
    assert all(re.search(r"  ε \(PRV\) \d+\.\d\d  auc \d\.\d{3}  accuracy \d\.\d{3}", line) for line in lines)
    assert sum("released of round 2: auc" in line for line in lines) == 1
    result = json.loads((folder / "out" / "result.json").read_text())
    for line in (
        f"run {result['run_id']}",
        "sites 4 (ash, birch, cedar, doum)",
        "profile open rounds 3",
        "consent simulated consent",
        f"ε of this run {result['epsilon']['max']:.2f} per subject (δ = 1e-05; neighbours: add or remove one subject; "
        "PRV: this run alone, its parameters fixed beforehand)",
        "of 8 charged so far",
        f"auc {result['metrics']['auc']:.3f}, accuracy {result['metrics']['accuracy']:.3f}, "
        f"ece {result['metrics']['ece']:.3f}, clipped_loss {result['metrics']['clipped_loss']:.3f} on held-out persons",
        f"uplink {result['bytes_per_parameter']:.2f} bytes a parameter",
        "Who learns what under profile open",
        "coordinator every site's update, every round",
        "one other site the sum over the cohort",
        "coordinator and one site every site's update",
        "written to out",
    ):
        assert line in answer.words
    assert "\x1b" not in answer.out + answer.err


def test_released_metrics_are_shown_with_their_intervals(folder: Path) -> None:
    arguments = ("--set", "privacy.epsilon=inf")  # on so few people, noise would leave none to show
    answer = confide("simulate", "experiment.toml", "--out", "out", *arguments)
    result = json.loads((folder / "out" / "result.json").read_text())
    assert list(result["released_intervals"]) == list(result["released_metrics"])
    page = " ".join(html.unescape((folder / "out" / "index.html").read_text()).split())
    for name, value in result["released_metrics"].items():
        low, high = result["released_intervals"][name]
        assert low <= value <= high
        shown = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        assert f"{name} {shown}" in answer.words
        assert f"{NAMES[name]} {shown}" in page
    assert "(95 % intervals: noise and sampling of persons)" in answer.words


def test_where_noise_drowns_a_metric_no_interval_is_made_up(folder: Path) -> None:
    answer = confide("simulate", "experiment.toml", "--out", "out", "--set", "privacy.epsilon=0.05")
    result = json.loads((folder / "out" / "result.json").read_text())
    assert set(result["released_intervals"].values()) == {None}
    assert re.search(r"released, noised auc (—|\d\.\d{3} \[too noisy to say\])", answer.words)


def test_a_sealed_run_tells_who_learns_what_and_how_much_was_clipped(folder: Path) -> None:
    narrow = ("--set", "sealing.profile='sealed'", "--set", "sealing.range=0.01")
    answer = confide("simulate", "experiment.toml", "--out", "out", *narrow)
    assert answer.code == 0
    for line in (
        "Who learns what under profile sealed",
        "coordinator nothing until a release",
        "one other site the sum over the cohort",
        "a small model pays for one whole ciphertext, 31 kB",
    ):
        assert line in answer.words
    told = re.search(r"clipped to the range at most (\d+\.\d\d)% of a round's coordinates", answer.words)
    lines = [json.loads(line) for line in (folder / "out" / "rounds.jsonl").read_text().splitlines()]
    assert told
    assert 0 < float(told[1]) / 100 == pytest.approx(max(line["saturated"] for line in lines), abs=1e-4)


def test_stderr_holds_no_empty_lines(folder: Path) -> None:
    assert "" not in confide("simulate", "experiment.toml", "--out", "out").err.splitlines()


def test_the_folder_of_the_results_can_be_copied_from_the_last_line(folder: Path) -> None:
    deep = folder / "results-of-the-third-experiment" / "with-a-long-name"
    answer = confide("simulate", "experiment.toml", "--out", deep)
    assert str(deep) in answer.out


def test_json_is_the_last_line_of_stdout_with_exactly_the_promised_keys(folder: Path) -> None:
    answer = confide("simulate", "experiment.toml", "--out", "out", "--json")
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    found = answer.last_line
    assert list(found) == RESULT_KEYS
    assert found == json.loads((folder / "out" / "result.json").read_text())
    assert (found["rounds"], found["sites"], found["unit"], found["out"]) == (3, SITES, "subject", "out")
    assert list(found["epsilon"]) == ["max", "per_site"]
    assert list(found["epsilon"]["per_site"]) == SITES
    assert {"auc", "accuracy"} <= set(found["metrics"])


def test_a_baseline_is_labelled_as_one(folder: Path) -> None:
    arguments = ("simulate", "experiment.toml", "--set", "privacy.epsilon=inf", "--set", "run.rounds=1")
    answer = confide(*arguments, "--out", "out")
    assert "∞: a baseline on public data, nobody is protected" in answer.words
    assert confide(*arguments, "--out", "other", "--json").last_line["epsilon"]["max"] == "inf"


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [(("--set", "run.ruonds=2"), 2, "configuration"), (("--set", "data.file=none.csv"), 3, "data"),
     (("--set", "consent={file='none.csv'}"), 4, "consent"), (("--set", "data.public=false"), 9, "policy")],
    ids=["configuration", "data", "consent", "policy"],
)  # fmt: skip
def test_an_error_with_json_is_an_object_on_stdout_and_text_on_stderr(
    folder: Path, arguments: tuple[str, ...], code: int, kind: str
) -> None:
    answer = confide("simulate", "experiment.toml", "--out", "out", *arguments, "--json")
    assert (answer.code, answer.out.count("\n")) == (code, 1)
    error = answer.last_line["error"]
    assert list(error) == ["kind", "what", "where", "hint", "exit_code"]
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert error["hint"]
    assert f"{kind} error {error['where']}: {error['what']}\n  → {error['hint']}\n" in answer.err
    assert not (folder / "out").exists()


def test_an_error_without_json_leaves_stdout_empty(folder: Path) -> None:
    answer = confide("simulate", "experiment.toml", "--set", "run.ruonds=2")
    assert (answer.code, answer.out) == (2, "")


# --- real processes ------------------------------------------------------------------------------------------------


def test_the_installed_script_runs_and_prints_its_completion(folder: Path) -> None:
    run = spawn("simulate", "experiment.toml", "--out", "out", "--set", "run.rounds=1", "--json", cwd=folder)
    # Typer finds the shell among the parent processes, so one stands there.
    shell = subprocess.run(
        ["bash", "-c", f"'{SCRIPT}' --show-completion bash; exit $?"], capture_output=True, text=True, timeout=60
    )
    assert (shell.returncode, shell.stderr) == (0, "")
    assert "_CONFIDE_COMPLETE=complete_bash" in shell.stdout
    assert "complete -o default -F _confide_completion confide" in shell.stdout
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0
    assert list(json.loads(out)) == RESULT_KEYS
    assert "round 1/1" in err
    assert load_model(folder / "out" / "model.safetensors").card.run == json.loads(out)["run_id"]


def test_on_a_terminal_a_bar_tells_the_round_and_what_it_has_cost(folder: Path) -> None:
    """Under a pseudo-terminal: what a person sees there is drawn by other code than what a script reads."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [SCRIPT, "simulate", "experiment.toml", "--out", "out"], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(controller, 65_536)
        except OSError:  # the terminal is gone with its last user
            break
        if not part:
            break
        shown += part
    os.close(controller)
    assert process.wait(timeout=60) == 0, shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "training" in text
    assert re.search(r"round 3/3  ε \(PRV\) 4\.00", text)
    assert "Traceback" not in text
    assert "written to out" in text


def test_interrupted_in_the_middle_it_says_so_and_what_was_charged_stays_charged(folder: Path) -> None:
    arguments = ("--set", "run.rounds=2000", "--set", "run.report_metrics_every=1000")
    process = spawn("simulate", "experiment.toml", "--out", "out", "--ledger", "ledgers", *arguments, cwd=folder)
    assert process.stderr is not None
    seen: list[str] = []
    limit = time.monotonic() + 120
    while not seen or not seen[-1].startswith("round 5/"):
        assert time.monotonic() < limit
        seen.append(process.stderr.readline())
        assert seen[-1], seen
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert " ".join(err.split()).endswith(
        "interrupted the folder says so; what was charged stays charged, nothing else was released"
    )
    assert "Traceback" not in err
    status = json.loads((folder / "out" / "status.json").read_text())
    assert status["status"] == "interrupted"
    assert not (folder / "out" / "model.safetensors").exists()
    assert not (folder / "out" / "result.json").exists()
    rounds = [json.loads(line) for line in (folder / "out" / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == list(range(len(rounds)))
    assert len(rounds) >= 6
    for site in SITES:
        ledger = open_ledger(folder / "ledgers" / site / "ledger.db")
        steps = sum(event.steps for event in ledger.events(Role.TRAIN))
        ledger.close()
        assert steps >= 4 * (len(rounds) - 1)
        assert steps <= 4 * (len(rounds) + 1)
