"""What hostile peers may send, item by item, in a process of its own: prints one JSON line for each.

    python -m tests.attacks.hostile_bytes FOLDER

Side `site`: a member of the roster (or somebody without a key) answers the honest coordinator's `seal` request.
Side `coordinator`: whoever holds its key (or nobody's) sends a site a sum. Everything is signed as it must be unless
the item says otherwise: what has no signature is not parsed at all, so it is the less interesting case.

Memory: `above` is the process's peak (VmHWM, reset before each message) over its resident memory after a warm-up, less
the bulk of the item's messages, which this process holds because it made them; each distinct byte string counts once.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tenseal.sealapi as seal
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import confide  # noqa: F401  # sets Flower's switches before anything imports it
from confide.clients.run import model_digest
from confide.clients.store import ModelState
from confide.errors import SealingError
from confide.privacy.audit import records as audit
from confide.privacy.audit.entries import decode
from confide.privacy.audit.log import Log
from confide.privacy.digest import framed
from confide.privacy.sealing import Accumulator, Agreement, Payload, Profile
from confide.privacy.sealing import ckks as ckks_module
from confide.privacy.sealing.bfv import lattice_for
from confide.privacy.sealing.lattice import SUMMED_BYTES, Lattice, pack_residues, unpack_residues
from confide.privacy.sealing.masked import MODULUS
from confide.privacy.sealing.parameters import DEGREE, choose_parameters
from confide.protocol import messages as m
from confide.protocol.envelope import (
    _DOMAIN,
    EVERYBODY,
    MAX_CHUNKS,
    Address,
    Envelope,
    chunk_digests,
    chunk_root,
    seal_envelope,
)
from confide.protocol.flower import from_records, to_records
from confide.protocol.identity import Identity
from confide.simulations.engines.grid import LocalGrid
from tests.attacks.federation import CHECKPOINT, Federation, Sum, header_of, is_refusal, refusal_of

Chunks = tuple[bytes, ...]
Tags = tuple[str, ...]
MIB = 2**20
#: Three ciphertexts under `sealed`; a second round is attacked, so that there is a first one to replay.
MODEL = {
    "model": {"kind": "mlp", "hidden": [128, 128]},
    "training": {"local_steps": 1},
    "run": {"rounds": 2},
    # The data are public: no noise has to be calibrated, which takes longer than everything else here.
    "privacy": {"epsilon": float("inf")},
}
HOSTILE, ROUND = "birch", 2
PROFILES = ("sealed", "masked", "ckks", "open")
_MUTATIONS = 60


# --- memory -----------------------------------------------------------------------------------------------------------


class Meter:
    """This process's resident memory."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        gc.collect()
        gc.freeze()  # what is there by now is not looked at again, else collections would take most of the time
        self.baseline = self.settle()

    def settle(self) -> int:
        """Resident bytes once nothing is held that need not be."""
        gc.collect()
        self._libc.malloc_trim(0)
        return _status("VmRSS")

    def watch(self, message: int, attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `attempt` returns, and how far the peak lay above the baseline and the messages held, in MiB."""
        Path("/proc/self/clear_refs").write_text("5")
        result = attempt()
        return result | {"above": round((_status("VmHWM") - self.baseline - message) / MIB, 1)}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


# --- what is sent -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """One hostile message; what is not named is as in the honest one."""

    chunks: Chunks
    tags: Tags
    body: Callable[[bytes], bytes] = lambda body: body
    header: Callable[[bytes], bytes] = lambda header: header
    fields: Mapping[str, Any] = field(default_factory=dict)
    place: Mapping[str, Any] = field(default_factory=dict)
    signer: Identity | None = None
    raw: Envelope | RecordDict | None = None


@dataclass(frozen=True)
class Honest:
    """What an honest party sends at the attacked place, and what else it takes to make something worse of it."""

    chunks: Chunks
    tags: Tags
    fresh: bool
    federation: Federation
    profile: Profile
    earlier: Envelope | Sum
    others: tuple[Chunks, ...]
    modulus: int

    def but(self, **changes: Any) -> Sent:
        """The honest message with something else in it."""
        return replace(Sent(self.chunks, self.tags), **changes)

    def first(self, chunk: bytes) -> Sent:
        """The honest message with another first chunk."""
        return self.but(chunks=(chunk, *self.chunks[1:]))

    def last(self, chunk: bytes) -> Sent:
        """The honest message with another last chunk: what comes before it is in order."""
        return self.but(chunks=(*self.chunks[:-1], chunk))

    def all(self, chunk: bytes) -> Sent:
        """The honest message with the same chunk everywhere."""
        return self.but(chunks=(chunk,) * len(self.chunks))


Make = Callable[[Honest], list[Sent]]


@dataclass(frozen=True)
class Item:
    """`refused`: is it refused where it arrives? If not, no key holder may open what becomes of it."""

    make: Make
    refused: bool = True


def _flips(honest: Honest) -> list[Sent]:
    """One bit, in every region: head, body, and the end (a fresh ciphertext's seed)."""
    found = []
    for number, chunk in enumerate(honest.chunks):
        for position in sorted({0, 1, 14, len(chunk) // 2, len(chunk) - 65, len(chunk) - 64, len(chunk) - 1}):
            changed = bytearray(chunk)
            changed[position] ^= 1 << (position % 8)
            found.append(honest.but(chunks=(*honest.chunks[:number], bytes(changed), *honest.chunks[number + 1 :])))
    return found


def _shape(fill: bytes) -> Make:
    return lambda h: [h.but(chunks=tuple(fill * len(c) for c in h.chunks))]


def _too_large_residue(honest: Honest) -> list[Sent]:
    """q itself, q + 1 and the largest word, at both ends: each would be another number once reduced."""
    seed = honest.chunks[0][-64:] if honest.fresh else b""
    found = []
    for value in (honest.modulus, honest.modulus + 1, 2**60 - 1):
        for position in (0, -1):
            residues = unpack_residues(honest.chunks[0][: len(honest.chunks[0]) - len(seed)]).copy()
            residues[position] = value
            wrong = pack_residues(residues) + seed
            found += [honest.first(wrong), honest.last(wrong)]
    return found


def _too_large_word(honest: Honest) -> list[Sent]:
    words = [int(value).to_bytes(8, "little") for value in (MODULUS, 2**61, 2**64 - 1)]
    found = [honest.first(word + honest.chunks[0][8:]) for word in words]
    return [*found, *(honest.last(honest.chunks[-1][:-8] + word) for word in words)]


def _not_finite(honest: Honest) -> list[Sent]:
    kind = np.float32 if honest.fresh else np.float64
    values = [kind(v).tobytes() for v in (np.nan, np.inf, -np.inf)]
    return [honest.first(v + honest.chunks[0][len(v) :]) for v in values]


# --- SEAL's own format, and ciphertexts that belong elsewhere ---------------------------------------------------------


def _saved(thing: Any) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        thing.save(file.name)
        return Path(file.name).read_bytes()


def _context(scheme: Any, degree: int, bits: list[int], plain: int) -> Any:
    choice = seal.EncryptionParameters(scheme)
    choice.set_poly_modulus_degree(degree)
    choice.set_coeff_modulus(seal.CoeffModulus.Create(degree, bits))
    if plain:
        choice.set_plain_modulus(seal.PlainModulus.Batching(degree, plain))
    return seal.SEALContext(choice, True, seal.SEC_LEVEL_TYPE.NONE)


def _foreign(scheme: Any, degree: int = DEGREE, bits: tuple[int, ...] = (60,), plain: int = 20) -> Any:
    """A ciphertext of other parameters."""
    context = _context(scheme, degree, list(bits), plain if scheme != seal.SCHEME_TYPE.CKKS else 0)
    plaintext, ciphertext = seal.Plaintext(), seal.Ciphertext(context)
    if scheme == seal.SCHEME_TYPE.CKKS:
        seal.CKKSEncoder(context).encode([1.0], 2.0**24, plaintext)
    else:
        seal.BatchEncoder(context).encode([1, 2, 3], plaintext)
    seal.Encryptor(context, seal.KeyGenerator(context).secret_key()).encrypt_symmetric(plaintext, ciphertext)
    return ciphertext


def _residues(ciphertext: Any, count: int) -> NDArray[np.uint64]:
    array = ciphertext.dyn_array()
    found = np.zeros(count, dtype=np.uint64)
    held = min(count, array.size())
    found[:held] = [array.at(i) & (2**60 - 1) for i in range(held)]
    return found


def _as_wire(honest: Honest, ciphertext: Any) -> bytes:
    """A foreign ciphertext in our own format: reduced where it must be, so that nothing about the form is wrong."""
    count = DEGREE if honest.fresh else 2 * DEGREE
    return pack_residues(_residues(ciphertext, count) % np.uint64(honest.modulus)) + bytes(64 if honest.fresh else 0)


def _native(honest: Honest) -> list[Sent]:
    """What SEAL itself would have written for an honest ciphertext."""
    lattice = _lattice(honest.profile)
    ciphertext = lattice.parse(honest.chunks[0], fresh=honest.fresh)
    return [honest.first(_saved(ciphertext)), honest.but(chunks=(_saved(ciphertext),) * len(honest.chunks))]


def seal_file(mode: int, content: bytes, declared: int | None = None) -> bytes:
    """SEAL's header around content: magic, header size, version, compression mode, reserved, length."""
    size = 16 + len(content) if declared is None else declared
    return bytes.fromhex("5ea1100403") + bytes([mode, 0, 0]) + size.to_bytes(8, "little") + content


def zstd_bomb(content: bytes, zeros: int) -> bytes:
    """A zstd frame: raw blocks of content, then run-length blocks, 4 bytes for each 128 KiB of zeros."""
    block = 128 * 1024
    raw = b"".join(
        (len(part) << 3).to_bytes(3, "little") + part
        for part in (content[i : i + block] for i in range(0, len(content), block))
    )
    middle, last = ((block << 3 | 1 << 1 | end).to_bytes(3, "little") + b"\0" for end in (0, 1))
    return b"\x28\xb5\x2f\xfd\0\x58" + raw + middle * (zeros // block - 1) + last


def zlib_bomb(content: bytes, zeros: int) -> bytes:
    """A zlib stream of content and zeros, put together from equal pieces, without its checksum."""
    packer = zlib.compressobj(1)
    head = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)
    body = packer.compress(bytes(16 * MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + body * (zeros // (16 * MIB))


def bomb_files(honest: Honest) -> list[bytes]:
    """An honest ciphertext in SEAL's format with more than a gigabyte of zeros behind it, compressed both ways."""
    lattice, residues = _lattice(honest.profile), unpack_residues(honest.chunks[0][: SUMMED_BYTES // 2]).tobytes()
    if honest.fresh:
        before, after = lattice._frame_fresh
        content = before + residues + after + honest.chunks[0][-64:]
    else:
        content = lattice._frame_summed + residues * 2
    return [seal_file(2, zstd_bomb(content, 1100 * MIB)), seal_file(1, zlib_bomb(content, 1100 * MIB))]


def _bombs(honest: Honest) -> list[Sent]:
    """Such files, also with a size that they do not have, and cut or padded to the length of an honest chunk."""
    length, found = len(honest.chunks[0]), list[Sent]()
    for whole in (*bomb_files(honest), seal_file(0, bytes(64))):
        for declared in (whole[8:16], (2**40).to_bytes(8, "little"), (2**63 - 1).to_bytes(8, "little")):
            file = whole[:8] + declared + whole[16:]
            found += [honest.first(file), honest.first(file[:length].ljust(length, b"\0"))]
    return found


def _transparent(honest: Honest) -> list[Sent]:
    """Second polynomial 0: it opens without a key. A fresh ciphertext cannot say so, for it has a seed there."""
    first = unpack_residues(honest.chunks[0][: SUMMED_BYTES // 2])
    zero = np.zeros(DEGREE, dtype=np.uint64)
    return [
        honest.first(pack_residues(np.concatenate([first, zero]))),
        honest.all(pack_residues(np.concatenate([first, zero]))),
        honest.all(bytes(SUMMED_BYTES)),
    ]


def _wrong_parameters(honest: Honest) -> list[Sent]:
    bfv, found = seal.SCHEME_TYPE.BFV, []
    for degree, bits in ((2048, (54,)), (8192, (60, 60)), (DEGREE, (59,)), (DEGREE, (60, 49))):
        ciphertext = _foreign(bfv, degree, bits)
        found += [honest.first(_as_wire(honest, ciphertext)), honest.all(_as_wire(honest, ciphertext))]
    return found


def _wrong_parameters_native(honest: Honest) -> list[Sent]:
    bfv = seal.SCHEME_TYPE.BFV
    choices = ((2048, (54,)), (8192, (60, 60)), (DEGREE, (59,)), (DEGREE, (60, 49)))
    return [honest.all(_saved(_foreign(bfv, degree, bits))) for degree, bits in choices]


def _other_scheme(honest: Honest) -> list[Sent]:
    """A CKKS ciphertext where BFV is due (or the other way round), of the same ring and prime: it looks the same."""
    other = (
        lattice_for(choose_parameters(4, 20)) if honest.profile.name == "ckks" else ckks_module.lattice()
    )  # both have the 60-bit prime of N = 4096
    key, plain = seal.KeyGenerator(other.context).secret_key(), seal.Plaintext()
    encryptor, ciphertext = seal.Encryptor(other.context, key), seal.Ciphertext(other.context)
    if honest.profile.name == "ckks":
        seal.BatchEncoder(other.context).encode([1], plain)
    else:
        seal.CKKSEncoder(other.context).encode([1.0], 2.0**24, plain)
    encryptor.encrypt_symmetric(plain, ciphertext)
    chunk = other.fresh(lambda: encryptor.encrypt_symmetric(plain)) if honest.fresh else other.summed(ciphertext)
    return [honest.first(chunk), honest.all(chunk)]


def _other_key(honest: Honest) -> list[Sent]:
    """The right form, parameters, cohort and transcript under a run secret of the attacker's own."""
    federation, profile = honest.federation, honest.profile
    run = federation.sites["ash"]._runs[federation.manifest.run]
    keys = {s: bytes([i + 1] * 32) for i, s in enumerate(federation.names)}
    session = profile.session(HOSTILE, profile.make_secret(), keys[HOSTILE], {
        s: federation.sites[s]._runs[federation.manifest.run].keys.public for s in federation.names
    })  # fmt: skip
    vector = np.zeros(federation.manifest.vector_size(ROUND))
    agreement = Agreement(federation.names, "ab" * 32)
    payload = session.seal(vector, run.segments(ROUND), agreement).payload()
    if not honest.fresh:
        accumulator = profile.accumulator(federation.manifest.vector_size(ROUND))
        accumulator.add(payload)
        payload = accumulator.total()
    return [honest.but(chunks=payload.chunks), honest.but(chunks=payload.chunks, tags=_hex(payload.tags))]


def _lattice(profile: Profile) -> Lattice:
    return ckks_module.lattice() if profile.name == "ckks" else lattice_for(profile.choice)  # type: ignore[attr-defined]


def _hex(tags: tuple[int, ...]) -> Tags:
    return tuple(f"{tag:x}" for tag in tags)


# --- the corpus -------------------------------------------------------------------------------------------------------

_STRANGER = Identity.generate(HOSTILE)
_BODY = 2 * MIB
_BIG = 100 * MIB


def _many(start: bytes, unit: bytes, end: bytes, size: int = _BODY) -> bytes:
    return start + unit * ((size - len(start) - len(end)) // len(unit)) + unit.rstrip(b",") + end


def _long(name: bytes, unit: bytes) -> Callable[[bytes], bytes]:
    """JSON in which the first `name` is a long list."""

    def change(data: bytes) -> bytes:
        found = re.search(rb'"%s":(\[[^\]]*\]|[^,}]*)' % name, data)
        assert found is not None, "the message has changed"
        return _many(data[: found.start(1)] + b"[", unit + b",", b"]" + data[found.end(1) :])

    return change


def _extra_keys(data: bytes) -> bytes:
    return data[:-1] + b"".join(b',"%x":0' % i for i in range(_BODY // 10)) + b"}"


#: What every profile refuses for its form, whoever it is from.
_FORM: dict[str, Item] = {
    "truncated": Item(lambda h: [h.first(h.chunks[0][:-n]) for n in (1, 7, 8, 64, len(h.chunks[0]) // 2)]),
    "empty chunks": Item(lambda h: [h.first(b""), h.all(b"")]),
    "wrong in the last chunk only": Item(lambda h: [h.last(h.chunks[-1][:-8]), h.last(b""), h.last(b"\xff" * 99)]),
    "no chunks": Item(lambda h: [h.but(chunks=())]),
    "one chunk of 100 MB": Item(lambda h: [h.first(b"\x01" * _BIG), h.but(chunks=(b"\xff" * _BIG,))]),
    "100 MB behind an honest chunk": Item(lambda h: [h.first(h.chunks[0] + b"\x01" * _BIG)]),
    "one chunk missing": Item(lambda h: [h.but(chunks=h.chunks[:-1]), h.but(chunks=h.chunks[1:])]),
    "one chunk doubled": Item(lambda h: [h.but(chunks=(*h.chunks, h.chunks[-1])), h.but(chunks=h.chunks * 2)]),
}
#: And where there are tags.
_TAGS: dict[str, Item] = {
    "no tags": Item(lambda h: [h.but(tags=())]),
    "a tag too many": Item(lambda h: [h.but(tags=(*h.tags, h.tags[0])), h.but(tags=(*h.tags, "0"))]),
    "100,000 tags": Item(lambda h: [h.but(tags=("0",) * 100_000)]),
    "a tag that is no number": Item(
        lambda h: [
            h.but(body=lambda b, t=t: b.replace(f'"{h.tags[0]}"'.encode(), t))
            for t in (b'"-1"', b'"x"', b'""', b'"' + b"f" * 17 + b'"', b'"1\\n"', b"1", b"null", b"[]", b"1e999")
        ]
    ),
}
_CIPHERTEXT: dict[str, Item] = {
    "residues of q and above": Item(_too_large_residue),
    "all 0xff": Item(_shape(b"\xff")),
    "SEAL's own format": Item(_native),
    "SEAL's format, inflating beyond a gigabyte": Item(_bombs, refused=False),  # cut to length it is any ciphertext
    "wrong parameters in SEAL's format": Item(_wrong_parameters_native),
    "transparent": Item(_transparent),
}
#: Nothing about their form is wrong: a coordinator without a key cannot tell; no site opens the sum.
_PLAUSIBLE: dict[str, Item] = {
    "one bit": Item(_flips, refused=False),
    "all zeros": Item(_shape(b"\0"), refused=False),
    "two chunks exchanged": Item(lambda h: [h.but(chunks=(h.chunks[1], h.chunks[0], *h.chunks[2:]))], refused=False),
    "another's chunks": Item(lambda h: [h.but(chunks=c) for c in h.others], refused=False),
    "under another key": Item(_other_key, refused=False),
    "a tag that is off by one": Item(
        lambda h: [h.but(tags=(f"{(int(h.tags[0], 16) + d) % 2**40:x}", *h.tags[1:])) for d in (1, 2**39)],
        refused=False,
    ),
}
_CIPHERTEXT_PLAUSIBLE: dict[str, Item] = {
    "wrong parameters in our format": Item(_wrong_parameters, refused=False),
    "the other scheme": Item(_other_scheme, refused=False),
}
#: Around the payload: where it says it belongs, who signed it, and the JSON that is parsed before it.
_PLACES: dict[str, Item] = {
    "65,536 empty chunks": Item(lambda h: [h.but(chunks=(b"",) * 65_536)]),
    "70,000 chunks": Item(lambda h: [h.but(chunks=(b"x",) * 70_000)]),
    "of another round, run, epoch, step or manifest": Item(
        lambda h: [
            h.but(place=change)
            for change in (
                {"round": 1},
                {"round": 4},
                {"run": "another"},
                {"manifest": "00" * 32},
                {"key_epoch": 1},
                {"step": "release"},
                {"federation": "another"},
                {"roster_version": 99},
                {"attempt": 1},
            )
        ]
    ),
    "signed by somebody without a key": Item(lambda h: [h.but(signer=_STRANGER)]),
    "100 MB from somebody without a key": Item(lambda h: [replace(h.first(b"\x01" * _BIG), signer=_STRANGER)]),
    "a body of a million wrong list members": Item(lambda h: [h.but(body=_long(b"tags", u)) for u in (b"0", b"[]")]),
    "a body of unknown keys": Item(lambda h: [h.but(body=_extra_keys)]),
    "a header of a million wrong list members": Item(lambda h: [h.but(header=_long(b"chunks", b"0"))]),
    "a header of unknown keys": Item(lambda h: [h.but(header=_extra_keys)]),
    "a body or header that is no JSON": Item(
        lambda h: [
            h.but(**{part: lambda _, d=d: d})
            for part in ("body", "header")
            for d in (b"", b"\0", b"\xff\xfe", b"[" * 100_000, b"{}", b"null", b'"\\ud800"', b"9" * 100_000, b"NaN")
        ]
    ),
}
_SITE_PLACES: dict[str, Item] = {
    "65,536 empty chunks": Item(lambda h: [h.but(chunks=(b"",) * 65_536)]),
    "70,000 chunks": Item(lambda h: [h.but(chunks=(b"x",) * 70_000)]),
    "a reply of another round": Item(lambda h: [h.but(raw=h.earlier)]),
    "signed by another site": Item(lambda h: [h.but(signer=h.federation.sites["cedar"].identity)]),
    "records that are no envelope": Item(lambda h: [h.but(raw=r) for r in _records(h)]),
}
_SUM_PLACES: dict[str, Item] = {
    "65,536 empty chunks": Item(lambda h: [h.but(chunks=(b"",) * 65_536)]),
    "70,000 chunks": Item(lambda h: [h.but(chunks=(b"x",) * 70_000)]),
    "the sum of another round": Item(lambda h: [h.but(chunks=_sum(h).chunks, tags=_sum(h).reference.tags)]),
    "the sum of another round, renamed": Item(
        lambda h: [h.but(chunks=_sum(h).chunks, fields=_sum(h).reference.model_dump() | {"round": ROUND})]
    ),
    "another cohort, transcript or attempt": Item(
        lambda h: [
            h.but(fields=change)
            for change in (
                {"cohort": h.federation.names[:3]},
                {"cohort": ()},
                {"cohort": ("x" * 1000,) * 1000},
                {"transcript": "00" * 32},
                {"statements": ()},
                {"statements": ("00" * 32,) * 4},
                {"attempt": 1},
                {"round": 4},
                {"round": 10**9},
                {"chunks": 0},
            )
        ]
    ),
    "one site's payload as the sum": Item(lambda h: [h.but(chunks=c) for c in h.others]),
}


def _sum(honest: Honest) -> Sum:
    assert isinstance(honest.earlier, Sum)
    return honest.earlier


def _records(honest: Honest) -> list[RecordDict]:
    """Flower's own containers, wrongly used."""

    def config(**values: Any) -> ConfigRecord:
        record = ConfigRecord()
        for name, value in values.items():
            record[name] = value
        return record

    good = {"header": b"{}", "signature": b"", "body": b"{}"}
    array = Array(dtype="float64", shape=(2**40,), stype="numpy.ndarray", data=b"\x93NUMPY" + bytes(100))
    return [
        RecordDict(), RecordDict({"envelope": ArrayRecord()}), RecordDict({"envelope": MetricRecord()}),
        RecordDict({"envelope": config(header="text", signature=b"", body=b"")}),
        RecordDict({"envelope": config(header=[b"x"], signature=1, body=1.5)}),
        RecordDict({"envelope": config(**good), "chunks": config(**good)}),
        RecordDict({"envelope": config(**good), "more": config(**good)}),
        RecordDict({"envelope": config(**good), "chunks": ArrayRecord({"000001": array})}),
        RecordDict({"envelope": config(**good), "chunks": ArrayRecord({"000000": array})}),
    ]  # fmt: skip


def corpus(side: str, profile: str) -> dict[str, Item]:
    """What is tried on one side under one profile, by name."""
    items = dict(_FORM)
    if profile == "open":
        return items | {"not a finite number": Item(_not_finite), "all 0xff": Item(_shape(b"\xff"))}
    items |= _TAGS | _PLAUSIBLE
    if profile == "masked":
        return items | {"words of the modulus and above": Item(_too_large_word), "all 0xff": Item(_shape(b"\xff"))}
    items |= _CIPHERTEXT | _CIPHERTEXT_PLAUSIBLE
    if profile == "sealed":
        items |= _PLACES | (_SITE_PLACES if side == "site" else _SUM_PLACES)
    return items


# --- mutations --------------------------------------------------------------------------------------------------------

Mutation = tuple[str, float, int]
_MUTATION = st.tuples(
    st.sampled_from(["set", "delete", "insert", "cut", "zero", "repeat", "swap"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
)


def mutated(data: bytes, mutations: list[Mutation]) -> bytes:
    """Bytes that were honest once."""
    for kind, where, value in mutations:
        at, count = int(where * len(data)), value + 1
        data = {
            "set": lambda d, a, n: d[:a] + bytes([n - 1]) + d[a + 1 :],
            "delete": lambda d, a, n: d[:a] + d[a + n :],
            "insert": lambda d, a, n: d[:a] + bytes([n - 1]) * (n % 7) + d[a:],
            "cut": lambda d, a, _: d[:a],
            "zero": lambda d, a, n: d[:a] + bytes(min(n, len(d) - a)) + d[a + n :],
            "repeat": lambda d, a, n: d[:a] + d[a : a + n] + d[a:],
            "swap": lambda d, a, _: d[a:] + d[:a],
        }[kind](data, at, count)
    return data


def mutations(honest: Honest) -> st.SearchStrategy[Sent]:
    """An honest message with one of its parts mutated, and signed again."""

    def change(part: str, number: int, ops: list[Mutation]) -> Sent:
        if part != "chunks":
            return honest.but(**{part: lambda data: mutated(data, ops)})
        i = number % len(honest.chunks)
        return honest.but(chunks=(*honest.chunks[:i], mutated(honest.chunks[i], ops), *honest.chunks[i + 1 :]))

    return st.builds(
        change, st.sampled_from(["chunks", "chunks", "body", "header"]), st.integers(0, 2),
        st.lists(_MUTATION, min_size=1, max_size=3),
    )  # fmt: skip


# --- the two sides ----------------------------------------------------------------------------------------------------


def _write(sent: Sent, identity: Identity, address: Address, recipient: str, body: m.Message, request: str) -> Any:
    """The envelope (or whatever else is sent) of an item."""
    if sent.raw is not None:
        return sent.raw
    signer = Identity(identity.name, (sent.signer or identity).key)
    envelope = seal_envelope(
        signer, address.model_copy(update=dict(sent.place)), recipient=recipient, type_=body.TYPE,
        body=sent.body(body.to_bytes()), checkpoint=CHECKPOINT, chunks=sent.chunks[:MAX_CHUNKS], request=request,
    )  # fmt: skip
    header = envelope.header
    if len(sent.chunks) > MAX_CHUNKS:  # an attacker is not held to what our own types allow
        digests = chunk_digests(sent.chunks)
        tree = json.loads(header) | {"chunks": len(digests), "chunk_root": chunk_root(digests)}
        header = json.dumps(tree).encode()
    header = sent.header(header)
    if header == envelope.header:
        return envelope
    return Envelope(header, signer.sign(framed((_DOMAIN, header))), envelope.body, sent.chunks)


class _Wire(LocalGrid):
    """Hands a request to `answer` and its reply back, without copying either: Flower's copies are not ours."""

    answer: Callable[[str, Envelope], Any]

    def _deliver(self, message: FlowerMessage) -> FlowerMessage:
        reply = self.answer(self._site_of[message.metadata.dst_node_id], from_records(message.content))
        return FlowerMessage(reply if isinstance(reply, RecordDict) else to_records(reply), reply_to=message)


class _Tail:
    """What is new in a log."""

    def __init__(self, log: Log) -> None:
        self._log, self._read = log, log.size

    def new(self, kind: type[audit.Record]) -> list[Any]:
        entries = (decode(self._log.entry(number)[1])[0] for number in range(self._read, self._log.size))
        return [record for record in entries if isinstance(record, kind)]


def _digest(payload: Payload) -> str:
    return hashlib.sha256(b"".join(payload.chunks) + repr(payload.tags).encode()).hexdigest()


class Stage:
    """A federation in the middle of its second round: everybody has sealed, and the sum is about to be sent."""

    def __init__(self, folder: Path, profile: str) -> None:
        federation = self.federation = Federation(folder, sealing={"profile": profile}, **MODEL)
        federation.agree()
        self.earlier_sealed = federation.seal(1, federation.train(1))
        self.earlier = federation.add(1, self.earlier_sealed)
        self.committed = federation.train(ROUND, self.earlier)
        self.sealed = federation.seal(ROUND, self.committed)
        assert not any(map(is_refusal, (*self.committed.values(), *self.sealed.values())))
        self.total = federation.add(ROUND, self.sealed)
        self.profile = federation.sites["ash"]._runs[federation.manifest.run].profile
        self.modulus = MODULUS if profile in ("masked", "open") else _lattice(self.profile).modulus


class HostileSite:
    """A hostile site against the real coordinator, while it collects the payloads of a round."""

    def __init__(self, stage: Stage) -> None:
        self.committed, self.sealed = stage.committed, stage.sealed
        federation = self.federation = stage.federation
        grid = _Wire(lambda **_: None, federation.names)  # type: ignore[arg-type]
        grid.answer = self._answer
        self.coordinator = federation.coordinator(grid)
        self.coordinator._exchange.nodes = {s: n for n, s in grid._site_of.items()}
        self.replies = {s: m.SealReply.model_validate_json(e.body) for s, e in self.sealed.items()}
        self._accumulators, self._sent = list[Accumulator](), Sent((), ())
        make, kept = self.coordinator._profile.accumulator, self._accumulators
        self.coordinator._profile.accumulator = lambda size: kept.append(make(size)) or kept[-1]  # type: ignore
        self.honest = Honest(
            self.sealed[HOSTILE].chunks, self.replies[HOSTILE].tags, True, federation, stage.profile,
            stage.earlier_sealed[HOSTILE], (self.sealed["cedar"].chunks, stage.earlier_sealed[HOSTILE].chunks),
            stage.modulus,
        )  # fmt: skip
        #: The sum of the three others: what is left when a payload is refused.
        rest = self.coordinator._profile.accumulator(federation.manifest.vector_size(ROUND))
        for site in federation.names:
            if site != HOSTILE:
                rest.add(Payload(self.sealed[site].chunks, tuple(int(t, 16) for t in self.replies[site].tags)))
        self._without = rest.total()
        self.right = ""
        self.right = self.attack(self.honest.but())["model"]

    def attack(self, sent: Sent) -> dict[str, Any]:
        """Send one message among the others' honest ones."""
        tail, self._sent = _Tail(self.coordinator.log), sent
        self._accumulators.clear()
        try:
            total, _, sealed = self.coordinator._seal(ROUND, 0, self.committed)
        except Exception as error:
            return {"outcome": f"the coordinator fell over: {type(error).__name__}", "reason": str(error)[:80]}
        finally:
            self._sent = Sent((), ())
        rejected = [r for r in tail.new(audit.Rejected) if r.party == HOSTILE and r.step == "seal"]
        if total is None:
            return {
                "outcome": "refused", "logged": len(rejected) == 1 and bool(rejected[0].reason),
                "reason": rejected[0].reason if rejected else "",
                "unharmed": self._accumulators[0].total() == self._without
                and set(sealed) == set(self.federation.names) - {HOSTILE},
            }  # fmt: skip
        run = self.federation.sites["ash"]._runs[self.federation.manifest.run]
        try:
            model = model_digest(run.apply(self.federation.model("ash"), total.reference, total.chunks))
        except SealingError as error:
            return {"outcome": "unopened", "reason": error.what}
        return {"outcome": "opened", "model": model, "right": model == self.right}

    def _answer(self, site: str, request: Envelope) -> Any:
        sent = self._sent if site == HOSTILE else Sent(self.sealed[site].chunks, self.replies[site].tags)
        place = Address(**{name: getattr(header_of(request), name) for name in Address.model_fields})
        body = m.SealReply.model_construct(transcript=self.replies[site].transcript, tags=sent.tags)
        return _write(sent, self.federation.sites[site].identity, place, "coordinator", body, request.digest)


class HostileCoordinator:
    """A hostile coordinator against a real site, which it sends a round's sum with the next `train` request.

    What the site does about a sum that is not authentic (destroy its keys, and stop for good) is noted and not done,
    and a sum that opens is noted and not kept, so that the next item meets the site in the same state.
    """

    site = "ash"

    def __init__(self, stage: Stage) -> None:
        federation, self.total = stage.federation, stage.total
        self.federation = federation
        site = self.target = federation.sites[self.site]
        self.run, self._stopped = site._runs[federation.manifest.run], list[str]()
        self.run.destroy = lambda: self._stopped.append("keys")  # type: ignore[method-assign]
        site._store.stop_run = lambda _run, reason: self._stopped.append(reason)  # type: ignore[method-assign]
        site._store.put_model = self._opened  # type: ignore[method-assign,assignment]
        self.honest = Honest(
            self.total.chunks, self.total.reference.tags, False, federation, stage.profile, stage.earlier,
            tuple(e.chunks for s, e in stage.sealed.items() if s != self.site), stage.modulus,
        )  # fmt: skip
        self.before = self._state()
        self.right = ""
        self.right = self.attack(self.honest.but())["model"]

    def attack(self, sent: Sent) -> dict[str, Any]:
        """Send one sum."""
        federation = self.federation
        fields = {"tags": sent.tags, "chunks": len(sent.chunks), **sent.fields}
        body = m.TrainRequest.model_construct(sums=(self.total.reference.model_copy(update=fields),))
        place = federation.address("train", ROUND + 1)
        envelope = _write(sent, federation.world.coordinator, place, self.site, body, "")
        tail, size, self._stopped[:] = _Tail(self.target.log), self.target.log.size, []
        try:
            answer = self.target.handle("train", from_records(to_records(envelope)))
        except _Opened as opened:
            return {"outcome": "opened", "model": str(opened), "right": str(opened) == self.right}
        except SealingError as error:
            grown = self.target.log.size > size
            return {"outcome": "dropped", "reason": error.what, "logged": not grown, "unharmed": self._same()}
        except Exception as error:
            return {"outcome": f"the site fell over: {type(error).__name__}", "reason": str(error)[:80]}
        if not is_refusal(answer):
            return {"outcome": "opened", "right": False}
        noted, stopped = tail.new(audit.Refused), tail.new(audit.RunStopped)
        whole = len(noted) == 1 and bool(noted[0].reason) and len(self._stopped) == 2 * len(stopped)
        return {
            "outcome": "refused", "reason": refusal_of(answer).reason, "logged": whole, "unharmed": self._same(),
            "stopped": bool(stopped),
        }  # fmt: skip

    def _opened(self, _run: str, model: ModelState, _key: bytes) -> None:
        raise _Opened(model_digest(model))

    def _same(self) -> bool:
        return self._state() == self.before

    def _state(self) -> tuple[Any, ...]:
        model = self.federation.model(self.site)
        return model.round, model.weights.tobytes(), self.run.pending is None


class _Opened(Exception):
    """A site has opened a sum; the digest of the model that follows from it."""


# --- the process ------------------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """Try everything; one line each."""
    for profile in PROFILES:
        stage = Stage(folder / profile, profile)
        for side, kind in SIDES.items():
            _attack(side, profile, kind(stage))
        stage.federation.world.close()


SIDES: dict[str, type[HostileSite | HostileCoordinator]] = {"site": HostileSite, "coordinator": HostileCoordinator}


def _attack(side: str, profile: str, attacked: HostileSite | HostileCoordinator) -> None:
    def say(name: str, results: list[dict[str, Any]]) -> None:
        print(json.dumps({"side": side, "profile": profile, "item": name, "results": results}), flush=True)

    for _ in range(3):
        attacked.attack(attacked.honest.first(b"warm"))
    meter = Meter()
    for name, item in corpus(side, profile).items():
        say(name, _try(attacked, item.make(attacked.honest), meter))
    if profile == "sealed":
        say("mutations", _try_mutations(attacked, meter))
        say("control: a decompressor", [_swell(attacked.honest, meter)])
        if isinstance(attacked, HostileCoordinator):
            say("parsing", _parse(attacked, meter))
    _try(attacked, [attacked.honest.first(b"\x01" * _BIG)], meter)
    say("afterwards", [{"above": round((meter.settle() - meter.baseline) / MIB, 1)}])
    say("control: the honest message", [attacked.attack(attacked.honest.but())])


def _try(attacked: HostileSite | HostileCoordinator, messages: list[Sent], meter: Meter) -> list[dict[str, Any]]:
    held = {id(chunk): len(chunk) for sent in messages for chunk in sent.chunks}
    meter.settle()
    return [meter.watch(sum(held.values()), partial(attacked.attack, sent)) for sent in messages]


def _try_mutations(attacked: HostileSite | HostileCoordinator, meter: Meter) -> list[dict[str, Any]]:
    outcomes = list[dict[str, Any]]()

    @settings(
        max_examples=_MUTATIONS, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        derandomize=os.environ.get("CI", "").lower() == "true",
    )  # fmt: skip
    @given(mutations(attacked.honest))
    def attempt(sent: Sent) -> None:
        outcomes.append(meter.watch(0, partial(attacked.attack, sent)))

    attempt()
    return outcomes


def _parse(attacked: HostileCoordinator, meter: Meter) -> list[dict[str, Any]]:
    """What two megabytes of wrong JSON cost: in bodies (how long one may be depends on the roster), and in a manifest,
    which comes from the coordinator before the site knows anything of the run."""
    federation = attacked.federation
    body = m.TrainRequest(sums=(attacked.total.reference,)).to_bytes()
    seal_body = m.SealRequest(cohort=federation.names, statements=()).to_bytes()
    manifest = federation.manifest.to_bytes()
    wrong: dict[str, Callable[[], Any]] = {
        "numbers for sums": partial(m.decode, m.TrainRequest, m.TrainRequest.TYPE, _long(b"sums", b"0")(body)),
        "numbers for tags": partial(m.decode, m.TrainRequest, m.TrainRequest.TYPE, _long(b"tags", b"0")(body)),
        "numbers for sites": partial(m.decode, m.SealRequest, m.SealRequest.TYPE, _long(b"cohort", b"0")(seal_body)),
        "unknown keys": partial(m.decode, m.SealRequest, m.SealRequest.TYPE, _extra_keys(seal_body)),
    }
    join = {name: change(manifest) for name, change in {
        "a manifest with numbers for members": _long(b"members", b"0"),
        "a manifest with numbers for a shape": _long(b"shapes", b'""'),
        "a manifest with unknown keys": _extra_keys,
    }.items()}  # fmt: skip
    for name, data in join.items():
        place = federation.address("join", 0).model_copy(update={"run": "another"})
        envelope = federation.sign(
            "join", 0, EVERYBODY, m.JoinRequest(), (data, federation.weights), address=place
        )  # fmt: skip
        wrong[name] = partial(attacked.target.handle, "join", envelope)
    found = []
    for name, parse in wrong.items():

        def attempt(name: str = name, parse: Callable[[], Any] = parse) -> dict[str, Any]:
            try:
                answer = parse()
            except SealingError as error:
                return {"what": name, "outcome": "refused", "reason": error.what}
            refused = isinstance(answer, Envelope) and is_refusal(answer)
            return {"what": name, "outcome": "refused" if refused else "taken"}

        meter.settle()
        found.append(meter.watch(_BODY, attempt))
    return found


def _swell(honest: Honest, meter: Meter) -> dict[str, Any]:
    """The control of the bound: these are files that SEAL reads, and they do inflate beyond a gigabyte."""
    lattice, files = _lattice(honest.profile), bomb_files(honest)
    for file in files:
        seal.Ciphertext(lattice.context).load(lattice.context, _on_disk(file))
    meter.settle()
    return meter.watch(
        sum(map(len, files)), lambda: {"inflated": len(zlib.decompressobj().decompress(files[1][16:], 600 * MIB))}
    )


def _on_disk(data: bytes) -> str:
    descriptor = os.memfd_create("bomb")
    os.write(descriptor, data)
    return f"/proc/self/fd/{descriptor}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
