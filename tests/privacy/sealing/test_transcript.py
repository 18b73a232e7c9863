"""The transcript: everything that the sites agreed on is in it, and nothing runs together."""

from __future__ import annotations

import itertools

from confide.privacy.sealing.transcript import transcript

STATEMENTS = {"b": "2" * 64, "a": "1" * 64, "c": "3" * 64}
GIVEN = {"manifest": "f" * 64, "roster_version": 1, "key_epoch": 2, "round_": 3, "statements": STATEMENTS, "attempt": 0}
X = transcript(**GIVEN)


def test_it_is_a_digest_in_hex_and_the_same_for_all_who_agree() -> None:
    assert len(bytes.fromhex(X)) == 32
    for order in itertools.permutations(STATEMENTS):
        assert transcript(**GIVEN | {"statements": {site: STATEMENTS[site] for site in order}}) == X


def test_whatever_is_another_gives_another_transcript() -> None:
    changes = [
        {"manifest": "e" * 64},
        {"roster_version": 2},
        {"key_epoch": 3},
        {"round_": 4},
        {"attempt": 1},
        {"roster_version": 2, "key_epoch": 1},
        {"roster_version": 12, "key_epoch": 3, "round_": 0},
        {"round_": 30},
        {"key_epoch": 23, "round_": 0},
        {"statements": STATEMENTS | {"a": "4" * 64}},
        {"statements": STATEMENTS | {"d": "4" * 64}},
        {"statements": {site: STATEMENTS[site] for site in "ab"}},
        {"statements": {"a": "2" * 64, "b": "1" * 64, "c": "3" * 64}},
        {"statements": {"a": "1" * 64, "b": "2" * 64, "c3": "3" * 63}},
        {"statements": {}},
    ]
    assert len({X, *(transcript(**GIVEN | change) for change in changes)}) == 1 + len(changes)
