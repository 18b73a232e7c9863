"""A site's side: attempts and own masks, keys that end, and every sum but the agreed one refused."""

from __future__ import annotations

import dataclasses
import random
import secrets
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from confide.errors import DataError, SealingError
from confide.privacy.sealing import Payload, Segment
from confide.privacy.sealing.quantise import quantise
from tests.privacy.sealing import exact
from tests.privacy.sealing.cohort import SEGMENTS, SIZE, Cohort, vectors

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


# --- own masks: attempts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["sealed", "masked"])
def test_a_repeated_attempt_with_fewer_sites_opens_and_the_abandoned_one_stays_shut(profile: str) -> None:
    cohort = Cohort.make(4, 16, profile=profile)
    mine = vectors(cohort)
    first = cohort.agreement(transcript="01" * 32, self_masked=True)
    second = cohort.agreement(cohort.names[:3], transcript="02" * 32, self_masked=True)
    abandoned = cohort.seal(mine, SEGMENTS, first)
    rest = {name: mine[name] for name in second.cohort}
    total = cohort.total(list(cohort.seal(rest, SEGMENTS, second).values()), SIZE)
    opened = cohort.open(total, SEGMENTS, cohort.unlocked(second))
    assert np.allclose(opened, sum(rest.values()), atol=0.01)
    seeds = cohort.unlocked(second).unlocked
    assert not set(seeds) & set(cohort.unlocked(first).unlocked), "what is unlocked opens no other attempt"
    whole = cohort.total(list(abandoned.values()), SIZE)
    fourth = cohort.sessions[cohort.names[3]].unlock(second)
    with pytest.raises(SealingError):
        cohort.open(whole, SEGMENTS, dataclasses.replace(first, unlocked=(*seeds, fourth)))


@pytest.mark.parametrize("profile", ["sealed", "masked"])
@pytest.mark.parametrize("wrong", ["none", "one missing", "one too many", "another seed", "not said to be masked"])
def test_a_sum_with_own_masks_opens_only_with_every_seed(profile: str, wrong: str) -> None:
    cohort = Cohort.make(3, 16, profile=profile)
    agreement = cohort.agreement(self_masked=True)
    total = cohort.total(list(cohort.seal(vectors(cohort), SEGMENTS, agreement).values()), SIZE)
    right = cohort.unlocked(agreement)
    assert cohort.open(total, SEGMENTS, right).shape == (SIZE,)
    changed = {
        "none": agreement,
        "one missing": dataclasses.replace(right, unlocked=right.unlocked[:2]),
        "one too many": dataclasses.replace(right, unlocked=(*right.unlocked, bytes(32))),
        "another seed": dataclasses.replace(right, unlocked=(*right.unlocked[:2], bytes(32))),
        "not said to be masked": cohort.agreement(),
    }[wrong]
    counted = wrong in ("none", "one missing", "one too many")
    with pytest.raises(SealingError, match="lacks what its cohort unlocked" if counted else "no honest sum"):
        cohort.open(total, SEGMENTS, changed)


def test_the_seed_of_an_own_mask_is_the_same_each_time_and_different_for_every_site_and_transcript() -> None:
    cohort = Cohort.make(3)
    seeds = {
        session.unlock(cohort.agreement(transcript=x))
        for session in cohort.sessions.values()
        for x in ("01" * 32, "02" * 32)
    }
    assert len(seeds) == 6
    session = cohort.sessions["site-0000"]
    assert session.unlock(cohort.agreement()) == session.unlock(cohort.agreement())


# --- other secrets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1])
def test_another_secret_at_one_site_is_noticed_when_the_sum_is_opened(position: int) -> None:
    cohort = Cohort.make()
    name = cohort.names[position]
    other = cohort.profile.session(name, cohort.profile.make_secret(), cohort.private[name], cohort.public)
    assert other.secret_digest != cohort.sessions[name].secret_digest
    mine = vectors(cohort)
    payloads = cohort.seal(mine, SEGMENTS)
    cohort.open(cohort.total(list(payloads.values()), SIZE), SEGMENTS)  # the control: opens
    payloads[name] = other.seal(mine[name], SEGMENTS, cohort.agreement()).payload()
    with pytest.raises(SealingError):
        cohort.open(cohort.total(list(payloads.values()), SIZE), SEGMENTS, site=cohort.names[2])


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_another_mac_key_alone_is_noticed(profile: str) -> None:
    cohort = Cohort.make(profile=profile)
    name = cohort.names[0]
    half = cohort.secret[:-32] + bytes(32)
    other = cohort.profile.session(name, half, cohort.private[name], cohort.public)
    mine = vectors(cohort)
    payloads = cohort.seal(mine, SEGMENTS)
    payloads[name] = other.seal(mine[name], SEGMENTS, cohort.agreement()).payload()
    with pytest.raises(SealingError, match="authenticated"):
        cohort.open(cohort.total(list(payloads.values()), SIZE), SEGMENTS, site=cohort.names[2])


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_secret_that_is_none_is_refused(profile: str) -> None:
    cohort = Cohort.make(profile=profile)
    right = len(cohort.secret)
    hostile = [b"", bytes(right - 1), bytes(right + 1), bytes(100)]
    if profile != "masked":  # whose secret is any 32 bytes
        hostile += [bytes(32), b"\xff" * right]
    for secret in hostile:
        with pytest.raises(SealingError):
            cohort.profile.session("site-0000", secret, cohort.private["site-0000"], cohort.public)


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_destroyed_session_refuses_everything_and_holds_no_key(profile: str) -> None:
    cohort = Cohort.make(profile=profile)
    mine, session = vectors(cohort), cohort.sessions["site-0000"]
    total = cohort.total(list(cohort.seal(mine, SEGMENTS).values()), SIZE)
    assert cohort.open(total, SEGMENTS).shape == (SIZE,)
    session.destroy()
    with pytest.raises(SealingError, match=r"destroyed|no ephemeral"):
        session.seal(mine["site-0000"], SEGMENTS, cohort.agreement()).payload()
    with pytest.raises(SealingError, match="destroyed"):
        session.open(total, SEGMENTS, cohort.agreement())
    assert session._lock is None
    assert session._mac_key == b""
    if profile != "ckks":
        with pytest.raises(SealingError, match="destroyed"):
            session.unlock(cohort.agreement(self_masked=True))
        assert session._own_key == b""
        assert not session._pairs._shared
        assert session._pairs._private is None


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_site_does_not_seal_for_a_cohort_without_itself_or_larger_than_the_parameters(profile: str) -> None:
    cohort = Cohort.make(5, most=4, profile=profile)
    mine = vectors(cohort)["site-0000"]
    for members in (cohort.names[1:4], cohort.names):
        with pytest.raises(SealingError, match="cannot seal"):
            cohort.sessions["site-0000"].seal(mine, SEGMENTS, cohort.agreement(members))
    sealing = cohort.sessions["site-0000"].seal(mine, SEGMENTS, cohort.agreement(cohort.names[:4]))
    assert sealing.payload().chunks


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_an_update_with_a_coordinate_that_is_no_number_is_the_sites_own_affair(profile: str) -> None:
    cohort = Cohort.make(3, profile=profile)
    vector = vectors(cohort)["site-0000"]
    vector[3] = np.nan
    with pytest.raises(DataError):
        cohort.sessions["site-0000"].seal(vector, SEGMENTS, cohort.agreement()).payload()


def flipped(data: bytes, bit: int) -> bytes:
    """One bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


CHANGES: dict[str, Callable[[Payload], Payload]] = {
    "another tag": lambda p: Payload(p.chunks, (p.tags[0] ^ 1,)),
    "no tag": lambda p: Payload(p.chunks, ()),
    "a tag twice": lambda p: Payload(p.chunks, p.tags * 2),
    "no chunk": lambda p: Payload((), p.tags),
    "a chunk missing": lambda p: Payload(p.chunks[:-1], p.tags),
    "a chunk twice": lambda p: Payload((*p.chunks, p.chunks[0]), p.tags),
    "chunks swapped": lambda p: Payload((p.chunks[1], p.chunks[0], *p.chunks[2:]), p.tags),
    "one chunk for another": lambda p: Payload((p.chunks[1], *p.chunks[1:]), p.tags),
    "a byte missing": lambda p: Payload((p.chunks[0][:-1], *p.chunks[1:]), p.tags),
    "a byte more": lambda p: Payload((p.chunks[0] + b"\0", *p.chunks[1:]), p.tags),
    "a bit flipped": lambda p: Payload((flipped(p.chunks[0], 48), *p.chunks[1:]), p.tags),
    "the last bit flipped": lambda p: Payload((*p.chunks[:-1], flipped(p.chunks[-1], -1)), p.tags),
    "zeros": lambda p: Payload(tuple(bytes(len(c)) for c in p.chunks), p.tags),
    "ones": lambda p: Payload(tuple(b"\xff" * len(c) for c in p.chunks), p.tags),
    "nothing": lambda p: Payload(tuple(b"" for _ in p.chunks), p.tags),
}  # fmt: skip


@pytest.fixture(scope="module")
def sums() -> dict[str, tuple[Cohort, Payload, list[Segment]]]:
    """A sum of three chunks for each profile."""
    found = {}
    for profile in ("sealed", "masked", "ckks"):
        cohort = Cohort.make(3, 20, profile=profile)
        size = 2 * exact.coordinates(profile, 3, 20) + 100
        segments = [Segment(size, -1.0, 1.0)]
        mine = {n: np.random.default_rng(i).uniform(-1, 1, size) for i, n in enumerate(cohort.names)}
        found[profile] = (cohort, cohort.total(list(cohort.seal(mine, segments).values()), size), segments)
    return found


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
@pytest.mark.parametrize("change", CHANGES)
def test_no_changed_sum_opens(
    profile: str, change: str, sums: dict[str, tuple[Cohort, Payload, list[Segment]]]
) -> None:
    cohort, total, segments = sums[profile]
    assert len(total.chunks) == 3
    assert cohort.open(total, segments).shape == (segments[0].size,)
    with pytest.raises(SealingError):
        cohort.open(CHANGES[change](total), segments)


def test_a_change_within_the_noise_changes_nothing_that_opens(
    sums: dict[str, tuple[Cohort, Payload, list[Segment]]],
) -> None:
    """The tags are over what opens, not over the ciphertext: a flip of the lowest bit is so much more noise."""
    cohort, total, segments = sums["sealed"]
    changed = Payload((flipped(total.chunks[0], 0), *total.chunks[1:]), total.tags)
    assert cohort.open(changed, segments).tobytes() == cohort.open(total, segments).tobytes()


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_sum_opens_only_for_the_cohort_and_the_transcript_that_were_agreed(
    profile: str, sums: dict[str, tuple[Cohort, Payload, list[Segment]]]
) -> None:
    cohort, total, segments = sums[profile]
    for agreement in (cohort.agreement(transcript="cd" * 32), cohort.agreement(cohort.names[:2])):
        with pytest.raises(SealingError, match="authenticated"):
            cohort.open(total, segments, agreement)


@pytest.mark.parametrize("profile", ["sealed", "masked"])
@pytest.mark.parametrize("fewer", [2, 3, 6000])
def test_fewer_coordinates_than_were_sealed_are_not_read_as_padding(profile: str, fewer: int) -> None:
    cohort = Cohort.make(3, 20, profile=profile)
    size = exact.coordinates(profile, 3, 20) - 100
    segments = [Segment(size, 0.5, 1.0)]
    mine = {n: np.full(size, 0.75) for n in cohort.names}
    total = cohort.total(list(cohort.seal(mine, segments).values()), size)
    assert cohort.open(total, segments).shape == (size,)
    with pytest.raises(SealingError):
        cohort.open(total, [Segment(size - fewer, 0.5, 1.0)])


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_a_field_that_no_honest_sum_has_is_refused_although_the_tags_are_right(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that seals integers above the range does not get its sum through: nothing may wrap."""
    cohort = Cohort.make(3, 12, most=6, profile=profile)
    top = 2**12 - 1
    segments = [Segment(4, 0.0, float(top))]
    mine = {n: np.full(4, float(top)) for n in cohort.names}
    assert cohort.open(cohort.total(list(cohort.seal(mine, segments).values()), 4), segments).tolist() == [3 * top] * 4

    def cheat(values: Floats, low: float, high: float, bits: int, rng: object) -> tuple[Words, int]:
        return values.astype(np.uint64) + np.uint64(1), 0

    monkeypatch.setattr("confide.privacy.sealing.encoding.quantise", cheat)
    total = cohort.total(list(cohort.seal(mine, segments).values()), 4)
    with pytest.raises(SealingError, match="no honest sum"):
        cohort.open(total, segments)


@pytest.mark.parametrize("profile", ["sealed", "masked", "ckks"])
def test_no_seed_reaches_what_a_session_draws(profile: str) -> None:
    cohort = Cohort.make(2, profile=profile)
    draws, seeds = [], []
    for _ in range(2):
        np.random.seed(1)  # the point of the test
        random.seed(1)
        session = cohort.profile.session("site-0000", cohort.secret, cohort.private["site-0000"], cohort.public)
        draws.append(quantise(np.full(500, 0.01234), -0.5, 0.5, 8, session._rng)[0])
        seeds.append(session.unlock(cohort.agreement()) if cohort.profile.name != "ckks" else secrets.token_bytes(32))
    assert not np.array_equal(*draws)
    assert seeds[0] != seeds[1]
