"""What a person-level ε buys: many sites that share sealed sums, against one pool that shares everything.

On RAND (six sites) and on RAND cut into thirty small ones, for each ε, the exact held-out AUC of

- **site**: confide, every site's update private by itself, through `confide.simulations.simulate`;
- **central**: the same person-level DP-SGD (the same `LocalTrainer`, model, q, clip, number of steps, persons) on the
  pooled records, one noise for all, σ from the same `calibrate`: what trusting one party with all records would buy;
- **none**: a pooled logistic regression without privacy, as in `benchmarks.utility`.

Exact metrics are possible because the data are public. The ε of a cell holds for that cell alone: reading off the best
of several cells would cost more on private data, which the watermark says.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.utility import pooled_auc
from confide.clients.data.records import SiteRecords
from confide.clients.data.source import read_table, resolve
from confide.clients.training.models import build_model
from confide.clients.training.trainer import LocalTrainer, TrainingPlan
from confide.config import load_experiment
from confide.privacy.dp import PrivacyEvent, RenyiBudget, Role, SecureRandom, calibrate
from confide.simulations import simulate
from confide.simulations.evaluation import ExactEvaluator
from confide.simulations.sources import Sources, builtin_example, load_sources
from confide.simulations.sweeps.frontier import WATERMARK, Line, Panel, Point, write_frontier
from confide.simulations.world import World

Mask = NDArray[np.bool_]
Vector = NDArray[np.float32]

DATASETS = {"rand": "RAND, six sites", "rand30": "RAND, thirty small sites"}
ARMS = {"site": "site (confide)", "central": "central (one trusted pool)", "none": "none (pool, no privacy)"}
EPSILONS = ("0.25", "0.5", "1", "2", "4")
CELLS = tuple((data, epsilon) for data in DATASETS for epsilon in EPSILONS)
SEEDS = (1, 2, 3, 4, 5)
_PARTS = 5

#: What differs from the built-in example. A site's noise is for its own population: the sum over thirty small sites
#: holds 2.2 times the noise of the sum over six large ones, and its random walk grows with learning rate × steps.
HYPER_PARAMETERS = {
    "rand": (),
    "rand30": ("sites.population.default=160", "training.learning_rate=0.35"),
}
SELECTION = (
    "the learning rate of rand30 was chosen among 1, 0.5, 0.35 and 0.25 after seeing AUCs of other seeds (11 to "
    "15) on these public data; everything else is the built-in example's; " + WATERMARK
)


@dataclass(frozen=True, slots=True)
class People:
    """Who takes part in one seed's cells, the same for every ε.

    Attributes:
        train: For each round, each site's mask [persons] of whom training may use.
        held_out: Each site's mask [persons] of whom the last model is scored on.
        initial: First weights, float32 [d].
    """

    sources: Sources
    train: list[dict[str, Mask]]
    held_out: dict[str, Mask]
    initial: Vector


@functools.lru_cache(maxsize=2)
def people_of(overrides: tuple[str, ...]) -> People:
    """Run the simulated officers through all rounds, without training."""
    path = builtin_example()
    sources = load_sources(load_experiment(path, overrides), path.parent)
    with tempfile.TemporaryDirectory() as scratch:
        world = World(sources, *(Path(scratch) / name for name in ("sites", "ledgers", "logs")))
        try:
            train = []
            for round_ in range(1, world.manifest.rounds + 1):
                world.before_round(round_)
                taken = {n: s.participants(world.manifest) for n, s in world.sites.items()}
                train.append({n: t.train for n, t in taken.items()})
            held_out = {n: t.held_out for n, t in taken.items()}
        finally:
            world.close()
    return People(sources, train, held_out, world.initial)


def central_auc(people: People, epsilon: float) -> float:
    """Person-level DP-SGD on the pooled records, by the trainer that a site runs."""
    experiment = people.sources.experiment
    privacy, training, label = experiment.privacy, experiment.training, experiment.data.label
    records = people.sources.records
    event = PrivacyEvent(
        role=Role.TRAIN, unit=privacy.unit, noise_multiplier=1.0, sample_rate=privacy.sample_rate,
        steps=experiment.run.rounds * training.local_steps, max_grad_norm=privacy.max_grad_norm,
    )  # fmt: skip
    sigma = calibrate(event, epsilon, RenyiBudget.for_limit(privacy.site_epsilon_limit, privacy.delta))
    pooled = pool(records)

    def new_model() -> torch.nn.Module:
        return build_model(experiment.model, pooled.inputs, label.outputs)

    plan = TrainingPlan(
        training=training, task=label.task, noise_multiplier=sigma, sample_rate=privacy.sample_rate,
        max_grad_norm=privacy.max_grad_norm, population=sum(people.sources.population.values()),
    )  # fmt: skip
    trainer = LocalTrainer(new_model(), pooled, plan, torch.device("cpu"), SecureRandom())
    weights = people.initial
    # Round by round only because consent may change between rounds; plain SGD keeps nothing from step to step.
    for masks in people.train:
        eligible = pooled.units_of(np.concatenate([masks[name] for name in records]))
        weights = (weights + trainer.train(weights, eligible)).astype(np.float32)
    return ExactEvaluator(new_model(), label.task, records).evaluate(weights, people.held_out)["auc"]


def pool(records: Mapping[str, SiteRecords]) -> SiteRecords:
    """All sites' records as one site's, in the order of the mapping."""
    x, y, unit_of, person_of, persons = [], [], [], [], list[str]()
    units = 0
    for site in records.values():
        batch = site.gather(np.arange(len(site.person_of), dtype=np.int64))
        x.append(batch.x.numpy())
        y.append(batch.y.numpy())
        unit_of.append(batch.owner.numpy() + units)
        person_of.append(site.person_of + len(persons))
        units += len(site.person_of)
        persons += site.persons
    return SiteRecords(
        x=np.concatenate(x), y=np.concatenate(y), unit_of=np.concatenate(unit_of),
        person_of=np.concatenate(person_of), persons=persons,
    )  # fmt: skip


def site_auc(overrides: Sequence[str]) -> float:
    """confide itself, sealed."""
    with tempfile.TemporaryDirectory() as scratch:
        result = simulate(overrides=overrides, out=Path(scratch) / "out")
    return (result.metrics or {})["auc"]


@functools.lru_cache(maxsize=4)
def none_auc(overrides: tuple[str, ...]) -> float:
    """A pooled model without privacy; the same for every ε of a seed."""
    return pooled_auc([*overrides])


def cell(data: str, epsilon: str, seed: int, overrides: tuple[str, ...]) -> tuple[str, str, int, dict[str, float]]:
    """One cell and seed, in one thread; runs in a worker process."""
    torch.set_num_threads(1)
    seeded = (*overrides, f"run.seed={seed}")
    in_the_open = (*seeded, "sealing.profile=open")  # who takes part does not depend on the profile
    found = {
        "site": site_auc([*seeded, f"privacy.epsilon={epsilon}", "sealing.profile=sealed"]),
        "central": central_auc(people_of(in_the_open), float(epsilon)),
        "none": none_auc(in_the_open),
    }
    return data, epsilon, seed, found


def cut_into_small_sites(folder: Path) -> Path:
    """RAND with every site's subjects dealt to five, by a checksum of the subject: public and without a seed."""
    path = builtin_example()
    data = load_experiment(path).data
    table = read_table(resolve(data.file, path.parent))
    part = table[data.subject].map(lambda subject: zlib.crc32(str(subject).encode()) % _PARTS)
    table[data.site] = table[data.site].astype(str) + "-" + part.astype(str)
    target = folder / "rand30.csv"
    table.to_csv(target, index=False)
    return target


def measure(
    cells: Sequence[tuple[str, str]] = CELLS, seeds: Sequence[int] = SEEDS, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Cells (data, ε), over two processes; medians at `[data][ε][arm]`, everything else beside them.

    `extra` assignments win over the hyper-parameters, in every cell.
    """
    started = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which start afresh
    values: dict[str, dict[str, dict[str, dict[str, float]]]] = {
        data: {e: {arm: {} for arm in ARMS} for d, e in cells if d == data} for data in dict(cells)
    }
    workers = min(2, len(cells) * len(seeds))
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(workers, get_context("spawn")) as pool_:
        overrides = {data: (*HYPER_PARAMETERS[data], *extra) for data in values}
        if "rand30" in values:
            file = cut_into_small_sites(Path(scratch))
            overrides["rand30"] = (f"data.file={json.dumps(str(file))}", *overrides["rand30"])
        # Seed by seed, so that a worker reuses what it has read for one; thirty sites first: they take longest.
        jobs = [
            pool_.submit(cell, data, e, seed, overrides[data])
            for data in sorted(values, reverse=True) for seed in seeds for e in values[data]
        ]  # fmt: skip
        for done, job in enumerate(as_completed(jobs), 1):
            data, epsilon, seed, found = job.result()
            for arm, auc in found.items():
                values[data][epsilon][arm][str(seed)] = round(auc, 4)
            shown = "  ".join(f"{arm} {auc:.4f}" for arm, auc in found.items())
            sys.stderr.write(f"{done}/{len(jobs)}  {data} epsilon {epsilon} seed {seed}: {shown}\n")
    medians: dict[str, Any] = {
        data: {
            e: {arm: round(statistics.median(auc.values()), 4) for arm, auc in arms.items()} for e, arms in of.items()
        } for data, of in values.items()
    }  # fmt: skip
    return {
        **medians,
        "seeds": list(seeds),
        "per_seed": values,
        "hyper-parameters": {data: hyper_parameters([*HYPER_PARAMETERS[data], *extra]) for data in values},
        "selection": SELECTION,
        "watermark": WATERMARK,
        "delta": load_experiment(builtin_example(), extra).privacy.delta,
        "command": "python -m benchmarks.privacy_utility --json",
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def hyper_parameters(overrides: Sequence[str]) -> dict[str, Any]:
    """What site and central train with; σ follows from these and ε."""
    experiment = load_experiment(builtin_example(), overrides)
    return {
        "rounds": experiment.run.rounds,
        "local_steps": experiment.training.local_steps,
        "optimizer": experiment.training.optimizer,
        "learning_rate": experiment.training.learning_rate,
        "sample_rate": experiment.privacy.sample_rate,
        "max_grad_norm": experiment.privacy.max_grad_norm,
        "population_per_site": experiment.sites.population["default"],
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """The frontier from what `measure` returned."""
    per_seed = results["per_seed"]
    panels, delta = [], f"{results['delta']:g}".replace("e-0", "e-")
    for data in (d for d in DATASETS if d in per_seed):
        lines = []
        for arm, name in ARMS.items():
            found = {e: list(of[arm].values()) for e, of in per_seed[data].items()}
            points = [Point(float(e), statistics.median(v), min(v), max(v)) for e, v in found.items()]
            lines.append(Line(name, sorted(points, key=lambda p: p.epsilon)))
        panels.append(Panel(DATASETS[data], lines))
    write_frontier(
        panels, path, title="What accuracy a person-level ε buys",
        x_label=f"ε per person (δ = {delta})", y_label="held-out AUC",
    )  # fmt: skip


def parse_cells(text: str) -> list[tuple[str, str]]:
    """`rand:0.5,rand30` → that cell and all of `rand30`; all cells where nothing is named.

    Raises:
        ValueError: A part names no cell.
    """
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    found = [(d, e) for d, e in CELLS if not wanted or d in wanted or f"{d}:{e}" in wanted]
    for part in wanted:
        if not any(part in (d, f"{d}:{e}") for d, e in CELLS):
            raise ValueError(f"{part!r} is no cell; write rand, rand30 or, for one ε, rand:0.5")
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS), help="how many")
    parser.add_argument("--cells", type=parse_cells, default=list(CELLS), help="a part: rand, rand30:0.5, …")
    parser.add_argument("--from", dest="source", type=Path, help="a JSON file to draw from instead of measuring")
    parser.add_argument("--figure", type=Path, help="write the frontier (SVG)")
    arguments = parser.parse_args()
    if arguments.source is None:
        results = measure(arguments.cells, SEEDS[: arguments.seeds])
    else:
        results = json.loads(arguments.source.read_text(encoding="utf-8"))
    if arguments.figure is not None:
        draw(results, arguments.figure)
    if arguments.source is None or arguments.json:
        print(json.dumps(results, ensure_ascii=False))


if __name__ == "__main__":
    main()
