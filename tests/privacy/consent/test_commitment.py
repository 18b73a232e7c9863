"""The commitment to a snapshot: presence and absence can be shown of everybody, and nothing can be read from it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.privacy.consent import (
    MembershipProof,
    RoundKeys,
    SiteKey,
    SnapshotCommitment,
    member_name,
    slots_for,
    verify_membership,
)
from confide.privacy.consent import commitment as module

KEYS = RoundKeys(b"o" * 32, b"f" * 32)
NAMES = st.binary(min_size=1, max_size=64)


@given(st.sets(NAMES, max_size=40), st.sets(NAMES, max_size=20), st.integers(0, 64))
def test_whoever_is_in_is_shown_to_be_in_and_nobody_else(members: set[bytes], asked: set[bytes], slots: int) -> None:
    tree = SnapshotCommitment(KEYS, members, slots)
    for name in members | asked:
        proof = tree.prove(name)
        assert proof.present == (name in members)
        assert verify_membership(tree.root, KEYS.opening, name, proof)


@given(st.sets(NAMES, min_size=2, max_size=40), st.data())
def test_no_proof_holds_for_another_person_or_key_or_root(members: set[bytes], data: st.DataObject) -> None:
    tree = SnapshotCommitment(KEYS, members, 8)
    one, other = data.draw(st.permutations(sorted(members)))[:2]
    proof = tree.prove(one)
    assert not verify_membership(tree.root, KEYS.opening, other, proof)
    assert not verify_membership(tree.root, KEYS.filling, one, proof)
    assert not verify_membership(SnapshotCommitment(KEYS, members - {one}, 8).root, KEYS.opening, one, proof)
    assert not verify_membership(SnapshotCommitment(KEYS, members, 64).root, KEYS.opening, one, proof)


def mutations(proof: MembershipProof, index: bytes) -> dict[str, MembershipProof]:
    flipped = bytes([proof.siblings[0][0] ^ 1]) + proof.siblings[0][1:]
    return {
        "said to be absent": replace(proof, present=False),
        "said to be another": replace(proof, present=False, other=bytes(31) + b"\x01"),
        "said to be itself, and absent": replace(proof, present=False, other=index),
        "a flipped bit": replace(proof, siblings=(flipped, *proof.siblings[1:])),
        "a shorter path": replace(proof, siblings=proof.siblings[:-1]),
        "a path cut at the root": replace(proof, siblings=proof.siblings[1:]),
        "a longer path": replace(proof, siblings=(*proof.siblings, module._EMPTY)),
        "a turned path": replace(proof, siblings=proof.siblings[::-1]),
        "no path": replace(proof, siblings=()),
        "a path without end": replace(proof, siblings=proof.siblings * 100),
        "a hash that is none": replace(proof, siblings=(b"", *proof.siblings[1:])),
        "present, and another as well": replace(proof, other=bytes(32)),
    }


@pytest.mark.parametrize("name", mutations(MembershipProof(True, None, (bytes(32),) * 3), b""))
def test_a_proof_that_was_changed_does_not_hold(name: str) -> None:
    members = [secrets.token_bytes(32) for _ in range(200)]
    tree = SnapshotCommitment(KEYS, members, 256)
    honest = tree.prove(members[7])
    assert verify_membership(tree.root, KEYS.opening, members[7], honest)
    changed = mutations(honest, module.index_of(KEYS.opening, members[7]))[name]
    assert not verify_membership(tree.root, KEYS.opening, members[7], changed)


@given(st.sets(NAMES, max_size=30))
def test_the_root_is_that_of_the_textbook(members: set[bytes]) -> None:
    """The same tree, written down as it is defined: by halves."""

    def root(leaves: list[bytes], depth: int) -> bytes:
        if not leaves:
            return hashlib.sha256(b"\x02").digest()
        if len(leaves) == 1:
            return hashlib.sha256(b"\x00" + leaves[0]).digest()
        ones = [leaf for leaf in leaves if f"{int.from_bytes(leaf, 'big'):0256b}"[depth] == "1"]
        zeros = [leaf for leaf in leaves if leaf not in ones]
        return hashlib.sha256(b"\x01" + root(zeros, depth + 1) + root(ones, depth + 1)).digest()

    leaves = [hashlib.blake2b(name, key=KEYS.opening, digest_size=32).digest() for name in members]
    assert SnapshotCommitment(KEYS, members, 0).root == root(leaves, 0)


def test_indices_that_agree_in_their_first_64_bits_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody finds such a pair of a PRF's; so here the PRF is a poor one."""
    monkeypatch.setattr(module, "_prf", lambda _key: lambda member: b"12345678" + member.rjust(24, b"\0"))
    members = [bytes([n]) for n in range(1, 40)]
    tree = SnapshotCommitment(KEYS, members, 0)
    for name in (*members, b"\xff", b"\0"):
        proof = tree.prove(name)
        assert proof.present == (name in members)
        assert verify_membership(tree.root, KEYS.opening, name, proof)
        assert not verify_membership(tree.root, KEYS.opening, b"\x7f", proof)


def test_nobody_stands_in_a_snapshot_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        SnapshotCommitment(KEYS, [b"one", b"two", b"one"], 8)


# --- what an outsider learns ------------------------------------------------------------------------------------------


def _dictionary(names: Callable[[str], list[bytes]], keys: Callable[[str], list[bytes]], root: bytes) -> list[str]:
    """Everybody whose snapshot alone, with nobody else in it, would give this root under a key that one can guess."""
    found = []
    for person in (f"person-{n}" for n in range(50)):
        for name in names(person):
            for key in keys(person):
                for slots in (0, 1, 2, 16):
                    if SnapshotCommitment(RoundKeys(key, key), [name], slots).root == root:
                        found.append(person)
    return found


def test_a_dictionary_of_all_identifiers_finds_nobody_without_the_sites_key() -> None:
    """The smallest snapshot there is: one person. Whoever knows all identifiers tries them all, with everything that
    stands in the log (run, round, root) as a key."""
    site = SiteKey(secrets.token_bytes(32))
    personal = secrets.token_bytes(32)
    keys = site.round_keys("run-1", 3)
    member = member_name("train", site.pseudonym("person-7", personal))
    root = SnapshotCommitment(keys, [member], 16).root

    def guesses(person: str) -> list[bytes]:
        plain = [person.encode(), hashlib.sha256(person.encode()).digest()]
        return plain + [member_name(role, p) for role in ("train", "held_out") for p in plain]

    public = [b"run-1/3", b"run-1", hashlib.sha256(b"run-1/3").digest(), b"\0" * 32]
    assert _dictionary(guesses, lambda _: public, root) == []
    # The control: with the site's keys, or where names and keys were what the log says, the person is found at once.
    own = _dictionary(
        lambda p: [member_name("train", site.pseudonym(p, personal))], lambda _: [keys.opening],
        SnapshotCommitment(RoundKeys(keys.opening, keys.opening), [member], 16).root,
    )  # fmt: skip
    assert own == ["person-7"]
    naive = SnapshotCommitment(RoundKeys(b"run-1/3", b"run-1/3"), [b"person-7"], 16).root
    assert _dictionary(guesses, lambda _: public, naive) == ["person-7"]


def test_two_rounds_with_the_same_people_have_nothing_in_common() -> None:
    site, people = SiteKey(secrets.token_bytes(32)), [secrets.token_bytes(32) for _ in range(100)]
    one, two, elsewhere = site.round_keys("run-1", 1), site.round_keys("run-1", 2), site.round_keys("run-2", 1)
    trees = [SnapshotCommitment(keys, people, 256) for keys in (one, two, elsewhere)]
    assert len({tree.root for tree in trees}) == 3
    assert not set(trees[0]._leaves) & set(trees[1]._leaves)
    # A round that was opened tells nothing of another: its key does not open the other's paths.
    assert not verify_membership(trees[1].root, one.opening, people[0], trees[0].prove(people[0]))
    assert not verify_membership(trees[1].root, one.opening, people[0], trees[1].prove(people[0]))
    assert len({one.opening, one.filling, two.opening, two.filling, elsewhere.opening}) == 5


def test_a_commitment_has_one_size_whoever_takes_part() -> None:
    """The root always; and how many leaves a tree has, which the length of a proof tells, is public."""
    sizes = set()
    for count in (0, 1, 17, 700):
        tree = SnapshotCommitment(KEYS, [secrets.token_bytes(32) for _ in range(count)], slots_for(800, count))
        assert len(tree.root) == 32
        sizes.add(len(tree._leaves))
    assert sizes == {1024}
    assert slots_for(800, 5000) == 8192  # more people than were declared: the next power of two


def test_a_path_does_not_tell_leaves_of_people_from_those_that_fill_up() -> None:
    """What lies beside a path are hashes; what may lie at its end in a proof of absence is an index, and both kinds are
    outputs of the same function under keys that the reader of the proof has only one of."""
    members = [secrets.token_bytes(32) for _ in range(30)]
    tree = SnapshotCommitment(KEYS, members, 64)
    shown = [p.other for p in (tree.prove(secrets.token_bytes(32)) for _ in range(200)) if p.other is not None]
    of_people = {module.index_of(KEYS.opening, name) for name in members}
    assert any(index in of_people for index in shown)
    assert any(index not in of_people for index in shown)
    assert {len(index) for index in shown} == {32}
