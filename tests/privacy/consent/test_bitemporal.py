"""The registry, through its database, against the reference: any events in any order, asked as of any (T, S)."""

from __future__ import annotations

import random
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from confide.privacy.consent import ConsentEvent, EventType, Registry, now_micros
from confide.privacy.consent.state import Status
from tests.privacy import postgres
from tests.privacy.consent.conftest import KEY
from tests.privacy.consent.reference import GRANTS, Says, may

PEOPLE = tuple(f"person {i}" for i in range(12))  # many, so that one question tests many histories
PURPOSES = ("a", "a/b", "a/b/c", "ab")
ASKED = ("a/b", "a/b/c", "a", "a/x", "ab", "a/b/c/d")
DIGESTS = ("", "n1", "n2", "n3", "n4")
INSTANTS = st.integers(0, 12)  # few, so that ties are common
LATER = 1 << 60  # beyond any clock


KINDS = [*EventType, *[EventType.GIVEN, EventType.RENEWED, EventType.WITHDRAWN] * 5]
KINDS.remove(EventType.ERASED)


def drafted(draw: random.Random) -> dict[str, Any]:
    """Any event but for its person; rarely an erasure, after which nothing can be told apart."""
    kind = draw.choice(KINDS) if draw.random() > 0.01 else EventType.ERASED
    at, grant = draw.randrange(8), kind in GRANTS
    return {
        "purpose": draw.choice(PURPOSES),
        "type": kind,
        "effective_at": at,
        "valid_until": at + draw.randint(1, 4) if grant and draw.random() < 0.3 else None,
        "notice_digest": draw.choice(DIGESTS) if grant else "",
        "max_epsilon": draw.choice([None, 0.5, 2.0]) if grant else None,
    }


class Machine(RuleBasedStateMachine):
    """What is learnt is put on record, and any question gets the reference's answer."""

    def __init__(self) -> None:
        super().__init__()
        self.learnt: list[ConsentEvent | tuple[str, Says]] = []  # at place i what has sequence number i + 1
        self.names: dict[str, bytes] = {}
        self.erased: set[str] = set()
        self.address = self.place()
        self.registry = Registry(self.address, KEY)

    def place(self) -> Path | str:
        raise NotImplementedError

    @initialize(seed=st.integers(0, 1 << 32))
    def enrol(self, seed: int) -> None:
        self.names = self.registry.enrol(PEOPLE)
        self.append(seed, 40)

    @rule(seed=st.integers(0, 1 << 32), size=st.integers(1, 30))
    def append(self, seed: int, size: int) -> None:
        draw, first = random.Random(seed), len(self.learnt)  # noqa: S311  # so that one number shrinks instead of hundreds
        people = list(self.names.values())  # also erased ones: somebody remembered the pseudonym
        events = [
            ConsentEvent(event_id=f"e{first + i}", pseudonym=draw.choice(people), **drafted(draw)) for i in range(size)
        ]
        assert self.registry.append(events) == size
        self.learnt += events

    @rule(
        digest=st.sampled_from(DIGESTS[1:]),
        purposes=st.sets(st.sampled_from(PURPOSES), min_size=1),
        below=st.booleans(),
    )
    def notice(self, digest: str, purposes: set[str], below: bool) -> None:
        if not any(isinstance(item, tuple) and item[0] == digest for item in self.learnt):
            self.registry.register_notice(digest, purposes, below)
            self.learnt.append((digest, (frozenset(purposes), below)))

    @rule(person=st.sampled_from(PEOPLE[:3]))
    def erase(self, person: str) -> None:
        mine = {e.purpose for e in self.learnt if isinstance(e, ConsentEvent) and e.pseudonym == self.names[person]}
        if person not in self.erased:
            now = now_micros()
            self.registry.erase(person)
            self.erased.add(person)
            closed = sorted({*mine, ""})
            self.learnt += [
                ConsentEvent(event_id=f"e{len(self.learnt) + i}", pseudonym=self.names[person], purpose=p,
                             type=EventType.ERASED, effective_at=now) for i, p in enumerate(closed)
            ]  # fmt: skip

    @rule()
    def open_again(self) -> None:
        self.registry.close()
        self.registry = Registry(self.address, KEY)

    @rule(purpose=st.sampled_from(ASKED), at=INSTANTS | st.just(LATER), back=st.none() | st.integers(-1, 12))
    def ask_of_all(self, purpose: str, at: int, back: int | None) -> None:
        assert self.registry.head() == len(self.learnt)
        sequence = None if back is None else max(0, len(self.learnt) - back)
        known = self.learnt[:sequence]
        found = self.registry.snapshot(purpose, at, sequence)
        answers = {pseudonym: self.answer(pseudonym, known, purpose, at) for pseudonym in self.names.values()}
        assert found.participants == {pseudonym: limit for pseudonym, (yes, limit) in answers.items() if yes}

    @rule(
        person=st.sampled_from(PEOPLE),
        purpose=st.sampled_from(ASKED),
        at=INSTANTS,
        back=st.none() | st.integers(-1, 12),
    )
    def ask_of_one(self, person: str, purpose: str, at: int, back: int | None) -> None:
        sequence = None if back is None else max(0, len(self.learnt) - back)
        found = self.registry.state(person, purpose, at, sequence)
        if person in self.erased:
            assert found.status is Status.REFUSED
            return
        yes, limit = self.answer(self.names[person], self.learnt[:sequence], purpose, at)
        assert (found.may_participate, found.max_epsilon) == (yes, limit)

    def answer(self, pseudonym: bytes, known: list[Any], purpose: str, at: int) -> tuple[bool, float | None]:
        events = [e for e in known if isinstance(e, ConsentEvent) and e.pseudonym == pseudonym]
        return may(events, dict(item for item in known if isinstance(item, tuple)), purpose, at)

    def teardown(self) -> None:
        assert self.registry.check() == []
        assert self.registry.head() == len(self.learnt)
        self.registry.close()


SETTINGS = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_the_registry_in_sqlite_answers_as_the_reference_does() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch) / "empty.db"
        Registry(template, KEY).close()
        number = 0

        class InSQLite(Machine):
            def place(self) -> Path:
                nonlocal number
                number += 1
                return Path(shutil.copy(template, Path(scratch) / f"{number}.db"))

        run_state_machine_as_test(InSQLite, settings=SETTINGS)
        assert number > 1, "it asked more than one registry"


def test_the_registry_in_postgresql_answers_as_the_reference_does(postgres_folder: str) -> None:
    first = next(_databases)

    class InPostgreSQL(Machine):
        def place(self) -> str:
            number = next(_databases)
            return postgres.new_database(postgres_folder, f"machine_{number}")

    run_state_machine_as_test(InPostgreSQL, settings=settings(SETTINGS, max_examples=8))
    assert next(_databases) > first + 1, "it asked at least one registry"


_databases = iter(range(1_000_000))


@pytest.mark.parametrize("lost", ["withdrawn", "restricted", "erased"])
def test_a_reference_that_forgets_a_rule_is_told_apart(tmp_path: Path, lost: str) -> None:
    """The control: events that would be decided otherwise if this kind did not count."""
    with closing(Registry(tmp_path / "consent.db", KEY)) as registry:
        ann = registry.enrol(["ann"])["ann"]
        events = [
            ConsentEvent(event_id=str(i), pseudonym=ann, purpose="a", type=EventType(kind), effective_at=i)
            for i, kind in enumerate(["given", lost])
        ]
        registry.append(events)
        assert registry.snapshot("a", 5).participants == {}
        assert may(events[:1], {}, "a", 5) == (True, None)
