"""Merkle trees: the RFC's own vectors, another implementation as the judge, and proofs that lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InclusionProof, InmemoryTree

from confide.privacy.audit.merkle import (
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    tree_root,
    verify_consistency,
    verify_inclusion,
)

LARGEST = 300
DATA = [f"entry {i}".encode() for i in range(LARGEST)]
LEAVES = [leaf_hash(d) for d in DATA]
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


def other_tree(size: int) -> InmemoryTree:
    """pymerkle's tree: the same prefixes 0x00 and 0x01, indices from 1."""
    tree = InmemoryTree(algorithm="sha256")
    for data in DATA[:size]:
        tree.append_entry(data)
    return tree


@pytest.fixture(scope="module")
def judge() -> InmemoryTree:
    """The whole tree in the other implementation."""
    return other_tree(LARGEST)


# --- known answers ---------------------------------------------------------------------------------------------------


def test_the_empty_tree_has_the_hash_of_nothing() -> None:
    assert tree_root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert Frontier().root() == tree_root([])


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
    leaves = [leaf_hash(d) for d in CT_INPUTS[:size]]
    assert [p.hex() for p in inclusion_proof(leaves, index)] == path


# --- another implementation ------------------------------------------------------------------------------------------


def test_every_root_up_to_300_leaves_is_the_other_implementations(judge: InmemoryTree) -> None:
    assert [judge.get_root(n) for n in range(1, LARGEST + 1)] == ROOTS[1:]


def test_a_growing_frontier_has_the_root_of_every_prefix() -> None:
    frontier = Frontier()
    for size, leaf in enumerate(LEAVES, 1):
        frontier.append(leaf)
        assert (frontier.size, frontier.root()) == (size, ROOTS[size])


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 299, 300])
def test_inclusion_proofs_are_the_other_implementations_and_verify_in_both(size: int, judge: InmemoryTree) -> None:
    for index in {*range(min(size, 20)), size // 2, size - 2, size - 1} - {-1}:
        proof, theirs = inclusion_proof(LEAVES[:size], index), judge.prove_inclusion(index + 1, size)
        assert [LEAVES[index], *proof] == theirs.path
        assert verify_inclusion(LEAVES[index], index, size, proof, ROOTS[size])
        ours = InclusionProof("sha256", True, size, index + 1, theirs.rule, [LEAVES[index], *proof])
        ours.verify(LEAVES[index], ROOTS[size], index=index + 1, size=size)  # raises where it does not hold


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_consistency_proofs_hold_between_the_other_implementations_roots(
    judge: InmemoryTree, data: st.DataObject
) -> None:
    new = data.draw(st.integers(1, LARGEST))
    old = data.draw(st.integers(1, new))
    before, after = judge.get_root(old), judge.get_root(new)
    judge.prove_consistency(old, new).verify(before, after, prior_size=old, later_size=new)
    assert verify_consistency(old, before, new, after, consistency_proof(LEAVES[:new], old))


@pytest.mark.parametrize(
    ("old", "ranges"), [(3, ["c", "d", "g", "l"]), (4, ["l"]), (6, ["i", "j", "k"]), (7, [])], ids=[3, 4, 6, 7]
)
def test_consistency_proofs_are_those_that_rfc_6962_works_out(old: int, ranges: list[str], judge: InmemoryTree) -> None:
    """§2.1.3: the tree of seven leaves a–f, j with its nodes g, h, i, k, l."""
    nodes = {"c": (2, 3), "d": (3, 4), "g": (0, 2), "i": (4, 6), "j": (6, 7), "k": (0, 4), "l": (4, 7)}
    theirs = {name: tree_root(LEAVES[start:end]) for name, (start, end) in nodes.items()}
    assert judge.get_root(2) == theirs["g"]
    assert consistency_proof(LEAVES[:7], old) == [theirs[name] for name in ranges]


def test_every_pair_of_sizes_up_to_40_is_consistent_and_no_other_claim_is() -> None:
    for new in range(1, 41):
        for old in range(1, new + 1):
            proof = consistency_proof(LEAVES[:new], old)
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
    proof = inclusion_proof(LEAVES[:size], index)
    assert verify_inclusion(LEAVES[index], index, size, proof, ROOTS[size])  # the control
    for lie in _lies(proof, data.draw(st.integers(0, 10_000))):
        assert not verify_inclusion(LEAVES[index], index, size, lie, ROOTS[size])
    other = data.draw(st.integers(-3, LARGEST + 3).filter(lambda i: i != index))
    assert not verify_inclusion(LEAVES[index], other, size, proof, ROOTS[size])
    assert not verify_inclusion(leaf_hash(b"another entry"), index, size, proof, ROOTS[size])
    wrong = data.draw(st.integers(0, LARGEST).filter(lambda n: n != size))
    assert not verify_inclusion(LEAVES[index], index, size, proof, ROOTS[wrong])
    assert not verify_inclusion(LEAVES[index], index, wrong, proof, ROOTS[wrong])
    strange = [leaf_hash(d + b"!") for d in DATA[:size]]
    assert not verify_inclusion(LEAVES[index], index, size, proof, tree_root(strange))
    assert not verify_inclusion(LEAVES[index], index, size, inclusion_proof(strange, index), ROOTS[size]) or size == 1


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_consistency_proof_that_was_changed_holds(data: st.DataObject) -> None:
    new = data.draw(st.integers(2, LARGEST))
    old = data.draw(st.integers(1, new - 1))
    proof = consistency_proof(LEAVES[:new], old)
    assert verify_consistency(old, ROOTS[old], new, ROOTS[new], proof)  # the control
    for lie in _lies(proof, data.draw(st.integers(0, 10_000))):
        assert not verify_consistency(old, ROOTS[old], new, ROOTS[new], lie)
    strange = [leaf_hash(d + b"!") for d in DATA[:new]]
    assert not verify_consistency(old, tree_root(strange[:old]), new, ROOTS[new], proof)
    assert not verify_consistency(old, ROOTS[old], new, tree_root(strange), proof)
    wrong = data.draw(st.integers(0, LARGEST).filter(lambda n: n not in (old, new)))
    assert not verify_consistency(wrong, ROOTS[wrong], new, ROOTS[new], proof)
    assert not verify_consistency(old, ROOTS[old], wrong, ROOTS[wrong], proof)
    assert not verify_consistency(new, ROOTS[new], old, ROOTS[old], proof)


def test_a_rewritten_past_is_never_consistent() -> None:
    """One early leaf is exchanged: no proof that either tree can make connects the two."""
    for old in (1, 2, 3, 5, 8, 13):
        for new in (old + 1, 16, 21):
            rewritten = [leaf_hash(b"rewritten"), *LEAVES[1:new]]
            for proof in (consistency_proof(LEAVES[:new], old), consistency_proof(rewritten, old)):
                assert not verify_consistency(old, ROOTS[old], new, tree_root(rewritten), proof)


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
