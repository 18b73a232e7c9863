"""What few bits cost: exact held-out AUC on RAND at 20, 16, 12 and 8 bits a coordinate, against float32 in the open.

Without differential privacy (the data are public), so that nothing but the quantiser differs; paired over seeds.
`range` takes a tenth of the largest possible update as the quantiser's range; `rotated` spreads the update first, which
needs more than the logistic model's 31 parameters to have an effect.
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

MODELS = {
    "logistic": (),
    "mlp": ("model.kind=mlp", "model.hidden=[64, 32]", "training.learning_rate=0.5"),
}
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "logistic": {"plain": (), "range": ("sealing.range=0.1",)},
    "mlp": {"plain": (), "rotated": ("sealing.rotation=true",)},
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
    found: dict[str, Any] = {"seeds": seeds}
    for model, fixed in MODELS.items():
        reference = [_auc(seed, *fixed, "sealing.profile=open")[0] for seed in range(seeds)]
        part: dict[str, Any] = {"open": round(statistics.median(reference), 4)}
        for b in bits:
            for name, overrides in VARIANTS[model].items():
                runs = [_auc(seed, *fixed, f"sealing.bits={b}", *overrides) for seed in range(seeds)]
                differences = [open_ - auc for open_, (auc, _) in zip(reference, runs, strict=True)]
                part.setdefault(str(b), {})[name] = {
                    "auc": round(statistics.median(auc for auc, _ in runs), 4),
                    "below_open": round(statistics.median(differences), 4),
                    "saturated": round(max(share for _, share in runs), 4),
                }
                sys.stderr.write(f"{model}, {b} bits, {name}: {part[str(b)][name]}\n")
        found[model] = part
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--seeds", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().seeds)))


if __name__ == "__main__":
    main()
