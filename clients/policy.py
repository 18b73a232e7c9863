"""What a site allows. Default deny: a policy that names nothing admits nothing. The coordinator is not trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from confide.clients.training.code import package_digest
from confide.config import STRATEGY_OPTIONS
from confide.config.site import SiteConfig
from confide.errors import ConfigError, PolicyError
from confide.privacy.dp import person_epsilon
from confide.protocol.manifest import Manifest
from confide.protocol.roster import COORDINATOR

__all__ = ["SitePolicy"]

#: Where a line of the policy stands.
_LINE = "site.toml [policy]"
_PLACES = {"federation": "site.toml federation", "data_are_public": "site.toml [data] public",
           "unsafe_noise": "a deployed site", "unit": "site.toml [data] public"}  # fmt: skip


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
        unsafe_noise: May noise come from a seed in the manifest? In simulations of public data; `of` never says so.
        models: Kinds of models allowed; `package.module:function` runs that code here.
        model_digests: Of models whose code runs here: the digest that its package must have.
        strategies: Kinds of strategies allowed; `package.module:Class`, or an installed name, runs that code here.
        strategy_digests: Of strategies whose code runs here: the same.
        held_out: Share of persons held out, the same for every run: a person's role is for ever.
        min_sites: Smallest sum this site's update may hide in.
        min_subjects: Fewest consenting persons with which this site takes part.
        population: Declared population: the public normaliser that a run must name.
        max_sites_per_subject: At how many sites of a federation this site's persons may be; a run may assume no fewer.
        epsilon_limit: The most ε that a single run may ask for.
        delta: The ledger's δ.
        release: May this site hand out the trained model?
        statistics: May bounds of columns be learned from noised histograms?
        local_steps_limit: The most steps of training a round.
        reply_seconds: Training is answered so long after it was asked for, or a multiple of that (`confide.clients.
            cutoff`); 0: when it is done. `site.toml` has another default.
        hours: When this site joins and trains, as `(from, to)` in minutes of the day (UTC); empty: at any time.
    """

    coordinator: str
    coordinator_key: bytes
    federation: str
    purposes: frozenset[str] = frozenset()
    profiles: frozenset[str] = frozenset()
    data_are_public: bool = False
    unsafe_noise: bool = False
    models: frozenset[str] = frozenset({"logistic", "mlp"})
    strategies: frozenset[str] = frozenset(STRATEGY_OPTIONS)
    held_out: float = 0.2
    min_sites: int = 3
    min_subjects: int = 20
    population: int = 0
    max_sites_per_subject: int = 1
    epsilon_limit: float = 0.0
    delta: float = 0.0
    release: bool = False
    statistics: bool = False
    local_steps_limit: int = 0
    model_digests: Mapping[str, str] = field(default_factory=dict)
    strategy_digests: Mapping[str, str] = field(default_factory=dict)
    hours: tuple[tuple[int, int], ...] = ()
    reply_seconds: float = 0.0

    @classmethod
    def of(cls, config: SiteConfig) -> SitePolicy:
        """What a `site.toml` says.

        Raises:
            ConfigError: It does not name the coordinator's key: nobody is listened to yet.
        """
        asked = config.policy
        if asked.coordinator_key is None:
            raise ConfigError("names no coordinator_key", where="site.toml [policy]",
                              hint="confirm the roster first: confide site confirm writes the key down")  # fmt: skip
        return cls(
            coordinator=COORDINATOR,
            coordinator_key=bytes.fromhex(asked.coordinator_key),
            federation=config.federation,
            purposes=frozenset(asked.purposes),
            profiles=frozenset(asked.profiles),
            data_are_public=config.data.public,
            models=frozenset(asked.models),
            model_digests=dict(asked.model_digests),
            strategies=frozenset(asked.strategies),
            strategy_digests=dict(asked.strategy_digests),
            held_out=asked.held_out,
            min_sites=asked.min_sites,
            min_subjects=asked.min_subjects,
            population=asked.population,
            max_sites_per_subject=asked.max_sites_per_subject,
            epsilon_limit=asked.epsilon_limit,
            delta=asked.delta,
            release=asked.release,
            reply_seconds=asked.reply_seconds,
            statistics=asked.statistics,
            local_steps_limit=asked.local_steps_limit,
            hours=tuple(_minutes(text) for text in asked.hours),
        )

    def check_hours(self, at: int, site: str) -> None:
        """Does this site work now?

        Args:
            at: Microseconds since 1970, UTC.
            site: For the error.

        Raises:
            PolicyError: It does not.
        """
        minute = at // 60_000_000 % (24 * 60)
        open_ = any(a <= minute < b if a < b else (minute >= a or minute < b) for a, b in self.hours)
        if self.hours and not open_:
            allowed = ", ".join(f"{_clock(a)}-{_clock(b)}" for a, b in self.hours)
            raise PolicyError(f"{_LINE} hours allows {allowed} (UTC) only", where=f"policy of site {site}",
                              hint="ask again then")  # fmt: skip

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
            ("local_steps_limit", manifest.training.local_steps <= self.local_steps_limit,
             f"<= {self.local_steps_limit}", manifest.training.local_steps),
            ("delta", asked.delta == self.delta, self.delta, asked.delta),
            ("reply_seconds", manifest.wait_seconds is None or manifest.wait_seconds > self.reply_seconds,
             f"runs that wait longer than {self.reply_seconds:g} s for replies", f"{manifest.wait_seconds} s"),
            ("statistics", self.statistics or not manifest.statistics, "none", "the bounds of columns"),
            ("data_are_public", asked.unsafe_noise_seed is None or self.data_are_public, "noise that nobody knows",
             "unsafe_noise_seed"),
            ("unsafe_noise", asked.unsafe_noise_seed is None or self.unsafe_noise, "noise that nobody knows",
             "unsafe_noise_seed, which is for simulations"),
            ("max_sites_per_subject", asked.max_sites_per_subject >= self.max_sites_per_subject,
             f">= {self.max_sites_per_subject}", asked.max_sites_per_subject),
            ("unit", asked.unit == "subject" or self.data_are_public, "subject", asked.unit),
        ]  # fmt: skip
        if asked.is_private:
            noisy = manifest.noise_multiplier > 0 and manifest.metrics_noise_multiplier > 0
            cost = person_epsilon(manifest.all_charges(), asked.delta) if noisy else math.inf
            within = max(cost, asked.epsilon) <= self.epsilon_limit and cost <= asked.epsilon * (1 + 1e-9)
            lines.append(("epsilon_limit", within, f"<= {self.epsilon_limit:g}",
                          f"{asked.epsilon:g} with noise for {cost:g}" if noisy else "no noise"))  # fmt: skip
        else:
            lines.append(("data_are_public", self.data_are_public, "a finite epsilon", "epsilon = inf"))
        for name, holds, allowed, got in lines:
            if not holds:
                raise PolicyError(
                    f"{_PLACES.get(name, _LINE + ' ' + name)} allows {allowed}, the run asks for {got}",
                    where=f"policy of site {site}",
                    hint="change the run, or have the site's operator change the policy",
                )
        self._check_code("model", self.model_digests, manifest.model.kind, site)
        self._check_code("strategy", self.strategy_digests, manifest.strategy.kind, site)
        if len(manifest.members) < manifest.min_sites:
            raise PolicyError(
                f"the roster has {len(manifest.members)} sites, fewer than min_sites = {manifest.min_sites}",
                where=f"policy of site {site}",
            )

    @staticmethod
    def _check_code(what: str, digests: Mapping[str, str], kind: str, site: str) -> None:
        """Code of a package runs here only as the operator has seen it."""
        pinned = digests.get(kind)
        if pinned is not None and package_digest(kind) != pinned:
            raise PolicyError(
                f"{_LINE} {what}_digests allows other code for {kind} than is installed",
                where=f"policy of site {site}",
                hint="read what changed, then write down what confide model digest says",
            )


def _minutes(text: str) -> tuple[int, int]:
    """`22:00-06:00` as minutes of the day."""
    start, _, end = text.partition("-")
    return _minute(start), _minute(end)


def _minute(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)


def _clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"
