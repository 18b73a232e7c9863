"""A real Ray cluster for tests: a head and further nodes as processes, each at an address of its own on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.deployed import ROOT

PATIENCE = 90.0
#: An address each; not 127.0.0.1, which Ray takes for the machine's own outside one.
_HEAD, _NODES = "127.0.0.2", ("127.0.0.3", "127.0.0.4")


@dataclass
class RayCluster:
    """What was started, and what its own tables say."""

    address: str
    mark: str
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def actors(self, state: str = "ALIVE") -> list[dict[str, Any]]:
        """The sites' processes, of this run and of earlier ones."""
        return [a for a in self._state().actor_table(None, None, None).values() if a["State"] == state]

    def alive(self) -> set[str]:
        """The addresses of the nodes that are up."""
        return {node["NodeManagerAddress"] for node in self._state().node_table() if node["Alive"]}

    def kill_actor(self) -> int:
        """kill -9 to one process of a run that is under way, away from the head; returns once Ray knows."""
        victim = max(self.actors(), key=lambda actor: str(actor["Address"]["IPAddress"]))
        os.kill(victim["Pid"], signal.SIGKILL)
        wait_until(lambda: victim["Pid"] not in {actor["Pid"] for actor in self.actors()})
        return int(victim["Pid"])

    def kill_second(self) -> None:
        """kill -9 to the second node's raylet: its actors end with it."""
        own = {self.nodes[1].pid}
        for _ in range(3):  # it, its children, theirs
            own |= {pid for pid in _pids() if _parent(pid) in own}
        for pid in own:
            if "/raylet/raylet" in _command(pid):
                os.kill(pid, signal.SIGKILL)

    def _state(self) -> Any:
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        state = GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        return state


@contextmanager
def ray_cluster(*cores: int, code: Path = ROOT) -> Iterator[RayCluster]:
    """Nodes with so many cores, the head's first, with the code of a source tree. Nothing of it is left afterwards."""
    mark = f"cluster-{time.monotonic_ns()}"
    folder, ports = tempfile.mkdtemp(prefix="ray-"), free_ports(2)  # short: sockets lie in it
    made = RayCluster(f"{_HEAD}:{ports[0]}", mark)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_stop, made)
        head = ["--head", "--port", str(ports[0]), "--ray-client-server-port", str(ports[1]), "--temp-dir", folder,
                "--include-dashboard=false"]  # fmt: skip
        for count, place in zip(cores, (_HEAD, *_NODES), strict=False):
            which = head if place == _HEAD else ["--address", made.address]
            made.nodes.append(
                _start(
                    place,
                    count,
                    which,
                    {"CONFIDE_TEST_MARK": mark, "PYTHONPATH": f"{code / 'src'}{os.pathsep}{code}"},
                    Path(folder) / f"{place}.txt",
                )
            )
            wait_until(lambda place=place: _is_up(made, place))
        yield made


def _is_up(made: RayCluster, place: str) -> bool:
    host, port = made.address.split(":")
    with socket.socket() as probe:
        if probe.connect_ex((host, int(port))):
            return False
    return place in made.alive()


def _start(
    place: str, cores: int, which: list[str], environment: dict[str, str], output: Path
) -> subprocess.Popen[bytes]:
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *which, "--block", "--node-ip-address", place,
             "--num-cpus", str(cores), "--object-store-memory", str(100_000_000), "--include-log-monitor", "false",
             "--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats"],
            stdout=stream, stderr=stream,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment},
        )  # fmt: skip


def _stop(made: RayCluster) -> None:
    """As `ray stop` would, but of this cluster only; then whatever is left of it."""
    for node in reversed(made.nodes):
        node.terminate()
    for node in made.nodes:
        try:
            node.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
    for pid in [pid for pid in _pids() if made.mark in _environment(pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_until(lambda: not any(made.mark in _environment(pid) for pid in _pids()))


def wait_until(holds: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait for something that has to happen."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((_HEAD, 0))
        return [one.getsockname()[1] for one in sockets]


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _read(pid: int, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / name).read_bytes().decode(errors="replace")
    except OSError:  # it has ended, or is somebody else's
        return ""


def _environment(pid: int) -> str:
    return _read(pid, "environ")


def _command(pid: int) -> str:
    return _read(pid, "cmdline")


def _parent(pid: int) -> int:
    status = _read(pid, "status")
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")), 0)
