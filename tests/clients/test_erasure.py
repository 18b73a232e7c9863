"""Erasing a person: what the site, its ledger and its evidence say and do afterwards."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

import confide as product
from confide.errors import ConsentError
from confide.privacy.consent import Registry, SiteKey
from confide.privacy.dp import PrivacyEvent, Role
from confide.privacy.dp.personal import PersonalLosses
from tests.cli.command import confide
from tests.clients.watching import Watch, watch_runs
from tests.support import experiment_tree, write_people

EVENT = PrivacyEvent(
    role=Role.TRAIN, unit="subject", noise_multiplier=2.0, sample_rate=0.5, steps=20, max_grad_norm=1.0
)  # fmt: skip


@pytest.mark.parametrize("kept", [True, False])
def test_a_site_whose_table_still_holds_an_erased_person_goes_on_without_her(tmp_path: Path, kept: bool) -> None:
    tree = experiment_tree(
        str(write_people(tmp_path, people=12)), run={"rounds": 3}, sites={"min_subjects": 2},
        training={"local_steps": 1}, privacy={"sample_rate": 1.0}, sealing={"profile": "masked"},
        consent={"simulate": {"fraction": 1.0}},
    )  # fmt: skip
    out, watch = tmp_path / "out", Watch()

    def stop(seen: Watch) -> None:
        if seen.round == 2:
            raise KeyboardInterrupt

    watch.on_round = stop
    with pytest.MonkeyPatch.context() as patch:
        watch_runs(patch, watch)
        with pytest.raises(KeyboardInterrupt):
            product.simulate(tree, out=out)
        trained = watch.of("train", site="ash", rounds=range(1, 2))
        person, other = min(trained), max(trained)
        at_ash = ("--registry", out / "sites" / "ash", "--key", out / "ledgers" / "ash" / "site.key")
        wish = ("--keep-rounds",) if kept else ()
        assert confide("consent", "erase", person, "--yes", *wish, *at_ash).code == 0
        watch.on_round, watch.readings = lambda _seen: None, []
        product.simulate(out=out, resume=True)
    assert person not in watch.of()
    assert watch.of("train", site="ash", rounds=range(2, 3)) == trained - {person}  # the control: the others are
    assert confide("audit", "verify", out).code == 0
    gone, still = (confide("audit", "exposure", p, out, "--json").last_line for p in (person, other))
    assert (gone["known"], gone["erased"], gone["consent"], gone["decisions"]) == (True, True, [], [])
    assert [run["rounds"] for run in gone["runs"]] == ([[1]] if kept else [])
    assert (still["erased"], [run["rounds"] for run in still["runs"]]) == (False, [[1, 2, 3]])
    assert 0 < gone["epsilon"] < still["epsilon"] if kept else gone["epsilon"] >= still["epsilon"] > 0
    assert gone["forgotten"] != kept
    shown = confide("audit", "exposure", person, out, "--out", tmp_path / "page.html")
    assert "erased" in shown.out
    assert "to withdraw" not in shown.out
    page = (tmp_path / "page.html").read_text()
    assert "You were erased here" in page
    assert "How to withdraw" not in page
    assert confide("consent", "grant", person, "--purpose", "research/test", *at_ash).code == 4


@pytest.mark.parametrize("registry_lost", [False, True])
def test_what_was_spent_is_not_forgotten_even_where_the_registry_is(tmp_path: Path, registry_lost: bool) -> None:
    """Erased, or erased and then enrolled in a registry made anew: her loss is found by the site key alone."""
    key = SiteKey.load_or_create(tmp_path / "site.key")
    charges = {"run/1/train": EVENT}
    with closing(Registry(tmp_path / "consent.db", key)) as registry:
        registry.enrol(["ann", "bob"])
        with closing(PersonalLosses(tmp_path / "personal.db")) as personal:
            places = personal.enrol([key.locator("ann"), key.locator("bob")])
            personal.hold("run/1/train", places[:1])
        registry.erase("ann")
        with pytest.raises(ConsentError, match="was erased"):
            registry.enrol(["ann"])
    if registry_lost:
        (tmp_path / "consent.db").unlink()
        with closing(Registry(tmp_path / "consent.db", key)) as registry:
            registry.enrol(["ann"])  # no registry can know better, so the ledger's record must
    with closing(PersonalLosses(tmp_path / "personal.db")) as personal:
        again = personal.enrol([key.locator("ann"), key.locator("bob")])
        assert list(again) == list(places)
        ann, bob = personal.epsilons(charges, 1e-5)[again]
        assert ann > bob == 0
        limits = personal.divergence(charges, 8.0)[again] * 0 + ann / 2
        assert list(personal.admits(again, limits, Role.TRAIN, charges, [], 1e-5)) == [False, True]


def test_runs_without_noise_are_told_too(tmp_path: Path) -> None:
    tree = experiment_tree(
        str(write_people(tmp_path, people=12)), run={"rounds": 2}, sites={"min_subjects": 2},
        training={"local_steps": 1}, privacy={"epsilon": float("inf")}, consent={"simulate": {"fraction": 0.8}},
    )  # fmt: skip
    out = tmp_path / "out"
    run = product.simulate(tree, out=out).run_id
    seen = set()
    for number in range(12):
        found = confide("audit", "exposure", f"ash-{number}", out, "--json").last_line
        assert found["charged_epsilon"] == 0
        if not found["consent"]:
            assert (found["runs"], found["epsilon"]) == ([], 0)
            seen.add("no consent")
            continue
        (only,) = found["runs"]
        assert (only["run"], only["epsilon"], found["epsilon"]) == (run, "inf", "inf")
        assert only["rounds"] == ([1, 2] if found["role"] == "train" else [3])
        assert only["model"] is not None
        seen.add(found["role"])
    assert seen == {"no consent", "train", "held_out"}
    text = confide("audit", "exposure", "ash-0", out, "--out", tmp_path / "page.html")
    assert "∞" in text.out
    assert "∞" in (tmp_path / "page.html").read_text()
