"""The exposure table: every coalition for every profile, and neighbours where a cohort has more than 65 sites."""

from __future__ import annotations

import pytest

from confide.config import SealingConfig
from confide.privacy.sealing import COALITIONS, Exposure, make_profile

#: update, sum, forges: as the design's table says, coalition by coalition.
SAID = {
    "sealed": [(0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0), (0, 0, 0)],
    "masked": [(0, 1, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0), (0, 1, 0)],
    "ckks": [(0, 0, 0), (0, 1, 0), (1, 1, 1), (1, 1, 0), (0, 0, 0)],
    "open": [(1, 1, 1), (0, 1, 0), (1, 1, 1), (1, 1, 0), (1, 1, 0)],
}


#: What single updates passed on to every site change.
GATHERED = [(1, 1, 0), (1, 1, 0), (1, 1, 0), (1, 1, 0), (1, 1, 0)]


def test_passing_single_updates_on_shows_them_to_every_site_and_lets_nobody_forge_one() -> None:
    rows = make_profile(SealingConfig(profile="open"), 6, gather=True).describe_exposure()
    assert tuple(row.coalition for row in rows) == COALITIONS
    assert [(row.update, row.sum, row.forges) for row in rows] == GATHERED
    assert rows != table("open"), "the control: where updates are added, it is not so"


def table(profile: str, sites: int = 6) -> tuple[Exposure, ...]:
    """What the profile says of itself."""
    return make_profile(SealingConfig.model_validate({"profile": profile}), sites).describe_exposure()


@pytest.mark.parametrize("profile", SAID)
def test_the_five_coalitions_are_in_every_profiles_table(profile: str) -> None:
    assert len(COALITIONS) == 5
    assert tuple(row.coalition for row in table(profile)) == COALITIONS
    assert [(row.update, row.sum, row.forges) for row in table(profile)] == SAID[profile]
    assert all(row.learns for row in table(profile))


@pytest.mark.parametrize("profile", ["sealed", "masked"])
@pytest.mark.parametrize("sites", [2, 65, 66, 1000])
def test_above_65_sites_the_masked_profiles_name_neighbours(profile: str, sites: int) -> None:
    rows = table(profile, sites)
    named = [row for row in rows if "neighbours" in row.coalition]
    if sites <= 65:
        assert not named
        assert tuple(row.coalition for row in rows) == COALITIONS
        return
    assert [rows.index(row) for row in named] == [3]
    assert named[0].coalition == "all 64 neighbours of a site, or all other sites of the cohort"
    assert "neighbours" in named[0].learns
    assert [(row.update, row.sum, row.forges) for row in rows] == SAID[profile], "who learns it changes, not what"
    assert [row for row in rows if row is not named[0]] == [
        r for r in table(profile, 6) if r.coalition != COALITIONS[3]
    ]


@pytest.mark.parametrize("profile", ["ckks", "open"])
def test_profiles_without_masks_have_no_neighbours(profile: str) -> None:
    assert table(profile, 1000) == table(profile, 6)


def test_an_update_is_never_learnt_without_the_sum() -> None:
    for profile in SAID:
        assert all(row.sum for row in table(profile) if row.update)
