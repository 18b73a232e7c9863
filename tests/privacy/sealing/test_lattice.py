"""Our own bytes around SEAL: nothing is lost, nothing else is accepted, and no sender's framing ever reaches SEAL."""

from __future__ import annotations

import os
import secrets
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing import ckks
from confide.privacy.sealing.bfv import BfvLock, lattice_for
from confide.privacy.sealing.lattice import (
    FRESH_BYTES,
    KEY_BYTES,
    SUMMED_BYTES,
    Lattice,
    pack_residues,
    unpack_residues,
)
from confide.privacy.sealing.parameters import DEGREE, choose_parameters

Words = NDArray[np.uint64]
CHOICE = choose_parameters(6, 20)
LATTICE = lattice_for(CHOICE)
KEY = LATTICE.generate_key()
LOCK = BfvLock(CHOICE, KEY)
SLOTS = np.random.default_rng(1).integers(0, CHOICE.plain_modulus, DEGREE).astype(np.uint64)


def file_of(thing: Any, folder: Path) -> bytes:
    """What SEAL itself saves."""
    thing.save(str(folder / "saved"))
    return (folder / "saved").read_bytes()


def by_seal(data: bytes, folder: Path, thing: Any = None) -> Any:
    """What SEAL's own loader makes of bytes."""
    thing = thing or seal.Ciphertext(LATTICE.context)
    (folder / "given").write_bytes(data)
    thing.load(LATTICE.context, str(folder / "given"))
    return thing


def fresh_pair() -> tuple[Any, Any, bytes]:
    """One encryption: SEAL's object, its plaintext, and our bytes."""
    secret = LATTICE.parse_key(KEY)
    encryptor, plain = seal.Encryptor(LATTICE.context, secret), seal.Plaintext()
    seal.BatchEncoder(LATTICE.context).encode(SLOTS.tolist(), plain)
    made = []
    data = LATTICE.fresh(lambda: made.append(encryptor.encrypt_symmetric(plain)) or made[-1])
    return made[-1], plain, data


def residues_of(ciphertext: Any) -> Words:
    """Both polynomials, as SEAL holds them in memory."""
    array = ciphertext.dyn_array()
    return np.array([array.at(i) for i in range(2 * DEGREE)], dtype=np.uint64)


# --- sixty bits each --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**60 - 1), min_size=2, max_size=200).map(lambda v: v[: len(v) // 2 * 2]))
@settings(deadline=None)
def test_residues_are_packed_at_sixty_bits_and_come_back(values: list[int]) -> None:
    data = pack_residues(np.array(values, dtype=np.uint64))
    assert len(data) * 8 == 60 * len(values)
    assert int.from_bytes(data, "little") == sum(value << 60 * i for i, value in enumerate(values))
    found = unpack_residues(data)
    assert (found.tolist(), found.dtype) == (values, np.uint64)


@given(st.binary(min_size=15, max_size=150).map(lambda b: b[: len(b) // 15 * 15]))
@settings(deadline=None)
def test_no_two_encodings_hold_the_same_residues(data: bytes) -> None:
    assert pack_residues(unpack_residues(data)) == data


def test_the_lengths_are_what_the_reports_say() -> None:
    assert (FRESH_BYTES, SUMMED_BYTES, KEY_BYTES) == (30_784, 61_440, 30_720)
    fresh = LOCK.close(SLOTS)
    assert len(fresh) == FRESH_BYTES
    assert len(LATTICE.summed(LATTICE.parse(fresh, fresh=True))) == SUMMED_BYTES
    assert len(KEY) == KEY_BYTES


# --- against SEAL's own format ----------------------------------------------------------------------------------------


def test_a_fresh_ciphertext_is_the_one_that_seals_own_format_carries(tmp_path: Path) -> None:
    for _ in range(5):
        made, _, data = fresh_pair()
        theirs = by_seal(file_of(made, tmp_path), tmp_path)
        ours = LATTICE.parse(data, fresh=True)
        assert np.array_equal(residues_of(ours), residues_of(theirs))
        assert ours.parms_id() == theirs.parms_id()
        assert np.array_equal(LATTICE.residues(data, fresh=True), residues_of(theirs)[:DEGREE])
        assert len(data) < len(file_of(made, tmp_path)) * 0.94, "and shorter"


def test_a_sum_is_the_one_that_seals_own_format_carries(tmp_path: Path) -> None:
    total = LATTICE.parse(LOCK.close(SLOTS), fresh=True)
    LATTICE.evaluator.add_inplace(total, LATTICE.parse(LOCK.close(SLOTS), fresh=True))
    data = LATTICE.summed(total)
    theirs = by_seal(file_of(total, tmp_path), tmp_path)
    assert np.array_equal(LATTICE.residues(data, fresh=False), residues_of(theirs))
    assert np.array_equal(residues_of(LATTICE.parse(data, fresh=False)), residues_of(theirs))
    assert LATTICE.summed(LATTICE.parse(data, fresh=False)) == data


def test_a_key_is_the_one_that_seals_own_format_carries(tmp_path: Path) -> None:
    key = LATTICE.parse_key(KEY)
    theirs = by_seal(file_of(key, tmp_path), tmp_path, seal.SecretKey())
    made, plain, _ = fresh_pair()
    for secret in (key, theirs):
        opened = seal.Plaintext()
        seal.Decryptor(LATTICE.context, secret).decrypt(by_seal(file_of(made, tmp_path), tmp_path), opened)
        assert opened.to_string() == plain.to_string()
    assert np.array_equal(unpack_residues(KEY), _key_residues(theirs))


def _key_residues(key: Any) -> Words:
    array = key.data().dyn_array()
    return np.array([array.at(i) for i in range(DEGREE)], dtype=np.uint64)


def test_what_was_encrypted_is_decrypted_whichever_way_the_bytes_went() -> None:
    fresh = LOCK.close(SLOTS)
    summed = LATTICE.summed(LATTICE.parse(fresh, fresh=True))
    assert np.array_equal(LOCK.open(summed), SLOTS)
    another = BfvLock(CHOICE, LATTICE.generate_key())
    with pytest.raises(SealingError, match="more noise"):
        another.open(summed)


def test_a_sum_that_seals_compressor_finds_compressible_is_written_all_the_same() -> None:
    """SEAL then frames it otherwise: the residues are read one by one."""
    low = np.zeros(2 * DEGREE, dtype=np.uint64)
    low[DEGREE + 5] = 7  # all but transparent
    data = pack_residues(low)
    ciphertext = LATTICE.parse(data, fresh=False)
    assert LATTICE._content(ciphertext) is None, "the control: it is compressible"
    assert LATTICE.summed(ciphertext) == data


def test_an_encryption_that_is_compressible_is_made_again() -> None:
    made, _, _ = fresh_pair()
    flat = LATTICE.parse(pack_residues(np.ones(2 * DEGREE, dtype=np.uint64)), fresh=False)
    answers = [flat, flat, made]
    assert LATTICE.parse(LATTICE.fresh(lambda: answers.pop(0)), fresh=True) is not None
    assert not answers


def test_two_keys_and_two_encryptions_have_nothing_in_common() -> None:
    assert not np.any(unpack_residues(KEY) == unpack_residues(LATTICE.generate_key()))
    one, other = LOCK.close(SLOTS), LOCK.close(SLOTS)
    assert not np.any(LATTICE.residues(one, fresh=True) == LATTICE.residues(other, fresh=True))
    assert one[-64:] != other[-64:]


# --- hostile bytes ----------------------------------------------------------------------------------------------------

GOOD = {True: LOCK.close(SLOTS), False: LATTICE.summed(LATTICE.parse(LOCK.close(SLOTS), fresh=True))}


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEAL must not be asked."""

    def load(*_: object) -> None:
        pytest.fail("SEAL saw bytes that should have been refused before")

    monkeypatch.setattr(LATTICE._file, "load", load)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("fresh", [True, False])
def test_any_other_length_is_refused_before_seal_sees_it(fresh: bool) -> None:
    good = GOOD[fresh]
    for data in (b"", good[:-1], good + b"\0", good[:-15], good * 2, good[: len(good) // 2], bytes(15)):
        with pytest.raises(SealingError, match="a length that no honest"):
            LATTICE.parse(data, fresh=fresh)
    with pytest.raises(SealingError, match="a length that no honest"):
        LATTICE.parse(GOOD[not fresh], fresh=fresh)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2000, -1])
@pytest.mark.parametrize("value", [LATTICE.modulus, LATTICE.modulus + 1, 2**60 - 1])
def test_a_residue_that_is_not_below_q_is_refused_before_seal_sees_it(fresh: bool, place: int, value: int) -> None:
    body, seed = (GOOD[True][:-64], GOOD[True][-64:]) if fresh else (GOOD[False], b"")
    residues = unpack_residues(body)
    residues[place] = value
    with pytest.raises(SealingError, match="not below q"):
        LATTICE.parse(pack_residues(residues) + seed, fresh=fresh)


@pytest.mark.parametrize("fresh", [True, False])
def test_the_largest_residue_is_still_accepted(fresh: bool) -> None:
    body, seed = (GOOD[True][:-64], GOOD[True][-64:]) if fresh else (GOOD[False], b"")
    residues = unpack_residues(body)
    residues[:] = LATTICE.modulus - 1
    found = LATTICE.parse(pack_residues(residues) + seed, fresh=fresh)
    assert int(residues_of(found)[7]) == LATTICE.modulus - 1


@pytest.mark.parametrize("first", [np.zeros(DEGREE, dtype=np.uint64), SLOTS])
def test_a_transparent_ciphertext_which_opens_without_any_key_is_refused(first: Words) -> None:
    residues = np.concatenate([first, np.zeros(DEGREE, dtype=np.uint64)])
    with pytest.raises(SealingError, match="transparent"):
        LATTICE.parse(pack_residues(residues), fresh=False)
    with pytest.raises(SealingError, match="transparent"):
        LOCK.open(pack_residues(residues))
    residues[-1] = 1
    assert LATTICE.parse(pack_residues(residues), fresh=False) is not None


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    """SEAL's own format, compressed: sixteen polynomials of nothing in a few hundred bytes."""
    flat = seal.Ciphertext(LATTICE.context)
    flat.resize(LATTICE.context, 16)
    data = file_of(flat, tmp_path)
    assert len(data) < 1000
    assert by_seal(data, tmp_path).size() == 16, "the control: SEAL's loader inflates half a megabyte from it"
    return data


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("fresh", [True, False])
def test_a_bomb_in_seals_own_format_is_refused_by_its_length_alone(bomb: bytes, fresh: bool) -> None:
    with pytest.raises(SealingError, match="a length that no honest"):
        LATTICE.parse(bomb, fresh=fresh)


@pytest.mark.parametrize("fresh", [True, False])
def test_whatever_comes_seal_is_given_a_frame_that_differs_from_an_honest_one_only_in_residues_and_seed(
    fresh: bool, bomb: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sender chooses a header, a size, a scale or a compression, not even with a bomb padded to the right length."""
    seen, load = list[bytes](), LATTICE._file.load

    def watched(thing: Any, context: Any, data: bytes) -> None:
        seen.append(data)
        load(thing, context, data)

    monkeypatch.setattr(LATTICE._file, "load", watched)
    LATTICE.parse(GOOD[fresh], fresh=fresh)
    for _ in range(20):
        hostile = secrets.token_bytes(len(GOOD[fresh]))
        body, seed = (hostile[:-64], hostile[-64:]) if fresh else (hostile, b"")
        LATTICE.parse(pack_residues(unpack_residues(body) % np.uint64(LATTICE.modulus)) + seed, fresh=fresh)
    with suppress(SealingError):
        LATTICE.parse(bomb.ljust(len(GOOD[fresh]), b"\x01"), fresh=fresh)
    assert len(seen) >= 21
    start = len(LATTICE._frame_fresh[0] if fresh else LATTICE._frame_summed) + 16
    end = len(seen[0]) - 64 if fresh else len(seen[0])
    behind = start + DEGREE * 8 * (1 if fresh else 2)
    assert len({(len(data), data[:start], data[behind:end]) for data in seen}) == 1
    assert seen[0][5] == 0, "uncompressed: SEAL's inflater has no part in it"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("data", [b"", bytes(KEY_BYTES - 1), bytes(KEY_BYTES + 1), b"\xff" * KEY_BYTES])
def test_what_is_no_key_is_refused_before_seal_sees_it(data: bytes) -> None:
    with pytest.raises(SealingError, match="not a key"):
        LATTICE.parse_key(data)


def test_bytes_for_other_parameters_are_read_as_those_of_this_run_and_do_not_open() -> None:
    other = choose_parameters(1000, 8)
    assert other.plain_modulus != CHOICE.plain_modulus
    foreign = BfvLock(other, lattice_for(other).generate_key()).close(np.ones(DEGREE, dtype=np.uint64))
    summed = LATTICE.summed(LATTICE.parse(foreign, fresh=True))
    with pytest.raises(SealingError, match="more noise"):
        LOCK.open(summed)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_random_bytes_of_the_right_length_are_refused_or_do_not_open(data: st.DataObject) -> None:
    hostile = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).bytes(SUMMED_BYTES)
    if data.draw(st.booleans()):
        hostile = pack_residues(unpack_residues(hostile) % np.uint64(LATTICE.modulus))
    with pytest.raises(SealingError):
        LOCK.open(hostile)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_files() -> list[str]:
    """Files in memory that this process holds open."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder's own
            found.append(os.readlink(path))
    return [target for target in found if "memfd" in target]


def test_no_file_in_memory_outlives_a_call_so_nothing_of_a_key_does() -> None:
    lattice = Lattice(seal.SCHEME_TYPE.BFV, plain_modulus=CHOICE.plain_modulus)
    lattice.parse_key(lattice.generate_key())
    with pytest.raises(SealingError, match="not a valid SEAL object"):
        lattice._file.load(seal.SecretKey(), lattice.context, b"no frame")
    assert memory_files() == []


def test_a_file_in_memory_is_inherited_by_no_program_that_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, create = [], os.memfd_create

    def watched(name: str) -> int:
        descriptor = create(name)
        seen.append((os.get_inheritable(descriptor), memory_files()))
        return descriptor

    monkeypatch.setattr(os, "memfd_create", watched)
    LATTICE.parse_key(KEY)
    assert [inheritable for inheritable, _ in seen] == [False]
    assert len(seen[0][1]) == 1, "the control of the test above: there is one"


def test_threads_that_share_a_lattice_do_not_read_each_others_bytes() -> None:
    wrong = []

    def work(number: int) -> None:
        lock, rng = BfvLock(CHOICE, LATTICE.generate_key()), np.random.default_rng(number)
        for _ in range(60):
            slots = rng.integers(0, CHOICE.plain_modulus, DEGREE).astype(np.uint64)
            try:
                opened = lock.open(LATTICE.summed(LATTICE.parse(lock.close(slots), fresh=True)))
            except SealingError as error:
                wrong.append(error.what)
            else:
                wrong.extend(["another sum"] if not np.array_equal(opened, slots) else [])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


def test_ckks_bytes_go_the_same_way() -> None:
    lattice = ckks.lattice()
    lock = ckks._Lock(lattice.generate_key())
    values = np.arange(ckks.SLOTS, dtype=np.uint64)
    fresh = lock.close(values)
    assert len(fresh) == FRESH_BYTES
    summed = lattice.summed(lattice.parse(fresh, fresh=True))
    assert len(summed) == SUMMED_BYTES
    assert np.array_equal(lock.open(summed), values)
    assert np.array_equal(lock.residues(fresh), lattice.residues(summed, fresh=False))
