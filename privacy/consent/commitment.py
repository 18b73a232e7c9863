"""A commitment to who is in a round's snapshot: 32 bytes that say nothing, and from which presence *and* absence of one
person can be shown later by whoever holds the keys.

It is a sparse Merkle tree over 256-bit indices, in which a subtree with one leaf is that leaf (Dahlberg, Pulls and
Peeters 2016; indices by a pseudorandom function as in CONIKS, Melara et al. 2015). A member's index is PRF(k, member)
with a key k of its own for each round, so roots and indices of two rounds have nothing in common, and without k nobody
can look for a person whose identifier she knows.

Invariants:
1. One root, one answer: on the path of an index lies its own leaf, another leaf, or nothing. A root of which presence
   and absence of one member could both be shown would be a collision of SHA-256.
2. The tree is filled up with leaves under a second key that is never opened, to a public number; so neither a root nor
   the length of a proof tells how many members there are, up to that number.
3. A proof opens k and one path. With k alone nobody can test a member whose name (a keyed pseudonym) she does not know.

PRF: BLAKE2b, keyed (RFC 7693). Nodes: SHA-256, told apart by their first byte as in RFC 6962.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["MembershipProof", "RoundKeys", "SnapshotCommitment", "member_name", "slots_for", "verify_membership"]

_LEAF, _NODE = b"\x00", b"\x01"
_EMPTY = hashlib.sha256(b"\x02").digest()
_BITS = 256


@dataclass(frozen=True, slots=True, repr=False)
class RoundKeys:
    """Keys of one round's commitment, 32 bytes each: `opening` is shown with a proof, `filling` never."""

    opening: bytes
    filling: bytes


@dataclass(frozen=True, slots=True)
class MembershipProof:
    """The path of one member, and what lies at its end.

    Attributes:
        present: The member's own leaf lies there.
        other: The index of another leaf that lies there; None where there is none.
        siblings: Hashes beside the path, from the root down.
    """

    present: bool
    other: bytes | None
    siblings: tuple[bytes, ...]


class SnapshotCommitment:
    """The tree over one round's members.

    Args:
        keys: The round's keys.
        members: Names of the members, in any order, each once.
        slots: The public number of leaves that the tree is filled up to.
    """

    def __init__(self, keys: RoundKeys, members: Iterable[bytes], slots: int) -> None:
        self._keys = keys
        index, filled = _prf(keys.opening), _prf(keys.filling)
        own = [index(member) for member in members]
        own += [filled(number.to_bytes(8, "big")) for number in range(slots - len(own))]
        self._leaves, self._shared = _sorted(own)
        self._root: bytes | None = None

    @property
    def root(self) -> bytes:
        """The commitment, 32 bytes."""
        if self._root is None:
            self._root = self._fold(0, len(self._leaves), 0)
        return self._root

    def prove(self, member: bytes) -> MembershipProof:
        """Show that a member is there, or is not."""
        index = index_of(self._keys.opening, member)
        start, stop, siblings = 0, len(self._leaves), list[bytes]()
        while stop - start > 1:
            depth = len(siblings)
            middle = self._first_with(index, depth, start, stop)
            here, beside = (
                ((middle, stop), (start, middle)) if _bit(index, depth) else ((start, middle), (middle, stop))
            )
            siblings.append(self._fold(*beside, depth + 1))
            start, stop = here
        found = self._leaves[start] if stop > start else None
        return MembershipProof(found == index, None if found == index else found, tuple(siblings))

    def _first_with(self, index: bytes, depth: int, start: int, stop: int) -> int:
        """The first leaf in the range with a one at this depth; all of the range share the bits of `index` before."""
        value = int.from_bytes(index, "big") >> (_BITS - depth)
        return bisect_left(self._leaves, ((value << 1 | 1) << (_BITS - depth - 1)).to_bytes(32, "big"), start, stop)

    def _fold(self, start: int, stop: int, top: int) -> bytes:
        """Hash of the subtree over a range of leaves, as it lies at depth `top`."""
        sha256, number = hashlib.sha256, int.from_bytes
        stack: list[tuple[int, bytes]] = []
        node, before = _EMPTY, top - 1
        shared = [*self._shared[start : stop - 1], top - 1]
        for index, after in zip(self._leaves[start:stop], shared, strict=False):
            node = sha256(_LEAF + index).digest()
            depth = 1 + (after if after > before else before)
            # Two leaves seldom share more than the first bits: small numbers are shifted faster.
            bits = number(index[:7], "big") >> (56 - depth) if depth <= 56 else number(index, "big") >> (_BITS - depth)
            before = after
            while depth > after + 1:
                if bits & 1:
                    left = stack.pop()[1] if stack and stack[-1][0] == depth else _EMPTY
                    node = sha256(_NODE + left + node).digest()
                else:
                    node = sha256(_NODE + node + _EMPTY).digest()
                bits >>= 1
                depth -= 1
            stack.append((depth, node))
        return node


def verify_membership(root: bytes, opening: bytes, member: bytes, proof: MembershipProof) -> bool:
    """Does the proof hold for this root? Then `proof.present` says whether the member is in the snapshot."""
    index, depth = index_of(opening, member), len(proof.siblings)
    if depth > _BITS or any(len(part) != 32 for part in proof.siblings):
        return False
    if proof.present:
        if proof.other is not None:
            return False
        node = hashlib.sha256(_LEAF + index).digest()
    elif proof.other is None:
        node = _EMPTY
    else:
        if len(proof.other) != 32 or proof.other == index or _prefix(proof.other, depth) != _prefix(index, depth):
            return False
        node = hashlib.sha256(_LEAF + proof.other).digest()
    for level in range(depth - 1, -1, -1):
        beside = proof.siblings[level]
        pair = beside + node if _bit(index, level) else node + beside
        node = hashlib.sha256(_NODE + pair).digest()
    return node == root


def member_name(role: str, pseudonym: bytes) -> bytes:
    """What a person is called in a commitment: in which role she takes part, and her pseudonym."""
    return role.encode() + b"\0" + pseudonym


def slots_for(population: int, members: int) -> int:
    """Leaves of a snapshot: the declared population, or all members where there are more, up to a power of two."""
    return 1 << max(population, members, 1).bit_length()


def index_of(key: bytes, member: bytes) -> bytes:
    """PRF(key, member), 32 bytes."""
    return _prf(key)(member)


def _prf(key: bytes) -> Callable[[bytes], bytes]:
    """PRF(key, ·). The key is taken in once, and copied for every member: that is a third of the work."""
    keyed = hashlib.blake2b(key=key, digest_size=32)

    def index(member: bytes) -> bytes:
        taken = keyed.copy()
        taken.update(member)
        return taken.digest()

    return index


def _sorted(indices: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
    """Leaves in order, and how many leading bits each shares with the next (the last: 0)."""
    if len(indices) < 2:
        return list(indices), [0] * len(indices)
    first = np.frombuffer(b"".join(indices), dtype=">u8")[:: _BITS // 64].astype(np.uint64)
    order = np.argsort(first, kind="stable")
    ordered = [indices[place] for place in order.tolist()]
    shared = _leading_zeros(first[order][1:] ^ first[order][:-1])
    if int(shared.max()) == 64:  # two agree in 64 bits: as good as never, but then they are put in order one by one
        ordered.sort()
        if any(a == b for a, b in pairwise(ordered)):
            raise ValueError("a member stands twice in a snapshot")
        return ordered, [*(_shared_bits(a, b) for a, b in pairwise(ordered)), 0]
    return ordered, [*shared.tolist(), 0]


def _leading_zeros(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Leading zero bits of 64; 64 for zero. In halves, because a float64 holds 32 bits exactly and not 64."""
    high = (values >> np.uint64(32)).astype(np.float64)
    low = (values & np.uint64(0xFFFFFFFF)).astype(np.float64)
    bits = np.where(high > 0, 32 + np.frexp(high)[1], np.frexp(low)[1])
    return (64 - bits).astype(np.int64)


def _shared_bits(one: bytes, other: bytes) -> int:
    return _BITS - (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_length()


def _bit(index: bytes, depth: int) -> int:
    return index[depth >> 3] >> (7 - (depth & 7)) & 1


def _prefix(index: bytes, bits: int) -> int:
    return int.from_bytes(index, "big") >> (_BITS - bits)
