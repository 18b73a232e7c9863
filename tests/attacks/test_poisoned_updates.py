"""A site that sends anything at all: strategies that compare single updates resist it, an average does not. And a
coordinator that passes single updates on can change none of them: each counts as its own site signed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.privacy.audit.records import RunStopped
from confide.privacy.sealing.exposure import exposure_table
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope
from tests.attacks.federation import Federation, Sum, header_of, is_refusal, refusal_of, resign

NAMES = ("ash", "birch", "cedar", "doum", "elm")
POISONED = "cedar"
ROBUST: dict[str, dict[str, Any]] = {
    "median": {}, "trimmed_mean": {"trim": 0.2}, "krum": {"byzantine": 1}, "multi_krum": {"byzantine": 1},
}  # fmt: skip
Make = Callable[..., Federation]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Federations of five sites under `open`, without noise: what moves the model is the data, and the attacker."""
    made: list[Federation] = []

    def build(kind: str, **options: Any) -> Federation:
        made.append(
            Federation(
                tmp_path / f"f{len(made)}", people={"sites": NAMES, "people": 30}, run={"rounds": 3},
                sites={"min_sites": 5, "min_subjects": 1, "population": {"default": 30}},
                privacy={"epsilon": float("inf"), "sample_rate": 1.0}, sealing={"profile": "open"},
                strategy={"kind": kind, **options},
            )
        )  # fmt: skip
        return made[-1]

    yield build
    for federation in made:
        federation.world.close()


def scaled(factor: float) -> Callable[[Federation], Callable[[str, Envelope, Envelope], Envelope]]:
    """One member multiplies its whole update by a number, and signs that."""

    def of(federation: Federation) -> Callable[[str, Envelope, Envelope], Envelope]:
        def tamper(site: str, request: Envelope, reply: Envelope) -> Envelope:
            header = header_of(reply)
            if site != POISONED or header.type != m.SealReply.TYPE or header.round > federation.manifest.rounds:
                return reply
            values = np.frombuffer(b"".join(reply.chunks), dtype="<f4").copy()
            size = federation.manifest.layout.size
            high = federation.sites[site]._runs[federation.manifest.run].segments(header.round)[0].high
            # What an honest site's own code would have let through: no range check finds it.
            values[:size] = np.clip(values[:size] * factor, -high, high)
            return resign(federation.sites[site], reply, chunks=(values.tobytes(),))

        return tamper

    return of


def trained(federation: Federation, tamper: Any = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The model of a whole run."""
    return federation.coordinator(federation.grid(tamper=tamper and tamper(federation))).run().weights


def off(found: Any, honest: Any, start: Any) -> float:
    """How far from the honest model, in units of how far honest training moves it."""
    return float(np.linalg.norm(found - honest) / np.linalg.norm(honest - start))


ATTACK = -1000.0


@pytest.mark.parametrize("kind", ROBUST)
def test_one_poisoned_site_hardly_moves_a_robust_strategy(make: Make, kind: str) -> None:
    honest, attacked = make(kind, **ROBUST[kind]), make(kind, **ROBUST[kind])
    reference, start = trained(honest), honest.world.initial
    assert off(trained(attacked, scaled(ATTACK)), reference, start) < 0.5


def test_the_same_site_ruins_an_average(make: Make) -> None:
    """The control."""
    honest, attacked = make("fedavg"), make("fedavg")
    reference, start = trained(honest), honest.world.initial
    assert off(trained(attacked, scaled(ATTACK)), reference, start) > 2


@pytest.mark.parametrize("kind", ["median", "krum"])
def test_a_value_far_outside_the_range_ends_no_run(make: Make, kind: str) -> None:
    federation = make(kind, **ROBUST[kind])

    def tamper(site: str, request: Envelope, reply: Envelope) -> Envelope:
        if site != POISONED or header_of(reply).type != m.SealReply.TYPE:
            return reply
        huge = np.full(len(b"".join(reply.chunks)) // 4, 3e38, dtype="<f4")
        return resign(federation.sites[site], reply, chunks=(huge.tobytes(),))

    released = federation.coordinator(federation.grid(tamper=tamper)).run()
    assert not any(o.abandoned for o in released.outcomes)
    assert np.isfinite(released.weights).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, None], ids=["not a number", "infinity", "one too few"])
def test_what_is_no_update_at_all_costs_a_round_and_nothing_else(make: Make, bad: float | None) -> None:
    """Whoever seals nothing usable abandons the round, under every profile: see the threat model."""
    federation = make("median")

    def tamper(site: str, request: Envelope, reply: Envelope) -> Envelope:
        header = header_of(reply)
        if site != POISONED or header.type != m.SealReply.TYPE or header.round != 2:
            return reply
        values = np.frombuffer(b"".join(reply.chunks), dtype="<f4").copy()
        if bad is not None:
            values[0] = bad
        return resign(federation.sites[site], reply, chunks=(values[: None if bad is not None else -1].tobytes(),))

    released = federation.coordinator(federation.grid(tamper=tamper)).run()
    assert [o.abandoned for o in released.outcomes] == [False, True, False, False]


# --- the coordinator between the sites --------------------------------------------------------------------------------


def first_sum(federation: Federation) -> Sum:
    """The first round's updates, as an honest coordinator passes them on."""
    federation.participants = federation.names
    assert not any(map(is_refusal, federation.join().values()))
    return federation.round(1)


def poisoned(total: Sum) -> tuple[bytes, ...]:
    """The first payload with other numbers in it."""
    values = np.frombuffer(total.chunks[0], dtype="<f4").copy()
    values[:-1] = -values[:-1]
    return (values.tobytes(), *total.chunks[1:])


def swapped(total: Sum) -> Sum:
    """The first two sites' updates under each other's names."""
    return total.changed(chunks=(total.chunks[1], total.chunks[0], *total.chunks[2:]))


CHANGES: dict[str, Callable[[Sum], Sum]] = {
    "another update": lambda t: t.changed(chunks=poisoned(t)),
    "swapped": swapped,
    "one twice": lambda t: t.changed(
        chunks=(t.chunks[0], t.chunks[0], *t.chunks[2:]),
        sealed=(t.reference.sealed[0], t.reference.sealed[0], *t.reference.sealed[2:]),
    ),
    "one left out": lambda t: t.changed(chunks=t.chunks[1:], sealed=t.reference.sealed[1:]),
    "nobody's signature": lambda t: t.changed(sealed=()),
    "one more chunk": lambda t: t.changed(chunks=(*t.chunks, b"\0\0\0\0")),
    "a smaller cohort": lambda t: t.changed(
        chunks=t.chunks[1:], sealed=t.reference.sealed[1:], cohort=t.reference.cohort[1:],
        statements=t.reference.statements[1:],
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_coordinator_can_change_no_single_update(make: Make, change: str) -> None:
    federation = make("median")
    changed = CHANGES[change](first_sum(federation))
    answer = federation.train(2, changed, sites=("ash",))["ash"]
    assert refusal_of(answer).kind == "sealing"
    assert any(isinstance(e, RunStopped) for e in federation.sites["ash"].log.entries()), "it left the run for good"


def test_an_update_of_another_round_is_not_passed_off_as_this_ones(make: Make) -> None:
    federation = make("median")
    first = first_sum(federation)
    second = federation.round(2, first)
    old = second.changed(
        chunks=(first.chunks[0], *second.chunks[1:]),
        sealed=(first.reference.sealed[0], *second.reference.sealed[1:]),
    )
    assert is_refusal(federation.train(3, old, sites=("ash",))["ash"])
    assert not is_refusal(federation.train(3, second, sites=("birch",))["birch"]), "the control"


def test_in_whatever_order_they_arrive_the_sites_agree(make: Make) -> None:
    """The control of the changes above: what is signed may come in any order."""
    federation = make("krum", byzantine=1)
    first = first_sum(federation)
    turned = first.changed(chunks=first.chunks[::-1], sealed=first.reference.sealed[::-1])
    answers = [federation.train(2, t, sites=(s,))[s] for t, s in ((first, "ash"), (turned, "birch"))]
    replies = [m.TrainReply.model_validate_json(a.body) for a in answers]
    assert len({(r.model, r.state) for r in replies}) == 1


def test_a_coordinator_does_change_a_plain_open_sum(make: Make) -> None:
    """The control: without single updates nothing that travels in the open is authenticated, as the table says."""
    federation = make("fedavg")
    first = first_sum(federation)
    values = np.frombuffer(first.chunks[0], dtype="<f8").copy()
    values[:-1] = -values[:-1]
    honest = federation.train(2, first, sites=("birch",))["birch"]
    changed = federation.train(2, first.changed(chunks=(values.tobytes(),)), sites=("ash",))["ash"]
    models = {m.TrainReply.model_validate_json(a.body).model for a in (honest, changed)}
    assert len(models) == 2
    forges = {p: exposure_table(p, 5, 64)[0].forges for p in ("open", "open, gathered")}
    assert forges == {"open": True, "open, gathered": False}


def test_every_site_and_the_coordinator_read_every_update_and_the_table_says_so(make: Make) -> None:
    federation = make("median")
    federation.participants = federation.names
    assert not any(map(is_refusal, federation.join().values()))
    committed = federation.train(1)
    secret = {n: federation.sites[n]._runs[federation.manifest.run].pending for n in NAMES}
    total = federation.add(1, federation.seal(1, committed))
    size = federation.manifest.layout.size
    for site, payload in zip(total.reference.cohort, total.chunks, strict=True):  # what is sent to every site
        pending = secret[site]
        assert pending is not None
        assert np.array_equal(np.frombuffer(payload, dtype="<f4")[:size], pending[1][:size].astype(np.float32))
    table = federation.sites["ash"]._runs[federation.manifest.run].profile.describe_exposure()
    assert [row.update for row in table] == [True] * len(table)
    assert not exposure_table("open", 5, 64)[1].update, "the control: where updates are added, a site sees the sum"


# --- at the site ------------------------------------------------------------------------------------------------------


def test_a_site_refuses_single_updates_under_encryption_whatever_the_coordinator_wrote(make: Make) -> None:
    federation = make("median")
    sealing = federation.manifest.sealing.model_copy(update={"profile": "sealed"})
    manifest = federation.manifest.model_copy(update={"sealing": sealing})
    federation.set_policy("ash", min_sites=3)
    refused = refusal_of(federation.join(("ash",), manifest)["ash"])
    assert refused.kind == "policy"
    assert "median compares the sites' single updates, and under profile sealed nobody sees one" in refused.reason


@pytest.mark.parametrize("changes", [{"single_updates": False}, {"control_variates": True}, {"min_sites": 3}])
def test_a_site_refuses_a_manifest_that_does_not_fit_its_strategy(make: Make, changes: dict[str, Any]) -> None:
    federation = make("krum", byzantine=1)
    federation.set_policy("ash", min_sites=3)
    refused = refusal_of(federation.join(("ash",), federation.manifest.model_copy(update=changes))["ash"])
    assert refused.kind == "policy"
    assert "krum" in refused.reason
    assert not is_refusal(federation.join(("birch",))["birch"]), "the control"


def test_gathering_is_for_the_open_profile_only() -> None:
    from confide.config import SealingConfig
    from confide.errors import ConfigError
    from confide.privacy.sealing import make_profile

    for profile in ("sealed", "masked", "ckks"):
        with pytest.raises(ConfigError, match="never a single update"):
            make_profile(SealingConfig(profile=profile), 5, gather=True)
    assert make_profile(SealingConfig(profile="open"), 5, gather=True).size(10).downlink == 5 * 44
