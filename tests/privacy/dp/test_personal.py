"""Each person's own loss: what she was held by, nothing else, and what she may still take part in."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from confide.errors import BudgetError
from confide.privacy.dp import PrivacyEvent, RenyiBudget, Role, personal
from confide.privacy.dp.accounting import rdp, rdp_epsilon
from confide.privacy.dp.personal import PersonalLosses

DELTA = 1e-5
NAMES = [bytes([i]) * 32 for i in range(5)]
KINDS = [(2.0, 0.1), (5.0, 0.1), (3.0, 1.0)]


def event(kind: int = 0, steps: int = 1) -> PrivacyEvent:
    sigma, rate = KINDS[kind]
    return PrivacyEvent(
        role=Role.TRAIN, unit="subject", noise_multiplier=sigma, sample_rate=rate, steps=steps, max_grad_norm=1.0
    )


@pytest.fixture
def losses(tmp_path: Path) -> Iterator[PersonalLosses]:
    made = PersonalLosses(tmp_path / "personal.db")
    yield made
    made.close()


charges_of = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 30), st.frozensets(st.integers(0, 4))), min_size=0, max_size=12
)


@given(made=charges_of, limit=st.sampled_from([0.3, 1.0, 2.5, 6.0]), kind=st.integers(0, 2), steps=st.integers(1, 40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_person_may_go_on_exactly_while_her_own_charges_and_the_next_fit_her_own_budget(
    tmp_path_factory: pytest.TempPathFactory,
    made: list[tuple[int, int, frozenset[int]]],
    limit: float,
    kind: int,
    steps: int,
) -> None:
    losses = PersonalLosses(tmp_path_factory.mktemp("personal") / "personal.db")
    places = losses.enrol(NAMES)
    charges = {f"charge-{i}": event(k, s) for i, (k, s, _) in enumerate(made)}
    for i, (_, _, held) in enumerate(made):
        losses.hold(f"charge-{i}", places[sorted(held)])
    upcoming = [event(kind, steps)]
    allowed = losses.admits(places, np.full(5, limit), Role.TRAIN, charges, upcoming, DELTA)
    budget = RenyiBudget.for_limit(limit, DELTA)
    for person in range(5):
        own = [event(k, s) for k, s, held in made if person in held and s]
        share = budget.used([*own, *upcoming])
        if abs(share - 1) > 1e-9:
            assert allowed[person] == (share <= 1)
        assert losses.epsilons(charges, DELTA)[person] == pytest.approx(rdp_epsilon(own, DELTA))
        assert losses.divergence(charges, 4.0)[person] == pytest.approx(rdp(own, 4.0))
    losses.close()


def test_what_others_were_held_by_changes_nothing(losses: PersonalLosses) -> None:
    places, limits = losses.enrol(NAMES), np.full(5, 1.0)
    alone = losses.admits(places[:1], limits[:1], Role.TRAIN, {}, [event()], DELTA)
    losses.hold("others", places[1:])
    charges = {"others": event(0, 10_000)}
    found = losses.admits(places, limits, Role.TRAIN, charges, [event()], DELTA)
    assert found.tolist() == [bool(alone[0]), False, False, False, False]


def test_without_a_limit_a_person_is_never_left_out_and_a_limit_of_nothing_always(losses: PersonalLosses) -> None:
    places = losses.enrol(NAMES[:3])
    losses.hold("all", places)
    limits = np.array([np.inf, 0.0, -1.0])
    assert losses.admits(places, limits, Role.TRAIN, {"all": event(0, 10**6)}, [event()], DELTA).tolist() == [
        True,
        False,
        False,
    ]


def test_a_settled_charge_counts_at_what_is_left_of_it(losses: PersonalLosses) -> None:
    places = losses.enrol(NAMES)
    losses.hold("a", places)
    before = losses.divergence({"a": event(0, 10)}, 8.0)
    assert losses.divergence({"a": event(0, 3)}, 8.0) == pytest.approx(before * 0.3)
    assert not losses.divergence({"a": event(0, 0)}, 8.0).any()


def test_a_charge_that_nobody_was_noted_for_counts_for_nobody_and_an_unknown_one_too(losses: PersonalLosses) -> None:
    losses.enrol(NAMES)
    assert not losses.divergence({"unknown": event(0, 10)}, 8.0).any()


def test_everybody_a_charge_ever_held_counts_however_often_it_was_computed(losses: PersonalLosses) -> None:
    places = losses.enrol(NAMES)
    losses.hold("a", places[:2])
    assert np.count_nonzero(losses.divergence({"a": event()}, 8.0)) == 2
    losses.hold("a", places[1:3])
    again = losses.divergence({"a": event()}, 8.0)
    assert np.count_nonzero(again) == 3
    assert len(set(again[:3])) == 1, "once each"


def test_it_is_on_the_disk_when_hold_returns_and_there_again_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "personal.db"
    first = PersonalLosses(path)
    places = first.enrol(NAMES)
    first.hold("a", places[[0, 3]])
    second = PersonalLosses(path)  # while the first is still open: nothing waits in it
    assert second.enrol(NAMES).tolist() == places.tolist()
    assert np.flatnonzero(second.divergence({"a": event()}, 8.0)).tolist() == [0, 3]
    later = second.enrol([b"new" * 8, *NAMES])
    assert later.tolist() == [5, *places.tolist()]
    assert second.divergence({"a": event()}, 8.0)[5] == 0
    first.close()
    second.close()


@pytest.mark.parametrize("statement", ["UPDATE held SET persons = x'00'", "DELETE FROM held"])
def test_what_was_noted_cannot_be_changed(losses: PersonalLosses, tmp_path: Path, statement: str) -> None:
    losses.hold("a", losses.enrol(NAMES))
    with sqlite3.connect(tmp_path / "personal.db") as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)


def test_a_file_that_cannot_be_read_is_refused_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "personal.db"
    path.write_bytes(b"this is no database, and it is long enough to be looked at" * 40)
    before = path.read_bytes()
    with pytest.raises(BudgetError, match="not a readable record"):
        PersonalLosses(path)
    assert path.read_bytes() == before


def test_a_disk_that_takes_nothing_is_told_and_nothing_is_counted(losses: PersonalLosses) -> None:
    places = losses.enrol(NAMES)
    losses._db.execute("PRAGMA query_only = ON")
    with pytest.raises(BudgetError, match="nothing may leave"):
        losses.hold("a", places)
    assert not losses.divergence({"a": event()}, 8.0).any()


def test_roles_do_not_matter_only_what_was_held(losses: PersonalLosses) -> None:
    places = losses.enrol(NAMES[:2])
    losses.hold("train", places[:1])
    losses.hold("metrics", places[1:])
    charges = {"train": event(0, 5), "metrics": replace(event(2, 5), role=Role.HELD_OUT)}
    found = losses.divergence(charges, 8.0)
    assert found[0] == pytest.approx(rdp([event(0, 5)], 8.0))
    assert found[1] == pytest.approx(rdp([event(2, 5)], 8.0))


def test_a_charge_that_nobody_was_noted_for_counts_against_everybodys_limit_of_its_role(losses: PersonalLosses) -> None:
    """The file was deleted, or is younger than the ledger: no limit may start afresh."""
    places, limits = losses.enrol(NAMES), np.full(5, 1.0)
    charges = {"before": event(0, 10_000)}
    assert not losses.admits(places, limits, Role.TRAIN, charges, [], DELTA).any()
    assert losses.admits(places, limits, Role.HELD_OUT, charges, [], DELTA).all(), "the control: another role"
    losses.hold("before", places[:1])
    found = losses.admits(places, limits, Role.TRAIN, charges, [], DELTA)
    assert found.tolist() == [False, True, True, True, True], "the control: it is known whom it held"


def held_out(steps: int, kind: int = 2) -> PrivacyEvent:
    return replace(event(kind, steps), role=Role.HELD_OUT)


def test_unnoted_charges_count_in_a_persons_own_epsilon_by_the_role_that_held_her(losses: PersonalLosses) -> None:
    """A person's role is that of the charges that held her; where none did, the costlier one counts."""
    places = losses.enrol(NAMES)
    losses.hold("trained", places[[0, 1]])
    losses.hold("measured", places[[2, 1]])
    charges = {"trained": event(0, 5), "measured": held_out(1), "lost": event(1, 40), "lost too": held_out(3)}
    found = losses.epsilons(charges, DELTA)
    train, measure = [charges["lost"]], [charges["lost too"]]
    assert rdp_epsilon(measure, DELTA) > rdp_epsilon(train, DELTA)  # else the last line would say nothing
    assert found == pytest.approx([
        rdp_epsilon([event(0, 5), *train], DELTA),
        max(rdp_epsilon([event(0, 5), held_out(1), *more], DELTA) for more in (train, measure)),  # held as both
        rdp_epsilon([held_out(1), *measure], DELTA),
        *[rdp_epsilon(measure, DELTA)] * 2,
    ])  # fmt: skip
    assert losses.unnoted(charges) == {"lost": charges["lost"], "lost too": charges["lost too"]}


def test_with_every_charge_noted_nothing_is_added(losses: PersonalLosses) -> None:
    """The control."""
    places = losses.enrol(NAMES[:2])
    losses.hold("a", places[:1])
    assert losses.epsilons({"a": event(0, 5)}, DELTA) == pytest.approx([rdp_epsilon([event(0, 5)], DELTA), 0.0])
    assert losses.unnoted({"a": event(0, 5)}) == {}
    assert (losses.uncharged({"a": event(0, 5)}), losses.uncharged({})) == (0, 1)


@given(
    made=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 30), st.frozensets(st.integers(0, 4)), st.booleans()), max_size=10
    ),
    limit=st.sampled_from([0.3, 1.0, 2.5, 6.0]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nobodys_reported_epsilon_is_below_what_the_site_decides_by(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, int, frozenset[int], bool]], limit: float
) -> None:
    """Persons 0–2 hold one role, 3 and 4 the other; some charges were never noted. Whoever is reported to be within a
    limit's budget is one whom the site would decide so about, at every order."""
    losses = PersonalLosses(tmp_path_factory.mktemp("personal") / "personal.db")
    places, of_role = losses.enrol(NAMES), {Role.TRAIN: [0, 1, 2], Role.HELD_OUT: [3, 4]}
    charges = {}
    for i, (kind, steps, persons, noted) in enumerate(made):
        role = Role.TRAIN if kind < 2 else Role.HELD_OUT
        charges[f"charge-{i}"] = replace(event(kind, steps), role=role)
        if noted:
            losses.hold(f"charge-{i}", places[[p for p in of_role[role] if p in persons]])
    found = losses.epsilons(charges, DELTA)
    for role, here in of_role.items():
        decided = losses.admits(places[here], np.full(len(here), limit), role, charges, [], DELTA)
        for person, allowed in zip(here, decided, strict=True):
            own = [
                e
                for (_, _, persons, noted), e in zip(made, charges.values(), strict=True)
                if e.role is role and (person in persons or not noted)
            ]
            assert found[person] >= rdp_epsilon(own, DELTA) * (1 - 1e-9), "the composition that `admits` reasons with"
            if not allowed and RenyiBudget.for_limit(limit, DELTA).used(own) > 1:
                assert found[person] > 0
    losses.close()


def test_a_file_is_read_without_being_made_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "personal.db"
    with pytest.raises(BudgetError, match="not a readable record"):
        PersonalLosses.open(path)
    assert not path.exists()
    made = PersonalLosses(path)
    made.hold("a", made.enrol(NAMES)[:2])
    made.close()
    before = path.read_bytes()
    found = PersonalLosses.open(path)
    assert np.count_nonzero(found.epsilons({"a": event()}, DELTA)) == 2
    with pytest.raises(BudgetError, match="nothing may leave"):
        found.hold("b", np.array([0]))
    found.close()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- the erased -------------------------------------------------------------------------------------------------------


def test_the_erased_are_forgotten_unless_they_asked_otherwise_and_nobody_else_is(losses: PersonalLosses) -> None:
    places = losses.enrol(NAMES)
    losses.hold("c", places[:3])
    losses.keep(NAMES[1])
    losses.forget_erased(NAMES[:2])
    assert [losses.is_forgotten(name) for name in NAMES] == [True, False, False, False, False]
    assert losses.charges_of(NAMES[1]) == losses.charges_of(NAMES[2]) == ["c"]
    assert list(losses.enrol(NAMES))[1:] == list(places)[1:]
    losses.forget([NAMES[1]])
    assert losses.is_forgotten(NAMES[1]), "erased again without that wish"
    losses.keep(NAMES[1])
    assert losses.charges_of(NAMES[1]) is None, "what is destroyed cannot be kept"


def test_who_was_erased_before_the_first_charge_is_forgotten_too_so_that_nothing_tells_her_from_others(
    losses: PersonalLosses,
) -> None:
    losses.forget_erased(NAMES[:1])
    places = losses.enrol(NAMES)
    assert places[0] == -1
    losses.hold("c", places[1:2])
    assert losses.epsilons({"c": event()}, DELTA)[-1] == losses.epsilons({"c": event()}, DELTA)[places[1]] > 0


def test_a_reader_in_the_way_does_not_keep_a_site_from_starting(
    losses: PersonalLosses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses.hold("c", losses.enrol(NAMES))
    path = tmp_path / "personal.db"
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM person").fetchone()
    monkeypatch.setattr(personal.time, "sleep", lambda _: pytest.fail("it waits"))
    losses.forget_erased(NAMES[3:4])
    assert losses.is_forgotten(NAMES[3])
    reader.close()
    losses.forget_erased(NAMES[3:])
    for file in tmp_path.glob("personal.db*"):
        assert file.read_bytes().count(NAMES[3]) <= 1, file.name


def test_a_file_of_an_earlier_version_is_read_and_written(tmp_path: Path) -> None:
    """It had no list of those who asked that their rounds be kept."""
    path = tmp_path / "personal.db"
    made = PersonalLosses(path)
    made.hold("c", made.enrol(NAMES))
    made.close()
    db = sqlite3.connect(path)
    db.execute("DROP TABLE kept")
    db.commit()
    db.close()
    PersonalLosses.open(path).close()
    again = PersonalLosses(path)
    again.keep(NAMES[0])
    again.forget_erased(NAMES[:2])
    assert [again.is_forgotten(name) for name in NAMES[:3]] == [False, True, False]
    again.close()
