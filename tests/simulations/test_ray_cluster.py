"""A run over a Ray cluster of two nodes, and what becomes of it when its processes die.

Every run here is on real nodes and real processes; what was killed was killed with SIGKILL.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from confide.errors import ConfigError, PeerError
from confide.privacy.audit import records as audit
from confide.privacy.dp import Ledger
from confide.simulations import Progress, simulate
from confide.simulations.engines import ray_engine
from tests.cli.command import confide, to_toml
from tests.integration.deployed import ROOT, rand_tree
from tests.simulations.clusters import free_ports, ray_cluster, wait_until
from tests.simulations.test_drawn import entries
from tests.simulations.test_engines import told, tree, weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and not os.environ.get("CONFIDE_CI"), reason="pip install 'confide[ray]'"
)
#: Seconds after which a run that goes on is a failure: it would wait for ever.
PATIENCE = 400
ROUNDS = 4


@contextmanager
def never_hangs() -> Iterator[None]:
    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def six_sites(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Private, so that there is something to be charged; three sites an actor where there are two."""
    run = {"rounds": ROUNDS, "report_metrics_every": ROUNDS}
    return rand_tree(folder, 6, 40, **{"run": run, **sections})


# --- a cluster -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_cluster_of_two_nodes_changes_nothing_of_a_run_and_is_up_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(to_toml(tree(tmp_path)))
    local = tmp_path / "local"
    simulate(experiment, out=local)
    with ray_cluster(1, 1) as cluster, never_hangs():
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # which cluster is meant, where there are several
        for number, address in enumerate((cluster.address, "auto"), start=1):
            out = tmp_path / f"out-{number}"
            answer = confide("simulate", experiment, "--engine", "ray", "--ray-address", address, "--out", out)
            assert answer.code == 0, answer.err
            assert weights(out).tobytes() == weights(local).tobytes(), "the same model, bit by bit"
            assert told(out) == told(local)
            assert (out / "rounds.jsonl").read_text() == (local / "rounds.jsonl").read_text(), "and round by round"
            assert confide("audit", "verify", out).code == 0
            assert json.loads((out / "status.json").read_text())["status"] == "finished"
            ended = cluster.actors("DEAD")
            assert len(ended) == 2 * number, "an actor a core"
            where = Counter(actor["Address"]["IPAddress"] for actor in ended)
            assert where == {"127.0.0.2": number, "127.0.0.3": number}, "the sites were on both nodes"
            assert cluster.actors() == []
            assert cluster.alive() == {"127.0.0.2", "127.0.0.3"}


@pytest.mark.long
def test_a_cluster_whose_machines_have_other_code_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in ("src", "server", "clients", "privacy", "strategies", "simulations"):
        shutil.copytree(ROOT / name, other / name, symlinks=True)
    with (other / "server" / "app.py").open("a") as stream:
        stream.write("# another one\n")
    with ray_cluster(1, 1, code=other) as cluster, never_hangs():
        with pytest.raises(ConfigError, match="another confide_code_sha256"):
            simulate(tree(tmp_path), out=tmp_path / "out", engine="ray", ray_address=cluster.address)
        assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"
        assert cluster.actors() == []


@pytest.mark.long
def test_a_cluster_without_a_core_is_an_error_at_once(tmp_path: Path) -> None:
    with ray_cluster(0) as cluster, never_hangs(), pytest.raises(ConfigError, match="no core"):
        simulate(tree(tmp_path), out=tmp_path / "out", engine="ray", ray_address=cluster.address)


@pytest.mark.parametrize("address", ["HOST:PORT", "auto"])
def test_an_address_where_something_else_listens_is_refused_before_anything_is_written(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr(ray_engine, "_KNOCK_SECONDS", 1.0)
    with socket.create_server(("127.0.0.2", 0)) as silent:
        place = f"127.0.0.2:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", place)
        with pytest.raises(ConfigError, match="no Ray cluster answers") as told:
            simulate(tree(tmp_path), out=tmp_path / "out", engine="ray",
                     ray_address=place if address == "HOST:PORT" else address)  # fmt: skip
    assert "ray start" in told.value.hint
    assert not (tmp_path / "out").exists()


def test_as_many_messages_are_under_way_as_there_are_sites(tmp_path: Path) -> None:
    """Whatever cores this machine has: a cluster has others."""
    import flwr.server.superlink.fleet.vce.vce_api as engine

    from confide.simulations.engines.ray_backend import sites_stay

    many = 40  # Flower's own threads are 32 at most

    def together(patience: float) -> None:
        meeting = threading.Barrier(many, timeout=patience)
        with engine.ThreadPoolExecutor() as pool:
            list(pool.map(lambda _: meeting.wait(), range(many)))

    with sites_stay(tmp_path, [f"site-{n}" for n in range(many)], lambda _message, _site: False):
        together(PATIENCE)
    with pytest.raises(threading.BrokenBarrierError):  # the control
        together(0.5)


# --- what dies -------------------------------------------------------------------------------------------------------


def check_after(out: Path, lost: dict[int, int]) -> None:
    """The run is whole: so many sites missed each of the rounds in `lost`, and nobody another; nothing twice.

    Args:
        out: The run's folder.
        lost: By round.
    """
    assert json.loads((out / "status.json").read_text())["status"] == "finished"
    cohorts = {e.round: e.cohort for e in entries(out, audit.Cohort)}
    assert {n: 6 - len(cohort) for n, cohort in cohorts.items() if len(cohort) < 6} == lost
    assert set(cohorts) == set(range(1, ROUNDS + 2)), "everybody else has gone on, round by round"
    faults = {(e.round, e.party) for e in entries(out, audit.Fault)}
    missing = {(n, site) for n in lost for site in set(cohorts[max(set(cohorts) - set(lost))]) - set(cohorts[n])}
    assert faults == missing
    for path in (out / "ledgers").glob("*/ledger.db"):
        with closing(Ledger.open(path)) as ledger:
            charged = [e.charge for e in _logged(out, path.parent.name) if isinstance(e, audit.Charged)]
            assert Counter(charged) == Counter(list(ledger.reservations())), "as it is logged, and each charge once"
            assert ledger.used() <= 1.0
    answer = confide("audit", "verify", out)
    assert answer.code == 0, answer.out


def _logged(out: Path, site: str) -> list[audit.Record]:
    from confide.privacy.audit.log import stored_entries

    return [record for record, _ in stored_entries(out / "sites" / site / "federated.db")]


@pytest.mark.long
def test_a_process_that_dies_between_rounds_costs_its_sites_one_round(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with ray_cluster(1, 1) as cluster, never_hangs():

        def kill(progress: Progress) -> None:
            if progress.round == 1:
                cluster.kill_actor()

        simulate(six_sites(tmp_path), out=out, engine="ray", ray_address=cluster.address, progress=kill)
        assert len(cluster.actors("DEAD")) == 3, "another one took its place"
    check_after(out, {3: 3})
    assert "its sites are in a new one" in (out / "ray.log").read_text()
    assert "raylet" not in capfd.readouterr().out, "stdout is the command's"


@pytest.mark.long
def test_a_process_that_dies_while_its_sites_train_costs_them_that_round(tmp_path: Path) -> None:
    """It dies when all sites have been charged and none has answered: what was charged stays, and once."""
    out = tmp_path / "out"
    slow = six_sites(tmp_path, training={"local_steps": 1500, "learning_rate": 0.5})
    with ray_cluster(1, 1) as cluster, never_hangs():

        def charged() -> bool:
            held = []
            for path in (out / "ledgers").glob("*/ledger.db"):
                with closing(Ledger.open(path)) as ledger:
                    held.append(any("/3/" in charge for charge in ledger.reservations()))
            return sum(held) >= 2  # a site of each actor

        def kill() -> None:
            wait_until(charged)
            cluster.kill_actor()

        killer = threading.Thread(target=kill)

        def begin(progress: Progress) -> None:
            if progress.round == 1:
                killer.start()

        simulate(slow, out=out, engine="ray", ray_address=cluster.address, progress=begin)
        killer.join()
    check_after(out, {3: 3})
    of_round = Counter(e.charge for e in entries(out, audit.Charged) if "/3/" in e.charge)
    assert set(of_round.values()) <= set(range(1, 7))
    committed = [e for e in entries(out, audit.UpdateCommitted) if e.round == 3]
    trained = [e for e in entries(out, audit.Charged) if e.charge.endswith("/3/train")]
    assert len(trained) > len(committed), "somebody was in the middle of it"


@pytest.mark.long
def test_processes_that_do_not_live_to_take_sites_leave_them_to_the_others(tmp_path: Path) -> None:
    out, over = tmp_path / "out", threading.Event()
    with ray_cluster(1, 1) as cluster, never_hangs():

        def kill_all() -> None:
            while not over.wait(0.2):
                for actor in cluster.actors():
                    if actor["Address"]["IPAddress"] != "127.0.0.2":
                        os.kill(actor["Pid"], signal.SIGKILL)

        killer = threading.Thread(target=kill_all)

        def begin(progress: Progress) -> None:
            if progress.round == 1:
                cluster.kill_actor()
                killer.start()

        try:
            simulate(six_sites(tmp_path), out=out, engine="ray", ray_address=cluster.address, progress=begin)
        finally:
            over.set()
            killer.join()
        dead = [actor for actor in cluster.actors("DEAD") if actor["Address"]["IPAddress"] != "127.0.0.2"]
        assert len(dead) == 2, "one with sites, and another one before it had any"
    check_after(out, {3: 3})


@pytest.mark.long
def test_a_process_that_dies_in_every_round_costs_its_sites_each_of_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ray_cluster(1, 1) as cluster, never_hangs():

        def kill(progress: Progress) -> None:
            if progress.round < 3:
                cluster.kill_actor()

        simulate(six_sites(tmp_path), out=out, engine="ray", ray_address=cluster.address, progress=kill)
        assert len(cluster.actors("DEAD")) == 2 + 3
    check_after(out, {2: 3, 3: 3, 4: 3})


@pytest.mark.long
def test_the_sites_of_a_node_that_dies_go_on_at_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from confide.simulations.engines import ray_actors

    monkeypatch.setattr(ray_actors, "_START_SECONDS", 20.0)
    out = tmp_path / "out"
    with ray_cluster(1, 1) as cluster, never_hangs():

        def kill(progress: Progress) -> None:
            if progress.round == 1:
                cluster.kill_second()
                wait_until(lambda: cluster.alive() == {"127.0.0.2"})

        simulate(six_sites(tmp_path), out=out, engine="ray", ray_address=cluster.address, progress=kill)
        assert cluster.alive() == {"127.0.0.2"}
    check_after(out, {3: 3})


@pytest.mark.long
def test_without_any_node_for_its_sites_the_run_ends_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from confide.simulations.engines import ray_actors

    monkeypatch.setattr(ray_actors, "_START_SECONDS", 20.0)
    out, made = tmp_path / "out", six_sites(tmp_path)
    with ray_cluster(0, 1) as cluster, never_hangs():

        def kill(progress: Progress) -> None:
            if progress.round == 1:
                cluster.kill_second()

        with pytest.raises(PeerError, match="the last process") as ended:
            simulate(made, out=out, engine="ray", ray_address=cluster.address, progress=kill)
        assert ended.value.exit_code == 8
        assert "--resume" in ended.value.hint
        assert json.loads((out / "status.json").read_text())["status"] == "failed"
        assert cluster.alive() == {"127.0.0.2"}, "nobody else's cluster is stopped"
    with ray_cluster(1, 1) as cluster, never_hangs():
        answer = confide("simulate", "--resume", "--out", out, "--ray-address", cluster.address)
        assert answer.code == 0, answer.err
    assert confide("audit", "verify", out).code == 0
    for path in (out / "ledgers").glob("*/ledger.db"):
        with closing(Ledger.open(path)) as ledger:
            assert len(ledger.reservations()) == len(set(ledger.reservations()))
            assert ledger.used() <= 1.0
    assert len(free_ports(2)) == 2
