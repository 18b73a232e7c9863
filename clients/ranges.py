"""Public ranges of a round's vector, from the manifest alone, the same at every site.

A step moves the weights by at most lr · C (everybody drawn pulls the same way, at the expected number of draws) plus
noise of standard deviation lr · σ · C / (q N); Adam's step is below 3.2 · lr in each coordinate (Kingma, Ba 2015, with
β = 0.9, 0.999). Half as much again and eight standard deviations are left for the unexpected; `sealing.range` takes a
share of that. What still lies outside is clipped after the noise: it costs accuracy, never privacy, and is counted.
"""

from __future__ import annotations

from confide.privacy.dp.metrics import value_range
from confide.privacy.sealing import Segment
from confide.protocol.manifest import Manifest

__all__ = ["segments"]

_SPARE = 1.5
_DEVIATIONS = 8
_ADAM_STEP = 3.2


def segments(manifest: Manifest, round_: int) -> list[Segment]:
    """The ranges of what a round's vector holds: the update, then the metrics."""
    found = []
    if manifest.trains_in(round_):
        found.append(_update(manifest))
    if size := manifest.metric_width(round_):
        largest = max(m.population for m in manifest.members)
        found.append(Segment(size, *value_range(manifest.metrics_noise_multiplier, largest)))
    return found


def _update(manifest: Manifest) -> Segment:
    training, clip, size = manifest.training, manifest.privacy.max_grad_norm, manifest.layout.size
    smallest = min(m.population for m in manifest.members)
    scale = training.learning_rate * max(manifest.weight(m.site) for m in manifest.members) * manifest.sealing.range
    steps = training.local_steps
    deviation = manifest.noise_multiplier * clip * steps**0.5 / (manifest.privacy.sample_rate * smallest)
    if training.optimizer == "adam":
        bound, norm, deviation = _ADAM_STEP * steps, _ADAM_STEP * steps * size**0.5, 0.0
    else:
        slow = 1 - training.momentum
        norm, deviation = _SPARE * clip * steps / slow, deviation / slow
        bound = norm + _DEVIATIONS * deviation
    rotation = (norm * scale, deviation * scale) if manifest.sealing.rotation else None
    return Segment(size, -bound * scale, bound * scale, rotation)
