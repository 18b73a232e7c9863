"""The processes that `--engine deployment` starts: `python -m` this module, with `coordinator` or `agent`.

The first line of standard input is the whole order, in JSON. When it closes, whoever gave the order is gone, and so is
the process: an agent ends its own processes first. The coordinator says on standard output, a line of JSON each, where
it listens, how each round ended, and what was released; after a round it waits for a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from confide.clients.agent import AgentConfig, run_agent
from confide.errors import ConfideError, StorageError
from confide.privacy.files import write_atomically
from confide.server.coordinator import Coordinator, Released, RoundOutcome
from confide.server.link import LinkConfig
from confide.server.process import CoordinatorConfig, run_coordinator
from confide.simulations.engines.provisioning import LOOPBACK, found_parties
from confide.simulations.keeping import KEPT, Keeping
from confide.simulations.making import FEDERATION

__all__ = ["main", "outcome_from_json", "raised", "released_from_json"]

#: A file of the coordinator's beside its log, and the site factory that executors are given.
_WEIGHTS, _FACTORY = "released.bin", "confide.simulations.engines.apart:open_site"
#: Seconds for the sites' processes to start, on however slow a machine.
_PATIENCE = 600.0


def main() -> None:
    """The entry point of both."""
    order, code = json.loads(sys.stdin.readline()), 0
    try:
        _coordinator(order) if sys.argv[1] == "coordinator" else _agent(order)
    except ConfideError as error:
        _tell({"error": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint})
        code = error.exit_code
    sys.stdout.flush()
    os._exit(code)  # Flower leaves threads behind that would keep the process


# --- the coordinator ------------------------------------------------------------------------------------------------


def _coordinator(order: dict[str, Any]) -> None:
    folder = Path(order["folder"])
    keeping = Keeping(folder / KEPT, attached=True)
    parties, manifest = found_parties(keeping), keeping.manifest
    if parties is None or manifest is None:
        raise StorageError("holds no federation", where=str(keeping.folder))
    identity, weights = parties.identity("coordinator"), np.frombuffer(bytes.fromhex(order["initial"]), dtype="<f4")
    log = identity.open_log(folder / "sites" / "coordinator.db", "coordinator", FEDERATION)
    store = keeping.store()

    lines: Queue[str] = Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()

    def after(outcome: RoundOutcome) -> None:
        _tell({"round": _json(outcome)})
        lines.get()

    def start(grid: Grid) -> Coordinator:
        made = Coordinator(grid, identity, manifest, weights.astype(np.float32), log, after_round=after, store=store)
        _tell({"before": [_json(outcome) for outcome in made.outcomes]})
        return made

    _, certificate, key = parties.tls
    link = LinkConfig(host=LOOPBACK, port=0, certificate=certificate, key=key, nodes=parties.nodes)
    config = CoordinatorConfig(
        link=link, folder=parties.folder / "coordinator", min_nodes=len(parties.nodes), wait=_PATIENCE,
        listening=lambda port: _tell({"port": port}),
    )  # fmt: skip
    try:
        released = run_coordinator(config, start)
    finally:
        log.close()
        store.close()
    write_atomically(keeping.folder / _WEIGHTS, released.weights.astype("<f4").tobytes())
    _tell({"released": {
        "model": released.model, "metrics_round": released.metrics_round, "metrics": _floats(released.metrics),
        "bytes_per_parameter": released.bytes_per_parameter, "rounds": [_json(o) for o in released.outcomes],
    }})  # fmt: skip


def _read(lines: Queue[str]) -> None:
    """As if killed when whoever reads along is gone: the run is resumed from the store, with nothing given up."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(1)


def _tell(tree: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(tree) + "\n")
    sys.stdout.flush()


def _json(outcome: RoundOutcome) -> dict[str, Any]:
    return {
        "round": outcome.round, "cohort": list(outcome.cohort), "abandoned": outcome.abandoned,
        "uplink_bytes": outcome.uplink_bytes, "metrics_round": outcome.metrics_round,
        "metrics": _floats(outcome.metrics), "update_bytes": outcome.update_bytes,
    }  # fmt: skip


def _floats(values: Any) -> list[float] | None:
    return None if values is None else [float(v) for v in values]


def outcome_from_json(tree: dict[str, Any]) -> RoundOutcome:
    """What the coordinator has said of a round."""
    return RoundOutcome(**{**tree, "cohort": tuple(tree["cohort"]), "metrics": _array(tree["metrics"])})


def released_from_json(tree: dict[str, Any], keeping: Keeping) -> Released:
    """What the coordinator has said that it released."""
    return Released(
        weights=np.frombuffer((keeping.folder / _WEIGHTS).read_bytes(), dtype="<f4").astype(np.float32),
        model=tree["model"],
        outcomes=tuple(map(outcome_from_json, tree["rounds"])),
        metrics_round=tree["metrics_round"],
        metrics=_array(tree["metrics"]),
        bytes_per_parameter=tree["bytes_per_parameter"],
    )


def raised(tree: dict[str, Any]) -> ConfideError:
    """The error that a process has ended with."""
    kinds = {kind.__name__: kind for kind in ConfideError.__subclasses__()}
    return kinds.get(tree["error"], ConfideError)(tree["what"], where=tree["where"], hint=tree["hint"])


def _array(values: Iterable[float] | None) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    return None if values is None else np.array(list(values), dtype=np.float64)


# --- a site's agent -------------------------------------------------------------------------------------------------


def _agent(order: dict[str, Any]) -> None:
    folder, name, stop = Path(order["folder"]), str(order["name"]), threading.Event()
    parties = found_parties(Keeping(folder / KEPT, attached=True))
    if parties is None:
        raise StorageError("holds no federation", where=str(folder))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_until_orphaned, args=(stop,), daemon=True).start()
    config = AgentConfig(
        folder=parties.site(name) / "agent", superlink=f"{LOOPBACK}:{order['port']}", ca=parties.tls[0],
        node_key=parties.node_key(name), factory=_FACTORY, arguments={"folder": str(folder), "name": name},
    )  # fmt: skip
    # In a thread that takes no signals: what ends it is the event, however it came to be set.
    ended: list[BaseException] = []
    thread = threading.Thread(target=_run, args=(config, stop, ended))
    thread.start()
    thread.join()
    if ended:
        raise ended[0]


def _run(config: AgentConfig, stop: threading.Event, ended: list[BaseException]) -> None:
    try:
        run_agent(config, stop)
    except BaseException as error:
        ended.append(error)


def _until_orphaned(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main()
