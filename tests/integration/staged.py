"""A deployed federation of four sites, made and run through the commands that operators use, whose processes may die:
a coordinator that is killed is started again, as its operator's service manager would.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.deployment_demo import FEDERATION, POPULATION, PURPOSE, Demo, ok
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import export_log, stored_entries
from confide.privacy.audit.verify import Evidence, verify
from confide.privacy.dp import Ledger
from confide.privacy.dp.events import PrivacyEvent
from confide.protocol.manifest import Manifest
from confide.server.federation import FederationFolder
from confide.server.nodes import node_keys, node_number
from confide.simulations.sources import builtin_example
from tests.cli.command import to_toml
from tests.integration.deployed import ROOT
from tests.integration.struck import FOLDER

SITES = ("ash", "birch", "cedar", "dogwood")
ROUNDS = 3
COORDINATOR = "coordinator"
#: The site whose processes die.
VICTIM = SITES[1]
#: What a run is asked for.
SECTIONS = {"run": {"rounds": ROUNDS, "report_metrics_every": ROUNDS}, "privacy": {"epsilon": 1.0}}
chaos = pytest.mark.skipif(os.environ.get("CONFIDE_CHAOS") != "1", reason="make test-chaos: minutes of real processes")
#: Seconds after which something that does not happen is a failure.
PATIENCE = 420.0
_EXAMPLE = tomllib.loads(builtin_example().read_text())


class Staged(Demo):
    """See the module.

    Args:
        folder: Where everything lies.
        sites: Their names.
        people: Persons a site.
    """

    def __init__(self, folder: Path, sites: tuple[str, ...] = SITES, people: int = 50) -> None:
        super().__init__(folder, "", people)
        self.names, self.people = sites, people
        self.sites = {name: folder / name for name in sites}
        self.strikes = folder / "strikes"
        self.strikes.mkdir(parents=True, exist_ok=True)
        #: How often a coordinator was started.
        self.starts = 0

    @classmethod
    def started(cls, folder: Path, sites: tuple[str, ...] = SITES, people: int = 50) -> Staged:
        """A new one that listens; whoever asks for it stops it."""
        made = cls(folder, sites, people)
        try:
            made.provision()
            made.start_server()
            made.start_sites()
            pids = [place / "agent" / f"{role}.pid" for place in made.sites.values() for role in ("node", "site")]
            made.until(lambda: all(path.exists() for path in pids), "every agent starts its processes")
        except BaseException:
            made.stop()
            raise
        return made

    # --- what lies on the disks -----------------------------------------------------------------------------------

    def _fill_in(self) -> None:
        table = _table()
        persons = table["zper"].unique()
        for number, name in enumerate(self.names):
            mine = persons[number * self.people : (number + 1) * self.people]
            self._fill_in_site(name, table[table["zper"].isin(mine)].drop(columns="site"), [str(p) for p in mine])

    def _fill_in_site(self, name: str, rows: pd.DataFrame, persons: list[str]) -> None:
        place = self.sites[name]
        rows.to_csv(place / "data.csv", index=False)
        config = tomllib.loads((place / "site.toml").read_text())
        config["data"] = {"file": "data.csv", "subject": "zper", "label": _EXAMPLE["data"]["label"]}
        config["schema"] = _EXAMPLE["schema"]
        config["policy"] |= {
            "purposes": [PURPOSE], "profiles": ["sealed"], "models": ["logistic", "mlp"], "epsilon_limit": 4.0,
            "ledger_epsilon_limit": 400.0, "local_steps_limit": 20, "release": True,
        }  # fmt: skip
        (place / "site.toml").write_text(to_toml(config))
        with (place / "consent.csv").open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(["event_id", "subject", "purpose", "type", "effective_at", "lawful_basis"])
            for number, person in enumerate(persons):
                out.writerow([f"paper-{number}", person, PURPOSE, "given", "2024-01-01T00:00:00+00:00", "consent"])
        ok("consent", "import", place / "consent.csv", "--registry", place, "--passphrase-file", self.passphrase)

    def enrol(self, name: str) -> None:
        """One more site, with everybody's signature, while everything runs. Its agent is not started."""
        place, secret = self.folder / name, ("--passphrase-file", self.passphrase)
        ok("site", "init", place, "--name", name, "--federation", FEDERATION, "--population", str(POPULATION), *secret)
        ok("federation", "add-site", self.fed, place / "request.json", *secret)
        self.sites[name] = place
        self.names = (*self.names, name)
        kits = ok("federation", "kit", self.fed, *secret, "--json").last_line["kits"]
        signed = []
        for site, folder in self.sites.items():
            shown = ok("federation", "show", folder, "--kit", kits[site], "--json").last_line
            signed.append(ok("site", "confirm", folder, kits[site], "--fingerprint", shown["fingerprint"], *secret,
                             "--json").last_line["file"])  # fmt: skip
        ok("federation", "collect", self.fed, *signed)
        kits = ok("federation", "kit", self.fed, *secret, "--json").last_line["kits"]
        for site, folder in self.sites.items():
            ok("site", "confirm", folder, kits[site], *secret)
        table = _table()
        number = len(self.names) - 1
        mine = table["zper"].unique()[number * self.people : (number + 1) * self.people]
        self._fill_in_site(name, table[table["zper"].isin(mine)].drop(columns="site"), [str(p) for p in mine])

    # --- processes ------------------------------------------------------------------------------------------------

    def start(self, name: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start a command as a process of its own, which may be struck."""
        with (self.folder / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.struck", "confide", *map(str, arguments),
                 "--passphrase-file", str(self.passphrase)],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", FOLDER: str(self.strikes)},
            )  # fmt: skip
        return self._processes[name]

    def start_server(self) -> subprocess.Popen[bytes]:
        """The coordinator's service."""
        self.starts += 1
        return super().start_server()

    def start_site(self, name: str) -> None:
        """One site's agent."""
        self.start(name, "site", "run", self.sites[name])

    def stop_site(self, name: str) -> None:
        """End one site's agent, as its operator would."""
        self._processes[name].terminate()
        assert self._processes.pop(name).wait(timeout=120) == 0

    def reroute(self, name: str, endpoint: str) -> str:
        """Have a site that is stopped look for the coordinator elsewhere; where it did before."""
        path = self.sites[name] / "site.toml"
        config = tomllib.loads(path.read_text())
        before, config["endpoint"] = str(config["endpoint"]), endpoint
        path.write_text(to_toml(config))
        return before

    def pid_of(self, name: str, role: str) -> int:
        """The id of a site's `node` or `site` process."""
        return int((self.sites[name] / "agent" / f"{role}.pid").read_text())

    @property
    def server(self) -> subprocess.Popen[bytes]:
        """The coordinator's process."""
        return self._processes[COORDINATOR]

    # --- strikes --------------------------------------------------------------------------------------------------

    def plan(self, party: str, moment: str, role: str = "", *, until: str = "") -> None:
        """Have a party's process die at a moment; with a role, that process of the site; or wait for a file."""
        pid_file = str(self.sites[party] / "agent" / f"{role}.pid") if role else ""
        (self.strikes / f"{party}.struck").unlink(missing_ok=True)
        new = self.strikes / f"{party}.new"
        new.write_text(json.dumps({"moment": moment, "pid_file": pid_file, "until": until}))
        new.replace(self.strikes / f"{party}.json")

    def hold(self, moment: str) -> Path:
        """Have the coordinator wait at a moment, until the file is made that is returned."""
        path = self.strikes / f"{time.monotonic_ns()}.go"
        self.plan(COORDINATOR, moment, until=str(path))
        return path

    def until_held(self) -> None:
        """Wait until the coordinator waits."""
        self.until(lambda: self.struck(COORDINATOR), "the coordinator comes to where it is held")

    def asks(self, site: str) -> int:
        """How often a site's node has asked the link for messages."""
        roster = FederationFolder(self.fed).state.roster
        assert roster is not None
        keys = node_keys({member.site: member.node_key for member in roster.members})
        return sum(n.get("asks") == node_number(keys[site]) for n in self._noted())

    def until_it_asks(self, site: str) -> None:
        """Wait until a site's node is there, from now on."""
        before = self.asks(site)
        self.until(lambda: self.asks(site) > before, f"the node of {site} asks the link")

    def _noted(self) -> list[dict[str, Any]]:
        wire = self.strikes / "wire.jsonl"
        return [json.loads(line) for line in wire.read_text().splitlines()] if wire.exists() else []

    def struck(self, party: str) -> bool:
        """Was the plan carried out?"""
        return (self.strikes / f"{party}.struck").exists()

    def until(self, condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
        """Wait for something that must happen; a coordinator that was killed is started again meanwhile."""
        deadline = time.monotonic() + patience
        while not condition():
            if self.server.poll() == -signal.SIGKILL:
                self.start_server()
            gone = [name for name, process in self._processes.items() if process.poll() not in (None, 0)]
            if gone or time.monotonic() > deadline:
                raise AssertionError(f"it did not happen that {what}; gone: {gone}\n{self.everything_said()}")
            time.sleep(0.05)

    def result(self, run: str) -> dict[str, Any]:
        """What a run ended with."""
        path = self.fed / "runs" / run / "result.json"
        self.until(path.exists, f"run {run} ends")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    # --- what was left --------------------------------------------------------------------------------------------

    def log_of(self, party: str) -> Path:
        """Where a party's log lies."""
        return self.fed / "coordinator.db" if party == COORDINATOR else self.sites[party] / "logs" / "federated.db"

    def entries(self, party: str, kind: type[audit.Record], run: str) -> list[Any]:
        """A party's log entries of a kind, of a run."""
        if not self.log_of(party).exists():
            return []
        found = (entry for entry, _ in stored_entries(self.log_of(party)))
        return [entry for entry in found if isinstance(entry, kind) and getattr(entry, "run", None) == run]

    def until_it_has(self, party: str, kind: type[audit.Record], run: str, round_: int) -> None:
        """Wait until a party has written down that it did something in a round."""
        self.until(
            lambda: any(entry.round >= round_ for entry in self.entries(party, kind, run)),
            f"{party} writes {kind.__name__} of round {round_}",
        )

    def computed(self, run: str) -> list[tuple[str, int]]:
        """(site, round) of every update whose computing was begun, in all processes."""
        return [(n["site"], n["computed"]) for n in self._noted() if n.get("run") == run]

    def manifest(self, run: str) -> Manifest:
        """The run, as the coordinator's log has it."""
        (created,) = self.entries(COORDINATOR, audit.RunCreated, run)
        return Manifest.from_bytes(created.manifest.encode())

    def charges(self, site: str, run: str) -> tuple[dict[str, PrivacyEvent], dict[str, PrivacyEvent]]:
        """What a site's ledger reserved for a run, and what of it stands."""
        ledger = Ledger.open(self.sites[site] / "ledger" / "ledger.db")
        try:
            of_run = [{c: e for c, e in found.items() if c.startswith(f"{run}/")}
                      for found in (ledger.reservations(), ledger.charges())]  # fmt: skip
        finally:
            ledger.close()
        return of_run[0], of_run[1]

    def evidence(self, run: str) -> Evidence:
        """What an auditor sees who gets all logs as they are now: the sites' first, then the coordinator's."""
        place = self.folder / "exported" / f"{run}-{time.monotonic_ns()}"
        (place / "logs").mkdir(parents=True)
        for party in (*self.names, COORDINATOR):
            export_log(self.log_of(party), place / "logs" / f"{party}.log")
        return verify(place, run=run)


def _table() -> pd.DataFrame:
    file = _EXAMPLE["data"]["file"].removeprefix("package:")
    return pd.read_csv(str(importlib.metadata.distribution(file.split("/")[0]).locate_file(file)))


@contextmanager
def staged(folder: Path, sites: tuple[str, ...] = SITES, people: int = 50) -> Iterator[Staged]:
    """A federation that listens; nothing of it outlives the block."""
    made = Staged.started(folder, sites, people)
    try:
        yield made
    finally:
        made.stop()
