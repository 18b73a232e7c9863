"""The work of `benchmarks.simulation` in pfl-research, one process. Runs in pfl's environment, without confide.

Arguments: the data (`.npz`), rounds, cohort, batch, learning rate. The last line of stdout is JSON.
"""

import json
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.callback.base import TrainingProcessCallback  # noqa: E402
from pfl.data.dataset import Dataset  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.data.sampling import get_user_sampler  # noqa: E402
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # noqa: E402
from pfl.metrics import Metrics  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402


class Network(torch.nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(inputs, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    def loss(self, x, y, eval=False):
        self.train(not eval)
        return torch.nn.functional.cross_entropy(self.layers(torch.as_tensor(x)), torch.as_tensor(y))

    def metrics(self, x, y):
        return {}


class Clock(TrainingProcessCallback):
    def __init__(self):
        self.marks = [(time.perf_counter(), time.process_time())]

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.marks.append((time.perf_counter(), time.process_time()))
        return False, Metrics()


def _peak():
    """MiB; what getrusage says begins with the size of the process that started this one."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(found.split()[1]) / 1024


def main():
    path, rounds, cohort, batch, rate = sys.argv[1], *map(float, sys.argv[2:6])
    with np.load(path) as held:
        x, y = held["x"], held["y"]  # [clients, samples, features], [clients, samples]
    torch.manual_seed(0)
    network = Network(x.shape[2])
    model = PyTorchModel(
        network, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(network.parameters(), 1.0)
    )

    def of_user(user):
        return Dataset(raw_data=[torch.from_numpy(x[user]), torch.from_numpy(y[user])], user_id=str(user))

    users = FederatedDataset(of_user, get_user_sampler("random", range(len(x))))
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            int(rounds), evaluation_frequency=1_000_000, train_cohort_size=int(cohort), val_cohort_size=0
        ),
        SimulatedBackend(training_data=users, val_data=None),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=rate, local_batch_size=int(batch)),
        NNEvalHyperParams(local_batch_size=int(batch)),
        [clock],
    )
    walls, cpus = zip(*clock.marks, strict=True)
    print(json.dumps({
        "startup": walls[0] - STARTED, "rounds": np.diff(walls).tolist(), "cpu": np.diff(cpus).tolist(),
        "peak_mib": _peak(),
    }))  # fmt: skip


main()
