"""A fixed noise seed: on public data only, with `unsafe` in its name, and shouted about wherever the run is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.clients.training.artifact import load_model
from confide.config import load_experiment
from confide.errors import ConfigError, PolicyError
from confide.privacy.audit.report import write_report
from confide.simulations import plan, simulate
from confide.simulations.sources import load_sources
from confide.simulations.world import World
from tests.cli.command import confide, to_toml

SEEDED = {"epsilon": 2.0, "unsafe_noise_seed": 7}


def weights(folder: Path) -> np.ndarray:
    module = load_model(folder / "model.safetensors").module
    return np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])


def test_with_a_seed_two_runs_are_the_same_and_without_they_are_not(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for name, privacy in (("a", SEEDED), ("b", SEEDED), ("c", {"epsilon": 2.0}), ("d", {"epsilon": 2.0})):
        simulate(make_experiment(privacy=privacy, sealing={"profile": "open"}), out=tmp_path / name)
    # What is left is the quantiser's own rounding, far below the noise.
    assert np.abs(weights(tmp_path / "a") - weights(tmp_path / "b")).max() < 1e-3
    assert np.abs(weights(tmp_path / "c") - weights(tmp_path / "d")).max() > 1e-2, "the control"


def test_everything_that_shows_the_run_shouts(make_experiment: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(to_toml(make_experiment(privacy=SEEDED)))
    dry, done = confide("simulate", experiment, "--dry-run"), confide("simulate", experiment, "--out", tmp_path / "out")
    as_json = confide("simulate", experiment, "--out", tmp_path / "json", "--json")
    write_report(tmp_path / "out", tmp_path / "report.html")
    assert as_json.last_line["epsilon"]["max"] == "inf", "whoever knows the seed takes the noise off again"
    assert "UNSAFE" in as_json.last_line["warnings"][0]
    pages = [(tmp_path / "report.html").read_text(), (tmp_path / "out" / "index.html").read_text()]
    for text in (dry.out, done.out, *pages, load_model(tmp_path / "out" / "model.safetensors").card.privacy):
        assert "UNSAFE" in text
        assert "protects nobody" in " ".join(text.split())
        assert "at most ε" not in text


def test_nothing_shouts_where_the_noise_is_the_systems(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The control of the one above."""
    result = simulate(make_experiment(), out=tmp_path / "out")
    write_report(tmp_path / "out", tmp_path / "report.html")
    assert not result.warnings
    assert not plan(make_experiment()).warnings
    assert np.isfinite(result.epsilon.max)
    assert "UNSAFE" not in (tmp_path / "report.html").read_text() + (tmp_path / "out" / "index.html").read_text()


def test_it_is_charged_all_the_same(make_experiment: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    simulate(make_experiment(privacy=SEEDED), out=tmp_path / "out")
    line = confide("site", "ledger", tmp_path / "out" / "ledgers", "--json").last_line
    assert all(role["epsilon"] > 0 for site in line["sites"] for role in site["roles"])


def test_private_data_are_never_trained_on_with_a_seed(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="unsafe_noise_seed needs data"):
        load_experiment(make_experiment(privacy=SEEDED, data={"public": False}), ())


def test_a_site_refuses_a_coordinator_that_names_the_noise(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A coordinator that knows the noise takes it off each update: the site's own policy decides."""
    experiment = load_experiment(make_experiment(privacy=SEEDED), ())
    world = World(load_sources(experiment, tmp_path), tmp_path / "s", tmp_path / "ledgers", tmp_path / "logs")
    site = next(iter(world.sites.values()))
    site.policy.check(world.manifest, site.name)
    with pytest.raises(PolicyError, match="noise that nobody knows"):
        replace(site.policy, data_are_public=False).check(world.manifest, site.name)
    world.close()
    assert json.loads(world.manifest.to_bytes())["privacy"]["unsafe_noise_seed"] == 7
