"""`--engine ray`: the run through Flower's own simulation engine, on this machine or on a Ray cluster.

Flower's engine brings the grid and Ray's processes. Our ServerApp is given that grid in this thread, so that Ctrl-C,
the run's store and its display are where they are with the other engines; Flower's own ServerApp only hands it over.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from confide.config import Experiment
from confide.environment import switches
from confide.errors import ConfideError, ConfigError, PeerError, StorageError
from confide.server.coordinator import Released
from confide.server.process import log_file
from confide.simulations.engines.apart import forget_seen, wait_until_closed
from confide.simulations.engines.engine import Drive, run_over
from confide.simulations.keeping import Keeping
from confide.simulations.sources import Sources

if TYPE_CHECKING:
    from confide.simulations.engines.ray_backend import Stay

__all__ = ["RayEngine"]

_log = logging.getLogger(__name__)
#: Seconds for Flower's engine to begin, and to end after it was told to.
_BEGIN_SECONDS, _END_SECONDS = 120.0, 90.0
#: Variables of the environment that are put back when the run is over; Flower sets one of them, too.
_CHANGED = ("PYTHONPATH", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
_LOOK_AGAIN, _KNOCK_SECONDS = 0.05, 10.0
#: Every so many seconds a cluster's head is asked whether it is there; so often without an answer, and it is not. Ray
#: would end this whole process after 60 seconds.
_WATCH_SECONDS, _MISSES, _LEAVE_SECONDS = 3.0, 4, 15.0


class RayEngine:
    """See the module.

    Args:
        address: Of a Ray cluster (`host:port`, or `auto` on one of its machines); None: processes of this machine.

    Raises:
        ConfigError: Ray is not installed.
    """

    name = "ray"

    def __init__(self, address: str | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("needs Ray, which is not installed", where="--engine ray",
                              hint="pip install 'confide[ray]'")  # fmt: skip
        self._address = address

    def check(self, experiment: Experiment, sites: int) -> None:
        """Whatever runs in one process runs here, if the cluster answers at all.

        Raises:
            ConfigError: It does not, or it is not for this machine.
        """
        if self._address is not None:
            _knock(self._address)

    def prepare(self, keeping: Keeping, sources: Sources) -> None:
        """The world makes its own parties. A run that is resumed waits for the processes of the one before: when that
        was killed, a cluster ends them a moment later.

        Raises:
            StorageError: They do not end.
        """
        wait_until_closed(keeping.folder.parent / "sites")

    def drive(self, drive: Drive) -> Released:
        """Run to the end; see `Engine`."""
        world = drive.world
        world.sites.close()
        try:
            with log_file(drive.folder / "ray.log"), self._ray() as head, _engine(drive, head) as grid:
                released = run_over(grid, drive.start)
        except BaseException:
            world.log.close()
            with suppress(StorageError):  # said already why the run ends; processes of other nodes may never let go
                wait_until_closed(world.folder, _LEAVE_SECONDS)
                world.take_back()
            raise
        world.log.close()
        wait_until_closed(world.folder)
        world.take_back()
        forget_seen(world.folder, world.sites)
        return released

    @contextmanager
    def _ray(self) -> Iterator[str | None]:
        """Connected to Ray: a cluster's, whose head's HOST:PORT it is, or one that is started here and ends with the
        run."""
        import ray
        from ray._private import worker as driver

        if ray.is_initialized():
            raise ConfigError("Ray is in use in this process already", where="--engine ray",
                              hint="ray.shutdown() first: the run begins and ends it by itself")  # fmt: skip
        before = dict(os.environ)
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # no warning about a default that will change
        scratch = tempfile.mkdtemp(prefix="confide-ray-")  # short: sockets lie in it
        says, driver._worker_logs_enabled = driver._worker_logs_enabled, False  # to stdout, of what has died
        try:
            yield self._connect(scratch)
        finally:
            ray.shutdown()
            driver._worker_logs_enabled = says
            shutil.rmtree(scratch, ignore_errors=True)
            for name in _CHANGED:
                os.environ.pop(name, None)
                os.environ.update({name: before[name]} if name in before else {})

    def _connect(self, scratch: str) -> str | None:
        import ray

        head = None if self._address is None else _knock(self._address)
        if self._address is None:
            # Its processes find this package where this one has found it.
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            place: dict[str, Any] = {"address": "local", "include_dashboard": False, "_temp_dir": scratch,
                                     "_node_ip_address": "127.0.0.1"}  # fmt: skip
        else:
            place = {"address": head, "runtime_env": {"env_vars": switches()}}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Ray's own, about its own
                ray.init(configure_logging=False, log_to_driver=False, **place)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = "--engine ray" if self._address is None else f"--ray-address {self._address}"
            raise ConfigError(f"Ray cannot be reached or started ({type(error).__name__})", where=where,
                              hint="ray status on a machine of the cluster says whether it runs; its version must be "
                              "this installation's") from error  # fmt: skip
        return head


def _knock(address: str, patience: float = _KNOCK_SECONDS) -> str:
    """A cluster's HOST:PORT, if it answers: Ray would try for minutes, and say so on the terminal.

    Raises:
        ConfigError: Nothing answers, or not as a cluster of this Ray, or this machine is none of its.
    """
    import grpc  # type: ignore[import-untyped]  # it has no stubs
    import ray
    from ray._private import services
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    where = f"--ray-address {address[:200]}"
    rpc: Any = gcs_service_pb2_grpc
    wire: Any = gcs_service_pb2
    here: Any = services
    try:
        found = str(here.canonicalize_bootstrap_address(address))
        with init_grpc_channel(found) as channel:
            asked = rpc.NodeInfoGcsServiceStub(channel).CheckAlive
            version = asked(wire.CheckAliveRequest(), timeout=patience).ray_version
    except (grpc.RpcError, OSError, ValueError) as error:
        why = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
        raise ConfigError(f"no Ray cluster answers there ({why})", where=where,
                          hint="name the head's HOST:PORT, as ray start has printed it") from None  # fmt: skip
    if version != ray.__version__:
        raise ConfigError(f"the cluster's Ray is {version[:40]}, this installation's {ray.__version__}", where=where,
                          hint=f"pip install ray=={ray.__version__} on every machine of the cluster")  # fmt: skip
    if not here.find_node_ids():
        raise ConfigError("no Ray runs on this machine", where=where,
                          hint=f"make it one of the cluster's: ray start --address {found}")  # fmt: skip
    return found


@contextmanager
def _engine(drive: Drive, head: str | None) -> Iterator[Grid]:
    """Flower's engine in a thread of its own, for as long as its grid is used."""
    from flwr.simulation import run_simulation

    from confide.simulations.engines.ray_backend import PlacedGrid, SitesApp, sites_stay

    names, over, grids, server = tuple(drive.world.sites), threading.Event(), list[Grid](), ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        grids.append(grid)
        over.wait()

    def run() -> None:
        try:
            run_simulation(server, SitesApp(str(folder)), len(names), backend_config=_BACKEND)  # type: ignore[arg-type]
        except BaseException as error:  # told to whoever waits
            stay.failed = stay.failed or error

    folder = drive.folder.absolute()
    with sites_stay(folder, names, drive.unreachable) as stay:
        thread = threading.Thread(target=run, name="flower", daemon=True)
        thread.start()
        if head is not None:
            threading.Thread(target=_watch, args=(head, stay, over), name="head", daemon=True).start()
        try:
            deadline = time.monotonic() + _BEGIN_SECONDS
            while not (grids and stay.begun.is_set()):
                if isinstance(stay.failed, ConfideError):
                    raise stay.failed
                if stay.failed is not None or not thread.is_alive() or time.monotonic() > deadline:
                    raise PeerError("did not begin", where="Flower's simulation engine",
                                    hint=f"see {drive.folder / 'ray.log'}") from stay.failed  # fmt: skip
                time.sleep(_LOOK_AGAIN)
            yield PlacedGrid(grids[0], stay)
        finally:
            over.set()
            thread.join(_LEAVE_SECONDS if stay.headless else _END_SECONDS)


def _watch(head: str, stay: Stay, over: threading.Event) -> None:
    """Have the run end when the head of its cluster does."""
    misses = 0
    while not over.wait(_WATCH_SECONDS):
        try:
            _knock(head, _WATCH_SECONDS)
        except ConfigError:
            misses += 1
        else:
            misses = 0
        if misses == _MISSES:
            stay.headless = True
            stay.failed = PeerError("the head of the cluster does not answer any more", where=f"Ray at {head}",
                                    hint="confide simulate --resume --out FOLDER goes on with this run, on another "
                                    "cluster with --ray-address, or on this machine without")  # fmt: skip
            return


#: One core a process of Ray's, so that there are as many as cores; each keeps its share of the sites open.
_BACKEND: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
