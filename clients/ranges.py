"""Public ranges of a round's vector, from the manifest alone, the same at every site.

A step moves the weights by at most lr · C (everybody drawn pulls the same way, at the expected number of draws) plus
noise of standard deviation lr · σ · C / (q N); Adam's step is below 3.2 · lr in each coordinate (Kingma, Ba 2015, with
β = 0.9, 0.999). Half as much again and eight standard deviations are left for the unexpected; `sealing.range` takes a
share of that. What still lies outside is clipped after the noise: it costs accuracy, never privacy, and is counted.

A proximal term pulls back, so it needs no more room. Control variates are mean gradients: an update is then made of
three of them (its own, cᵢ and c), a change of cᵢ of two; their noises are independent and add up as roots. A site that
takes τᵢ of τ steps multiplies its update by τ / τᵢ: what its persons can do stays, the noise grows by √(τ / τᵢ).
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
        if manifest.control_variates:
            found.append(_control(manifest))
    if size := manifest.metric_width(round_):
        _, largest = manifest.populations
        found.append(Segment(size, *value_range(manifest.metrics_noise_multiplier, largest)))
    return found


def _update(manifest: Manifest) -> Segment:
    training, size = manifest.training, manifest.layout.size
    scale = training.learning_rate * _share(manifest)
    steps = training.local_steps
    norm, deviation = _gradients(manifest)
    deviation *= (steps / _fewest(manifest)) ** 0.5
    if training.optimizer == "adam":
        bound, norm, deviation = _ADAM_STEP * steps, _ADAM_STEP * steps * size**0.5, 0.0
    else:
        slow = 1 - training.momentum
        norm, deviation = norm / slow, deviation / slow
        if manifest.control_variates:
            norm, deviation = norm * 3, deviation * 3**0.5
        bound = norm + _DEVIATIONS * deviation
    return _segment(manifest, bound, norm, deviation, scale)


def _control(manifest: Manifest) -> Segment:
    """The change of a control variate: the difference of two mean gradients."""
    steps = manifest.training.local_steps
    norm, deviation = _gradients(manifest)
    norm, deviation = 2 * norm / steps, 2**0.5 * deviation / (steps * _fewest(manifest)) ** 0.5
    return _segment(manifest, norm + _DEVIATIONS * deviation, norm, deviation, _share(manifest))


def _gradients(manifest: Manifest) -> tuple[float, float]:
    """Of the sum of a round's gradients: what its norm is at most, and the noise's standard deviation."""
    clip, steps = manifest.privacy.max_grad_norm, manifest.training.local_steps
    smallest, _ = manifest.populations
    noise = manifest.noise_multiplier * clip * steps**0.5 / (manifest.privacy.sample_rate * smallest)
    return _SPARE * clip * steps, noise


def _fewest(manifest: Manifest) -> int:
    """Local steps of the site that takes the fewest."""
    return min([manifest.training.local_steps, *(manifest.strategy.steps or {}).values()])


def _share(manifest: Manifest) -> float:
    """The largest weight, and the share of the range that is covered."""
    heaviest = 1.0 if manifest.single_updates else manifest.heaviest
    return heaviest * manifest.sealing.range


def _segment(manifest: Manifest, bound: float, norm: float, deviation: float, scale: float) -> Segment:
    size = manifest.layout.size
    rotation = (norm * scale, deviation * scale) if manifest.sealing.rotation else None
    return Segment(size, -bound * scale, bound * scale, rotation)
