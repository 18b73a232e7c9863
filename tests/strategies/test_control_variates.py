"""SCAFFOLD's control variates leave a site in the sealed update only, and stay at the site, encrypted and durable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from confide.clients.ranges import segments
from confide.errors import SealingError
from confide.privacy.sealing import vault
from confide.protocol.envelope import Envelope
from confide.strategies.scaffold import control_change
from tests.attacks.federation import Federation, is_refusal
from tests.attacks.machines import Machines

Floats = NDArray[np.float64]
NAMES = ("ash", "birch", "cedar", "doum")
SITE = "birch"
Make = Callable[..., Federation]
SECTIONS: dict[str, dict[str, Any]] = {
    "strategy": {"kind": "scaffold"},
    "sites": {"min_sites": 3, "min_subjects": 1, "population": {"default": 12}},
    "privacy": {"epsilon": 4.0, "sample_rate": 1.0},
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Federations of four sites; passphrases cost nothing."""
    for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
        monkeypatch.setattr(vault, name, cheap)
    made: list[Federation] = []

    def build(profile: str = "sealed", vaults: bool = False, agreed: bool = True, **sections: Any) -> Federation:
        folder = tmp_path / f"f{len(made)}"
        options: dict[str, Any] = {**SECTIONS, "sealing": {"profile": profile}, **sections}
        if vaults:
            made.append(Machines(folder, vaults=True, **options))
        else:
            made.append(Federation(folder, people={"people": 12}, **options))
        federation = made[-1]
        if profile == "open":
            federation.participants = federation.names
            assert not any(map(is_refusal, federation.join().values()))
            return federation
        return federation.agree() if agreed else federation

    yield build
    for federation in made:
        federation.world.close()


def vectors(federation: Federation) -> dict[str, Floats]:
    """What waits at each site to be sealed."""
    found = {}
    for name, site in federation.sites.items():
        pending = site._runs[federation.manifest.run].pending
        assert pending is not None
        found[name] = pending[1]
    return found


def stored(federation: Federation, site: str = SITE) -> Floats | None:
    """The control variate in force on a site's disk."""
    run = federation.sites[site]._runs[federation.manifest.run]
    return federation.sites[site]._store.control(federation.manifest.run, run.keys.storage)


def rows(federation: Federation, site: str = SITE) -> list[tuple[int, int]]:
    """What lies in a site's table: (round, in force)."""
    return federation.sites[site]._store._db.execute("SELECT round, applied FROM control ORDER BY round").fetchall()


# --- on the wire -----------------------------------------------------------------------------------------------------


def wire_bytes(envelopes: Mapping[str, Envelope]) -> bytes:
    """All that some sites sent."""
    return b"".join(e.header + e.body + b"".join(e.chunks) for e in envelopes.values())


def parts(values: Floats) -> list[bytes]:
    """Every coordinate as somebody would spot it: as float32 and as float64."""
    return [c for x in values for c in (np.float32(x).tobytes(), np.float64(x).tobytes()) if c.strip(b"\0")]


def seen(wire: bytes, values: Floats) -> int:
    """How many coordinates stand in what was sent."""
    return sum(part in wire for part in parts(values))


def two_rounds(federation: Federation) -> tuple[bytes, dict[str, list[Floats]]]:
    """Everything the sites sent in two rounds, and what of theirs must not be in it: updates, changes, variates."""
    size, wire, secret = federation.manifest.layout.size, b"", {name: list[Floats]() for name in federation.names}
    last: tuple[Any, ...] = ()
    for round_ in (1, 2):
        committed = federation.train(round_, *last)
        for name, vector in vectors(federation).items():
            run = federation.sites[name]._runs[federation.manifest.run]
            secret[name] += [vector[:size], vector[size : 2 * size], run.control]
        sealed = federation.seal(round_, committed)
        assert not any(map(is_refusal, sealed.values()))
        wire += wire_bytes(committed) + wire_bytes(sealed)
        last = (federation.add(round_, sealed),)
    return wire, secret


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_no_coordinate_of_a_control_variate_is_ever_on_the_wire(make: Make, profile: str) -> None:
    wire, secret = two_rounds(make(profile))
    for values in secret.values():
        assert sum(seen(wire, part) for part in values) == 0


def test_under_the_open_profile_the_changes_are_there_for_everybody_to_read(make: Make) -> None:
    """The control: this is how they would be spotted. The variates themselves stay even then."""
    federation = make("open")
    wire, secret = two_rounds(federation)
    size = federation.manifest.layout.size
    for updates, changes, first, _, later, variate in secret.values():
        assert seen(wire, updates) == seen(wire, changes) == seen(wire, later) == size
        assert not first.any(), "at first it is 0"
        # In the first round the change is the variate, so what is stored as float64 must not be found.
        assert not any(np.float64(x).tobytes() in wire for x in variate)


def test_they_ride_in_the_same_sealed_vector_as_the_update(make: Make) -> None:
    federation = make()
    size, width = federation.manifest.layout.size, federation.manifest.metric_width(1)
    federation.train(1)
    for vector in vectors(federation).values():
        assert len(vector) == federation.manifest.vector_size(1) == 2 * size + width
        steps, rate = federation.manifest.training.local_steps, federation.manifest.training.learning_rate
        change = control_change(vector[:size], np.zeros(size), steps, rate)
        assert np.allclose(vector[size : 2 * size], change), "weights are 1 here"


def test_the_ranges_leave_room_for_them(make: Make) -> None:
    """A whole run with noise in which not a coordinate is clipped."""
    strategy = {"kind": "scaffold", "steps": {"ash": 1}}  # one step alone has the loudest mean gradient
    federation = make(agreed=False, run={"rounds": 4}, strategy=strategy)
    released = federation.coordinator().run()
    assert np.isfinite(released.weights).all()
    assert {federation.model(n).saturated for n in federation.names} == {0.0}


# --- at the site -----------------------------------------------------------------------------------------------------


def test_c_is_the_weighted_mean_of_all_sites_variates(make: Make) -> None:
    federation = make(
        sites={"min_sites": 3, "min_subjects": 1, "population": {"ash": 6, "default": 12}},
        sealing={"profile": "masked"},
    )  # fmt: skip
    first = federation.round(1)
    second = federation.round(2, first)
    federation.train(3, second)
    own = np.array([stored(federation, n) for n in federation.names])
    weights = np.array([federation.manifest.weight(n) for n in federation.names])
    assert len(set(weights)) == 2
    common = federation.model(SITE).state[0]
    # Quantised: one step of the range for each site and round at most.
    segment = segments(federation.manifest, 1)[1]
    grain = (segment.high - segment.low) / (2**federation.manifest.sealing.bits - 1)
    assert np.allclose(common, (weights[:, None] * own).sum(axis=0) / weights.sum(), atol=2 * grain)
    assert np.abs(common).max() > 100 * grain, "the control: it is not just small"


def test_a_variate_is_in_force_once_its_sum_is_applied_and_not_before(make: Make) -> None:
    federation = make()
    committed = federation.train(1)
    assert rows(federation) == [], "nothing of an update that is not sealed touches the disk"
    total = federation.add(1, federation.seal(1, committed))
    assert rows(federation) == [(1, 0)]
    assert stored(federation) is None
    federation.train(2, total)
    assert rows(federation) == [(1, 1)]
    assert stored(federation) is not None


def test_a_variate_of_a_round_that_came_to_nothing_is_forgotten(make: Make) -> None:
    federation = make()
    committed = federation.train(1)
    federation.seal(1, committed)  # and no sum is ever made of it
    second = federation.round(2)
    assert rows(federation) == [(1, 0), (2, 0)]
    federation.train(3, second)
    assert rows(federation) == [(2, 1)]


def test_a_site_outside_the_cohort_keeps_the_variate_that_it_had(make: Make) -> None:
    federation = make()
    first = federation.round(1)
    committed = federation.train(2, first)
    before = stored(federation)
    others = [n for n in NAMES if n != SITE]
    total = federation.add(2, federation.seal(2, committed, others))
    federation.train(3, total)
    assert before is not None
    assert np.array_equal(before, stored(federation))
    assert rows(federation) == [(1, 1)]
    assert rows(federation, others[0]) == [(2, 1)]


def test_an_unsent_update_leaves_no_variate_behind_for_its_charge_is_given_back(make: Make) -> None:
    federation = make()
    committed = federation.train(1)
    others = [n for n in NAMES if n != SITE]
    total = federation.add(1, federation.seal(1, committed, others))
    federation.train(2, total)
    assert federation.charges(SITE, 1) == {f"{federation.manifest.run}/1/train": 0}
    assert rows(federation) == []
    assert not federation.sites[SITE]._runs[federation.manifest.run].control.any()


def test_it_survives_a_restart_where_the_keys_do(make: Make) -> None:
    federation = make(vaults=True)
    first = federation.round(1)
    committed = federation.train(2, first)
    kept = stored(federation)
    second = federation.add(2, federation.seal(2, committed))
    federation.restart(SITE)
    assert not is_refusal(federation.train(3, second)[SITE])
    after = stored(federation)
    assert kept is not None
    assert after is not None
    assert not np.array_equal(after, kept), "the one that was sealed before the restart is in force"
    assert np.array_equal(federation.sites[SITE]._runs[federation.manifest.run].control, after)


def test_on_the_disk_it_is_encrypted_and_gone_with_the_runs_keys(make: Make) -> None:
    federation = make()
    federation.train(2, federation.round(1))
    control, store = stored(federation), federation.sites[SITE]._store
    assert control is not None
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = store.path.read_bytes()
    assert seen(data, control) == 0
    with pytest.raises(SealingError):
        store.control(federation.manifest.run, b"\0" * 32)
    # The control: so it would be found, were it written as it is.
    store._db.execute("INSERT INTO control VALUES ('x', 1, 0, ?)", (control.astype("<f8").tobytes(),))
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert sum(np.float64(x).tobytes() in store.path.read_bytes() for x in control) == len(control)
