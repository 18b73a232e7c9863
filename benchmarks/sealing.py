"""What sealing costs beside TenSEAL's CKKS with the parameters that NVFLARE uses: bytes, seconds, memory.

One run measures both sides, turn by turn, on the same vector; medians. The baseline (N = 8192, [60, 40, 40], scale
2⁴⁰, symmetric) encrypts and serialises a vector, parses and adds two, parses and decrypts a sum. `sealed` quantises,
packs, masks towards the five other sites, tags and encrypts; parses and adds; parses, decrypts, authenticates and
unpacks. What a run does once (keys, contexts, starting worker processes) is outside the clock on both sides.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tenseal as ts
from numpy.typing import NDArray

from confide.privacy.sealing import Agreement, Payload, SealedProfile, Segment, Session, workers
from confide.privacy.sealing.wrapping import new_ephemeral
from confide.protocol.envelope import Address, Envelope, seal_envelope, verify
from confide.protocol.identity import Identity

Floats = NDArray[np.float64]
RANGE = 0.05
ROSTER = 50  # of the memory measurement: one run whose cohorts have 2 or all 50 sites


def _clock(action: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        result = action(*arguments)
        return time.perf_counter() - start, result
    finally:
        gc.enable()


class _Cohort:
    """Sessions of sites that share a secret, and the ranges of their vectors."""

    def __init__(self, most: int, bits: int, sites: int, size: int) -> None:
        self.profile = SealedProfile(most, bits)
        names = tuple(f"site-{i:04d}" for i in range(sites))
        keys = {name: new_ephemeral() for name in names}
        public = {name: pair[1] for name, pair in keys.items()}
        secret = self.profile.make_secret()
        self.sessions: dict[str, Session] = {n: self.profile.session(n, secret, keys[n][0], public) for n in names}
        self.agreement = Agreement(names, "ab" * 32)
        self.segments = [Segment(size, -RANGE, RANGE)]

    def seal(self, name: str, vector: Floats) -> Payload:
        return self.sessions[name].seal(vector, self.segments, self.agreement).payload()


class _Baseline:
    """TenSEAL's CKKS as NVFLARE sets it up."""

    def __init__(self) -> None:
        self.context = ts.context(
            ts.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
        )  # fmt: skip
        self.context.global_scale = 2**40

    def seal(self, vector: Floats) -> bytes:
        return bytes(ts.ckks_vector(self.context, vector).serialize())

    def parse(self, data: bytes) -> Any:
        return ts.ckks_vector_from(self.context, data)

    def add(self, into: Any, data: bytes) -> Any:
        return into.add_(self.parse(data))

    def open(self, data: bytes) -> Any:
        return self.parse(data).decrypt()


def _timings(size: int, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    cohort, baseline = _Cohort(6, 20, 6, size), _Baseline()
    vectors = {name: np.clip(rng.normal(0, RANGE / 5, size), -RANGE, RANGE) for name in cohort.sessions}
    first = next(iter(vectors))
    seal: dict[str, list[float]] = {"sealed": [], "sealed_workers": [], "ckks_baseline": []}
    add: dict[str, list[float]] = {"sealed": [], "ckks_baseline": []}
    opened: dict[str, list[float]] = {"sealed": [], "sealed_workers": [], "ckks_baseline": []}
    payloads = {name: cohort.seal(name, vector) for name, vector in vectors.items()}
    time.sleep(3)  # the worker processes that the line above started are ready now
    pays_from, never = workers.PAYS_FROM, sys.maxsize
    for number in range(repeats):
        for kind, threshold in (("sealed", never), ("sealed_workers", pays_from)):
            workers.PAYS_FROM = threshold
            seconds, payloads[first] = _clock(cohort.seal, first, vectors[first])
            seal[kind].append(seconds)
        seconds, data = _clock(baseline.seal, vectors[first])
        seal["ckks_baseline"].append(seconds)

        accumulator = cohort.profile.accumulator(size)
        for name, payload in payloads.items():
            seconds, _ = _clock(accumulator.add, payload)
            if name != first:  # the first payload becomes the sum
                add["sealed"].append(seconds)
        total = accumulator.total()
        summed = baseline.parse(data)
        for _ in range(len(vectors) - 1):
            seconds, summed = _clock(baseline.add, summed, data)
            add["ckks_baseline"].append(seconds)
        out = bytes(summed.serialize())

        for kind, threshold in (("sealed", never), ("sealed_workers", pays_from)):
            workers.PAYS_FROM = threshold
            seconds, result = _clock(cohort.sessions[first].open, total, cohort.segments, cohort.agreement)
            opened[kind].append(seconds)
        seconds, decrypted = _clock(baseline.open, out)
        opened["ckks_baseline"].append(seconds)

        step = 2 * RANGE / (2**20 - 1)
        assert np.abs(result.values - sum(vectors.values())).max() <= len(vectors) * step
        assert np.abs(np.asarray(decrypted) - len(vectors) * vectors[first]).max() < 1e-4
        sys.stderr.write(f"timing round {number + 1} of {repeats}\n")
    workers.PAYS_FROM = pays_from
    workers.stop_workers()
    return {
        "seal_seconds": {k: round(statistics.median(v), 4) for k, v in seal.items()},
        "add_seconds": {k: round(statistics.median(v), 4) for k, v in add.items()},
        "open_seconds": {k: round(statistics.median(v), 4) for k, v in opened.items()},
        "baseline_uplink_bytes": len(data) / size,
        "baseline_downlink_bytes": len(out) / size,
    }


def _sizes(size: int, timings: dict[str, Any]) -> dict[str, Any]:
    """Uplink and downlink bytes a parameter, counted on real payloads for the cohort of six, else from the profile."""
    rng = np.random.default_rng(1)
    uplink: dict[str, float] = {}
    downlink: dict[str, float] = {}
    for bits in (20, 16, 12, 8):
        cohort = _Cohort(6, bits, 6, size)
        accumulator = cohort.profile.accumulator(size)
        for name in cohort.sessions:
            payload = cohort.seal(name, rng.normal(0, RANGE / 5, size))
            accumulator.add(payload)
        uplink[str(bits)] = round(sum(map(len, payload.chunks)) / size, 3)
        downlink[str(bits)] = round(sum(map(len, accumulator.total().chunks)) / size, 3)
    larger = {}
    for sites in (16, 64, 1000):
        shapes = {bits: SealedProfile(sites, bits).size(size) for bits in (20, 18, 16, 12, 8)}
        larger[str(sites)] = {
            "uplink": {str(b): round(s.uplink / size, 3) for b, s in shapes.items()},
            "downlink": {str(b): round(s.downlink / size, 3) for b, s in shapes.items()},
        }
    return {
        "bytes_per_parameter": {**uplink, "ckks_baseline": round(timings.pop("baseline_uplink_bytes"), 3)},
        "downlink_bytes_per_parameter": {
            **downlink, "ckks_baseline": round(timings.pop("baseline_downlink_bytes"), 3)
        },
        "larger_cohorts": larger,
    }  # fmt: skip


def _memory(size: int) -> dict[str, float]:
    """Peak resident memory of a coordinator's process that verifies and adds signed payloads of 2 or 50 sites."""
    place = Address(federation="f", roster_version=1, run="r", manifest="0" * 64, key_epoch=0, round=1, step="seal")
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        cohort = _Cohort(ROSTER, 20, ROSTER, size)
        for number, name in enumerate(cohort.sessions):
            payload, identity = cohort.seal(name, rng.normal(0, RANGE / 5, size)), Identity.generate(name)
            envelope = seal_envelope(
                identity, place, recipient="coordinator", type_="seal.reply", body=json.dumps(payload.tags).encode(),
                checkpoint="0:" + "0" * 64, chunks=payload.chunks, request="0" * 64,
            )  # fmt: skip
            parts = (name, identity.public_key, envelope.header, envelope.signature, envelope.body, envelope.chunks)
            (Path(folder) / f"{number:04d}").write_bytes(pickle.dumps(parts))
            sys.stderr.write(f"payload {number + 1} of {ROSTER}\n") if number % 10 == 9 else None
        workers.stop_workers()
        return {f"{count}_sites": _peak_of_coordinator(folder, count, size) for count in (2, ROSTER)}


def _peak_of_coordinator(folder: str, count: int, size: int) -> float:
    command = [sys.executable, "-m", "benchmarks.sealing", "--coordinator", folder, str(count), str(size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _coordinate(folder: str, count: int, size: int) -> None:
    accumulator = SealedProfile(ROSTER, 20).accumulator(size)
    for path in sorted(Path(folder).iterdir())[:count]:
        name, key, header, signature, body, chunks = pickle.loads(path.read_bytes())  # noqa: S301  # our own files
        envelope = Envelope(header, signature, body, chunks)
        verify(envelope, key, sender=name)
        accumulator.add(Payload(envelope.chunks, tuple(json.loads(body))))
        del envelope, chunks, header, body
    accumulator.total()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def measure(size: int, repeats: int) -> dict[str, Any]:
    """Everything."""
    timings = _timings(size, repeats)
    sizes = _sizes(size, timings)
    seal, opened = timings["seal_seconds"], timings["open_seconds"]
    memory = {k: round(v, 1) for k, v in _memory(size).items()}
    return {
        **sizes, **timings,
        "ratios": {
            "seal": round(seal["ckks_baseline"] / seal["sealed"], 2),
            "seal_workers": round(seal["ckks_baseline"] / seal["sealed_workers"], 2),
            "open": round(opened["ckks_baseline"] / opened["sealed"], 2),
            "memory": round(memory["50_sites"] / memory["2_sites"], 3),
        },
        "coordinator_peak_mib": memory,
        "parameters": size, "cohort": 6, "repeats": repeats, "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--coordinator", nargs=3, metavar=("FOLDER", "COUNT", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.coordinator:
        folder, count, size = options.coordinator
        _coordinate(folder, int(count), int(size))
    else:
        with _stdout_to_stderr():
            result = measure(options.parameters, options.repeats)
        print(json.dumps(result))


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """TenSEAL writes warnings to standard output, past Python."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


if __name__ == "__main__":
    main()
