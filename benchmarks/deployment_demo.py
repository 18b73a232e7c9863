"""A whole deployment on this machine, through the commands that operators use: `python -m benchmarks.deployment_demo`.

A federation is provisioned; a coordinator and three sites run as processes of their own, over TLS on the loopback
interface; the sites read from CSV, Parquet and a database (PostgreSQL, started here; SQLite where it is not installed);
five sealed rounds are trained on RAND, the coordinator is killed (SIGKILL) after the second and started again; all logs
are verified and the report is written. Whatever was started is stopped, by its id.

The last line is one JSON object. `auc` is what a deployment would see: the *released* one, noised and charged, from the
sealed sum over the sites' held-out persons; nothing exact leaves a site here, though RAND is public.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import sqlalchemy

from confide.clients.agent import free_port
from confide.simulations.sources import builtin_example
from tests.cli.command import Answer, confide, to_toml
from tests.privacy import postgres

FEDERATION, PURPOSE, POPULATION, ROUNDS = "rand", "research/health-utilisation", 1200, 5
#: Names of three of RAND's six cities, by their number in the table.
SITES = {"dayton": 1, "seattle": 2, "fitchburg": 4}
WORDS = "correct horse battery staple"
_PATIENCE = 240.0
_EXAMPLE = tomllib.loads(builtin_example().read_text())


def ok(*arguments: str | Path) -> Answer:
    """A command that must succeed."""
    done = confide(*arguments)
    if done.code:
        raise RuntimeError(f"confide {' '.join(map(str, arguments))}: {done.code}\n{done.err}")
    return done


class Demo:
    """The files and processes of one deployment.

    Args:
        folder: Where everything lies.
        database: URL of an empty database for one site's table.
        people: At most so many persons a site; None: all.
        tell: Called with each step.
    """

    def __init__(
        self, folder: Path, database: str, people: int | None = None, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder, self.fed, self._database, self._people, self._tell = folder, folder / "fed", database, people, tell
        self.sites = {name: folder / name for name in SITES}
        self.passphrase = folder / "passphrase"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def provision(self) -> None:
        """Keys, rosters, fingerprints; then each operator fills in site.toml and imports consent."""
        self._tell("provisioning")
        self.passphrase.write_text(WORDS)
        self.passphrase.chmod(0o600)
        secret = ("--passphrase-file", self.passphrase)
        ok("federation", "init", self.fed, "--name", FEDERATION, "--endpoint", f"127.0.0.1:{free_port()}", *secret)
        for name, place in self.sites.items():
            ok("site", "init", place, "--name", name, "--federation", FEDERATION, "--population", str(POPULATION),
               *secret)  # fmt: skip
        ok("federation", "add-site", self.fed, *(p / "request.json" for p in self.sites.values()), *secret)
        kits = ok("federation", "kit", self.fed, *secret, "--json").last_line["kits"]
        said = {n: ok("federation", "show", p, "--kit", kits[n], "--json").last_line for n, p in self.sites.items()}
        signed = [
            ok("site", "confirm", p, kits[n], "--fingerprint", said[n]["fingerprint"], *secret, "--json").last_line
            for n, p in self.sites.items()
        ]
        ok("federation", "collect", self.fed, *(s["file"] for s in signed))
        kits = ok("federation", "kit", self.fed, *secret, "--json").last_line["kits"]
        for name, place in self.sites.items():
            ok("site", "confirm", place, kits[name], *secret)
        self._fill_in()

    def _fill_in(self) -> None:
        file = _EXAMPLE["data"]["file"].removeprefix("package:")
        import importlib.metadata

        path = importlib.metadata.distribution(file.split("/")[0]).locate_file(file)
        table = pd.read_csv(str(path))
        sources = (self._as_csv, self._as_parquet, self._as_database)
        for (name, number), write in zip(SITES.items(), sources, strict=True):
            place, rows = self.sites[name], table[table["site"] == number].drop(columns="site")
            persons = [str(p) for p in rows["zper"].unique()[: self._people]]
            rows = rows[rows["zper"].astype(str).isin(persons)]
            config = tomllib.loads((place / "site.toml").read_text())
            config["data"] = {**write(place, rows), "subject": "zper", "label": _EXAMPLE["data"]["label"]}
            config["schema"] = _EXAMPLE["schema"]
            config["policy"] |= {
                "purposes": [PURPOSE], "profiles": ["sealed"], "models": ["logistic"], "epsilon_limit": 4.0,
                "local_steps_limit": 20, "release": True,
            }  # fmt: skip
            (place / "site.toml").write_text(to_toml(config))
            self._consent(place, persons[: len(persons) * 17 // 20])

    def _as_csv(self, place: Path, rows: pd.DataFrame) -> dict[str, str]:
        rows.to_csv(place / "data.csv", index=False)
        return {"file": "data.csv"}

    def _as_parquet(self, place: Path, rows: pd.DataFrame) -> dict[str, str]:
        rows.to_parquet(place / "data.parquet", index=False)
        return {"file": "data.parquet"}

    def _as_database(self, place: Path, rows: pd.DataFrame) -> dict[str, str]:
        engine = sqlalchemy.create_engine(self._database)
        rows.to_sql("visits", engine, index=False)
        engine.dispose()
        return {"url": "env:DEMO_DATABASE", "query": "SELECT * FROM visits"}

    def _consent(self, place: Path, persons: list[str]) -> None:
        with (place / "consent.csv").open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(["event_id", "subject", "purpose", "type", "effective_at", "lawful_basis"])
            for number, person in enumerate(persons):
                out.writerow([f"paper-{number}", person, PURPOSE, "given", "2024-01-01T00:00:00+00:00", "consent"])
        ok("consent", "import", place / "consent.csv", "--registry", place, "--passphrase-file", self.passphrase)

    def start(self, name: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start a command as a process of its own."""
        with (self.folder / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "confide.cli.main", *map(str, arguments), "--passphrase-file",
                 str(self.passphrase)],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, "DEMO_DATABASE": self._database},
            )  # fmt: skip
        return self._processes[name]

    def start_server(self) -> subprocess.Popen[bytes]:
        """The coordinator's service."""
        return self.start("coordinator", "server", "run", self.fed)

    def start_sites(self) -> None:
        """Every site's agent."""
        for name, place in self.sites.items():
            self.start(name, "site", "run", place)

    def start_run(self, name: str = "demo", **sections: Mapping[str, Any]) -> str:
        """Put a run into the store; its name there."""
        tree = {key: _EXAMPLE[key] for key in ("run", "schema", "model", "training", "strategy", "privacy", "sealing")}
        tree["run"] = {**tree["run"], "name": name, "rounds": ROUNDS, "report_metrics_every": ROUNDS}
        tree["privacy"] = {**tree["privacy"], "epsilon": 4.0}
        tree["data"] = {"label": _EXAMPLE["data"]["label"], "held_out": 0.2}
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        (self.folder / f"{name}.toml").write_text(to_toml(tree))
        done = ok("run", "start", self.folder / f"{name}.toml", "--federation", self.fed, "--json").last_line
        return str(done["run"])

    def status(self, run: str) -> Mapping[str, Any]:
        """What the store says of a run."""
        (found,) = ok("run", "status", run, "--federation", self.fed, "--json").last_line["runs"]
        return dict(found)

    def wait(self, run: str, until: Callable[[Mapping[str, Any]], bool], what: str) -> Mapping[str, Any]:
        """Watch the run."""
        deadline = time.monotonic() + _PATIENCE
        while not until(found := self.status(run)):
            gone = [name for name, process in self._processes.items() if process.poll() is not None]
            if gone or time.monotonic() > deadline or (found["result"] or {}).get("reason"):
                raise RuntimeError(f"it did not happen that {what}: {found}; ended: {gone}\n{self.everything_said()}")
            time.sleep(0.1)
        return found

    def stop(self) -> None:
        """End what was started."""
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(timeout=45)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def everything_said(self) -> str:
        """The ends of all logs."""
        paths = [*self.folder.glob("*.out"), *self.folder.glob("*/agent/*.log"), self.fed / "server.log"]
        return "\n".join(f"== {p}\n{p.read_text(errors='replace')[-2000:]}" for p in sorted(paths) if p.is_file())

    def verify(self, run: str) -> bool:
        """What an auditor does: gather the logs that travel, verify them, write the report."""
        logs = self.fed / "runs" / run / "logs"
        for name, place in self.sites.items():
            exported = self.folder / "exported" / name
            ok("site", "export", place, "--out", exported)
            for path in (exported / "logs").iterdir():
                shutil.copy(path, logs)
        ok("server", "export", self.fed, "--out", logs.parent)  # it may know of later runs by now
        ok("audit", "report", logs.parent, "--run", run)
        ok("audit", "verify", logs.parent, "--run", run)
        return bool(ok("audit", "verify", logs.parent, "--json").last_line["verified"])


def run_demo(folder: Path, database: str, people: int | None = None,
             tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:  # fmt: skip
    """See the module; what its last line says."""
    begun, demo = time.monotonic(), Demo(folder, database, people, tell)
    demo.provision()
    try:
        tell("starting a coordinator and three sites")
        server = demo.start_server()
        demo.start_sites()
        refused, run = demo.start_run("refused", run={"purpose": "marketing"}), demo.start_run()
        said = demo.wait(refused, lambda s: s["result"] is not None, "all sites refused a run")["result"]
        tell(f"a run for another purpose: {said['reason'].splitlines()[0]}")
        killed_in = demo.wait(run, lambda s: s["round"] >= 3, "two rounds ended")["round"]
        tell(f"SIGKILL to the coordinator in round {killed_in}, and a new start")
        server.send_signal(signal.SIGKILL)
        server.wait()
        unfinished = demo.status(run)["status"] == "running"
        demo.start_server()
        result = demo.wait(run, lambda s: s["result"] is not None, "the run ended")["result"]
    finally:
        demo.stop()
    tell("verifying the logs")
    verified = demo.verify(run)
    return {
        "rounds": result["rounds"], "sites": len(result["sites_in_last_cohort"]), "resumed": unfinished,
        "refused": len(said["refusals"]), "verified": verified, "seconds": round(time.monotonic() - begun, 1),
        "auc": result["released_metrics"]["auc"], "epsilon": result["epsilon"],
        "database": database.partition(":")[0],
        "report": str(folder / "fed" / "runs" / run / "report.html"),
    }  # fmt: skip


@contextlib.contextmanager
def database(folder: Path) -> Iterator[str]:
    """An empty database: PostgreSQL where its programs are there, else SQLite."""
    if postgres.binaries() is None:
        yield f"sqlite:///{folder / 'visits.db'}"
        return
    with postgres.server() as place:
        yield postgres.new_database(place, "visits").replace("postgresql://", "postgresql+psycopg://", 1)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="Keep everything in this new folder; else it is temporary.")
    parser.add_argument("--people", type=int, help="At most so many persons a site.")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="confide-demo-")))
        folder.mkdir(parents=True, exist_ok=True)
        url = stack.enter_context(database(folder))
        shown = run_demo(folder, url, arguments.people, lambda step: print(step, file=sys.stderr, flush=True))
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
