"""The two releases of a statistics run, as its sites and whoever reads them understand them.

Every site computes the second release over the ranges that the first one's opened sum shows: a pure function of the
manifest and of that sum, so that all compute the same.
"""

from __future__ import annotations

from confide.errors import DataError
from confide.privacy.dp import statistics
from confide.privacy.dp.metrics import Floats, noise_deviation
from confide.privacy.dp.statistics import Range
from confide.protocol.manifest import Manifest

__all__ = ["coarse_ranges", "learned_bounds"]

_UNSEEN: Range = (-1.0, 1.0)


def coarse_ranges(manifest: Manifest, first: Floats) -> list[Range]:
    """Each learned column's coarse range from the first release; any range where nothing but noise is seen."""
    columns = len(manifest.schema_.unknown_bounds)
    return [range_ or _UNSEEN for range_ in statistics.coarse_ranges(first, columns, _noise(manifest))]


def learned_bounds(manifest: Manifest, first: Floats, second: Floats) -> dict[str, Range]:
    """Bounds by column, from both releases.

    Raises:
        DataError: A column cannot be told from the noise.
    """
    names = manifest.schema_.unknown_bounds
    seen = statistics.coarse_ranges(first, len(names), _noise(manifest))
    unseen = [name for name, range_ in zip(names, seen, strict=True) if range_ is None]
    if unseen:
        raise DataError(
            f"the noise hides the bounds of {', '.join(unseen[:10])}",
            where=f"statistics run {manifest.run}",
            hint="declare their bounds, learn fewer columns, or spend more: privacy.epsilon, more persons",
        )
    found = statistics.learned(second, [range_ or _UNSEEN for range_ in seen], _noise(manifest))
    return dict(zip(names, found, strict=True))


def _noise(manifest: Manifest) -> float:
    """Of a sum over the whole roster: no cohort's is louder."""
    return noise_deviation(
        manifest.metrics_noise_multiplier, sites=len(manifest.members),
        population=max(m.population for m in manifest.members), bits=manifest.sealing.bits,
    )  # fmt: skip
