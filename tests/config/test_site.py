"""`site.toml`: what it may say, and that a run which asks for more is refused with the line that says so."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.clients.policy import SitePolicy
from confide.clients.training.code import package_digest
from confide.config import ModelConfig
from confide.config.site import REPLY_SECONDS, load_site, site_template
from confide.errors import ConfigError, PolicyError
from confide.privacy.audit import records as audit
from tests.attacks.federation import is_refusal, open_federation, refusal_of

KEY = "ab" * 32


def tree(**policy: Any) -> dict[str, Any]:
    """A site that allows what a small run needs; `policy` is put over it."""
    allowed = {
        "coordinator_key": KEY, "population": 40, "purposes": ["research/test"], "profiles": ["sealed"],
        "models": ["logistic"], "epsilon_limit": 4.0, "local_steps_limit": 4, "held_out": 0.25, "min_subjects": 10,
        "release": True,
    }  # fmt: skip
    return {"name": "ash", "federation": "heart", "data": {"file": "d.csv", "subject": "p"}, "policy": allowed | policy}


def test_the_template_is_read_and_allows_nothing() -> None:
    text = site_template("ash", "heart", 40, endpoint="h:1", coordinator_key=KEY)
    found = load_site(tomllib.loads(text))
    assert (found.name, found.federation, found.endpoint) == ("ash", "heart", "h:1")
    policy = SitePolicy.of(found)
    assert (policy.purposes, policy.profiles, policy.models) == (frozenset(), frozenset(), frozenset())
    assert (policy.epsilon_limit, policy.local_steps_limit, policy.release, policy.statistics) == (0, 0, False, False)
    everything = "\n".join(
        line.removeprefix("# ") if line.startswith(tuple(f"# {key}" for key in ("pu", "pr", "mo", "eps", "loc", "hou")))
        else line for line in text.splitlines()
    )  # fmt: skip
    assert SitePolicy.of(load_site(tomllib.loads(everything))).profiles == {"sealed"}, "its commented lines are valid"


def test_replies_are_padded_unless_the_operator_says_that_they_are_not() -> None:
    template = tomllib.loads(site_template("ash", "heart", 40, coordinator_key=KEY))
    assert template["policy"]["reply_seconds"] == REPLY_SECONDS > 0
    assert SitePolicy.of(load_site(template)).reply_seconds == REPLY_SECONDS
    assert SitePolicy.of(load_site(tree())).reply_seconds == REPLY_SECONDS, "a site.toml that an earlier version wrote"
    assert SitePolicy.of(load_site(tree(reply_seconds=0))).reply_seconds == 0


def test_without_the_coordinators_key_there_is_no_policy() -> None:
    with pytest.raises(ConfigError, match="names no coordinator_key"):
        SitePolicy.of(load_site(tomllib.loads(site_template("ash", "heart", 40))))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [({"purpose": ["x"]}, "policy.purposes"), ({"min_site": 3}, "policy.min_sites"),
     ({"epsilon_limits": 2.0}, "policy.epsilon_limit")],
)  # fmt: skip
def test_an_unknown_line_is_refused_with_the_nearest_known_one(wrong: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_site(tree(**wrong))
    assert refused.value.hint == f"did you mean {hint}?"
    with pytest.raises(ConfigError, match="unknown key polcy"):
        load_site({**tree(), "polcy": {}})


@pytest.mark.parametrize(
    "wrong",
    [{"min_sites": 2}, {"population": 0}, {"hours": ["22-6"]}, {"hours": ["24:00-06:00"]}, {"hours": ["06:00-06:00"]},
     {"models": ["resnet"]}, {"models": ["a:b"]}, {"model_digests": {"a:b": KEY}}, {"profiles": ["plain"]},
     {"coordinator_key": "x"}, {"epsilon_limit": float("inf")}, {"epsilon_limit": 9.0}, {"held_out": 0.0}],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    load_site(tree())
    with pytest.raises(ConfigError):
        load_site(tree(**wrong))


@pytest.mark.parametrize(
    "data",
    [{"subject": "p"}, {"subject": "p", "file": "x", "url": "y", "query": "z"}, {"subject": "p", "url": "y"},
     {"subject": "p", "file": "x", "query": "z"}, {"file": "x"}],
    ids=str,
)  # fmt: skip
def test_the_data_come_from_one_place(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_site({**tree(), "data": data})
    assert load_site({**tree(), "data": {"subject": "p", "url": "env:DB", "query": "SELECT 1"}}).data.url == "env:DB"


def test_a_missing_or_broken_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_site(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_site(tmp_path / "site.toml")


# --- a run that asks for more -----------------------------------------------------------------------------------------

#: A policy that does not allow the run, and the line of site.toml that the refusal names.
LINES: list[tuple[dict[str, Any], str]] = [
    ({"purposes": frozenset()}, "site.toml [policy] purposes"),
    ({"profiles": frozenset({"masked"})}, "site.toml [policy] profiles"),
    ({"models": frozenset({"mlp"})}, "site.toml [policy] models"),
    ({"min_sites": 4}, "site.toml [policy] min_sites"),
    ({"min_subjects": 9}, "site.toml [policy] min_subjects"),
    ({"epsilon_limit": 1.0}, "site.toml [policy] epsilon_limit"),
    ({"delta": 1e-6}, "site.toml [policy] delta"),
    ({"local_steps_limit": 3}, "site.toml [policy] local_steps_limit"),
    ({"held_out": 0.5}, "site.toml [policy] held_out"),
    ({"population": 41}, "site.toml [policy] population"),
    ({"max_sites_per_subject": 2}, "site.toml [policy] max_sites_per_subject"),
    ({"reply_seconds": 60.0}, "site.toml [policy] reply_seconds"),
    ({"coordinator_key": b"x" * 32}, "site.toml [policy] coordinator_key"),
    ({"federation": "another"}, "site.toml federation"),
]


def test_a_refusal_names_the_line_of_policy_and_stands_in_both_logs_of_the_site(tmp_path: Path) -> None:
    with open_federation(tmp_path / "f") as federation:
        site = federation.sites["ash"]
        allowed = site.policy
        for number, (changes, line) in enumerate(LINES):
            federation.set_policy("ash", **{k: v for k, v in changes.items() if k != "coordinator_key"})
            made = federation.manifest.model_copy(update={"run": f"run-{number}", "wait_seconds": 60})
            if "coordinator_key" in changes:
                made = made.model_copy(update={"coordinator_key": "00" * 32})
            answer = refusal_of(federation.join(["ash"], made)["ash"])
            assert answer.kind == "policy"
            assert answer.reason.startswith(f"{line} allows "), line
            entries = [e for e in site.log.entries() if isinstance(e, audit.Refused)]
            assert entries[-1].reason == answer.reason
            local = [e for e in site.local_log.entries() if isinstance(e, audit.LocalRefusal)]
            assert line in local[-1].reason
            site.policy = allowed
        federation.set_policy("ash", reply_seconds=59.0)
        made = federation.manifest.model_copy(update={"run": "good", "wait_seconds": 60})
        assert not is_refusal(federation.join(["ash"], made)["ash"]), "the control"


def test_the_coordinator_logs_the_line_that_refused_it(tmp_path: Path) -> None:
    with open_federation(tmp_path / "f") as federation:
        federation.set_policy("ash", local_steps_limit=1)
        federation.coordinator().run()
        refusals = [e for e in federation.world.log.entries() if isinstance(e, audit.Refused)]
        assert [e.party for e in refusals] == ["ash"]
        assert "site.toml [policy] local_steps_limit allows <= 1" in refusals[0].reason


# --- hours ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 24 * 60 - 1), st.sampled_from(["22:00-06:00", "08:00-17:30", "00:00-23:59"]))
def test_hours_are_half_open_and_may_cross_midnight(minute: int, hours: str) -> None:
    policy = SitePolicy.of(load_site(tree(hours=[hours])))
    (a, b), at = policy.hours[0], (7 * 24 * 60 + minute) * 60_000_000
    inside = a <= minute < b if a < b else not b <= minute < a
    if inside:
        policy.check_hours(at, "ash")
    else:
        with pytest.raises(PolicyError, match=rf"\[policy\] hours allows {hours}"):
            policy.check_hours(at, "ash")


def test_outside_its_hours_a_site_neither_joins_nor_trains_and_goes_on_afterwards(tmp_path: Path) -> None:
    with open_federation(tmp_path / "f") as federation:
        federation.agree()
        minute = federation.sites["ash"].log.now() // 60_000_000 % 1440
        federation.set_policy("ash", hours=(((minute + 120) % 1440, (minute + 180) % 1440),))
        assert "hours allows" in refusal_of(federation.train(1)["ash"]).reason
        assert not federation.charges("ash", 1), "and nothing was charged"
        federation.set_policy("ash", hours=(((minute - 60) % 1440, (minute + 60) % 1440),))
        assert not is_refusal(federation.train(1)["ash"])


# --- models of one's own ----------------------------------------------------------------------------------------------


def test_code_that_changed_since_the_operator_read_it_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "ourmodels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(
        "from torch import nn\ndef make(inputs, outputs):\n    return nn.Linear(inputs, outputs)\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    seen = package_digest("ourmodels.nets:make")
    assert "ourmodels" not in sys.modules, "looking at a package runs nothing of it"
    with open_federation(tmp_path / "f") as federation:
        kind = "ourmodels.nets:make"
        models = {"models": frozenset({kind}), "model_digests": {kind: seen}}
        federation.set_policy("ash", **models)
        run = {"run": "own", "model": ModelConfig(kind=kind)}
        made = federation.manifest.model_copy(update=run)
        (package / "nets.py").write_text((package / "nets.py").read_text() + "# one more line\n")
        answer = refusal_of(federation.join(["ash"], made)["ash"])
        assert "model_digests allows other code" in answer.reason
        assert "ourmodels" not in sys.modules
        federation.set_policy("ash", model_digests={kind: package_digest(kind)})
        layout = made.layout.model_copy(update={"names": ("weight", "bias")})
        again = federation.join(["ash"], made.model_copy(update={"layout": layout}))["ash"]
        assert not is_refusal(again), "the control"


def test_the_digest_of_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="is not installed"):
        package_digest("no_such_package_at_all:make")
    assert package_digest("statistics:mean") == package_digest("statistics:median"), "one module, one digest"
