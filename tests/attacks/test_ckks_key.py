"""The key of an approximate scheme from its exact decryptions (Li, Micciancio 2021), and what keeps it from leaving.

A CKKS decryption is c₀ + c₁·s: whoever knows it exactly solves for s. All attacks work at this product's parameters
(N = 4096, one 60-bit prime, scale 2²⁴) and on its own wire format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import tenseal.sealapi as seal
from numpy.typing import NDArray

from confide.errors import SealingError
from confide.privacy.sealing import CkksProfile, Payload, Segment, ckks
from confide.privacy.sealing.authentication import SumMac
from confide.privacy.sealing.lattice import KEY_BYTES, pack_residues, unpack_residues
from confide.privacy.sealing.parameters import DEGREE
from tests.attacks.forging import CKKS_SCALE, CKKS_SLOTS, ciphertext, ckks_polynomial, polynomials
from tests.privacy.sealing.cohort import Cohort

Floats = NDArray[np.float64]
Residues = NDArray[np.object_]
#: Two chunks, and the whole-number coordinates of 16 bits: what is opened is what the sites sent.
SIZE, BITS = 2 * CKKS_SLOTS - 1, 16
SEGMENTS = [Segment(SIZE, 0.0, 2.0**BITS - 1)]


@dataclass(frozen=True)
class Scene:
    """Three sites' payloads and their sum."""

    cohort: Cohort
    updates: dict[str, Floats]
    payloads: dict[str, Payload]
    total: Payload

    @property
    def victim(self) -> str:
        """Whose update is looked for."""
        return self.cohort.names[0]

    def exact(self, chunks: Sequence[bytes]) -> list[Floats]:
        """What SEAL's decryption says, to the last bit: what a profile that does not round would release."""
        context = ckks.lattice().context
        key = ckks.lattice().parse_key(self.cohort.secret[:KEY_BYTES])
        found = []
        for chunk in chunks:
            plain = seal.Plaintext()
            seal.Decryptor(context, key).decrypt(ckks.lattice().parse(chunk, fresh=False), plain)
            found.append(np.array(seal.CKKSEncoder(context).decode_double(plain)))
        return found

    def released(self) -> list[Floats]:
        """What this profile releases, on the slots of each chunk."""
        fields = np.append(self.cohort.open(self.total, SEGMENTS), 0.0)  # nothing was clipped
        return list(fields.reshape(-1, CKKS_SLOTS))


@pytest.fixture(scope="module")
def scene() -> Scene:
    """An honest sum of two chunks."""
    cohort, rng = Cohort.make(3, BITS, profile="ckks"), np.random.default_rng(3)
    updates = {name: rng.integers(0, 2**BITS, SIZE).astype(np.float64) for name in cohort.names}
    payloads = cohort.seal(updates, SEGMENTS)
    made = Scene(cohort, updates, payloads, cohort.total(list(payloads.values()), SIZE))
    assert np.array_equal(cohort.open(made.total, SEGMENTS), sum(updates.values()))
    return made


# --- number theory ----------------------------------------------------------------------------------------------------


def reversed_bits(count: int) -> NDArray[np.int64]:
    """Bit reversal of 0 … count − 1."""
    bits, out = count.bit_length() - 1, np.zeros(count, dtype=np.int64)
    for i in range(bits):
        out |= ((np.arange(count) >> i) & 1) << (bits - 1 - i)
    return out


def smallest_root(q: int) -> int:
    """The smallest primitive 2N-th root of unity mod q: SEAL's choice."""
    root = next(r for g in range(2, 1000) if pow(r := pow(g, (q - 1) // (2 * DEGREE), q), DEGREE, q) == q - 1)
    best, square, power = root, root * root % q, root
    for _ in range(DEGREE):
        power = power * square % q
        best = min(best, power)
    return best


def powers(base: int, count: int, q: int) -> Residues:
    """base⁰ … base^(count − 1)."""
    out = [1]
    for _ in range(count - 1):
        out.append(out[-1] * base % q)
    return np.array(out, dtype=object)


def coefficients(values: Residues, q: int) -> Residues:
    """The polynomial, centred, from its values at the odd powers of the root in SEAL's (bit-reversed) order."""
    root = smallest_root(q)
    inverse = powers(pow(root, -1, q), 2 * DEGREE, q)
    x, width = values.copy(), 2  # bit-reversed order is what a decimation in time starts from
    while width <= DEGREE:
        rows, half = x.reshape(-1, width), width // 2
        upper, lower = rows[:, :half].copy(), rows[:, half:] * inverse[:: 2 * DEGREE // width][:half] % q
        rows[:, :half], rows[:, half:] = (upper + lower) % q, (upper - lower) % q
        width *= 2
    x = x * pow(DEGREE, -1, q) * inverse[:DEGREE] % q
    return np.where(x > q // 2, x - q, x)


def slots_of(polynomial: Residues) -> Floats:
    """Real parts of a plaintext polynomial's slots."""
    twist = np.exp(-1j * np.pi / DEGREE * np.arange(DEGREE))
    everywhere = np.fft.fft(polynomial.astype(np.float64) / CKKS_SCALE * twist)
    return np.asarray(everywhere[(slot_exponents() - 1) // 2].real)


def slot_exponents() -> NDArray[np.int64]:
    """Slot j is the value at e^(iπ·3ʲ/N)."""
    return np.array([pow(3, j, 2 * DEGREE) for j in range(CKKS_SLOTS)])


def is_ternary(key: Residues) -> bool:
    """Has the polynomial only coefficients −1, 0, 1?"""
    return set(key.tolist()) <= {-1, 0, 1}


# --- the attack -------------------------------------------------------------------------------------------------------


def recover_key(chunks: Sequence[bytes], decryptions: Sequence[Floats]) -> Residues:
    """The key in evaluation form, from two summed ciphertexts and the real parts of their slots.

    2·Re m = m + m̄ as polynomials, and m̄'s value at index i is m's at N − 1 − i. So each pair of indices gives one
    equation a ciphertext in two unknowns: c₁[i]·s[i] + c₁[j]·s[j] = (m + m̄)[i] − c₀[i] − c₀[j].
    """
    q = ckks.lattice().modulus
    rows = []
    for chunk, opened in zip(chunks, decryptions, strict=True):
        first, second = polynomials(CkksProfile(3, BITS), chunk)
        right = (ckks_polynomial(2 * opened) - first - first[::-1]) % q
        rows.append((second, second[::-1], right))
    (a, b, r), (c, d, t) = rows[:2]
    determinant = [int(x) for x in (a * d - b * c) % q]
    inverse = np.array([pow(x, -1, q) if x else 0 for x in determinant], dtype=object)
    found: Residues = (r * d - b * t) % q * inverse % q
    return found


def test_exact_decryptions_of_two_sums_give_away_the_key_and_every_update(scene: Scene) -> None:
    """The attack: no key is used but in SEAL's decryption of the two sums, whose outcome is what would be released."""
    q = ckks.lattice().modulus
    key = recover_key(scene.total.chunks, scene.exact(scene.total.chunks))
    assert is_ternary(coefficients(key, q))
    assert pack_residues(key.astype(np.uint64)) == scene.cohort.secret[:KEY_BYTES], "the run's key, to the last bit"
    opened = []
    for chunk in scene.payloads[scene.victim].chunks:
        first, second = polynomials(scene.cohort.profile, chunk)
        opened.append(slots_of(coefficients((first + second * key) % q, q)))
    update = np.concatenate(opened)[:SIZE]
    assert np.abs(update - scene.updates[scene.victim]).max() < 0.01, "and with it one site's update"


def test_what_the_profile_releases_does_not_give_away_the_key(scene: Scene) -> None:
    """The same attack on the same ciphertexts; what is opened was rounded to the grid, and the errors are gone."""
    exact, released = scene.exact(scene.total.chunks), scene.released()
    assert all(0 < np.abs(e - r).max() < 0.25 for e, r in zip(exact, released, strict=True)), "rounding is all it is"
    key = recover_key(scene.total.chunks, released)
    assert not is_ternary(coefficients(key, ckks.lattice().modulus))
    assert pack_residues(key.astype(np.uint64)) != scene.cohort.secret[:KEY_BYTES]


@pytest.mark.parametrize("digits", [30, 16, 8])
def test_the_attack_needs_the_errors_lowest_bits(scene: Scene, digits: int) -> None:
    """With 30 binary digits behind the point it works, with 16 no more; the profile keeps none."""
    rounded = [np.rint(e * 2.0**digits) / 2.0**digits for e in scene.exact(scene.total.chunks)]
    key = recover_key(scene.total.chunks, rounded)
    assert is_ternary(coefficients(key, ckks.lattice().modulus)) is (digits == 30)


# --- through the rounding ---------------------------------------------------------------------------------------------

_MIDDLE, _GAIN = 2.0**17, 2.0**8


def forged_chunks() -> tuple[bytes, bytes]:
    """(middle, gain·scale) and (middle, gain·scale·X^(N/2)): they open to the key's values, real and imaginary parts,
    enlarged until rounding does not matter and moved into the range of honest sums."""
    q = ckks.lattice().modulus
    enlarged = int(_GAIN * CKKS_SCALE)
    quarter = powers(smallest_root(q), 2 * DEGREE, q)[(2 * reversed_bits(DEGREE) + 1) * (DEGREE // 2) % (2 * DEGREE)]
    middle = ckks_polynomial(np.full(CKKS_SLOTS, _MIDDLE))
    return ciphertext((middle, np.full(DEGREE, enlarged, dtype=object))), ciphertext((middle, quarter * enlarged % q))


def key_from_values(opened: Floats) -> NDArray[np.int64]:
    """The key's coefficients from its values at all slots."""
    real, turned = ((part - _MIDDLE) / _GAIN for part in np.append(opened, _MIDDLE).reshape(2, CKKS_SLOTS))
    exponents = slot_exponents()
    values = real - 1j * turned * np.where(exponents % 4 == 1, 1, -1)  # X^(N/2) is ±i there
    everywhere = np.zeros(2 * DEGREE, dtype=complex)
    everywhere[exponents], everywhere[2 * DEGREE - exponents] = values, values.conj()
    return np.rint((np.fft.fft(everywhere)[:DEGREE] / DEGREE).real).astype(np.int64)


def test_a_forged_sum_that_opens_to_the_key_is_not_even_decrypted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding protects honest sums only. Of forged ones the tags stop the decryption, and the bound on the error the
    release; without both, whoever sees the opened values has the key."""
    forged = Payload(forged_chunks(), scene.total.tags)
    session, agreement = scene.cohort.sessions[scene.victim], scene.cohort.agreement()
    decrypted, honest = list[bytes](), ckks._Lock.open
    monkeypatch.setattr(ckks._Lock, "open", lambda lock, data: decrypted.append(data) or honest(lock, data))
    with pytest.raises(SealingError, match="authenticated sum"):
        session.open(forged, SEGMENTS, agreement)
    assert decrypted == []
    monkeypatch.setattr(SumMac, "accepts", lambda *_: True)
    with pytest.raises(SealingError, match="more error"):
        session.open(forged, SEGMENTS, agreement)
    assert len(decrypted) == 1
    monkeypatch.setattr(ckks, "_TOLERANCE", 1.0)
    key = key_from_values(session.open(forged, SEGMENTS, agreement).values)
    values = unpack_residues(scene.cohort.secret[:KEY_BYTES]).astype(object)
    true = coefficients(values, ckks.lattice().modulus).astype(np.int64)
    assert is_ternary(true.astype(object))
    assert np.array_equal(key, true), "one slot, the count of clipped values, was guessed: the others outweigh it"
