"""A site's agent by itself: what it starts, stops, gives up on, and by which way its traffic goes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from confide.clients.agent import AgentConfig, run_agent
from confide.clients.executor import resolve_factory
from confide.errors import ConfigError, StorageError
from confide.server.link import Link, LinkConfig
from tests.integration.deployed import ROOT, Deployment, deployment, wait_until

ELSEWHERE = "127.0.0.2"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Deployment]:
    """The files of three sites."""
    with deployment(tmp_path) as files:
        files.port = 9  # nobody listens there
        yield files


def config_of(made: Deployment, name: str) -> AgentConfig:
    """What a site's agent is told."""
    order = made.agent_order(name)
    paths = {key: Path(order.pop(key)) for key in ("folder", "ca", "node_key")}
    return AgentConfig(**paths, **order)


def test_agents_stopped_by_a_signal_leave_no_process(tmp_path: Path) -> None:
    with deployment(tmp_path, sites=3) as made:
        made.port = 9  # nobody listens there
        name = made.names[0]
        made.start_agent(name)
        wait_until((made.folder / "agents" / name / "node.pid").exists, "the agent starts its node")
        ids = [made.pid_of(name, role) for role in ("node", "site")]
        made.processes[name].terminate()
        assert made.processes[name].wait(timeout=45) == 0
        assert not any(Path(f"/proc/{id_}").exists() for id_ in ids)


def test_a_killed_agent_takes_its_processes_with_it(tmp_path: Path) -> None:
    with deployment(tmp_path, sites=3) as made:
        made.port = 9
        name = made.names[0]
        made.start_agent(name)
        log = made.folder / "agents" / name / "site.log"
        wait_until(lambda: log.exists() and "answers" in log.read_text(), "the site is open")
        ids = [made.pid_of(name, role) for role in ("node", "site")]
        made.processes[name].kill()
        made.processes[name].wait()
        wait_until(lambda: not any(running(id_) for id_ in ids), "its processes end", patience=30)
        assert not any(running(id_) for id_ in ids)


def running(id_: int) -> bool:
    """Is it there, and not only waiting for somebody to take note of its end?"""
    try:
        return Path(f"/proc/{id_}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def broken_site(**_: object) -> None:
    """A site that says why it cannot start."""
    raise ConfigError("there is no such table", where="site.toml")


def test_a_site_that_cannot_start_is_not_started_again(made: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    config = replace(config_of(made, made.names[0]), factory="tests.integration.test_agent:broken_site")
    with pytest.raises(ConfigError, match="cannot start"):
        run_agent(config, threading.Event())
    assert "there is no such table" in (config.folder / "site.log").read_text()
    ids = [int((config.folder / f"{role}.pid").read_text()) for role in ("node", "site")]
    assert not any(running(id_) for id_ in ids)


def test_missing_files_and_factories_are_named(made: Deployment) -> None:
    config = config_of(made, made.names[0])
    for wrong in (replace(config, ca=Path("/none.pem")), replace(config, node_key=Path("/none.key"))):
        with pytest.raises(ConfigError, match=r"/none\."):
            run_agent(wrong, threading.Event())
    for reference in ("json:none", "no.such.module:f", "json", "", ":dumps", "json:__name__"):
        with pytest.raises(ConfigError, match="names no function"):
            resolve_factory(reference)
    assert resolve_factory("json:dumps")([1]) == "[1]"


def test_an_agent_that_cannot_write_says_so_with_its_own_exit_code(made: Deployment) -> None:
    order = made.agent_order(made.names[0])
    Path(order["folder"]).mkdir(exist_ok=True)
    program = """
import json, resource, sys
from pathlib import Path
from confide.clients.agent import AgentConfig, run_agent
from confide.errors import ConfideError
order = json.loads(sys.argv[1])
paths = {key: Path(order.pop(key)) for key in ("folder", "ca", "node_key")}
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    run_agent(AgentConfig(**paths, **order))
except ConfideError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program, json.dumps(order)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, timeout=60, check=False)  # fmt: skip
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "free space" in done.stdout


@contextmanager
def connect_proxy() -> Iterator[tuple[int, list[str]]]:
    """An HTTPS proxy on the loopback interface: its port, and the first lines of what it was asked."""
    asked: list[str] = []
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with suppress(OSError):
                while not stop.is_set() and (data := source.recv(65536)):
                    sink.sendall(data)

        def serve(client: socket.socket) -> None:
            with client, suppress(OSError):
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(4096)
                line = head.split(b"\r\n")[0].decode()
                asked.append(line)
                host, port = line.split()[1].split(":")
                with socket.create_connection((host, int(port)), timeout=10) as target:
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    back = threading.Thread(target=pump, args=(target, client), daemon=True)
                    back.start()
                    pump(client, target)

        def accept() -> None:
            while not stop.is_set():
                with suppress(OSError):
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1], asked
        stop.set()
        thread.join(timeout=5)


def test_a_proxy_is_used_for_the_link_and_for_nothing_else(made: Deployment) -> None:
    name, tls = made.names[0], made.folder / "tls"
    config = LinkConfig(
        host=ELSEWHERE, port=0, certificate=tls / "server.pem", key=tls / "server.key", nodes={name: made.nodes[name]}
    )
    with connect_proxy() as (port, asked), Link(config) as link:
        made.port, made.host = link.port, ELSEWHERE
        proxy = f"http://127.0.0.1:{port}"
        made.start_agent(name, HTTPS_PROXY=proxy, HTTP_PROXY=proxy, ALL_PROXY=proxy, NO_PROXY="")
        wait_until(lambda: link.online() != [], "the node comes through the proxy")
        site_log = made.folder / "agents" / name / "site.log"
        wait_until(lambda: "answers" in site_log.read_text(), "the site is open")
        assert set(asked) == {f"CONNECT {ELSEWHERE}:{link.port} HTTP/1.1"}
        made.stop()


def test_the_agents_own_process_loads_neither_torch_nor_flower() -> None:
    loaded = "import confide.clients.agent, sys; print(sorted({'torch', 'flwr', 'pandas'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    said = subprocess.run([sys.executable, "-c", loaded], env=environment, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "[]", said.stderr
