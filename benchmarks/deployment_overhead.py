"""What a round costs besides training: deployed confide against Flower's stock deployment, on this machine, one after
the other. `python -m benchmarks.deployment_overhead [--rounds N] [--json]`.

Three sites, about 100 k parameters. A confide round is two exchanges (train, seal) over TLS with node authentication,
sealed, with one training step on a few people, everything that is durable in it, and replies held back to whole seconds
as sites do unless their operators say otherwise; the first round and the one that
only evaluates do not count. A Flower round is what `FedAvg` does by default (train, evaluate), plain HTTP, subprocess
isolation, the same payload both ways, and an app that returns it; `flower_train_seconds` is its first exchange alone.
Medians of rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import confide  # noqa: F401  # sets Flower's switches
from confide.clients.agent import free_port
from confide.config.site import REPLY_SECONDS
from confide.protocol.manifest import Manifest
from tests.integration.deployed import LOOPBACK, deployment, wait_until

HIDDEN = [314, 314]
_SERVER = """
import json, time
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server, client = ServerApp(), ClientApp()

def answer(message, context):
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"n": 1})})
    return Message(content, reply_to=message)

client.train()(answer)
client.evaluate()(answer)

@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 3:
        time.sleep(0.2)
    found, arrays = [], np.zeros(context.run_config["parameters"], dtype=np.float32)
    for _ in range(context.run_config["rounds"]):
        begun = time.monotonic()
        for kind in ("train", "evaluate"):
            nodes = list(grid.get_node_ids())
            messages = [Message(RecordDict({"arrays": ArrayRecord([arrays])}), node, kind) for node in nodes]
            replies = list(grid.send_and_receive(messages, timeout=120))
            assert len(replies) == 3 and not any(reply.has_error() for reply in replies)
            if kind == "train":
                trained = time.monotonic() - begun
        found.append([trained, time.monotonic() - begun])
    out = Path(context.run_config["out"])
    out.with_suffix(".new").write_text(json.dumps(found))
    out.with_suffix(".new").rename(out)
"""


def confide_seconds(folder: Path, rounds: int) -> tuple[int, list[float]]:
    """(parameters, seconds of each round that counts)."""
    with deployment(
        folder, people=40, reply_seconds=REPLY_SECONDS, run={"rounds": rounds + 1, "report_metrics_every": rounds + 1},
        model={"kind": "mlp", "hidden": HIDDEN}, training={"local_steps": 1, "learning_rate": 0.1},
        privacy={"epsilon": 4.0, "sample_rate": 0.1},
    ) as made:  # fmt: skip
        made.start_coordinator()
        for name in made.names:
            made.start_agent(name)
        result = made.result()
        manifest = Manifest.from_bytes(json.loads((folder / "kept.json").read_text())["manifest"].encode())
    return manifest.layout.size, result["seconds"][1:-1]


def flower_seconds(folder: Path, rounds: int, parameters: int) -> list[list[float]]:
    """[seconds until all have trained, seconds of the round] of each round."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    app, out, port = folder / "app", folder / "found.json", free_port()
    app.mkdir(parents=True)
    (app / "echo.py").write_text(_SERVER)
    (app / "pyproject.toml").write_text(
        '[project]\nname = "echo"\nversion = "1.0.0"\ndependencies = []\nlicense = "Apache-2.0"\n'
        '[tool.flwr.app]\npublisher = "confide"\n'
        '[tool.flwr.app.components]\nserverapp = "echo:server"\nclientapp = "echo:client"\n'
        f'[tool.flwr.app.config]\nrounds = {rounds}\nparameters = {parameters}\nout = "{out}"\n'
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bundle = build_fab_from_disk(app)
    programs = Path(sys.executable).parent
    link = [str(programs / "flower-superlink"), "--insecure", "--host", LOOPBACK, "--port", str(port)]
    node = [str(programs / "flower-supernode"), "--insecure", "--superlink", f"{LOOPBACK}:{port}", "--host", LOOPBACK]
    commands = [link, *([*node, "--port", str(free_port())] for _ in range(3))]
    environment = {
        **os.environ, "FLWR_HOME": str(folder / "flower"), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "log").open("ab") as log:
            for command in commands:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        with ControlHttpClient.from_server_address(f"{LOOPBACK}:{port}", True, None, [version]) as control:
            fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
            request = StartRunRequest(fab=fab_to_proto(fab), federation="")
            wait_until(lambda: _submits(control, request), "the link takes a run")
        wait_until(out.exists, "Flower's run ends", patience=60.0 * rounds + 120)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
    found: list[list[float]] = json.loads(out.read_text())
    return found


def _submits(control: Any, request: Any) -> bool:
    import httpx

    try:
        return bool(control.StartRun(request).run_id)
    except httpx.TransportError:
        return False


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters, ours = confide_seconds(_made(folder / "confide"), options.rounds)
        theirs = flower_seconds(_made(folder / "flower"), options.rounds, parameters)
    ours_median, theirs_median = statistics.median(ours), statistics.median(whole for _, whole in theirs)
    if not options.json:
        print(f"{parameters:,} parameters, {options.rounds} rounds each, 3 sites, {os.cpu_count()} cores")
        print("confide:", ", ".join(f"{s:.2f}" for s in ours))
        print("flower: ", ", ".join(f"{s:.2f}" for _, s in theirs))
    found = {
        "confide_round_seconds": round(ours_median, 3), "flower_round_seconds": round(theirs_median, 3),
        "ratio": round(ours_median / theirs_median, 3), "parameters": parameters,
        "flower_train_seconds": round(statistics.median(trained for trained, _ in theirs), 3),
    }  # fmt: skip
    print(json.dumps(found))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
