"""Forgeries of sums in the product's own wire format: what anybody can write who knows the public parameters.

None of it needs a key. `right_tags` is what those can add who hold the run's MAC key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from confide.privacy.sealing import (
    Agreement,
    CkksProfile,
    MaskedProfile,
    OpenProfile,
    Payload,
    Profile,
    SealedProfile,
)
from confide.privacy.sealing import ckks as ckks_module
from confide.privacy.sealing.accumulate import words_from
from confide.privacy.sealing.authentication import SumMac
from confide.privacy.sealing.bfv import lattice_for
from confide.privacy.sealing.encoding import SATURATION
from confide.privacy.sealing.lattice import FRESH_BYTES, Lattice, pack_residues, unpack_residues
from confide.privacy.sealing.masked import MODULUS
from confide.privacy.sealing.packing import Packing
from confide.privacy.sealing.parameters import DEGREE
from confide.privacy.sealing.slots import MAC_KEY_BYTES, SlotSession, chunk_words

Words = NDArray[np.uint64]
Floats = NDArray[np.float64]
CKKS_SCALE = 2.0**24
CKKS_SLOTS = DEGREE // 2


def lattice_of(profile: Profile) -> Lattice:
    """The SEAL context of a profile that has one; public."""
    return ckks_module.lattice() if isinstance(profile, CkksProfile) else lattice_for(sealed(profile).choice)


def sealed(profile: Profile) -> SealedProfile:
    """Narrow the type."""
    assert isinstance(profile, SealedProfile)
    return profile


def packing_of(profile: Profile) -> Packing:
    """How a masked profile packs."""
    return profile.packing if isinstance(profile, MaskedProfile) else sealed(profile).choice.packing


def modulus_of(profile: Profile) -> int:
    """What tags are computed modulo."""
    return lattice_of(profile).modulus if isinstance(profile, CkksProfile) else packing_of(profile).modulus


def tag_count(profile: Profile) -> int:
    """Tags a sum."""
    return 0 if isinstance(profile, OpenProfile) else int(profile.parameters["tags"])


# --- from fields to what lies under the lock --------------------------------------------------------------------------


def split(profile: Profile, fields: Words) -> list[Words]:
    """Fields of a whole vector (with its saturation coordinate) as the words, or CKKS slots, of each chunk."""
    if isinstance(profile, CkksProfile):
        count = max(1, -(-len(fields) // CKKS_SLOTS))
        padded = np.zeros(count * CKKS_SLOTS, dtype=np.uint64)
        padded[: len(fields)] = fields
        return list(padded.reshape(count, CKKS_SLOTS))
    packing = packing_of(profile)
    lengths = chunk_words(packing, len(fields), whole=isinstance(profile, SealedProfile))
    step = packing.coordinates
    return [packing.pack(fields[i * step : (i + 1) * step], words) for i, words in enumerate(lengths)]


def bfv_polynomial(profile: Profile, slots: Words) -> NDArray[np.object_]:
    """The plaintext polynomial mod t of BFV slots."""
    plain = seal.Plaintext()
    seal.BatchEncoder(lattice_of(profile).context).encode(slots.tolist(), plain)
    data = plain.dyn_array()
    return np.array([data.at(i) if i < data.size() else 0 for i in range(DEGREE)], dtype=object)


def ckks_polynomial(values: Floats | Words) -> NDArray[np.object_]:
    """The plaintext polynomial of CKKS slots, in the evaluation form that CKKS ciphertexts have."""
    plain = seal.Plaintext()
    seal.CKKSEncoder(ckks_module.lattice().context).encode(values.astype(np.float64).tolist(), CKKS_SCALE, plain)
    data = plain.dyn_array()
    return np.array([data.at(i) for i in range(DEGREE)], dtype=object)


def shift_of(profile: Profile, words: Words) -> NDArray[np.object_]:
    """What added to the first polynomial adds these words to the plaintext: round(q · m / t) under BFV."""
    if isinstance(profile, CkksProfile):
        return ckks_polynomial(words)
    q, t = lattice_of(profile).modulus, sealed(profile).choice.plain_modulus
    scaled: NDArray[np.object_] = (bfv_polynomial(profile, words) * q + t // 2) // t % q
    return scaled


def one(profile: Profile) -> NDArray[np.object_]:
    """The constant polynomial 1, in the form that the profile's ciphertexts have."""
    first = np.zeros(DEGREE, dtype=object)
    first[0] = 1
    return np.ones(DEGREE, dtype=object) if isinstance(profile, CkksProfile) else first


# --- ciphertexts ------------------------------------------------------------------------------------------------------


def polynomials(profile: Profile, chunk: bytes) -> NDArray[np.object_]:
    """Both polynomials of a chunk, [2, N]; a fresh one's seed is expanded, which needs no key."""
    lattice = lattice_of(profile)
    whole = lattice.summed(lattice.parse(chunk, fresh=True)) if len(chunk) == FRESH_BYTES else chunk
    return unpack_residues(whole).astype(object).reshape(2, DEGREE)


def ciphertext(parts: NDArray[np.object_] | Sequence[NDArray[np.object_]]) -> bytes:
    """The wire form of two polynomials."""
    return pack_residues(np.concatenate(list(parts)).astype(np.uint64))


def chosen_chunks(profile: Profile, fields: Words) -> tuple[bytes, ...]:
    """A sum that opens to these fields whatever the keys are: (round(q · m / t), 1), or the bare words."""
    if isinstance(profile, OpenProfile):
        raise ValueError("an open sum has no fields")
    chunks = split(profile, fields)
    if isinstance(profile, MaskedProfile):
        return tuple(words.astype("<u8").tobytes() for words in chunks)
    return tuple(ciphertext((shift_of(profile, words), one(profile))) for words in chunks)


def key_chunk(profile: Profile) -> bytes:
    """(0, ⌊q/t⌋): under BFV it opens to the secret key."""
    delta = lattice_of(profile).modulus // sealed(profile).choice.plain_modulus
    return ciphertext((np.zeros(DEGREE, dtype=object), one(profile) * delta))


def combine(profile: Profile, terms: Sequence[tuple[int, Sequence[bytes]]]) -> tuple[bytes, ...]:
    """Σ factor · chunks: what anybody can do with ciphertexts, or masked words, that he has recorded."""
    found = []
    for chunks in zip(*(chunks for _, chunks in terms), strict=True):
        factors = [factor for factor, _ in terms]
        if isinstance(profile, MaskedProfile):
            words = sum(f * words_from(c, MODULUS).astype(object) for f, c in zip(factors, chunks, strict=True))
            found.append((words % MODULUS).astype("<u8").tobytes())
            continue
        q = lattice_of(profile).modulus
        found.append(ciphertext(sum(f * polynomials(profile, c) for f, c in zip(factors, chunks, strict=True)) % q))
    return tuple(found)


def nudged(profile: Profile, chunks: Sequence[bytes], fields: Words) -> tuple[bytes, ...]:
    """Chunks with fields added to what they open to, without a key (`add_plain`)."""
    found = []
    for chunk, words in zip(chunks, split(profile, fields), strict=True):
        if isinstance(profile, MaskedProfile):
            found.append(((words_from(chunk, MODULUS) + words) % np.uint64(MODULUS)).astype("<u8").tobytes())
            continue
        parts = polynomials(profile, chunk)
        parts[0] = (parts[0] + shift_of(profile, words)) % lattice_of(profile).modulus
        found.append(ciphertext(parts))
    return tuple(found)


# --- what real coordinates become -------------------------------------------------------------------------------------


def with_saturation(fields: Words) -> Words:
    """A vector's fields and, behind them, that nothing was clipped."""
    return np.concatenate([fields, np.zeros(SATURATION, dtype=np.uint64)])


def right_tags(
    profile: Profile, secret: bytes, transcript: str, cohort: Sequence[str], chunks: Sequence[bytes], fields: Words
) -> tuple[int, ...]:
    """The tags of a sum of one's choosing; for holders of the MAC key."""
    modulus, count = modulus_of(profile), tag_count(profile)
    mac = SumMac(secret[-MAC_KEY_BYTES:], transcript, modulus, count)
    under = [unpack_residues(c) for c in chunks] if isinstance(profile, CkksProfile) else split(profile, fields)
    products = [mac.products(number, words) for number, words in enumerate(under)]
    total = [sum(p[i] for p in products) for i in range(count)]
    pads = [mac.tags(site, [0] * count) for site in cohort]
    return tuple((total[i] + sum(p[i] for p in pads)) % modulus for i in range(count))


def hostile_payload(session: Any, agreement: Agreement, fields: Words) -> Payload:
    """What a member sends that puts fields of its choosing under its own masks and tags: nothing checks their range."""
    lock, mac = session._alive(), session._mac(agreement)
    if isinstance(session, SlotSession):
        packing = session._packing
        profile = (SealedProfile if session._whole else MaskedProfile)(packing.sites, packing.bits)
        masks = session._pairs.for_cohort(agreement.cohort, agreement.transcript)
        masked = [masks.apply(words, n, packing.modulus) for n, words in enumerate(split(profile, fields))]
        products = [mac.products(n, words) for n, words in enumerate(masked)]
        chunks = tuple(lock.close(words) for words in masked)
    else:
        chunks = tuple(lock.close(slots) for slots in split(CkksProfile(session._sites, session._bits), fields))
        products = [mac.products(n, lock.residues(chunk)) for n, chunk in enumerate(chunks)]
    return Payload(chunks, mac.tags(session._site, [sum(parts) for parts in zip(*products, strict=True)]))
