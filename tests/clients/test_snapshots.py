"""The record of who was in each round's snapshot: what one process adds another finds, and damage is found, too."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.clients.snapshots import SnapshotStore
from confide.errors import AuditError
from confide.privacy.consent import RoundKeys
from confide.privacy.dp import Role

KEYS = RoundKeys(b"o" * 32, b"f" * 32)


def name(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def put(store: SnapshotStore, round_: int, train: Sequence[int], held_out: Sequence[int] = ()) -> str:
    members = {Role.TRAIN: [name(n) for n in train], Role.HELD_OUT: [name(n) for n in held_out]}
    return store.put("run", round_, members, 100, KEYS)


def rounds(store: SnapshotStore, number: int) -> list[tuple[int, Role]]:
    return [(round_, role) for _, round_, role in store.rounds_of(name(number))]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 30), st.sampled_from(list(Role)), max_size=20), max_size=6))
def test_everybody_is_found_in_exactly_her_rounds(taken: list[dict[int, Role]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, roots = Path(folder) / "snapshots.db", dict[int, str]()
        with closing(SnapshotStore(path)) as one, closing(SnapshotStore(path)) as other:
            for round_, roles in enumerate(taken, start=1):
                by_role = [[n for n, r in roles.items() if r is role] for role in (Role.TRAIN, Role.HELD_OUT)]
                roots[round_] = put((one, other)[round_ % 2], round_, *by_role)  # as two runs of one site would
        with closing(SnapshotStore(path, read_only=True)) as store:
            for number in range(32):
                expected = [(r, roles[number]) for r, roles in enumerate(taken, start=1) if number in roles]
                assert rounds(store, number) == expected
            for round_, root in roots.items():
                tree = store.commitment("run", round_, KEYS)
                assert tree is not None
                assert tree.root.hex() == root


def test_a_file_of_an_earlier_version_is_read_and_added_to(tmp_path: Path) -> None:
    """It had a row for each person."""
    path = tmp_path / "snapshots.db"
    with closing(SnapshotStore(path)) as store:
        root = put(store, 1, [1, 2], [3])
    with closing(sqlite3.connect(path)) as db, db:
        (row,) = db.execute("SELECT pseudonyms FROM members").fetchone()
        db.execute("DROP TABLE members")
        db.execute("CREATE TABLE member (place INTEGER PRIMARY KEY, pseudonym BLOB NOT NULL UNIQUE)")
        db.executemany("INSERT INTO member VALUES (?, ?)", ((n, row[32 * n : 32 * n + 32]) for n in range(3)))
    for again in range(2):
        with closing(SnapshotStore(path, read_only=True)) as store:
            tree = store.commitment("run", 1, KEYS)
            assert tree is not None
            assert (tree.root.hex(), rounds(store, 3)[0]) == (root, (1, Role.HELD_OUT))
        with closing(SnapshotStore(path)) as store:
            put(store, 2 + again, [1, 4, 5 + again])
            assert rounds(store, 4) == [(2 + n, Role.TRAIN) for n in range(again + 1)]
            assert len(rounds(store, 1)) == 2 + again


def test_a_hundred_persons_who_come_at_once_stand_in_one_row_and_in_no_order(tmp_path: Path) -> None:
    with closing(SnapshotStore(tmp_path / "snapshots.db")) as store:
        put(store, 1, range(100))
        put(store, 2, range(100))
    with closing(sqlite3.connect(tmp_path / "snapshots.db")) as db:
        ((first, row),) = db.execute("SELECT * FROM members").fetchall()
    stored = [row[32 * n : 32 * n + 32] for n in range(100)]
    assert first == 0
    assert sorted(stored) == sorted(map(name, range(100)))
    assert stored not in (sorted(stored), [name(n) for n in range(100)])


@pytest.mark.parametrize("damage", [
    "UPDATE members SET pseudonyms = substr(pseudonyms, 1, 95) WHERE first = 0",
    "DELETE FROM members WHERE first = 0",
    "UPDATE members SET pseudonyms = (SELECT pseudonyms FROM members WHERE first = 0)",
])  # fmt: skip
def test_a_record_that_misses_or_repeats_persons_is_not_read(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "snapshots.db"
    with closing(SnapshotStore(path)) as store:
        put(store, 1, [1, 2, 3])
        put(store, 2, [4, 5, 6])
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(damage)
    with pytest.raises(AuditError, match=r"misses|twice"):
        SnapshotStore(path)


def test_what_is_no_pseudonym_is_not_kept(tmp_path: Path) -> None:
    with closing(SnapshotStore(tmp_path / "snapshots.db")) as store:
        with pytest.raises(ValueError, match="32 bytes"):
            store.put("run", 1, {Role.TRAIN: [b"short"]}, 10, KEYS)
        put(store, 1, [1])
        assert rounds(store, 1) == [(1, Role.TRAIN)]
