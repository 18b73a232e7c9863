"""What a site allows. Default deny: a policy that names nothing admits nothing. The coordinator is not trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from confide.config import STRATEGY_OPTIONS
from confide.errors import PolicyError
from confide.privacy.dp import run_epsilon
from confide.protocol.manifest import Manifest

__all__ = ["SitePolicy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SitePolicy:
    """One site's policy.

    Attributes:
        coordinator: The only coordinator listened to, by name.
        coordinator_key: Its Ed25519 public key.
        federation: The only federation taken part in.
        purposes: Purposes allowed.
        profiles: Sealing profiles allowed; `open` hands the coordinator every update.
        data_are_public: May ε = ∞ and readable updates be asked for at all?
        models: Kinds of models allowed; `package.module:function` runs that code here.
        strategies: Kinds of strategies allowed; `package.module:Class`, or an installed name, runs that code here.
        held_out: Share of persons held out, the same for every run: a person's role is for ever.
        min_sites: Smallest sum this site's update may hide in.
        min_subjects: Fewest consenting persons with which this site takes part.
        population: Declared population: the public normaliser that a run must name.
        epsilon_limit: The most ε that a single run may ask for.
        delta: The ledger's δ.
        release: May this site hand out the trained model?
        statistics: May bounds of columns be learned from noised histograms?
    """

    coordinator: str
    coordinator_key: bytes
    federation: str
    purposes: frozenset[str] = frozenset()
    profiles: frozenset[str] = frozenset()
    data_are_public: bool = False
    models: frozenset[str] = frozenset({"logistic", "mlp"})
    strategies: frozenset[str] = frozenset(STRATEGY_OPTIONS)
    held_out: float = 0.2
    min_sites: int = 3
    min_subjects: int = 20
    population: int = 0
    epsilon_limit: float = 0.0
    delta: float = 0.0
    release: bool = False
    statistics: bool = False

    def check(self, manifest: Manifest, site: str) -> None:
        """Compare a run with the policy.

        Raises:
            PolicyError: Names the line of policy, what it allows and what was asked.
        """
        member = manifest.member(site)
        asked = manifest.privacy
        lines = [
            ("federation", manifest.federation == self.federation, self.federation, manifest.federation),
            ("coordinator_key", manifest.coordinator_key == self.coordinator_key.hex(), "its pinned key", "another"),
            ("purposes", manifest.purpose in self.purposes, sorted(self.purposes), manifest.purpose),
            ("profiles", manifest.sealing.profile in self.profiles, sorted(self.profiles), manifest.sealing.profile),
            ("min_sites", manifest.min_sites >= self.min_sites, f">= {self.min_sites}", manifest.min_sites),
            ("population", member is not None and member.population == self.population, self.population,
             member.population if member else "not in the roster"),
            ("models", manifest.model.kind in self.models, sorted(self.models), manifest.model.kind),
            ("strategies", manifest.strategy.kind in self.strategies, sorted(self.strategies), manifest.strategy.kind),
            ("held_out", manifest.held_out == self.held_out, self.held_out, manifest.held_out),
            # A threshold of the coordinator's choosing would tell it the number of persons, bit by bit.
            ("min_subjects", manifest.min_subjects <= self.min_subjects, f"<= {self.min_subjects}",
             manifest.min_subjects),
            ("delta", asked.delta == self.delta, self.delta, asked.delta),
            ("statistics", self.statistics or not manifest.statistics, "none", "the bounds of columns"),
            ("data_are_public", asked.unsafe_noise_seed is None or self.data_are_public, "noise that nobody knows",
             "unsafe_noise_seed"),
            ("unit", asked.unit == "subject" or self.data_are_public, "subject", asked.unit),
        ]  # fmt: skip
        if asked.is_private:
            noisy = manifest.noise_multiplier > 0 and manifest.metrics_noise_multiplier > 0
            cost = (
                max((run_epsilon(e, asked.delta) for e in manifest.all_charges()), default=0.0) if noisy else math.inf
            )
            within = max(cost, asked.epsilon) <= self.epsilon_limit and cost <= asked.epsilon * (1 + 1e-9)
            lines.append(("epsilon_limit", within, f"<= {self.epsilon_limit:g}",
                          f"{asked.epsilon:g} with noise for {cost:g}" if noisy else "no noise"))  # fmt: skip
        else:
            lines.append(("data_are_public", self.data_are_public, "a finite epsilon", "epsilon = inf"))
        for name, holds, allowed, got in lines:
            if not holds:
                raise PolicyError(
                    f"{name} allows {allowed}, the run asks for {got}",
                    where=f"policy of site {site}",
                    hint="change the run, or have the site's operator change the policy",
                )
        if len(manifest.members) < manifest.min_sites:
            raise PolicyError(
                f"the roster has {len(manifest.members)} sites, fewer than min_sites = {manifest.min_sites}",
                where=f"policy of site {site}",
            )
