"""Seals, and adds, large updates in a process of its own; prints one JSON line for each size.

    python -m tests.privacy.sealing.stream_large seal PROFILE DTYPE SIZE...
    python -m tests.privacy.sealing.stream_large hold PROFILE DTYPE SIZE...
    python -m tests.privacy.sealing.stream_large add PROFILE SIZE COUNT...

`seal` writes chunks away as they come, as a site's process does that streams them to a disk or a network; `hold` keeps
them (the control). `add` feeds payloads of the right form to the coordinator's accumulator, one at a time.

`peak` is the process's (VmHWM), `extra` what it lies above the resident memory before the first chunk, which holds the
vector; `workers` are the peaks of the worker processes. All in bytes.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from confide.config import SealingConfig
from confide.privacy.sealing import (
    Agreement,
    CkksProfile,
    MaskedProfile,
    Payload,
    Profile,
    SealedProfile,
    Segment,
    make_profile,
    workers,
)
from confide.privacy.sealing import ckks as ckks_module
from confide.privacy.sealing.bfv import lattice_for
from confide.privacy.sealing.encoding import SATURATION
from confide.privacy.sealing.lattice import pack_residues
from confide.privacy.sealing.masked import MODULUS
from confide.privacy.sealing.parameters import DEGREE
from confide.privacy.sealing.slots import chunk_words
from confide.privacy.sealing.wrapping import new_ephemeral

SITES = ("ash", "birch", "cedar")
_WARM = 50_000


def status(key: str, process: int | str = "self") -> int:
    """A line of a process's status, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def watch() -> int:
    """Start measuring: the resident memory now."""
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return before


def seal(profile: Profile, dtype: str, size: int, *, hold: bool) -> dict[str, Any]:
    """Seal one update for a cohort of three."""
    keys = {site: new_ephemeral() for site in SITES}
    public = {site: pair[1] for site, pair in keys.items()}
    session = profile.session(SITES[0], profile.make_secret(), keys[SITES[0]][0], public)
    vector = np.full(size, 0.25, dtype=dtype)
    # Half of it is rotated, where a range is narrow enough for that.
    segments = [Segment(size // 2, -1.0, 1.0), Segment(size - size // 2, -1.0, 1.0, (1e-3 * size**0.5, 0.0))]
    held, sent, before, start = [], 0, watch(), time.perf_counter()
    with Path("/dev/null").open("wb") as stream:
        sealing = session.seal(vector, segments, Agreement(SITES, "ab" * 32))
        for chunk in sealing:
            sent += stream.write(chunk)
            if hold:
                held.append(chunk)
    peak = status("VmHWM")
    return {
        "size": size, "peak": peak, "extra": peak - before, "sent": sent, "tags": len(sealing.tags),
        "seconds": round(time.perf_counter() - start, 1),
        "workers": [status("VmHWM", worker._process.pid) for worker in workers._workers],
    }  # fmt: skip


def payloads(profile: Profile, size: int, count: int) -> Iterator[Payload]:
    """Random payloads of the right form: the coordinator cannot tell them from honest ones."""
    rng = np.random.default_rng(0)
    held = size + SATURATION
    for _ in range(count):
        if isinstance(profile, MaskedProfile):
            lengths = chunk_words(profile.packing, held, whole=False)
            yield Payload(tuple(rng.integers(0, MODULUS, n, dtype=np.uint64).tobytes() for n in lengths), (1,))
            continue
        lattice = ckks_module.lattice() if isinstance(profile, CkksProfile) else lattice_for(_sealed(profile).choice)
        chunks = profile.size(size).uplink // (DEGREE * 60 // 8 + 64)
        yield Payload(
            tuple(
                pack_residues(rng.integers(0, lattice.modulus, DEGREE, dtype=np.uint64)) + rng.bytes(64)
                for _ in range(chunks)
            ),
            (1,) * int(profile.parameters["tags"]),
        )


def _sealed(profile: Profile) -> SealedProfile:
    assert isinstance(profile, SealedProfile)
    return profile


def add(profile: Profile, size: int, counts: list[int]) -> Iterator[dict[str, Any]]:
    """Feed one accumulator; say after each of `counts` how large it has become."""
    accumulator = profile.accumulator(_WARM)
    for payload in payloads(profile, _WARM, 2):
        accumulator.add(payload)
    before = watch()
    accumulator = profile.accumulator(size)
    for added, payload in enumerate(payloads(profile, size, max(counts)), 1):
        accumulator.add(payload)
        if added in counts:
            yield {"count": added, "extra": status("VmHWM") - before, "payload": sum(map(len, payload.chunks))}


def main(what: str, name: str, *rest: str) -> None:
    """See the module."""
    sites = 3 if what != "add" else 30
    profile = make_profile(SealingConfig.model_validate({"profile": name, "bits": 20}), sites)
    if what == "add":
        lines = add(profile, int(rest[0]), [int(n) for n in rest[1:]])
    else:
        dtype, *sizes = rest
        seal(profile, dtype, _WARM, hold=False)
        lines = (seal(profile, dtype, int(size), hold=what == "hold") for size in sizes)
    for line in lines:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
