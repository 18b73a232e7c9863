"""A federation of real processes: certificates, node keys, sites on disk, their agents, a coordinator.

Run as a program it is one of those processes: `agent ORDER.json` or `coordinator ORDER.json`.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from confide.clients.agent import AgentConfig, run_agent

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"
#: Seconds after which a process that hangs is a failure.
PATIENCE = 150.0


# --- keys and certificates --------------------------------------------------------------------------------------------


def write_certificates(folder: Path) -> None:
    """A small authority (`ca.pem`) and a server certificate under it (`server.pem`, `server.key`)."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    now = datetime.datetime.now(datetime.UTC)
    whole_day = now - datetime.timedelta(hours=1), now + datetime.timedelta(days=1)
    ca = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(authority.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(whole_day[0]).not_valid_after(whole_day[1])
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )  # fmt: skip
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])).issuer_name(name)
        .public_key(server.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(whole_day[0]).not_valid_after(whole_day[1])
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(f"127.0.0.{n}")) for n in (1, 2)]),
            critical=False,
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )  # fmt: skip
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def write_node_key(path: Path) -> str:
    """A node's private key in OpenSSH form; its public key as a line."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    path.chmod(0o600)
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


# --- what lies on the disks -------------------------------------------------------------------------------------------


def rand_tree(folder: Path, sites: int, people: int, **sections: dict[str, Any]) -> dict[str, Any]:
    """An experiment over a slice of RAND: so many people at each of the first sites."""
    table = pd.read_csv(str(distribution("statsmodels").locate_file("statsmodels/datasets/randhie/src/randhie.csv")))
    names = sorted(table["site"].unique())[:sites]
    kept = [p for name in names for p in table.loc[table["site"] == name, "zper"].unique()[:people]]
    slice_ = table.loc[table["zper"].isin(kept), ["zper", "site", "mdvis", "xage", "female"]]
    slice_.to_csv(folder / "slice.csv", index=False)
    tree: dict[str, Any] = {
        "run": {"name": "deployed", "purpose": "research/test", "rounds": 3, "seed": 1, "report_metrics_every": 3},
        "data": {
            "file": str(folder / "slice.csv"), "subject": "zper", "site": "site", "public": True, "held_out": 0.25,
            "label": {"column": "mdvis", "at_least": 3},
        },
        "schema": {
            "missing": "midpoint",
            "features": {
                "xage": {"kind": "number", "bounds": [0, 65]}, "female": {"kind": "category", "values": [0, 1]},
            },
        },
        "sites": {"min_sites": 3, "min_subjects": 10, "population": {"default": people}},
        "consent": {"simulate": {"fraction": 0.9}},
        "model": {"kind": "logistic"},
        "training": {"local_steps": 4, "learning_rate": 0.5},
        "privacy": {"epsilon": 4.0, "sample_rate": 0.3, "site_epsilon_limit": 8.0},
        "sealing": {"profile": "sealed"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def open_site(folder: str, name: str, passphrase: str | None = None) -> Any:
    """The site that `Deployment` left on the disk, as its operator's configuration would open it."""
    from confide.clients.membership import Membership
    from confide.clients.policy import SitePolicy
    from confide.clients.site import Site
    from confide.clients.store import SiteStore
    from confide.config import load_experiment
    from confide.privacy.consent import Registry, SiteKey
    from confide.privacy.dp import Ledger, RenyiBudget
    from confide.privacy.dp.personal import PersonalLosses
    from confide.privacy.sealing.vault import Vault
    from confide.protocol.identity import Identity
    from confide.protocol.roster import SignedRoster
    from confide.protocol.standing import Standing
    from confide.simulations.sources import load_sources
    from confide.simulations.world import COORDINATOR, FEDERATION

    base = Path(folder)
    kept = json.loads((base / "kept.json").read_text())
    sources = load_sources(load_experiment(kept["tree"], ()), base)
    experiment, run, ledgers = sources.experiment, base / "sites" / name, base / "ledgers" / name
    key = SiteKey.load_or_create(ledgers / "site.key", b"")
    privacy = experiment.privacy
    identity = Identity(name, Ed25519PrivateKey.from_private_bytes(bytes.fromhex(kept["identities"][name])))
    policy = SitePolicy(
        coordinator=COORDINATOR, coordinator_key=bytes.fromhex(kept["coordinator_key"]), federation=FEDERATION,
        purposes=frozenset({experiment.run.purpose}), profiles=frozenset({"sealed"}), data_are_public=True,
        held_out=experiment.data.held_out, min_sites=experiment.sites.min_sites,
        min_subjects=experiment.sites.min_subjects, population=sources.population[name],
        epsilon_limit=privacy.site_epsilon_limit, delta=privacy.delta, release=True,
        local_steps_limit=experiment.training.local_steps, reply_seconds=kept["reply_seconds"],
    )  # fmt: skip
    chain = (SignedRoster.model_validate_json(kept["roster"]),)
    me = chain[-1].roster.member(name)
    assert me is not None
    membership = Membership(None, Standing(federation=FEDERATION, me=me))
    membership.accept(chain)
    return Site(
        identity=identity, policy=policy, membership=membership,
        records=sources.records[name], registry=Registry(run / "consent.db", key),
        ledger=Ledger(ledgers / "ledger.db", RenyiBudget.for_limit(privacy.site_epsilon_limit, privacy.delta),
                      privacy.unit, experiment.data.held_out),
        personal=PersonalLosses(ledgers / "personal.db"), key=key, store=SiteStore(run / "state.db"),
        log=identity.open_log(run / "federated.db", "federated", FEDERATION),
        local_log=identity.open_log(run / "local.db", "local", FEDERATION),
        vault=None if passphrase is None else Vault(run / "vault", passphrase),
    )  # fmt: skip


class Deployment:
    """The files of a federation, and its processes. A context manager: nothing outlives it.

    Args:
        folder: Where everything lies.
        tree: The experiment.
        passphrase: Of the sites' vaults; None: run keys in memory only.
        reply_seconds: The span in which the sites answer training.
    """

    def __init__(
        self, folder: Path, tree: Mapping[str, Any], passphrase: str | None = None, reply_seconds: float = 0.0
    ) -> None:
        from confide.config import load_experiment
        from confide.simulations.sources import load_sources
        from confide.simulations.world import World

        self.folder, self._passphrase = folder, passphrase
        write_certificates(folder / "tls")
        world = World(load_sources(load_experiment(dict(tree), ()), folder), folder / "sites", folder / "ledgers",
                      folder / "logs")  # fmt: skip
        self.names = list(world.sites)
        kept = {
            "tree": dict(tree), "reply_seconds": reply_seconds,
            "identities": {name: site.identity.key.private_bytes_raw().hex() for name, site in world.sites.items()},
            "coordinator": world.coordinator.key.private_bytes_raw().hex(),
            "coordinator_key": world.coordinator.public_key.hex(),
            "roster": world.roster[-1].model_dump_json(),
            "manifest": world.manifest.to_bytes().decode(), "initial": world.initial.astype("<f4").tobytes().hex(),
        }  # fmt: skip
        world.close()
        (folder / "kept.json").write_text(json.dumps(kept))
        self.nodes = {name: write_node_key(folder / "agents" / name / "node.key") for name in self.names}
        self.host, self.port = LOOPBACK, 0
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=45)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def agent_order(self, name: str) -> dict[str, Any]:
        """What an agent is told."""
        return {
            "folder": str(self.folder / "agents" / name), "superlink": f"{self.host}:{self.port}",
            "ca": str(self.folder / "tls" / "ca.pem"), "node_key": str(self.folder / "agents" / name / "node.key"),
            "factory": "tests.integration.deployed:open_site",
            "arguments": {"folder": str(self.folder), "name": name, "passphrase": self._passphrase},
        }  # fmt: skip

    def start_agent(self, name: str, **environment: str) -> None:
        """Start a site's agent."""
        self._start("agent", name, self.agent_order(name), **environment)

    def start_coordinator(self, **options: Any) -> None:
        """Start the coordinator, and wait until it listens."""
        order = {"folder": str(self.folder), "port": self.port, "nodes": self.nodes, **options}
        place = self.folder / "port"
        place.unlink(missing_ok=True)
        process = self._start("coordinator", "coordinator", order)
        wait_until(lambda: place.exists() or process.poll() is not None, "the coordinator listens")
        assert process.poll() is None, (self.folder / "coordinator.out").read_text()
        self.port = int(place.read_text())

    def _start(self, role: str, name: str, order: Mapping[str, Any], **variables: str) -> subprocess.Popen[bytes]:
        path = self.folder / f"{name}.order.json"
        path.write_text(json.dumps(order))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **variables}
        with (self.folder / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.deployed", role, str(path)],
                cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self.processes[name]

    def result(self) -> dict[str, Any]:
        """What the coordinator ended with."""
        process = self.processes["coordinator"]
        process.wait(timeout=PATIENCE)
        assert process.returncode == 0, self.everything_said()
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return found

    def rounds(self) -> int:
        """How many rounds have begun."""
        path = self.folder / "rounds"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def pid_of(self, name: str, role: str) -> int:
        """The id of a site's `node` or `site` process."""
        return int((self.folder / "agents" / name / f"{role}.pid").read_text())

    def everything_said(self) -> str:
        """The ends of all logs, for a failure's message."""
        paths = [*self.folder.glob("*.out"), *self.folder.glob("agents/*/*.log"), *self.folder.glob("server/*.log")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(paths))


def wait_until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait for something that must happen."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen that {what}"
        time.sleep(0.05)


@contextmanager
def deployment(folder: Path, sites: int = 3, people: int = 60, passphrase: str | None = None,
               reply_seconds: float = 0.0, **sections: dict[str, Any]) -> Iterator[Deployment]:  # fmt: skip
    """A federation over a slice of RAND, with nothing started."""
    with Deployment(folder, rand_tree(folder, sites, people, **sections), passphrase, reply_seconds) as made:
        yield made


# --- the processes ----------------------------------------------------------------------------------------------------


def _agent(order: dict[str, Any]) -> None:
    paths = {name: Path(order.pop(name)) for name in ("folder", "ca", "node_key")}
    run_agent(AgentConfig(**paths, **order))


def _coordinator(order: dict[str, Any]) -> None:
    import numpy as np
    from flwr.serverapp import Grid

    from confide.protocol.identity import Identity
    from confide.protocol.manifest import Manifest
    from confide.server.coordinator import Coordinator
    from confide.server.link import LinkConfig
    from confide.server.process import CoordinatorConfig, run_coordinator
    from confide.simulations.world import COORDINATOR, FEDERATION

    folder = Path(order["folder"])
    kept = json.loads((folder / "kept.json").read_text())
    identity = Identity(COORDINATOR, Ed25519PrivateKey.from_private_bytes(bytes.fromhex(kept["coordinator"])))
    manifest = Manifest.from_bytes(kept["manifest"].encode())
    name = order.get("log", COORDINATOR)
    log = identity.open_log(folder / "sites" / f"{name}.db", "coordinator", FEDERATION)
    times: list[float] = []

    def before(round_: int) -> None:
        times.append(time.monotonic())
        with (folder / "rounds").open("a") as stream:
            stream.write(f"{round_}\n")

    def start(grid: Grid) -> Coordinator:
        initial = np.frombuffer(bytes.fromhex(kept["initial"]), dtype="<f4").astype(np.float32)
        return Coordinator(grid, identity, manifest, initial, log, before_round=before,
                           timeout=order.get("timeout", 90.0))  # fmt: skip

    link = LinkConfig(host=LOOPBACK, port=order["port"], certificate=folder / "tls" / "server.pem",
                      key=folder / "tls" / "server.key", nodes=order["nodes"])  # fmt: skip
    config = CoordinatorConfig(
        link=link, folder=folder / "server", min_nodes=manifest.min_sites, wait=PATIENCE,
        wait_for_all=order.get("wait_for_all", PATIENCE), listening=lambda port: _say(folder / "port", str(port)),
    )  # fmt: skip
    released = run_coordinator(config, start)
    log.close()
    times.append(time.monotonic())
    _say(folder / "result.json", json.dumps({
        "model": released.model, "abandoned": [o.round for o in released.outcomes if o.abandoned],
        "cohorts": [list(o.cohort) for o in released.outcomes],
        "seconds": [b - a for a, b in pairwise(times)],
    }))  # fmt: skip


def _say(path: Path, text: str) -> None:
    """All at once: somebody is waiting for the file."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    {"agent": _agent, "coordinator": _coordinator}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
