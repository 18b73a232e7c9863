"""Whole runs of every strategy over the in-process grid: the sites' models and states agree, the logs verify."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.clients.training.artifact import load_model
from confide.privacy.audit import records as audit
from confide.privacy.audit.report import write_report
from confide.privacy.audit.verify import verify
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from confide.strategies import BUILT_IN
from tests.attacks.federation import Federation, header_of

NAMES = ("ash", "birch", "cedar", "doum", "elm")
ROUNDS = 3
#: The site that misses a round, so that it applies two sums at once.
LATE = "doum"


class Finished:
    """A run with what its sites committed to."""

    def __init__(self, folder: Path, kind: str, **options: Any) -> None:
        single = BUILT_IN[kind].single_updates
        self.federation = Federation(
            folder, people={"sites": NAMES, "people": 20},
            run={"rounds": ROUNDS, "report_metrics_every": 2},
            sites={"min_sites": 4 if single else 3, "min_subjects": 1, "population": {"default": 20}},
            privacy={"epsilon": 4.0, "sample_rate": 1.0}, sealing={"profile": "open" if single else "sealed"},
            strategy={"kind": kind, **options},
        )  # fmt: skip
        #: By round and site: digests of model and state that a site trained from.
        self.digests: dict[int, dict[str, tuple[str, str]]] = {}
        grid = self.federation.grid(drop=self._drop, tamper=self._look)
        self.released = self.federation.coordinator(grid).run()
        self.federation.world.export()

    @staticmethod
    def _drop(message: Any, site: str) -> bool:
        return False

    def _look(self, site: str, request: Envelope, reply: Envelope) -> Envelope | None:
        header = header_of(reply)
        if header.type == m.TrainReply.TYPE:
            if site == LATE and header.round == 2:
                return None
            body = m.TrainReply.model_validate_json(reply.body)
            self.digests.setdefault(header.round, {})[site] = body.model, body.state
        return reply


OPTIONS: dict[str, dict[str, Any]] = {
    "fednova": {"steps": {"ash": 1, "elm": 3}}, "scaffold": {"steps": {"birch": 2}},
    "trimmed_mean": {"trim": 0.25}, "krum": {"byzantine": 0}, "multi_krum": {"byzantine": 0, "keep": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Finished]]:
    """A run of a strategy, made when it is first asked for."""
    made: dict[str, Finished] = {}

    def of(kind: str) -> Finished:
        if kind not in made:
            made[kind] = Finished(tmp_path_factory.mktemp(kind) / "f", kind, **OPTIONS.get(kind, {}))
        return made[kind]

    yield of
    for run in made.values():
        run.federation.world.close()


@pytest.mark.parametrize("kind", BUILT_IN)
def test_all_sites_hold_the_same_model_and_state_after_every_step(
    kind: str, finished: Callable[[str], Finished]
) -> None:
    run = finished(kind)
    assert not any(o.abandoned for o in run.released.outcomes)
    assert run.released.outcomes[1].cohort == tuple(n for n in NAMES if n != LATE)
    for round_, digests in run.digests.items():
        assert set(digests) == set(NAMES if round_ != 2 else [n for n in NAMES if n != LATE])
        assert len(set(digests.values())) == 1, f"round {round_}"
    models = [next(iter(digests.values()))[0] for digests in run.digests.values()]
    assert len(set(models)) == ROUNDS + 1, "the control: every round moved the model"
    states = {next(iter(digests.values()))[1] for digests in run.digests.values()}
    assert len(states) == ROUNDS + 1, "names change with the round's key"


@pytest.mark.parametrize("kind", BUILT_IN)
def test_the_logs_of_such_a_run_verify(kind: str, finished: Callable[[str], Finished], tmp_path: Path) -> None:
    run = finished(kind)
    evidence = verify(run.federation.folder / "logs")
    assert evidence.findings == []
    charged = [e for log in evidence.sites.values() for _, e in log.of(audit.Charged)]
    assert len(charged) > 0
    page = tmp_path / "report.html"
    write_report(run.federation.folder / "logs", page)
    assert run.federation.manifest.strategy.describe().replace("'", "&#39;") in page.read_text()


def test_every_strategy_is_charged_the_same(finished: Callable[[str], Finished]) -> None:
    """What a strategy does with an update, or adds to a step, is not paid for; what a round reads is."""
    costs = {
        kind: [
            (e.role, e.noise_multiplier, e.sample_rate, e.steps, e.max_grad_norm)
            for e in finished(kind).federation.manifest.all_charges()
        ]
        for kind in ("fedavg", "fedprox", "scaffold", "fednova", "fedadam")
    }
    assert len({tuple(c) for c in costs.values()}) == 1
    for kind in costs:
        federation = finished(kind).federation
        charges = {name: federation.charges(name, 1) for name in NAMES}
        assert {sum(c.values()) for c in charges.values()} == {federation.manifest.training.local_steps}


@pytest.mark.parametrize("kind", ["fedadam", "scaffold", "multi_krum"])
def test_what_is_released_is_the_model_that_the_steps_lead_to(kind: str, finished: Callable[[str], Finished]) -> None:
    run = finished(kind)
    assert run.released.weights.shape == (run.federation.manifest.layout.size,)
    assert np.isfinite(run.released.weights).all()
    assert not np.array_equal(run.released.weights, run.federation.world.initial)


def test_a_model_file_says_by_which_strategy_it_was_trained(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    import confide

    tree = make_experiment(
        run={"rounds": 1}, strategy={"kind": "fedadam", "tau": 0.25}, privacy={"sample_rate": 1.0}
    )  # fmt: skip
    confide.simulate(tree, out=tmp_path / "out")
    card = load_model(tmp_path / "out" / "model.safetensors").card
    assert card.strategy is not None
    assert card.strategy.describe() == "fedadam (server learning rate 0.1, beta1 0.9, beta2 0.99, tau 0.25)"
