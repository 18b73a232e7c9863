"""Coordinator and sites as processes of their own, over TLS on the loopback interface.

Every SIGKILL goes to a process that this test started, by the id that its agent wrote down.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from confide.privacy.audit import records as audit
from confide.privacy.audit.log import export_log, stored_entries
from confide.privacy.audit.verify import Evidence, verify
from confide.simulations.world import COORDINATOR
from tests.integration.deployed import Deployment, deployment, wait_until

PASSPHRASE = "a few small words"
chaos = pytest.mark.skipif(os.environ.get("CONFIDE_CHAOS") != "1", reason="make test-chaos: minutes of real processes")


def database(made: Deployment, party: str) -> Path:
    """Where a party's log lies."""
    sites = made.folder / "sites"
    return sites / f"{COORDINATOR}.db" if party == COORDINATOR else sites / party / "federated.db"


def entries(made: Deployment, party: str, kind: type[audit.Record]) -> list[audit.Record]:
    """A party's log entries of a kind."""
    return [entry for entry, _ in stored_entries(database(made, party)) if isinstance(entry, kind)]


def evidence(made: Deployment) -> Evidence:
    """What anybody sees who gets all logs."""
    logs = made.folder / "exported"
    logs.mkdir()
    for party in (COORDINATOR, *made.names):
        export_log(database(made, party), logs / f"{party}.log")
    return verify(logs)


def kill(made: Deployment, site: str, role: str) -> int:
    """SIGKILL for a site's `node` or `site` process; its id."""
    victim = made.pid_of(site, role)
    os.kill(victim, signal.SIGKILL)
    return victim


def released(made: Deployment) -> dict[str, str]:
    """The digest of the model that each site released."""
    found = {}
    for name in made.names:
        for entry in entries(made, name, audit.ModelReleased):
            assert isinstance(entry, audit.ModelReleased)
            found[name] = entry.model
    return found


@pytest.mark.long  # test_nothing_is_lost and test_foreign_code have real sites train over TLS, too
def test_three_sites_train_one_model_over_tls_and_their_logs_hold_together(tmp_path: Path) -> None:
    with deployment(tmp_path, run={"rounds": 2}) as made:
        made.start_coordinator()
        for name in made.names:
            made.start_agent(name)
        result = made.result()
        first_ids = {name: made.pid_of(name, "site") for name in made.names}
    assert result["abandoned"] == []
    assert result["cohorts"] == [made.names] * 3
    assert released(made) == dict.fromkeys(made.names, result["model"])
    assert evidence(made).findings == []
    for name in made.names:  # one executor for the whole run, and nothing left behind
        assert not Path(f"/proc/{first_ids[name]}").exists()
        assert not (made.folder / "agents" / name / "tasks.secret").exists()
        assert made.processes[name].returncode == 0


def until_it_has(made: Deployment, site: str, kind: type[audit.Record], round_: int) -> None:
    """Wait until a site has written down that it did something in a round."""
    wait_until(
        lambda: any(getattr(entry, "round", None) == round_ for entry in entries(made, site, kind)),
        f"{site} writes {kind.__name__} of round {round_}",
    )


@chaos
@pytest.mark.parametrize("kind", [audit.Charged, audit.UpdateCommitted, audit.Sealed])
def test_a_supernode_killed_while_its_site_works_costs_nothing(tmp_path: Path, kind: type[audit.Record]) -> None:
    with deployment(tmp_path, training={"local_steps": 60, "learning_rate": 0.1}) as made:
        made.start_coordinator()
        for name in made.names:
            made.start_agent(name)
        until_it_has(made, made.names[1], kind, 2)
        victim = kill(made, made.names[1], "node")
        result = made.result()
        assert made.pid_of(made.names[1], "node") != victim
    assert result["abandoned"] == []  # the executor lives on, and the link hands the lost message out again
    assert released(made) == dict.fromkeys(made.names, result["model"])
    assert evidence(made).findings == []


@chaos
@pytest.mark.parametrize("kind", [audit.Charged, audit.UpdateCommitted, audit.Sealed])
def test_an_executor_killed_comes_back_into_the_run_where_there_is_a_vault(
    tmp_path: Path, kind: type[audit.Record]
) -> None:
    steps = {"local_steps": 60, "learning_rate": 0.1}
    with deployment(tmp_path, passphrase=PASSPHRASE, run={"rounds": 4}, training=steps) as made:
        made.start_coordinator()
        for name in made.names:
            made.start_agent(name)
        until_it_has(made, made.names[1], kind, 2)
        victim = kill(made, made.names[1], "site")
        result = made.result()
        assert made.pid_of(made.names[1], "site") != victim
    # What it had computed and not handed over died with it, by design: that round is lost, or the next one is.
    assert len(result["abandoned"]) <= 1
    assert set(result["abandoned"]) <= {2, 3}
    assert result["cohorts"][-1] == made.names
    assert released(made) == dict.fromkeys(made.names, result["model"])
    assert evidence(made).findings == []


@chaos
def test_without_a_vault_a_killed_executor_has_left_the_run_and_the_others_finish_it(tmp_path: Path) -> None:
    with deployment(tmp_path, sites=4, run={"rounds": 4}) as made:
        made.start_coordinator()
        for name in made.names:
            made.start_agent(name)
        wait_until(lambda: made.rounds() >= 2, "the second round begins")
        lost = made.names[1]
        kill(made, lost, "site")
        result = made.result()
    stayed = [name for name in made.names if name != lost]
    assert result["cohorts"][-1] == stayed
    assert released(made) == dict.fromkeys(stayed, result["model"])
    assert evidence(made).findings == []


@chaos
def test_a_coordinator_killed_and_started_again_finds_its_nodes_where_they_were(tmp_path: Path) -> None:
    with deployment(tmp_path, privacy={"epsilon": 2.0}) as made:
        made.start_coordinator()
        for name in made.names:
            made.start_agent(name)
        wait_until(lambda: made.rounds() >= 2, "the second round begins")
        before = {name: (made.pid_of(name, "node"), made.pid_of(name, "site")) for name in made.names}
        made.processes["coordinator"].kill()
        made.processes["coordinator"].wait()
        kept = json.loads((made.folder / "kept.json").read_text())
        manifest = json.loads(kept["manifest"])
        kept["manifest"] = json.dumps({**manifest, "run": manifest["run"] + "-again"})
        (made.folder / "kept.json").write_text(json.dumps(kept))
        made.start_coordinator(log="again")
        result = made.result()
        after = {name: (made.pid_of(name, "node"), made.pid_of(name, "site")) for name in made.names}
    assert after == before
    assert result["cohorts"][-1] == made.names
    assert released(made) == dict.fromkeys(made.names, result["model"])
