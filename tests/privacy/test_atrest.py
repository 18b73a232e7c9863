"""Boxes at rest: they open for the same key and context, and for nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import SealingError
from confide.privacy.atrest import close_box, new_key, open_box

KEY = bytes(range(32))
BOX = close_box(KEY, b"model of round 3", b"weights")


@given(data=st.binary(max_size=300), context=st.binary(max_size=60), key=st.binary(min_size=32, max_size=32))
@settings(deadline=None)
def test_what_was_closed_opens_to_itself(data: bytes, context: bytes, key: bytes) -> None:
    box = close_box(key, context, data)
    assert open_box(key, context, box) == data
    assert len(box) == len(data) + 28
    assert len(data) < 8 or data not in box


def test_every_single_changed_bit_is_refused() -> None:
    assert open_box(KEY, b"model of round 3", BOX) == b"weights"
    for bit in range(8 * len(BOX)):
        changed = bytearray(BOX)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealingError, match="cannot be opened"):
            open_box(KEY, b"model of round 3", bytes(changed))


@pytest.mark.parametrize("context", [b"", b"model of round 4", b"model of round 3\0", b"model of round "])
def test_another_context_is_refused(context: bytes) -> None:
    with pytest.raises(SealingError, match="cannot be opened"):
        open_box(KEY, context, BOX)


@pytest.mark.parametrize("key", [bytes(32), KEY[::-1], b"", b"short", KEY[:16], KEY[:31], KEY + b"\0"])
def test_another_key_or_none_is_refused(key: bytes) -> None:
    """A destroyed run's key is empty."""
    with pytest.raises(SealingError, match="cannot be opened"):
        open_box(key, b"model of round 3", BOX)


def test_every_shorter_box_and_a_longer_one_is_refused() -> None:
    for other in (*(BOX[:length] for length in range(len(BOX))), BOX + b"\0", BOX * 2):
        with pytest.raises(SealingError, match="cannot be opened"):
            open_box(KEY, b"model of round 3", other)


def test_no_two_boxes_share_a_nonce_and_no_two_keys_are_the_same() -> None:
    assert len({close_box(KEY, b"", b"same")[:12] for _ in range(1000)}) == 1000
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {32}
