"""A registry moved from one database into another says the same of everybody, and goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from confide.errors import ConsentError
from confide.privacy.consent import ConsentEvent, EventType, Registry
from confide.privacy.consent.transfer import copy_registry
from tests.privacy.consent.conftest import KEY

Make = Callable[[], Path | str]
PURPOSES, PEOPLE = ("research/heart", "research"), ("ann", "bob", "cat", "dan")


def fill(registry: Registry, kinds: list[tuple[int, int, EventType]]) -> None:
    registry.register_notice("ab" * 32, ["research"], covers_beneath=True)
    names = registry.enrol(PEOPLE)
    for number, (person, purpose, kind) in enumerate(kinds):
        registry.append([ConsentEvent(
            event_id=f"e{number}", pseudonym=names[PEOPLE[person]], purpose=PURPOSES[purpose], type=kind,
            effective_at=1_700_000_000_000_000 + number, lawful_basis="consent",
            max_epsilon=1.5 if number % 3 else None,
        )])  # fmt: skip


def says(registry: Registry) -> object:
    """Everything that can be asked of it."""
    return (
        [registry.history(p) for p in PEOPLE], registry.erased(PEOPLE), registry.pseudonyms(PEOPLE),
        [registry.snapshot(purpose, 1_700_000_050_000_000).participants for purpose in PURPOSES], registry.head(),
        registry.notices(), registry.latest_recorded(), list(registry.events()),
    )  # fmt: skip


GIVEN = [(0, 0, EventType.GIVEN), (1, 1, EventType.GIVEN), (2, 0, EventType.GIVEN), (1, 0, EventType.WITHDRAWN)]


@pytest.mark.parametrize("back", [False, True], ids=["", "and back"])
def test_a_copy_says_the_same_of_everybody_also_of_the_erased(new_address: Make, tmp_path: Path, back: bool) -> None:
    source, target = tmp_path / "old.db", new_address()
    with closing(Registry(source, KEY)) as old:
        fill(old, GIVEN)
        old.erase("cat", "asked for it")
        old.snapshot(PURPOSES[0], old.now())  # the clock goes forward, and must not go back
        expected = says(old)
    copy_registry(source, target)
    if back:
        source, target = target, tmp_path / "back.db"  # type: ignore[assignment]
        copy_registry(source, target)
    with closing(Registry(target, KEY)) as new:
        assert says(new) == expected
        assert new.check() == []
        with pytest.raises(ConsentError):
            new.enrol(["cat"])
        head = new.head()
        new.append([ConsentEvent(
            event_id="later", pseudonym=new.pseudonyms(["ann"])["ann"], purpose=PURPOSES[0], type=EventType.WITHDRAWN,
            effective_at=1_700_000_100_000_000,
        )])  # fmt: skip
        assert new.head() == head + 1, "and numbers go on"
        assert new.pseudonyms(["ann"])["ann"] not in new.snapshot(PURPOSES[0], 1_700_000_200_000_000).participants


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.sampled_from(
    [EventType.GIVEN, EventType.WITHDRAWN, EventType.RESTRICTED, EventType.OBJECTED])), max_size=12))  # fmt: skip
def test_whatever_is_on_record_is_the_same_afterwards(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[int, int, EventType]]
) -> None:
    folder = tmp_path_factory.mktemp("r")
    with closing(Registry(folder / "a.db", KEY)) as old:
        fill(old, kinds)
        expected = says(old)
    copy_registry(folder / "a.db", folder / "b.db")
    with closing(Registry(folder / "b.db", KEY)) as new:
        assert says(new) == expected


def test_nothing_is_copied_over_something_or_from_nothing(new_address: Make, tmp_path: Path) -> None:
    source, target = tmp_path / "old.db", new_address()
    with pytest.raises(ConsentError, match="is missing"):
        copy_registry(source, target)
    with closing(Registry(source, KEY)) as old:
        fill(old, GIVEN)
    copy_registry(source, target)
    with closing(Registry(target, KEY)) as new:
        expected = says(new)
    with pytest.raises(ConsentError, match="holds something already"):
        copy_registry(source, target)
    with closing(Registry(target, KEY)) as new:
        assert says(new) == expected


def test_the_copy_is_its_owners_only(tmp_path: Path) -> None:
    Registry(tmp_path / "a.db", KEY).close()
    copy_registry(tmp_path / "a.db", tmp_path / "b.db")
    assert (tmp_path / "b.db").stat().st_mode & 0o777 == 0o600
