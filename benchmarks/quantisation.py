"""What few bits cost: exact held-out AUC on RAND at 20, 16, 12 and 8 bits a coordinate, against float32 in the open.

Without differential privacy (the data are public), so that nothing but the quantiser differs; paired over seeds.
`range` is the same with a tenth of the largest possible update as the quantiser's range, `rotated` with the Hadamard
rotation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from confide.simulations import simulate

VARIANTS = {
    "plain": (),
    "range": ("sealing.range=0.1",),
    "rotated": ("sealing.rotation=true",),
}


def _auc(seed: int, *overrides: str) -> tuple[float, float]:
    """(exact AUC, largest share of clipped coordinates)."""
    with tempfile.TemporaryDirectory() as scratch:
        chosen = ("privacy.epsilon=inf", f"run.seed={seed}", *overrides)
        result = simulate(overrides=chosen, out=Path(scratch) / "out")
        assert result.metrics is not None
        return result.metrics["auc"], result.saturated


def measure(seeds: int, bits: tuple[int, ...] = (20, 16, 12, 8)) -> dict[str, Any]:
    """Medians over seeds, and medians of the paired differences to `open`."""
    reference = [_auc(seed, "sealing.profile=open")[0] for seed in range(seeds)]
    found: dict[str, dict[str, Any]] = {}
    for b in bits:
        for name, overrides in VARIANTS.items():
            runs = [_auc(seed, f"sealing.bits={b}", *overrides) for seed in range(seeds)]
            differences = [open_ - auc for open_, (auc, _) in zip(reference, runs, strict=True)]
            found.setdefault(str(b), {})[name] = {
                "auc": round(statistics.median(auc for auc, _ in runs), 4),
                "below_open": round(statistics.median(differences), 4),
                "saturated": round(max(share for _, share in runs), 4),
            }
            sys.stderr.write(f"{b} bits, {name}: {found[str(b)][name]}\n")
    return {"open": round(statistics.median(reference), 4), "bits": found, "seeds": seeds}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--seeds", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().seeds)))


if __name__ == "__main__":
    main()
