"""Merkle trees: the RFC's own vectors, another implementation as the judge, and proofs that lie."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InclusionProof, InmemoryTree

from confide.privacy.audit.merkle import (
    Tree,
    leaf_hash,
    tree_root,
    verify_consistency,
    verify_inclusion,
)

LARGEST = 300
DATA = [f"entry {i}".encode() for i in range(LARGEST)]
LEAVES = [leaf_hash(d) for d in DATA]
TREE = Tree(LEAVES)
ROOTS = [tree_root(LEAVES[:n]) for n in range(LARGEST + 1)]

#: Inputs and roots of certificate-transparency's reference tests (merkletree/merkle_tree_test.cc).
CT_INPUTS = [
    bytes.fromhex(h)
    for h in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
CT_ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    6: "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


@pytest.fixture(scope="module")
def judge() -> InmemoryTree:
    """The whole tree in pymerkle, another implementation: the same prefixes 0x00 and 0x01, indices from 1."""
    tree = InmemoryTree(algorithm="sha256")
    for data in DATA:
        tree.append_entry(data)
    return tree


# --- known answers ---------------------------------------------------------------------------------------------------


def test_the_empty_tree_has_the_hash_of_nothing() -> None:
    assert tree_root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert Tree().root() == Tree(LEAVES).root(0) == tree_root([])
    assert Tree().size == 0


def test_a_leaf_and_a_node_are_hashed_under_different_prefixes() -> None:
    left, right = LEAVES[:2]
    assert leaf_hash(b"x") == hashlib.sha256(b"\x00x").digest()
    assert tree_root([left, right]) == hashlib.sha256(b"\x01" + left + right).digest()
    assert leaf_hash(left + right) != tree_root([left, right])


@pytest.mark.parametrize("size", CT_ROOTS)
def test_roots_are_those_of_certificate_transparency(size: int) -> None:
    assert tree_root([leaf_hash(d) for d in CT_INPUTS[:size]]).hex() == CT_ROOTS[size]


@pytest.mark.parametrize(
    ("index", "size", "path"),
    [
        (0, 1, []),
        (
            0,
            8,
            [
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ],
        ),
        (
            5,
            8,
            [
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ],
        ),
        (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    ],
)
def test_inclusion_paths_are_those_of_certificate_transparency(index: int, size: int, path: list[str]) -> None:
    proof = Tree(leaf_hash(d) for d in CT_INPUTS).inclusion_proof(index, size)
    assert [p.hex() for p in proof] == path
    assert verify_inclusion(leaf_hash(CT_INPUTS[index]), index, size, proof, bytes.fromhex(CT_ROOTS[size]))


#: Consistency proofs of the same reference tests, (old, new): from the empty string's tree of eight.
CT_CONSISTENCY = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


@pytest.mark.parametrize(("old", "new"), CT_CONSISTENCY)
def test_consistency_proofs_are_those_of_certificate_transparency(old: int, new: int) -> None:
    proof = Tree(leaf_hash(d) for d in CT_INPUTS).consistency_proof(old, new)
    assert [p.hex() for p in proof] == CT_CONSISTENCY[old, new]
    assert verify_consistency(old, bytes.fromhex(CT_ROOTS[old]), new, bytes.fromhex(CT_ROOTS[new]), proof)


# --- another implementation ------------------------------------------------------------------------------------------


def test_every_root_up_to_300_leaves_is_the_other_implementations(judge: InmemoryTree) -> None:
    assert [judge.get_root(n) for n in range(1, LARGEST + 1)] == ROOTS[1:]


def test_a_growing_tree_has_the_root_of_every_prefix_now_and_ever_after() -> None:
    tree = Tree()
    for size, leaf in enumerate(LEAVES, 1):
        tree.append(leaf)
        assert (tree.size, tree.root()) == (size, ROOTS[size])
    assert [tree.root(size) for size in range(LARGEST + 1)] == ROOTS


def test_a_tree_that_was_cut_back_is_the_smaller_tree() -> None:
    """Also where it grows again, into another one: nothing of what was forgotten is left in a node."""
    others = [leaf_hash(d + b"!") for d in DATA]
    for size in (0, 1, 2, 3, 5, 8, 31, 32, 33, 64, 100, 255, 256, 299, 300):
        tree = Tree(LEAVES)
        tree.truncate(size)
        assert (tree.size, tree.root()) == (size, ROOTS[size])
        with pytest.raises(ValueError, match="no tree of"):
            tree.root(size + 1)
        for leaf in others[size:]:
            tree.append(leaf)
        again = Tree([*LEAVES[:size], *others[size:]])
        assert [tree.root(n) for n in range(LARGEST + 1)] == [again.root(n) for n in range(LARGEST + 1)]
        for n in {size, LARGEST}:
            assert all(tree.inclusion_proof(i) == again.inclusion_proof(i) for i in (0, n // 2, n - 1) if i >= 0)
            assert tree.consistency_proof(n) == again.consistency_proof(n)


def test_what_a_tree_does_not_hold_it_does_not_prove() -> None:
    tree = Tree(LEAVES[:5])
    wrong: list[Callable[[], object]] = [
        lambda: tree.root(6), lambda: tree.root(-1), lambda: tree.inclusion_proof(5), lambda: tree.inclusion_proof(-1),
        lambda: tree.inclusion_proof(3, 3), lambda: tree.inclusion_proof(0, 0), lambda: tree.inclusion_proof(0, 6),
        lambda: tree.consistency_proof(6), lambda: tree.consistency_proof(-1), lambda: tree.consistency_proof(4, 3),
        lambda: tree.consistency_proof(2, 6), lambda: Tree().inclusion_proof(0),
    ]  # fmt: skip
    for ask in wrong:
        with pytest.raises(ValueError, match="there is no"):
            ask()


@pytest.mark.parametrize("size", range(1, LARGEST + 1))
def test_every_inclusion_proof_is_the_other_implementations_and_verifies(size: int, judge: InmemoryTree) -> None:
    for index in range(size):
        proof = TREE.inclusion_proof(index, size)
        assert verify_inclusion(LEAVES[index], index, size, proof, ROOTS[size])
        theirs = judge.prove_inclusion(index + 1, size)
        assert [LEAVES[index], *proof] == theirs.path
        if index in (0, size // 2, size - 1):  # and in the other one's eyes; raises where it does not hold
            ours = InclusionProof("sha256", True, size, index + 1, theirs.rule, [LEAVES[index], *proof])
            ours.verify(LEAVES[index], ROOTS[size], index=index + 1, size=size)


@pytest.mark.parametrize("new", range(1, LARGEST + 1))
def test_every_consistency_proof_is_the_definitions_and_verifies(new: int) -> None:
    """The recursion of RFC 6962 §2.1.2 as it stands there, over roots that the other implementation agrees with."""
    for old in range(1, new + 1):
        proof = TREE.consistency_proof(old, new)
        assert proof == _by_definition(0, new, old, whole=True)
        assert verify_consistency(old, ROOTS[old], new, ROOTS[new], proof)


@cache
def _hash_of(low: int, high: int) -> bytes:
    if high - low == 1:
        return LEAVES[low]
    middle = low + 2 ** math.ceil(math.log2(high - low)) // 2
    return hashlib.sha256(b"\x01" + _hash_of(low, middle) + _hash_of(middle, high)).digest()


def _by_definition(low: int, high: int, old: int, *, whole: bool) -> list[bytes]:
    """SUBPROOF(old − low, D[low:high], whole)."""
    if old == high:
        return [] if whole else [_hash_of(low, high)]
    middle = low + 2 ** math.ceil(math.log2(high - low)) // 2
    if old <= middle:
        return [*_by_definition(low, middle, old, whole=whole), _hash_of(middle, high)]
    return [*_by_definition(middle, high, old, whole=False), _hash_of(low, middle)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_consistency_proofs_hold_between_the_other_implementations_roots(
    judge: InmemoryTree, data: st.DataObject
) -> None:
    new = data.draw(st.integers(1, LARGEST))
    old = data.draw(st.integers(1, new))
    before, after = judge.get_root(old), judge.get_root(new)
    judge.prove_consistency(old, new).verify(before, after, prior_size=old, later_size=new)
    assert verify_consistency(old, before, new, after, TREE.consistency_proof(old, new))


@pytest.mark.parametrize(
    ("old", "ranges"), [(3, ["c", "d", "g", "l"]), (4, ["l"]), (6, ["i", "j", "k"]), (7, [])], ids=[3, 4, 6, 7]
)
def test_consistency_proofs_are_those_that_rfc_6962_works_out(old: int, ranges: list[str], judge: InmemoryTree) -> None:
    """§2.1.3: the tree of seven leaves a–f, j with its nodes g, h, i, k, l."""
    nodes = {"c": (2, 3), "d": (3, 4), "g": (0, 2), "i": (4, 6), "j": (6, 7), "k": (0, 4), "l": (4, 7)}
    theirs = {name: tree_root(LEAVES[start:end]) for name, (start, end) in nodes.items()}
    assert judge.get_root(2) == theirs["g"]
    expected = [theirs[name] for name in ranges]
    assert Tree(LEAVES[:7]).consistency_proof(old) == TREE.consistency_proof(old, 7) == expected


def test_every_pair_of_sizes_up_to_40_is_consistent_and_no_other_claim_is() -> None:
    for new in range(1, 41):
        for old in range(1, new + 1):
            proof = TREE.consistency_proof(old, new)
            assert verify_consistency(old, ROOTS[old], new, ROOTS[new], proof)
            if old != new:
                assert not verify_consistency(old, ROOTS[old - 1], new, ROOTS[new], proof)
                assert not verify_consistency(old, ROOTS[old + 1], new, ROOTS[new], proof)
                assert not verify_consistency(old, ROOTS[old], new, ROOTS[new - 1], proof)


# --- proofs that lie -------------------------------------------------------------------------------------------------

Lie = Callable[[list[bytes]], list[bytes]]


def _flip(proof: list[bytes], at: int) -> list[bytes]:
    bit = at % (len(proof) * 256)
    changed = bytearray(proof[bit // 256])
    changed[bit % 256 // 8] ^= 1 << bit % 8
    return [*proof[: bit // 256], bytes(changed), *proof[bit // 256 + 1 :]]


def _lies(proof: Sequence[bytes], at: int) -> list[list[bytes]]:
    """A bit flipped, the proof cut at either end, extended at either end, two parts swapped, a part doubled."""
    p = list(proof)
    lies = [[*p, LEAVES[0]], [LEAVES[0], *p], [*p, b""]]
    if p:
        lies += [_flip(p, at), p[:-1], p[1:], [*p, p[-1]], [p[0][:-1], *p[1:]]]
    if len(p) > 1:
        i, j = at % len(p), (at + 1 + at // len(p) % (len(p) - 1)) % len(p)
        q = list(p)
        q[i], q[j] = q[j], q[i]
        lies.append(q)
    return [lie for lie in lies if lie != p]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_inclusion_proof_that_was_changed_holds(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, LARGEST))
    index = data.draw(st.integers(0, size - 1))
    proof = TREE.inclusion_proof(index, size)
    assert verify_inclusion(LEAVES[index], index, size, proof, ROOTS[size])  # the control
    for lie in _lies(proof, data.draw(st.integers(0, 10_000))):
        assert not verify_inclusion(LEAVES[index], index, size, lie, ROOTS[size])
    other = data.draw(st.integers(-3, LARGEST + 3).filter(lambda i: i != index))
    assert not verify_inclusion(LEAVES[index], other, size, proof, ROOTS[size])
    assert not verify_inclusion(leaf_hash(b"another entry"), index, size, proof, ROOTS[size])
    wrong = data.draw(st.integers(0, LARGEST).filter(lambda n: n != size))
    assert not verify_inclusion(LEAVES[index], index, size, proof, ROOTS[wrong])
    assert not verify_inclusion(LEAVES[index], index, wrong, proof, ROOTS[wrong])
    strange = Tree(leaf_hash(d + b"!") for d in DATA[:size])
    assert not verify_inclusion(LEAVES[index], index, size, proof, strange.root())
    assert not verify_inclusion(LEAVES[index], index, size, strange.inclusion_proof(index), ROOTS[size]) or size == 1


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_consistency_proof_that_was_changed_holds(data: st.DataObject) -> None:
    new = data.draw(st.integers(2, LARGEST))
    old = data.draw(st.integers(1, new - 1))
    proof = TREE.consistency_proof(old, new)
    assert verify_consistency(old, ROOTS[old], new, ROOTS[new], proof)  # the control
    for lie in _lies(proof, data.draw(st.integers(0, 10_000))):
        assert not verify_consistency(old, ROOTS[old], new, ROOTS[new], lie)
    strange = Tree(leaf_hash(d + b"!") for d in DATA[:new])
    assert not verify_consistency(old, strange.root(old), new, ROOTS[new], proof)
    assert not verify_consistency(old, ROOTS[old], new, strange.root(), proof)
    assert not verify_consistency(old, ROOTS[old], new, ROOTS[new], strange.consistency_proof(old))
    wrong = data.draw(st.integers(0, LARGEST).filter(lambda n: n not in (old, new)))
    assert not verify_consistency(wrong, ROOTS[wrong], new, ROOTS[new], proof)
    assert not verify_consistency(old, ROOTS[old], wrong, ROOTS[wrong], proof)
    assert not verify_consistency(new, ROOTS[new], old, ROOTS[old], proof)


def test_a_rewritten_past_is_never_consistent() -> None:
    """One early leaf is exchanged: no proof that either tree can make connects the two."""
    for old in (1, 2, 3, 5, 8, 13):
        for new in (old + 1, 16, 21):
            rewritten = Tree([leaf_hash(b"rewritten"), *LEAVES[1:new]])
            for proof in (TREE.consistency_proof(old, new), rewritten.consistency_proof(old)):
                assert not verify_consistency(old, ROOTS[old], new, rewritten.root(), proof)


@pytest.mark.parametrize(("old", "new"), [(5, 3), (-1, 3), (0, 3), (3, 3)])
def test_sizes_without_a_proof_accept_no_proof(old: int, new: int) -> None:
    assert not verify_consistency(old, ROOTS[max(old, 0)], new, ROOTS[new], [LEAVES[0]])


def test_equal_sizes_need_equal_roots() -> None:
    assert verify_consistency(3, ROOTS[3], 3, ROOTS[3], [])
    assert not verify_consistency(3, ROOTS[2], 3, ROOTS[3], [])


def test_an_older_tree_of_no_entries_is_the_empty_tree() -> None:
    """Whoever claims that a log was empty must claim the empty tree's root (RFC 9162 has no proof to ask for)."""
    assert verify_consistency(0, ROOTS[0], 5, ROOTS[5], [])
    assert not verify_consistency(0, LEAVES[0], 5, ROOTS[5], [])
