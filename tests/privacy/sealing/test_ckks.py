"""Profile `ckks`: what opens lies exactly on the quantiser's grid, and nothing is decrypted before its tags hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings

from confide.errors import ConfigError, SealingError
from confide.privacy.sealing import CkksProfile, Payload, Segment, ckks
from confide.privacy.sealing.accumulate import LatticeAccumulator
from confide.privacy.sealing.lattice import FRESH_BYTES, KEY_BYTES, SUMMED_BYTES, pack_residues
from tests.privacy.sealing import exact
from tests.privacy.sealing.cohort import SEGMENTS, SIZE, Cohort, vectors


@given(case=exact.cases("ckks"))
@settings(max_examples=120, deadline=None)
def test_the_opened_sum_is_the_exact_integer_sum_and_the_same_bits_at_every_site(case: exact.Case) -> None:
    exact.check(case)


@pytest.mark.parametrize("bits", [8, 20])
def test_a_sum_over_a_thousand_sites_is_exact_at_the_extremes(bits: int) -> None:
    """Every ciphertext is a fresh one: a thousand sites' worth of noise."""
    lattice, top, rng = ckks.lattice(), 2**bits - 1, np.random.default_rng(bits)
    lock = ckks._Lock(lattice.generate_key())
    values = rng.integers(0, top + 1, ckks.SLOTS).astype(np.uint64)
    values[:1000], values[1000] = top, 0
    total = lattice.parse(lock.close(values), fresh=True)
    for _ in range(999):
        lattice.evaluator.add_inplace(total, lattice.parse(lock.close(values), fresh=True))
    assert np.array_equal(lock.open(lattice.summed(total)), values * np.uint64(1000))


def raw(cohort: Cohort, data: bytes) -> np.ndarray:
    """What SEAL itself decrypts: with the approximation error that must not leave."""
    lattice, plain = ckks.lattice(), seal.Plaintext()
    key: Any = lattice.parse_key(cohort.secret[:KEY_BYTES])
    seal.Decryptor(lattice.context, key).decrypt(lattice.parse(data, fresh=False), plain)
    return np.array(seal.CKKSEncoder(lattice.context).decode_double(plain))


def test_no_approximation_error_leaves_what_is_opened_lies_exactly_on_the_grid() -> None:
    cohort, top = Cohort.make(5, 16, profile="ckks"), 2**16 - 1
    segments = [Segment(3000, 0.0, float(top))]  # a grid of whole numbers
    mine = {n: np.random.default_rng(i).uniform(0, top, 3000) for i, n in enumerate(cohort.names)}
    total = cohort.total(list(cohort.seal(mine, segments).values()), 3000)
    opened = cohort.open(total, segments)
    assert np.array_equal(opened, np.rint(opened))
    decrypted = np.concatenate([raw(cohort, chunk) for chunk in total.chunks])[:3000]
    error = decrypted - np.rint(decrypted)
    assert 0 < np.max(np.abs(error)) < 2**-7, "the control: the error is there, and small"
    assert np.array_equal(opened, np.rint(decrypted))


def test_two_sums_of_the_same_integers_open_to_the_same_bits_although_their_errors_differ() -> None:
    cohort = Cohort.make(3, 12, profile="ckks")
    segments, whole = [Segment(100, 0.0, 4095.0)], np.arange(100, dtype=np.float64)
    totals = [cohort.total(list(cohort.seal(dict.fromkeys(cohort.names, whole), segments).values()), 100) for _ in "ab"]
    assert not np.array_equal(*(raw(cohort, total.chunks[0]) for total in totals))
    assert len({cohort.open(total, segments).tobytes() for total in totals}) == 1


@pytest.mark.parametrize("size", [0, 2047, 2048, 4095])
def test_what_is_sent_is_as_long_as_was_said(size: int) -> None:
    cohort = Cohort.make(3, 20, profile="ckks")
    chunks, said = size // 2048 + 1, cohort.profile.size(size)
    assert (said.uplink, said.downlink) == (chunks * FRESH_BYTES, chunks * SUMMED_BYTES)
    assert said.padding == pytest.approx(1 - (size + 1) / (chunks * 2048))
    payloads = cohort.seal({name: np.zeros(size) for name in cohort.names}, [Segment(size, -1.0, 1.0)])
    exact.check_sizes(cohort, size, payloads, cohort.total(list(payloads.values()), size))


# --- authenticate, then decrypt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["tag", "ciphertext", "noise only", "transcript", "cohort", "other key"])
def test_nothing_is_decrypted_before_the_tags_of_the_whole_sum_hold(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, size = Cohort.make(3, 16, profile="ckks"), 3000
    segments = [Segment(size, -1.0, 1.0)]
    payloads = cohort.seal({n: np.zeros(size) for n in cohort.names}, segments)
    total, agreement = cohort.total(list(payloads.values()), size), cohort.agreement()
    decrypted = []
    honest = ckks._Lock.open
    monkeypatch.setattr(ckks._Lock, "open", lambda lock, data: decrypted.append(data) or honest(lock, data))
    assert cohort.open(total, segments).shape == (size,)
    assert len(decrypted) == 2, "the control: an authentic sum is decrypted"
    decrypted.clear()

    def changed(data: bytes, place: int) -> bytes:
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    if change == "tag":
        total = Payload(total.chunks, (total.tags[0] + 1,))
    elif change == "ciphertext":
        total = Payload((total.chunks[0], changed(total.chunks[1], 50_000)), total.tags)
    elif change == "noise only":  # adds 1 to the message's first coefficient: a forger's error, too small to see
        residues = ckks.lattice().residues(total.chunks[0], fresh=False)
        residues[:4096] = (residues[:4096] + np.uint64(1)) % np.uint64(ckks.lattice().modulus)
        nudged, lock = pack_residues(residues), cohort.sessions["site-0000"]._lock
        assert np.array_equal(honest(lock, nudged), honest(lock, total.chunks[0])), "it would open to the same"
        total = Payload((nudged, total.chunks[1]), total.tags)
    elif change == "transcript":
        agreement = cohort.agreement(transcript="cd" * 32)
    elif change == "cohort":
        agreement = cohort.agreement(cohort.names[:2])
    else:
        stranger = Cohort.make(3, 16, profile="ckks")
        foreign = stranger.seal({n: np.zeros(size) for n in stranger.names}, segments)
        total = Payload(stranger.total(list(foreign.values()), size).chunks, total.tags)
    with pytest.raises(SealingError, match="not the authenticated sum"):
        cohort.open(total, segments, agreement)
    assert decrypted == []


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_an_incomplete_sum_is_refused_before_anything_is_decrypted(
    chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, size = Cohort.make(3, 16, profile="ckks"), 3000
    segments = [Segment(size, -1.0, 1.0)]
    total = cohort.total(list(cohort.seal({n: np.zeros(size) for n in cohort.names}, segments).values()), size)
    monkeypatch.setattr(ckks._Lock, "open", lambda *_: pytest.fail("decrypted"))
    with pytest.raises(SealingError, match="not complete"):
        cohort.open(Payload((total.chunks * 2)[:chunks], total.tags), segments)


def authentic(cohort: Cohort, chunk: bytes, segments: list[Segment]) -> SealingError:
    """What happens to a sum that is none but whose tag is right: somebody who holds the MAC key made it."""
    agreement, session = cohort.agreement(), cohort.sessions["site-0000"]
    mac = session._mac(agreement)
    products = mac.products(0, ckks.lattice().residues(chunk, fresh=False))
    pads = sum(mac.tags(site, (0,))[0] for site in agreement.cohort)
    total = Payload((chunk,), ((pads + products[0]) % ckks.lattice().modulus,))
    with pytest.raises(SealingError) as caught:
        cohort.open(total, segments, agreement)
    return caught.value


def test_garbage_and_values_off_the_grid_are_refused_even_with_the_right_tag() -> None:
    cohort, lattice = Cohort.make(3, 16, profile="ckks"), ckks.lattice()
    segments = [Segment(8, 0.0, 65535.0)]
    garbage = pack_residues(np.random.default_rng(1).integers(0, lattice.modulus, 8192).astype(np.uint64))
    assert "more error" in authentic(cohort, garbage, segments).what
    key: Any = lattice.parse_key(cohort.secret[:KEY_BYTES])
    encryptor, encoder, plain = (
        seal.Encryptor(lattice.context, key),
        seal.CKKSEncoder(lattice.context),
        seal.Plaintext(),
    )
    for values, said in (
        ([7.5] * 2048, "more error"),
        ([7.0] * 2047 + [7.3], "more error"),
        ([7.0] * 2047 + [-1.0], "more error"),
        ([7.0] * 2047 + [3 * 65535.0 + 1], "no honest sum"),
    ):
        encoder.encode(values, 2.0**24, plain)
        chunk = lattice.summed(lattice.parse(lattice.fresh(lambda: encryptor.encrypt_symmetric(plain)), fresh=True))
        assert said in authentic(cohort, chunk, segments).what


# --- magnitudes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [31, 40, 59])
def test_a_sum_that_would_wrap_is_refused_at_construction(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CkksProfile(1000, 20).parameters["log2_scale"] == 24, "the largest request that there is fits"
    monkeypatch.setattr(ckks, "_SCALE_BITS", scale)
    with pytest.raises(ConfigError, match="would wrap") as caught:
        CkksProfile(1000, 20)
    assert caught.value.hint == "use fewer bits or sites"


def test_beyond_the_bound_a_sum_wraps_in_silence() -> None:
    """Why there is one: the control of the refusal above."""
    lattice = ckks.lattice()
    lock = ckks._Lock(lattice.generate_key())

    def added(times: int) -> set[int]:
        parts = [lattice.parse(lock.close(np.full(2048, 2**33, dtype=np.uint64)), fresh=True) for _ in range(times)]
        for part in parts[1:]:
            lattice.evaluator.add_inplace(parts[0], part)
        return set(lock.open(lattice.summed(parts[0])).tolist())

    assert added(2) == {2 * 2**33}
    assert added(9) == {2**33}


def test_there_are_no_masks_one_key_opens_one_sites_payload() -> None:
    """As the exposure table says: the coordinator and any one site read every update."""
    cohort = Cohort.make(3, 16, profile="ckks")
    mine = vectors(cohort)
    payload = cohort.seal(mine, SEGMENTS)["site-0001"]
    summed = cohort.total([payload], SIZE)
    read = cohort.sessions["site-0000"]._lock.open(summed.chunks[0])[:6] / 65535 - 0.5
    assert np.allclose(read, mine["site-0001"][:6], atol=1e-4)
    assert cohort.profile.describe_exposure()[2].update


def test_no_attempt_can_be_repeated() -> None:
    cohort = Cohort.make(3, profile="ckks")
    with pytest.raises(SealingError, match="no mask of a site's own"):
        cohort.sessions["site-0000"].unlock(dataclasses.replace(cohort.agreement(), self_masked=True))


def test_the_coordinators_side_holds_nothing_that_depends_on_a_secret() -> None:
    cohort = Cohort.make(profile="ckks")
    assert vars(cohort.profile) == {"sites": 4, "bits": 16}
    accumulator = cohort.profile.accumulator(SIZE)
    assert isinstance(accumulator, LatticeAccumulator)
    assert set(vars(accumulator)) == {"_lattice", "_count", "_modulus", "_total", "_tags"}
    assert accumulator._lattice is ckks.lattice(), "one context, which holds no secret"
