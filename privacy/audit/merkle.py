"""Merkle trees as in RFC 6962 §2.1 (and RFC 9162 §2.1): a growing tree, and the checks of what is proved from one.

leaf = SHA-256(0x00 ‖ data), node = SHA-256(0x01 ‖ left ‖ right); an unbalanced tree splits at the largest power of two
below its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

__all__ = [
    "Tree",
    "leaf_hash",
    "tree_root",
    "verify_consistency",
    "verify_inclusion",
]

_HASH = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """Hash of a leaf."""
    return hashlib.sha256(b"\0" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(size: int) -> int:
    return 1 << ((size - 1).bit_length() - 1)


class Tree:
    """A growing tree with all complete nodes in memory: 64 bytes a leaf; roots and proofs cost O(log² n) hashes."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        #: Level 0 holds the leaves, 32 bytes each; level k the roots of the complete subtrees of 2^k leaves.
        self._levels: list[bytearray] = [bytearray()]
        for leaf in leaves:
            self.append(leaf)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._levels[0]) // _HASH

    def append(self, leaf: bytes) -> None:
        """Add a leaf hash."""
        node, level = leaf, 0
        while True:
            nodes = self._levels[level]
            nodes += node
            if len(nodes) // _HASH % 2:
                return
            node, level = _node(bytes(nodes[-2 * _HASH : -_HASH]), bytes(nodes[-_HASH:])), level + 1
            if level == len(self._levels):
                self._levels.append(bytearray())

    def truncate(self, size: int) -> None:
        """Forget all but the first `size` leaves."""
        for level, nodes in enumerate(self._levels):
            del nodes[(size >> level) * _HASH :]

    def root(self, size: int | None = None) -> bytes:
        """Root of the first `size` leaves (None: of all).

        Raises:
            ValueError: There are not so many.
        """
        return self._hash(0, self._checked(size))

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """Audit path of leaf `index` in the tree of `size` leaves, from the leaf up (RFC 6962 §2.1.1).

        Raises:
            ValueError: There is no such leaf.
        """
        low, high, path = 0, self._checked(size), list[bytes]()
        if not low <= index < high:
            raise ValueError(f"there is no leaf {index}")
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                path.append(self._hash(middle, high))
                high = middle
            else:
                path.append(self._hash(low, middle))
                low = middle
        return path[::-1]

    def consistency_proof(self, old: int, size: int | None = None) -> list[bytes]:
        """Proof that the first `old` leaves are a prefix of the tree of `size` leaves (RFC 6962 §2.1.2); empty for
        old = 0 and old = size.

        Raises:
            ValueError: There are not so many leaves.
        """
        high = self._checked(size)
        if not 0 <= old <= high:
            raise ValueError(f"there is no tree of {old} leaves")
        if old in (0, high):
            return []
        low, path, whole = 0, list[bytes](), True
        while high != old:
            middle = low + _split(high - low)
            if old <= middle:
                path.append(self._hash(middle, high))
                high = middle
            else:
                path.append(self._hash(low, middle))
                low, whole = middle, False
        return ([] if whole else [self._hash(low, high)]) + path[::-1]

    def _checked(self, size: int | None) -> int:
        if size is not None and not 0 <= size <= self.size:
            raise ValueError(f"there is no tree of {size} leaves")
        return self.size if size is None else size

    def _hash(self, low: int, high: int) -> bytes:
        """MTH of the leaves low … high − 1 (RFC 6962 §2.1), where `low` is a place at which the recursion splits."""
        if low == high:
            return EMPTY_ROOT
        parts = []
        while low < high:
            level = min((high - low).bit_length() - 1, _trailing_zeros(low) if low else 64)
            at = (low >> level) * _HASH
            parts.append(bytes(self._levels[level][at : at + _HASH]))
            low += 1 << level
        node = parts.pop()
        while parts:
            node = _node(parts.pop(), node)
        return node


def tree_root(leaves: Iterable[bytes]) -> bytes:
    """Root over leaf hashes."""
    return Tree(leaves).root()


def _trailing_zeros(number: int) -> int:
    return (number & -number).bit_length() - 1


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Is `leaf` number `index` of the tree of `size` leaves with this root? (RFC 9162 §2.1.3.2)"""
    if not 0 <= index < size:
        return False
    fn, sn, node = index, size - 1, leaf
    for part in proof:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            node = _node(part, node)
            while not fn & 1 and fn:
                fn >>= 1
                sn >>= 1
        else:
            node = _node(node, part)
        fn >>= 1
        sn >>= 1
    return sn == 0 and node == root


def consistency_proof(leaves: Sequence[bytes], old: int) -> list[bytes]:
    """Proof that the first `old` leaves are a prefix (RFC 6962 §2.1.2); empty for old = 0 and old = size."""
    return _subproof(leaves, old, True) if 0 < old < len(leaves) else []


def _subproof(leaves: Sequence[bytes], old: int, whole: bool) -> list[bytes]:
    if old == len(leaves):
        return [] if whole else [tree_root(leaves)]
    k = _split(len(leaves))
    if old <= k:
        return [*_subproof(leaves[:k], old, whole), tree_root(leaves[k:])]
    return [*_subproof(leaves[k:], old - k, False), tree_root(leaves[:k])]


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """Does the tree of `new` leaves extend the tree of `old` leaves? (RFC 9162 §2.1.4.2)"""
    if old == 0:
        return not proof and old_root == EMPTY_ROOT
    if old == new:
        return not proof and old_root == new_root
    if not 0 < old < new or not proof:
        return False
    path = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    fn, sn = old - 1, new - 1
    while fn & 1:
        fn >>= 1
        sn >>= 1
    first = second = path[0]
    for part in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            first, second = _node(part, first), _node(part, second)
            while not fn & 1 and fn:
                fn >>= 1
                sn >>= 1
        else:
            second = _node(second, part)
        fn >>= 1
        sn >>= 1
    return sn == 0 and first == old_root and second == new_root
