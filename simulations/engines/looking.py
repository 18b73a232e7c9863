"""What the simulating process sees of its sites: directly where they are open in it, else as they have shown it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from confide.simulations.engines.apart import read_seen
from confide.simulations.world import World

__all__ = ["held_out_now", "model_now"]


def model_now(world: World, name: str, *, apart: bool) -> tuple[float, NDArray[np.float32] | None]:
    """The share of the latest sum that was clipped, and the weights, at one site; apart, these of public data only.

    Args:
        world: The sites.
        name: The site.
        apart: Are the sites open in other processes?
    """
    if world.elsewhere is not None:
        return world.elsewhere.look(name)
    if not apart:
        model = world.sites[name].current_model(world.manifest.run)
        return model.saturated, model.weights
    seen = read_seen(world.folder, name)
    return (0.0, None) if seen is None else (seen.saturated, seen.weights)


def held_out_now(world: World) -> Mapping[str, NDArray[np.bool_]]:
    """By site, whose metrics may be asked for; public data only."""
    if world.elsewhere is not None:
        return world.elsewhere.held_out()
    if world.sites.open:
        return {site.name: site.participants(world.manifest).held_out for site in world.sites.open.values()}
    shown = {name: read_seen(world.folder, name) for name in world.sites}
    return {name: seen.held_out for name, seen in shown.items() if seen is not None and seen.held_out is not None}
