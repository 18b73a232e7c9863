"""`confide simulate --resume`: a killed run goes on from its folder, pays nothing twice, and says what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from confide.errors import ConfigError
from confide.privacy.audit.verify import verify
from confide.privacy.dp import Ledger
from confide.protocol.identity import Identity
from confide.simulations import simulate
from confide.simulations.keeping import KEPT, Keeping
from tests.cli.command import confide, to_toml
from tests.clients.conftest import Stage, staged
from tests.simulations.test_learned_bounds import tree as tree_with_learned_bounds

MakeExperiment = Callable[..., dict[str, Any]]
SEEDED = {"epsilon": 2.0, "unsafe_noise_seed": 7}
#: Runs `confide simulate` up to the n-th time that an action comes by.
Killed = Callable[..., None]


@pytest.fixture(scope="module")
def program() -> Iterator[Stage]:
    with staged("tests.simulations.killing") as stage:
        yield stage


@pytest.fixture
def killed(program: Stage) -> Killed:
    """Run it in a process of its own, which dies there."""

    def play(at: str, nth: int, *arguments: object) -> None:
        (folder,) = program.play({"at": at, "nth": nth, "arguments": ["simulate", *map(str, arguments)]})
        assert int((folder / "ended").read_text()) == -signal.SIGKILL, (folder / "errors.txt").read_text()[-2000:]

    return play


def model(folder: Path) -> bytes:
    """What the model file holds behind its header, in which the run's name stands."""
    data = (folder / "model.safetensors").read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def charges(folder: Path) -> dict[str, list[str]]:
    """Names of the charges in each site's ledger, without the run's name."""
    found = {}
    for path in sorted(folder.glob("*/ledger.db")):
        ledger = Ledger.open(path)
        found[path.parent.name] = [charge.partition("/")[2] for charge in ledger.reservations()]
        ledger.close()
    return found


@pytest.fixture
def write(make_experiment: MakeExperiment, tmp_path: Path) -> Callable[..., Path]:
    """An experiment as a file."""

    def make(name: str = "experiment.toml", **sections: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.write_text(to_toml(make_experiment(**sections)))
        return path

    return make


CHAOS = bool(os.environ.get("CONFIDE_CHAOS"))
#: One of them is killed once more on its way.
POINTS = [
    ("SiteRun.compute", 6), ("Journal.finish", 1), *([
        ("Keeping.note", 1), ("Journal.put_requests", 1), ("Journal.agree", 1), ("Journal.put_requests", 8),
        ("Journal.end_round", 2),
    ] if CHAOS else []),
]  # fmt: skip


@pytest.mark.parametrize("profile", ["sealed", *(["open", "masked"] if CHAOS else [])])
def test_with_a_seed_the_resumed_run_ends_as_the_unbroken_one(
    write: Callable[..., Path], killed: Killed, tmp_path: Path, profile: str
) -> None:
    """The very same model, curve and charges, wherever it was killed; and it was killed twice."""
    experiment = write(privacy=SEEDED, sealing={"profile": profile})
    whole = tmp_path / "whole"
    simulate(experiment, out=whole)
    for number, (at, nth) in enumerate(POINTS):
        out = tmp_path / f"{number}"
        killed(at, nth, experiment, "--out", out)
        if (at, nth) == ("SiteRun.compute", 6):
            killed("SiteRun.compute", 3, "--resume", "--out", out)
        simulate(out=out, resume=True)
        assert model(out) == model(whole), (at, nth)
        assert (out / "rounds.jsonl").read_text() == (whole / "rounds.jsonl").read_text()
        assert charges(out / "ledgers") == charges(whole / "ledgers")
        assert verify(out).findings == []
        assert not (out / KEPT).exists(), "and its keys are gone"
        one, other = (json.loads((f / "result.json").read_text()) for f in (out, whole))
        assert {k for k in one if one[k] != other[k]} <= {"run_id", "seconds", "out"}


def test_without_a_seed_at_most_the_round_under_way_is_lost_and_nothing_is_charged_twice(
    write: Callable[..., Path], killed: Killed, tmp_path: Path
) -> None:
    experiment, ledger = write(privacy={"epsilon": 2.0}), tmp_path / "ledger"
    killed("SiteRun.compute", 6, experiment, "--out", tmp_path / "a", "--ledger", ledger)
    before = charges(ledger)
    assert len(before["ash"]) == 2
    assert len(before["doum"]) == 1
    done = confide("simulate", experiment, "--resume", "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    assert done.last_line["rounds_abandoned"] <= 1
    after = charges(ledger)
    for site, names in after.items():
        assert len(set(names)) == len(names)
        assert names[: len(before[site])] == before[site]
        assert len(names) <= 3 + 2, "three rounds, two times metrics"
    assert verify(tmp_path / "a").findings == []


@pytest.mark.parametrize(
    ("at", "nth"),
    [("Journal.end_round", 1), ("runner.learn_bounds", 1), ("Journal.end_round", 4)][None if CHAOS else 1 :],
)
def test_a_run_that_learns_bounds_first_goes_on_from_either_of_its_two_parts(
    killed: Killed, tmp_path: Path, at: str, nth: int
) -> None:
    experiment, out = tmp_path / "experiment.toml", tmp_path / "out"
    experiment.write_text(to_toml(tree_with_learned_bounds(tmp_path)))
    killed(at, nth, experiment, "--out", out)
    simulate(out=out, resume=True)
    assert verify(out).findings == []
    assert verify(out / "statistics").findings == []
    assert not list(out.rglob(KEPT))
    for names in charges(out / "ledgers").values():
        assert sorted(n for n in names if n.endswith("train")) == ["1/train", "2/train"]
        assert sorted(n for n in names if n.endswith("held_out")) == ["1/held_out", "2/held_out", "3/held_out"]


def test_a_finished_run_says_so(write: Callable[..., Path], tmp_path: Path) -> None:
    experiment, out = write(), tmp_path / "out"
    result = simulate(experiment, out=out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    said = confide("simulate", "--resume", "--out", out)
    assert said.code == 0
    assert "finished already" in " ".join(said.out.split())
    assert confide("simulate", experiment, "--resume", "--out", out, "--json").last_line == result.to_json()
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    with pytest.raises(ConfigError, match="is finished"):
        simulate(out=out, resume=True)


def test_one_that_was_killed_after_its_end_is_finished_and_tidied_up(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    simulate(write(), out=out)
    Keeping(out / KEPT).close()
    assert confide("simulate", "--resume", "--out", out).code == 0
    assert not (out / KEPT).exists()


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "somebody's files", "a run without its keys"])
def test_a_folder_that_holds_no_run_is_said_so(
    write: Callable[..., Path], killed: Killed, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    if kind != "nothing":
        out.mkdir()
    if kind == "somebody's files":
        (out / "notes.txt").write_text("mine")
    if kind == "a run without its keys":
        killed("Journal.end_round", 1, write(), "--out", tmp_path / "run")
        shutil.copytree(tmp_path / "run", out, dirs_exist_ok=True)
        shutil.rmtree(out / KEPT)
    before = sorted(out.rglob("*"))
    done = confide("simulate", "--resume", "--out", out)
    assert done.code == 2
    assert "holds no run that can be resumed" in " ".join(done.err.split())
    assert "→" in done.err
    assert sorted(out.rglob("*")) == before, "and nothing was made there"


def test_without_a_folder_or_with_a_plan_it_is_a_usage_error(write: Callable[..., Path], tmp_path: Path) -> None:
    assert confide("simulate", write(), "--resume").code == 2
    assert confide("simulate", write(), "--resume", "--dry-run", "--out", tmp_path).code == 2


def test_another_experiment_other_data_or_other_ledgers_are_refused(
    write: Callable[..., Path], people: Path, killed: Killed, tmp_path: Path
) -> None:
    experiment, out = write(), tmp_path / "out"
    killed("Journal.end_round", 1, experiment, "--out", out)

    def refused(why: str, *args: object) -> None:
        done = confide("simulate", *args, "--resume", "--out", out)
        assert done.code == 2, done.err
        assert why in " ".join(done.err.split())

    refused("[training] differs", write("other.toml", training={"learning_rate": 0.1}))
    refused("[run] differs", experiment, "--set", "run.rounds=9")
    refused("another experiment", "--set", "run.rounds=9")
    refused("ledgers are in", experiment, "--ledger", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    table = people.read_bytes()
    people.write_bytes(table + table.splitlines()[-1] + b"\n")
    refused("not those that the run was begun with")
    people.write_bytes(table)
    keeping = Keeping(out / KEPT)
    refused("another process works on this run")
    keeping.close()
    assert confide("simulate", experiment, "--resume", "--out", out).code == 0


def test_what_is_kept_of_a_run_is_for_its_owner_only(
    write: Callable[..., Path], killed: Killed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed("Journal.end_round", 1, write(), "--out", out)
    assert (out / KEPT).stat().st_mode & 0o777 == 0o700
    assert (out / KEPT / "passphrase").stat().st_mode & 0o777 == 0o600
    vaults = sorted((out / KEPT / "keys").glob("*/*.vault"))
    assert len(vaults) == 4, "each site's run keys"
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in vaults)


def test_a_party_has_one_signing_key_of_its_own_in_every_process_of_a_run(tmp_path: Path) -> None:
    runs = [Keeping(tmp_path / name) for name in ("one", "other")]
    again = Keeping(tmp_path / "one", attached=True)
    assert again.identity("ash").public_key == runs[0].identity("ash").public_key
    assert len({run.identity(party).public_key for run in runs for party in ("ash", "birch")}) == 4
    for run in runs:
        run.close()


def test_a_run_that_an_earlier_version_began_keeps_the_keys_that_it_saved(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path / "run")
    saved = Identity.generate("ash")
    keeping.vault("ash").save("identity", saved.key.private_bytes_raw())
    assert keeping.identity("ash").public_key == saved.public_key
    assert keeping.identity("birch").public_key != saved.public_key
    keeping.close()
