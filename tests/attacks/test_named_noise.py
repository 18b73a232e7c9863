"""Attack: a coordinator asks for a run whose noise comes from a seed in its manifest, to take it off each update again.

A simulation of public data may do that, to compare engines bit by bit. A deployed site does not, whatever its operator
writes: no line of `site.toml` allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from confide.clients.policy import SitePolicy
from confide.config import load_experiment
from confide.config.site import load_site
from confide.errors import ConfigError, PolicyError
from confide.protocol.manifest import Manifest
from confide.simulations.sources import load_sources
from confide.simulations.world import World

SEEDED = {"epsilon": 2.0, "unsafe_noise_seed": 7}


def manifest_of(tree: dict[str, Any], folder: Path) -> Manifest:
    world = World(load_sources(load_experiment(tree, ()), folder), folder / "s", folder / "ledgers", folder / "logs")
    world.close()
    return world.manifest


def site_of(asked: Manifest, **data: Any) -> dict[str, Any]:
    """A `site.toml` that allows everything that the run asks for, as far as there are words for it."""
    member = asked.members[0]
    return {
        "name": member.site, "federation": asked.federation, "data": {"file": "d.csv", "subject": "person", **data},
        "policy": {
            "coordinator_key": asked.coordinator_key, "population": member.population, "purposes": [asked.purpose],
            "profiles": [asked.sealing.profile], "models": [asked.model.kind], "epsilon_limit": 8.0,
            "ledger_epsilon_limit": 8.0, "local_steps_limit": 100, "held_out": asked.held_out,
            "min_subjects": asked.min_subjects, "delta": asked.privacy.delta, "release": True, "statistics": True,
        },
    }  # fmt: skip


@pytest.mark.parametrize("public", [True, False])
def test_a_deployed_site_refuses_noise_that_has_a_name(
    public: bool, make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    asked = manifest_of(make_experiment(privacy=SEEDED, sealing={"profile": "sealed"}), tmp_path)
    policy, name = SitePolicy.of(load_site(site_of(asked, public=public))), asked.members[0].site
    with pytest.raises(PolicyError, match="noise that nobody knows"):
        policy.check(asked, name)
    # The controls: with the defence off it takes part, and so it does where nobody names the noise.
    replace(policy, data_are_public=True, unsafe_noise=True).check(asked, name)
    honest = manifest_of(make_experiment(sealing={"profile": "sealed"}), tmp_path / "honest")
    SitePolicy.of(load_site(site_of(honest, public=public))).check(honest, name)


@pytest.mark.parametrize("section", ["data", "policy", "device"])
def test_no_line_of_a_site_allows_it(
    section: str, make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tree = site_of(manifest_of(make_experiment(privacy=SEEDED), tmp_path), public=True)
    for key in ("unsafe_noise", "unsafe_noise_seed"):
        with pytest.raises(ConfigError, match=key):
            load_site({**tree, section: {**tree.get(section, {}), key: True}})
    assert not SitePolicy.of(load_site(tree)).unsafe_noise, "the control: without it the file is read"
