"""A thousand simulated clients, a cohort of them a round: our in-process engine, a bare PyTorch loop, pfl-research, and
Flower's engine over Ray, one after the other, each in a process of its own and the peers in environments of their own
(`make bench-peers`; a peer that is not there is null).

The work is the same for all: clients x samples of 784 features, an MLP 784-128-10 without noise, one local pass in
batches of ten by SGD; ours draws each batch (Poisson), clips each record and runs the whole protocol under profile
`open`: signed messages in Flower's wire form, digests, consent snapshots, durable logs and ledgers.

All have one thread and one process first; then, under `all_cores`, ours has as many processes as there are cores, and
Flower's engine what it takes.

`population` is ours once more, with as many clients and with ten times as many, whose records have eight features only:
what a client costs who is never drawn, the data aside.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from confide.clients.data.records import SiteRecords
from confide.clients.training.models import build_model, flatten
from confide.clients.training.plan import TrainingPlan
from confide.clients.training.stacked import Chain, Work, train_stacked
from confide.config import ModelConfig, TrainingConfig
from confide.privacy.dp import SecureRandom
from confide.simulations import simulate
from confide.simulations.engines import grouping

FEATURES, CLASSES, HIDDEN, BATCH, RATE = 784, 10, 128, 10, 0.1
CONTENDERS = ("confide", "confide_vectorised", "plain_loop", "flower_ray", "pfl")
_HERE = Path(__file__).resolve().parent
_PEERS = {"flower_ray": ("flower", "flower_ray.py"), "pfl": ("pfl", "pfl_fedavg.py")}
#: Those that can have several processes.
_ALL_CORES = ("confide", "confide_vectorised", "flower_ray")
#: Features where the data are not the point, and rounds that are enough then.
_FEW, _ENOUGH = 8, 8
#: Rounds before the engine is warm.
_WARM = 2


def write_data(folder: Path, clients: int, samples: int, features: int = FEATURES) -> Path:
    """The clients' records: `.npz` for all, single arrays to be mapped, and the table that we read."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (clients, samples, features)).astype(np.float32)
    teacher = rng.normal(size=(features, CLASSES)).astype(np.float32)
    y = (x @ teacher).argmax(axis=2)
    np.savez(folder / "data.npz", x=x, y=y)
    np.save(folder / "data.x.npy", x)
    np.save(folder / "data.y.npy", y)
    table = pd.DataFrame(x.reshape(-1, features), columns=[f"x{i}" for i in range(features)])
    table["y"], table["subject"] = y.reshape(-1), np.arange(clients * samples)
    table["site"] = np.repeat([f"client{i:05d}" for i in range(clients)], samples)
    table.to_parquet(folder / "data.parquet")
    return folder / "data.npz"


def experiment(folder: Path, samples: int, rounds: int, cohort: int) -> dict[str, Any]:
    """The same work as an experiment."""
    return {
        "run": {"name": "engine", "purpose": "research/benchmark", "rounds": rounds, "report_metrics_every": rounds},
        "data": {
            "file": str(folder / "data.parquet"), "subject": "subject", "site": "site", "public": True,
            "held_out": 0.001, "label": {"column": "y", "classes": list(range(CLASSES))},
        },
        "schema": {"features": {"x*": {"kind": "number", "bounds": [-1, 1]}}},
        "sites": {"min_sites": 3, "min_subjects": 1, "per_round": cohort, "population": {"default": samples}},
        "consent": {"simulate": {"fraction": 1.0}},
        "model": {"kind": "mlp", "hidden": [HIDDEN]},
        "training": {"local_steps": samples // BATCH, "learning_rate": RATE},
        "privacy": {
            "unit": "record", "epsilon": float("inf"), "sample_rate": BATCH / samples, "max_grad_norm": 1000.0,
        },
        "sealing": {"profile": "open", "range": 0.001},
    }  # fmt: skip


def run_confide(
    folder: Path, samples: int, rounds: int, cohort: int, at_once: int, workers: int | None
) -> dict[str, Any]:
    """Our engine, in this process and, where it may, in others."""
    grouping.TOGETHER = at_once
    marks = [(time.perf_counter(), time.process_time())]
    with tempfile.TemporaryDirectory() as scratch:
        simulate(
            experiment(folder, samples, rounds, cohort), out=Path(scratch) / "out",
            workers=workers, progress=lambda _: marks.append((time.perf_counter(), time.process_time())),
        )  # fmt: skip
    walls, cpus = (np.array(part) for part in zip(*marks, strict=True))
    # What is told after a round is told before the next one trains: the first difference is start-up and first round.
    return {"startup": float(walls[1] - walls[0]), "rounds": np.diff(walls)[1:].tolist(),
            "cpu": np.diff(cpus)[1:].tolist(), "peak_mib": _peak()}  # fmt: skip


def run_loop(folder: Path, rounds: int, cohort: int) -> dict[str, Any]:
    """A bare loop: one model and optimiser, weights copied in place, a running sum."""
    started = time.perf_counter()
    with np.load(folder / "data.npz") as held:
        x, y = torch.from_numpy(held["x"]), torch.from_numpy(held["y"])
    model = _model()
    start, rng, marks = [p.detach().clone() for p in model.parameters()], np.random.default_rng(0), []
    marks.append((time.perf_counter(), time.process_time()))
    for _ in range(rounds):
        total = [torch.zeros_like(p) for p in start]
        for client in rng.choice(len(x), cohort, replace=False):
            train_bare(model, start, x[client], y[client])
            with torch.no_grad():
                for part, p, s in zip(total, model.parameters(), start, strict=True):
                    part.add_(p - s)
        for s, part in zip(start, total, strict=True):
            s.add_(part, alpha=1 / cohort)
        marks.append((time.perf_counter(), time.process_time()))
    walls, cpus = (np.array(part) for part in zip(*marks, strict=True))
    return {"startup": float(walls[0] - started), "rounds": np.diff(walls).tolist(), "cpu": np.diff(cpus).tolist(),
            "peak_mib": _peak()}  # fmt: skip


def train_bare(model: nn.Module, start: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> None:
    """One client's local pass."""
    with torch.no_grad():
        for p, s in zip(model.parameters(), start, strict=True):
            p.copy_(s)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for first in range(0, len(y), BATCH):
        optimizer.zero_grad()
        here = slice(first, first + BATCH)
        nn.functional.cross_entropy(model(x[here]), y[here]).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()


def training_only(cohort: int, samples: int, repeats: int = 9) -> dict[str, float]:
    """CPU seconds of a cohort's local steps alone, turn by turn, the least of several; one thread."""
    torch.set_num_threads(1)
    rng, model, chain = np.random.default_rng(0), _model(), Chain.of(_model())
    if chain is None:
        raise ValueError("the benchmark's model is a chain")
    x = rng.uniform(-1, 1, (cohort, samples, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, (cohort, samples))
    units, names = np.arange(samples), [str(i) for i in range(samples)]
    plan = TrainingPlan(
        training=TrainingConfig(local_steps=samples // BATCH, learning_rate=RATE), task="multiclass",
        noise_multiplier=0.0, sample_rate=BATCH / samples, max_grad_norm=1000.0, population=samples,
    )  # fmt: skip
    weights, start = flatten(model), [p.detach().clone() for p in model.parameters()]
    works = [
        Work(SiteRecords(x[i], y[i].astype(np.float32), units, units, names), plan, SecureRandom(), weights, units)
        for i in range(cohort)
    ]

    def bare() -> None:
        for i in range(cohort):
            train_bare(model, start, torch.from_numpy(x[i]), torch.from_numpy(y[i]))

    kinds = {
        "plain_loop": bare,
        "confide": lambda: [train_stacked(chain, [work], torch.device("cpu")) for work in works],
        "confide_vectorised": lambda: train_stacked(chain, works, torch.device("cpu")),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, run in kinds.items():
            before = time.process_time()
            run()
            found[name].append(time.process_time() - before)
    return {name: round(min(times), 4) for name, times in found.items()}


def contend(name: str, folder: Path, args: argparse.Namespace, threads: int | None) -> dict[str, Any] | None:
    """One contender in a process of its own; None where it is not there or fails."""
    rounds, cohort = str(args.rounds), str(args.cohort)
    if name in _PEERS:
        environment, script = _PEERS[name]
        python = _HERE.parent / ".venv-peers" / environment / "bin" / "python"
        command = [str(python), str(_HERE / "peers" / script), str(folder / "data.npz"), rounds, cohort, str(BATCH),
                   str(RATE)]  # fmt: skip
        if not python.exists():
            return None
    else:
        command = [sys.executable, "-m", "benchmarks.simulation", "--one", name, "--folder", str(folder), "--rounds",
                   rounds, "--cohort", cohort, "--samples", str(args.samples)]  # fmt: skip
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if threads is None and name not in _PEERS:
        command.append("--all-cores")
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.stderr.write(f"{name} failed: {done.stderr[-800:]}\n")
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["whole"] = time.perf_counter() - started
    found["whole_cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sys.stderr.write(f"{name}: {statistics.median(found['rounds'][_WARM:] or found['rounds']):.3f} s a round\n")
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything; ratios are of medians within this run."""
    names, load = [n for n in CONTENDERS if n not in args.without], os.getloadavg()[0]
    alone, cores = [n for n in names if n != "flower_ray"], [n for n in names if n in _ALL_CORES]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder, args.clients, args.samples)
        one = _figures({n: contend(n, folder, args, 1) for n in alone})
        all_ = _figures({n: contend(n, folder, args, None) for n in cores})
    seconds, faster = one["seconds_per_round"], all_["seconds_per_round"]
    population = {} if "confide" in args.without else population_of(args)
    return {
        "clients": args.clients, "samples": args.samples, "cohort": args.cohort, "rounds": args.rounds,
        "cores": os.cpu_count(), "load": load, **one, "all_cores": all_,
        "training_only": training_only(args.cohort, args.samples), "population": population,
        "ratios": {
            "confide_over_pfl": _over(seconds, "confide", "pfl"),
            "confide_vectorised_over_pfl": _over(seconds, "confide_vectorised", "pfl"),
            "flower_over_confide_steady": _over(faster, "flower_ray", "confide_vectorised"),
            "flower_over_confide_whole": _over(all_["whole_seconds"], "flower_ray", "confide_vectorised"),
        },
    }  # fmt: skip


def population_of(args: argparse.Namespace) -> dict[str, Any]:
    """The same cohort out of as many clients, and out of ten times as many, with hardly any data."""
    found = dict[str, dict[str, Any] | None]()
    for clients in (args.clients, 10 * args.clients):
        with tempfile.TemporaryDirectory() as scratch:
            write_data(Path(scratch), clients, args.samples, _FEW)
            few = argparse.Namespace(**{**vars(args), "rounds": min(args.rounds, _ENOUGH)})
            found[str(clients)] = contend("confide", Path(scratch), few, 1)
    figures, (less, more) = _figures(found), tuple(found)
    return {
        key: figures[key] for key in ("seconds_per_round", "cpu_seconds_per_round", "startup_seconds", "peak_mib")
    } | {
        "peak_ratio": _over(figures["peak_mib"], more, less),
        "round_ratio": _over(figures["cpu_seconds_per_round"], more, less),
    }


def _figures(runs: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, float | None]]:
    """Medians of the rounds after the first two, and what the whole command took, by contender."""

    def each(key: str) -> dict[str, float | None]:
        return {n: None if r is None or key not in r else round(float(r[key]), 3) for n, r in runs.items()}

    def steady(key: str) -> dict[str, float | None]:
        return {
            n: None if r is None or key not in r else round(statistics.median(r[key][_WARM:] or r[key]), 4)
            for n, r in runs.items()
        }

    return {
        "seconds_per_round": steady("rounds"), "cpu_seconds_per_round": steady("cpu"), "startup_seconds":
        each("startup"), "whole_seconds": each("whole"), "whole_cpu_seconds": each("whole_cpu"),
        "peak_mib": each("peak_mib"),
    }  # fmt: skip


def _over(values: dict[str, float | None], top: str, bottom: str) -> float | None:
    one, other = values.get(top), values.get(bottom)
    return round(one / other, 3) if one is not None and other else None


def _model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(kind="mlp", hidden=(HIDDEN,)), FEATURES, CLASSES)


def _peak() -> float:
    """Of the largest process of this run, with what it shares with the others."""
    # What getrusage says of a process itself begins with the size of the one that started it.
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return max(int(own.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--without", nargs="*", default=[], choices=CONTENDERS)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--all-cores", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one == "plain_loop":
        print(json.dumps(run_loop(args.folder, args.rounds, args.cohort)))
    elif args.one:
        at_once, workers = 8 if args.one == "confide_vectorised" else 1, None if args.all_cores else 1
        print(json.dumps(run_confide(args.folder, args.samples, args.rounds, args.cohort, at_once, workers)))
    else:
        print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
