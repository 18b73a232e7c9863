"""What a log of a million entries costs: durable appends, verification of its export, proofs, bytes.

Appends are batches of `--batch` entries, each a durable transaction (fsync) with a new signed checkpoint.
Verification reads the exported file from scratch: every line in its canonical form, every leaf, tree, signature.
Proofs are made from the open log, and each is checked.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from confide.privacy.audit.checkpoint import parse_note
from confide.privacy.audit.log import CHECKPOINT_SUFFIX, read_lines
from confide.privacy.audit.merkle import Tree, verify_inclusion
from confide.privacy.audit.records import Sealed
from confide.protocol.identity import Identity

PROOFS = 2_000


def record(number: int) -> Sealed:
    """An entry as sites write it most: a cohort of six."""
    digest = f"{number:064x}"
    return Sealed(
        run="rand-health-0123abcd", round=number % 1000, attempt=0, cohort=["1", "2", "3", "4", "5", "6"],
        transcript=digest, coordinator=f"{number}:{digest}",
    )  # fmt: skip


def measure(entries: int, batch: int) -> dict[str, Any]:
    """All figures, on one log."""
    identity = Identity.generate("ash")
    with tempfile.TemporaryDirectory() as scratch:
        log = identity.open_log(Path(scratch) / "federated.db", "federated", "benchmark")
        seconds = 0.0
        for first in range(0, entries, batch):
            records = [record(number) for number in range(first, min(first + batch, entries))]
            started = time.perf_counter()
            log.append(*records)
            seconds += time.perf_counter() - started
            if first * 10 // entries != (first + batch) * 10 // entries:
                sys.stderr.write(f"{first + batch:,} entries, {(first + batch) / seconds:,.0f} a second\n")
        database = sum(p.stat().st_size for p in Path(scratch).glob("federated.db*"))

        started = time.perf_counter()
        identity.open_log(log.path, "federated", "benchmark").close()
        opened = time.perf_counter() - started

        exported = Path(scratch) / "ash.log"
        log.export(exported)
        started = time.perf_counter()
        data, tree = exported.read_bytes(), Tree()
        for _, leaf, _ in read_lines(data, str(exported)):
            tree.append(leaf)
        note = exported.with_suffix(CHECKPOINT_SUFFIX).read_text(encoding="utf-8")
        checkpoint = parse_note(note, log.origin, "ash", identity.public_key)
        assert (checkpoint.size, checkpoint.root) == (tree.size, tree.root())
        verified = time.perf_counter() - started

        times, draw = [], random.Random(1)  # noqa: S311  # which entries are proved is no secret
        for number in (draw.randrange(entries) for _ in range(PROOFS)):
            started = time.perf_counter()
            proof = log.inclusion_proof(number)
            log.entry(number)
            times.append(time.perf_counter() - started)
            assert verify_inclusion(tree_leaf(tree, number), number, entries, proof, checkpoint.root)
        log.close()
    return {
        "append_per_second": round(entries / seconds),
        "verify_million_seconds": round(verified * 1_000_000 / entries, 2),
        "proof_ms_p99": round(1000 * statistics.quantiles(times, n=100)[98], 3),
        "bytes_per_entry": round(database / entries, 1),
        "exported_bytes_per_entry": round(len(data) / entries, 1),
        "open_million_seconds": round(opened * 1_000_000 / entries, 2),
        "entries": entries,
        "batch": batch,
    }


def tree_leaf(tree: Tree, number: int) -> bytes:
    """A leaf hash, as the export gave it."""
    return bytes(tree._levels[0][32 * number : 32 * number + 32])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=1_000)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.entries, arguments.batch)))


if __name__ == "__main__":
    main()
