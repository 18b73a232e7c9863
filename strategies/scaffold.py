"""SCAFFOLD (Karimireddy et al. 2020, Algorithm 1, option II): control variates against the drift of unlike sites.

A site keeps cᵢ, all sites keep c; at first both are 0. From the round's model x a site takes K steps (K may differ)
y ← y − η (g̃(y) − cᵢ + c) and then sets cᵢ⁺ = cᵢ − c + (x − y) / (K η). With nᵢ a site's public weight:
x ← x + η_g · Σ nᵢ (yᵢ − x) / Σ_cohort nᵢ and c ← c + Σ nᵢ (cᵢ⁺ − cᵢ) / Σ_roster nᵢ, so that c is Σ nᵢ cᵢ / Σ nᵢ.

Why this costs no further privacy. Let g̃₁ … g̃_K be a round's clipped and noised gradients: what the round is charged
for. Then x − y = η Σ (g̃ₖ − cᵢ + c), so cᵢ⁺ is just the mean of g̃₁ … g̃_K, and all that a site computes, keeps or sends
(y − x, cᵢ⁺ − cᵢ) is a function of g̃₁ … g̃_K, of cᵢ (the same mean of an earlier round, charged there) and of c (made of
opened sums). Functions of private values are private: post-processing, under the adaptive composition that charges are
added up by. It holds as long as the correction c − cᵢ is added after clipping and noise, which is where it is added
(`confide.clients.training.trainer`), and as long as the charge behind a cᵢ stands: a site takes cᵢ⁺ over only from an
update that it sealed, never from one whose charge it gave back (`confide.clients.rounds`).

The change of cᵢ, −c − (y − x) / (K η), rides as d further coordinates of the same sealed vector. It tells as much as
the update does, so it is sealed like it; cᵢ never leaves its site. (Where all sites take the same K, its sum follows
from the updates' sum; where they do not, it does not.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from confide.strategies.base import Floats, State, StepInput, Weights, moved
from confide.strategies.unequal import UnequalSteps

__all__ = ["Scaffold", "control_change", "correction"]


@dataclass(frozen=True, slots=True)
class Scaffold(UnequalSteps):
    """State: c."""

    control_variates: ClassVar[bool] = True

    def initial_state(self, size: int) -> State:
        """No correction."""
        return (np.zeros(size),)

    def step(self, given: StepInput) -> tuple[Weights, State]:
        """See the module."""
        if given.control is None:
            raise ValueError("scaffold needs the sum of the control variates' changes")
        common = given.state[0] + given.control / given.roster_weight
        return moved(given.model, given.average * self.server_learning_rate), (common,)


def correction(common: Floats, own: Floats) -> Floats:
    """c − cᵢ: what a site adds to each local step's gradient, after clipping and noise."""
    return common - own


def control_change(update: Floats, common: Floats, steps: int, learning_rate: float) -> Floats:
    """cᵢ⁺ − cᵢ = −c − (y − x) / (K η), for a site's update y − x of K steps at rate η."""
    return -common - update / (steps * learning_rate)
