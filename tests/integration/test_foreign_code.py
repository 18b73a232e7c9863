"""A bundle with code of its own, handed out through the link to a site's agent and to Flower's stock SuperNode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from confide.clients.agent import free_port
from confide.server.grid import LinkGrid
from confide.server.link import Link, LinkConfig
from tests.integration.deployed import LOOPBACK, Deployment, deployment, wait_until

_NOT_AUTHENTIC = 200  # the installed app's own code for a request that nobody signed
_TROJAN = """
import os
from pathlib import Path
Path({folder!r}, os.environ["TROJAN_AT"] + "-" + __name__.partition(".")[0]).touch()
"""
_APP = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server, client = ServerApp(), ClientApp()
@client.query("join")
def join(message, context):
    return Message(RecordDict({"said": ConfigRecord({"by": "the bundle"})}), reply_to=message)
"""


def hostile_bundle(folder: Path, marks: Path) -> bytes:
    """An app that leaves a mark where it is imported, and brings a `confide` of its own that does the same."""
    app = folder / "trojan"
    (app / "confide" / "clients").mkdir(parents=True)
    trojan = _TROJAN.format(folder=str(marks))
    (app / "pyproject.toml").write_text(
        '[project]\nname = "trojan"\nversion = "1.0.0"\ndependencies = []\nlicense = "Apache-2.0"\n'
        '[tool.flwr.app]\npublisher = "somebody"\n'
        '[tool.flwr.app.components]\nserverapp = "trojan:server"\nclientapp = "trojan:client"\n'
    )
    (app / "trojan.py").write_text(trojan + _APP)
    for module in ("__init__", "clients/__init__", "clients/app"):
        (app / "confide" / f"{module}.py").write_text(trojan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's, of a library's name
        return build_fab_from_disk(app)


@dataclass
class Scene:
    """A link, an agent, a stock SuperNode, and an agent that the link does not know."""

    made: Deployment
    link: Link
    marks: Path
    node_of: dict[str, int]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Everything running."""
    folder = tmp_path_factory.mktemp("foreign")
    marks = folder / "marks"
    marks.mkdir()
    with deployment(folder) as made:
        agent, stock, stranger = made.names
        tls = folder / "tls"
        known = {name: made.nodes[name] for name in (agent, stock)}
        config = LinkConfig(host=LOOPBACK, port=0, certificate=tls / "server.pem", key=tls / "server.key", nodes=known)
        with Link(config) as link:
            made.port = link.port
            made.start_agent(agent, TROJAN_AT="agent")
            made.start_agent(stranger, TROJAN_AT="stranger")
            made.processes[stock] = stock_supernode(made, stock)
            yield Scene(made, link, marks, {site: node for node, site in link.sites.items()})


def stock_supernode(made: Deployment, name: str) -> subprocess.Popen[bytes]:
    """Flower's own SuperNode as its manual starts it: it runs what the bundle holds."""
    environment = {
        **os.environ, "FLWR_HOME": str(made.folder / "stock"), "TROJAN_AT": "stock", "PYTHONPATH": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with (made.folder / "stock.out").open("ab") as out:
        return subprocess.Popen(
            [
                str(Path(sys.executable).parent / "flower-supernode"), "--superlink", f"{LOOPBACK}:{made.port}",
                "--root-certificates", str(made.folder / "tls" / "ca.pem"), "--host", LOOPBACK,
                "--port", str(free_port()), "--auth-supernode-private-key",
                str(made.folder / "agents" / name / "node.key"),
            ],
            env=environment, cwd=made.folder, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip


def test_a_bundles_code_runs_at_a_stock_node_and_never_at_an_agent(scene: Scene, tmp_path: Path) -> None:
    grid = LinkGrid(scene.link, hostile_bundle(tmp_path, scene.marks))
    grid.wait_for_nodes(2, 120)
    agent, stock, _ = scene.made.names

    def ask(site: str) -> Message:
        content = RecordDict({"c": ConfigRecord({"x": 1})})
        message = grid.create_message(content, "query.join", scene.node_of[site], "join")
        [reply] = grid.send_and_receive([message], timeout=120)
        return reply

    assert ask(stock).content.config_records["said"]["by"] == "the bundle"  # the control: it does run
    answer = ask(agent)
    assert answer.has_error()
    assert answer.error.code == _NOT_AUTHENTIC
    assert {path.name for path in scene.marks.iterdir()} == {"stock-trojan"}
    unpacked = list((scene.made.folder / "stock").rglob("trojan.py"))
    assert unpacked
    assert list((scene.made.folder / "agents" / agent).rglob("*trojan*")) == []


def test_an_agent_with_an_unknown_key_is_refused_and_keeps_asking_politely(scene: Scene) -> None:
    stranger = scene.made.names[2]
    said = scene.made.folder / f"{stranger}.out"
    wait_until(lambda: "is started again" in said.read_text(), "its node is refused")
    assert stranger not in scene.node_of
    assert scene.made.processes[stranger].poll() is None
    assert len(scene.link.online()) <= 2


def test_tasks_are_given_on_loopback_only_and_to_who_knows_the_secret(scene: Scene) -> None:
    folder = scene.made.folder / "agents" / scene.made.names[0]
    log = folder / "node.log"
    wait_until(lambda: log.exists() and "Uvicorn running" in log.read_text(), "the node listens")
    host, port = re.findall(r"Uvicorn running on http://([^:]+):([0-9]+)", log.read_text())[-1]
    assert host == LOOPBACK
    secret = (folder / "tasks.secret").read_bytes()
    assert oct((folder / "tasks.secret").stat().st_mode & 0o777) == "0o600"

    def take(*interceptors: object) -> str:
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        with RuntimeHttpClient.from_server_address(
            f"{host}:{port}", True, None, [RuntimeVersionHttpInterceptor(component_name="x"), *interceptors]
        ) as client:
            return str(client.AcquireTask(request).token)

    methods = {"/flwr.proto.Runtime/AcquireTask"}
    for wrong in ([], [SuperExecAuthHttpInterceptor(master_secret=b"guess", protected_methods=methods)]):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            take(*wrong)
        assert refused.value.response.status_code in (401, 403)
    assert take(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods)) == ""  # nothing to do
