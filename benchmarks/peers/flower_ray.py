"""The work of `benchmarks.simulation` in Flower's simulation engine over Ray. Runs in its environment, without confide.

Arguments: the data (`.npz`), rounds, cohort, batch, learning rate. The last line of stdout is JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

PATH, ROUNDS, COHORT, BATCH, RATE = sys.argv[1], *map(float, sys.argv[2:6])
MARKS = []
client, server = ClientApp(), ServerApp()


def _peak():
    """MiB; what getrusage says begins with the size of the process that started this one."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(found.split()[1]) / 1024


def network(inputs):
    return torch.nn.Sequential(torch.nn.Linear(inputs, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


@client.train()
def train(message, context):
    torch.set_num_threads(1)
    # A client's rows only: the file is mapped, not read.
    user = int(context.node_config["partition-id"])
    x = torch.from_numpy(np.array(np.load(PATH.replace(".npz", ".x.npy"), mmap_mode="r")[user]))
    y = torch.from_numpy(np.array(np.load(PATH.replace(".npz", ".y.npy"), mmap_mode="r")[user]))
    model = network(x.shape[1])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for start in range(0, len(y), int(BATCH)):
        optimizer.zero_grad()
        here = slice(start, start + int(BATCH))
        torch.nn.functional.cross_entropy(model(x[here]), y[here]).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
    return Message(RecordDict(content), reply_to=message)


class Timed(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        MARKS.append(time.perf_counter())
        return super().configure_train(server_round, arrays, config, grid)


@server.main()
def main(grid, context):
    clients = len(np.load(PATH.replace(".npz", ".y.npy"), mmap_mode="r"))
    inputs = np.load(PATH.replace(".npz", ".x.npy"), mmap_mode="r").shape[2]
    strategy = Timed(fraction_train=COHORT / clients, fraction_evaluate=0.0, min_available_nodes=clients)
    first = ArrayRecord(network(inputs).state_dict())
    strategy.start(grid, first, num_rounds=int(ROUNDS), train_config=ConfigRecord({"lr": RATE}))
    MARKS.append(time.perf_counter())


if __name__ == "__main__":
    clients = len(np.load(PATH.replace(".npz", ".y.npy"), mmap_mode="r"))
    config = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=clients, backend_config=config)
    print(json.dumps({
        "startup": MARKS[0] - STARTED, "rounds": np.diff(MARKS).tolist(), "whole": time.perf_counter() - STARTED,
        "peak_mib": _peak(),
    }))  # fmt: skip
