"""`confide site check | status | export | backup | restore` and `confide run`, over sites opened from their folders."""

from __future__ import annotations

import copy
import datetime as dt
import json
import os
import re
import shutil
import sqlite3
import ssl
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from benchmarks.deployment_demo import SITES, WORDS, Demo, ok
from confide.cli.server import write_model
from confide.clients import cutoff
from confide.clients.agent import _Process
from confide.clients.app import make_client_app
from confide.clients.assembly import open_site
from confide.clients.backup import REGISTRY_COPY
from confide.clients.cutoff import ReplyTime
from confide.clients.service import agent_config, alone
from confide.config import SchemaConfig
from confide.config.run import load_run
from confide.errors import AuditError, ConfideError, ConfigError, ConsentError, PeerError, PolicyError, SealingError
from confide.privacy.files import write_private
from confide.protocol.keyfiles import PASSPHRASE, PASSPHRASE_FILE, is_encrypted, site_key
from confide.protocol.manifest import Manifest
from confide.protocol.rosterbook import RosterBook
from confide.server.certificates import expiry, make_authority, make_server_certificate
from confide.server.coordinator import Coordinator, Released
from confide.server.federation import AUTHORITY, SERVER_CERTIFICATE, SERVER_KEY, FederationFolder
from confide.server.link import Link, LinkConfig
from confide.server.outcome import finished
from confide.server.plan import make_manifest
from confide.server.runs import RunStore
from confide.server.service import Service, ServiceConfig, run_store
from confide.simulations.engines.grid import NODE_CONFIG_SITE, LocalGrid
from tests.cli.command import confide, to_toml
from tests.integration.test_agent import connect_proxy
from tests.privacy import postgres
from tests.rosters import Cast

PEOPLE = 60


class Operated:
    """A provisioned federation in which two runs have ended, with what they released."""

    def __init__(self, folder: Path) -> None:
        self.demo = Demo(folder, f"sqlite:///{folder / 'visits.db'}", PEOPLE)
        self.demo.provision()
        self.secret = ("--passphrase-file", self.demo.passphrase)
        self.fed = self.demo.fed
        asked = {"run": {"rounds": 2, "report_metrics_every": 2}, "privacy": {"epsilon": 2.0}}
        self.runs = [self.demo.start_run(name, **asked) for name in ("short", "again")]
        self.run = self.runs[0]
        self.manifest, _ = self.load(self.run)
        self.released = [self._drive(run) for run in self.runs]

    def load(self, run: str) -> tuple[Manifest, Any]:
        """A run as it was put into the store."""
        store = RunStore(run_store(self.fed))
        held = store.load(run)
        store.close()
        assert held is not None
        return Manifest.from_bytes(held[0]), np.frombuffer(held[1], dtype="<f4").astype(np.float32)

    def _drive(self, run: str) -> Released:
        manifest, weights = self.load(run)
        sites = {name: open_site(str(place), WORDS) for name, place in self.demo.sites.items()}
        identity = FederationFolder(self.fed).identity(WORDS)
        log = identity.open_log(self.fed / "coordinator.db", "coordinator", manifest.federation)
        store = RunStore(run_store(self.fed))
        try:
            grid = LocalGrid(make_client_app(lambda c: sites[str(c.node_config[NODE_CONFIG_SITE])]), sites)
            return Coordinator(grid, identity, manifest, weights, log, store=store).run()
        finally:
            for site in sites.values():
                site.close()
            log.close()
            store.close()


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("federation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMO_DATABASE", f"sqlite:///{folder / 'visits.db'}")
        patch.setattr(cutoff, "_wait_until", lambda _: None)  # sites pad their replies; nobody here looks at the time
        yield Operated(folder)


@pytest.fixture
def site(operated: Operated, tmp_path: Path) -> Path:
    """A copy of a site's folder, to be spoilt."""
    shutil.copytree(operated.demo.sites["dayton"], tmp_path / "dayton")
    return tmp_path / "dayton"


def edit(site: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a site.toml."""
    tree = tomllib.loads((site / "site.toml").read_text())
    change(tree)
    (site / "site.toml").write_text(to_toml(tree))


# --- sites from their folders -----------------------------------------------------------------------------------------


def test_sites_opened_from_their_folders_train_seal_and_release(operated: Operated) -> None:
    result = finished(operated.manifest, operated.released[0])
    assert result["sites_in_last_cohort"] == sorted(SITES)
    assert (result["rounds_abandoned"], result["metrics_round"]) == (0, 2)
    assert set(result["released_metrics"]) == set(result["released_intervals"])
    assert 0 < result["epsilon"] <= 2.0


def test_a_run_with_another_schema_or_label_is_refused_by_a_site(operated: Operated, site: Path) -> None:
    label = operated.manifest.label.model_copy(update={"at_least": 4.0})
    opened = open_site(str(site), WORDS)
    try:
        opened.check(operated.manifest)
        with pytest.raises(PolicyError, match="schema or label"):
            opened.check(operated.manifest.model_copy(update={"label": label}))
    finally:
        opened.close()


@pytest.mark.parametrize(("change", "error", "said"), [
    (lambda t: t.pop("schema"), ConfigError, r"names no \[schema\]"),
    (lambda t: t["data"].pop("label"), ConfigError, "label"),
    (lambda t: t["policy"].update(population=7), PolicyError, "those of the roster"),
    (lambda t: t.update(name="somebody"), PolicyError, "those of the roster"),
    (lambda t: t["folders"].update(consent="env:NOWHERE"), ConfigError, "not in the environment"),
])  # fmt: skip
def test_a_folder_that_does_not_hold_together_opens_no_site(
    site: Path, change: Callable[[dict[str, Any]], object], error: type[ConfideError], said: str
) -> None:
    edit(site, change)
    with pytest.raises(error, match=said):
        open_site(str(site), WORDS)


@pytest.fixture(scope="module")
def database_server() -> Iterator[Path]:
    with postgres.server() as folder:
        yield folder


@pytest.fixture(scope="module")
def database(database_server: Path) -> str:
    """An empty PostgreSQL database's URL."""
    return postgres.new_database(database_server, "consent")


def test_a_sites_registry_may_lie_in_postgresql(
    operated: Operated, site: Path, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def consenting() -> tuple[list[bool], list[bool]]:
        opened = open_site(str(site), WORDS)
        try:
            found = opened.participants(operated.manifest)
            return found.train.tolist(), found.held_out.tolist()
        finally:
            opened.close()

    in_file, persons = consenting(), tmp_path / "persons"
    assert sum(in_file[0]) > 1
    monkeypatch.setenv("OUR_REGISTRY", database)
    edit(site, lambda tree: tree["folders"].update(consent="env:OUR_REGISTRY"))
    # An address at which there is no registry is a mistake, and makes none.
    with pytest.raises(ConsentError, match="holds no consent registry"):
        open_site(str(site), WORDS)
    assert "there is no registry" in confide("site", "check", site, *operated.secret).out
    keyed = ("--key", site / "site.key", *operated.secret)
    assert confide("consent", "init", database, *keyed).code == 0
    enough = "at least 20 consenting subjects to train on"
    assert enough not in confide("site", "check", site, *operated.secret).out, "nobody consents yet"
    opened = open_site(str(site), WORDS)
    persons.write_text("\n".join(opened.records.persons))
    opened.close()
    moved = tmp_path / "moved.csv"
    answer = confide("consent", "export", "--out", moved, "--subjects", persons, "--named-only", "--registry", site,
                     *operated.secret)  # fmt: skip
    assert answer.code == 0, answer.err
    assert confide("consent", "import", moved, "--registry", database, *keyed).code == 0
    assert consenting() == in_file
    assert enough in confide("site", "check", site, *operated.secret).out
    # And it is this one that decides.
    someone = next(p for p, in_ in zip(persons.read_text().split("\n"), in_file[0], strict=True) if in_)
    purpose = operated.manifest.purpose
    assert confide("consent", "withdraw", someone, "--purpose", purpose, "--registry", database, *keyed).code == 0
    assert sum(consenting()[0]) == sum(in_file[0]) - 1


# --- what a site tells one person, and its consent officer ------------------------------------------------------------


def persons_of(operated: Operated, site: Path) -> tuple[list[str], list[str]]:
    """Whom both runs trained on, and whom they evaluated on."""
    opened = open_site(str(site), WORDS)
    try:
        found = opened.participants(operated.manifest)
        names = opened.records.persons
        return [names[i] for i in np.flatnonzero(found.train)], [names[i] for i in np.flatnonzero(found.held_out)]
    finally:
        opened.close()


def exposure(operated: Operated, site: Path, person: str) -> dict[str, Any]:
    return dict(ok("audit", "exposure", person, site, *operated.secret, "--json").last_line)


def impact(operated: Operated, site: Path, *arguments: str) -> dict[str, Any]:
    return dict(ok("consent", "impact", *arguments, "--site", site, *operated.secret, "--json").last_line)


@pytest.mark.parametrize("where", ["file", "postgresql"])
def test_a_site_answers_one_person_about_all_its_runs(
    operated: Operated, site: Path, where: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    if where == "postgresql":
        url = postgres.new_database(request.getfixturevalue("database_server"), "persons")
        ok("consent", "copy", site / "consent.db", url)
        (site / "consent.db").unlink()
        monkeypatch.setenv("OUR_REGISTRY", url)
        edit(site, lambda tree: tree["folders"].update(consent="env:OUR_REGISTRY"))
    train, held_out = persons_of(operated, site)
    for person, role, rounds in ((train[0], "train", [1, 2]), (held_out[0], "held_out", [3])):
        found = exposure(operated, site, person)
        assert (found["site"], found["role"], found["decisions"]) == (
            "dayton", role, [{"purpose": operated.manifest.purpose, "status": "given"}],
        )  # fmt: skip
        assert [run["run"] for run in found["runs"]] == operated.runs
        for run, released in zip(found["runs"], operated.released, strict=True):
            assert (run["rounds"], run["model"], run["purpose"]) == (rounds, released.model, operated.manifest.purpose)
            assert run["recipients"][0] == "sites fitchburg, seattle: sums over the cohort"
            assert 0 < run["epsilon"] < found["epsilon"] <= 8
        told = impact(operated, site, person)
        assert [(r["site"], r["run"], r["rounds"], r["model"]) for r in told["runs"]] == [
            ("dayton", run, rounds, released.model)
            for run, released in zip(operated.runs, operated.released, strict=True)
        ]
    page = tmp_path / "answer.html"
    ok("audit", "exposure", train[0], site, *operated.secret, "--out", page)
    assert all(run in page.read_text() for run in operated.runs)
    assert not exposure(operated, site, "nobody")["known"]


def test_an_officer_sees_what_those_who_have_left_took_part_in(operated: Operated, site: Path) -> None:
    train, _ = persons_of(operated, site)
    since = dt.datetime.now(dt.UTC).isoformat()
    at = ("--registry", site, *operated.secret)
    ok("consent", "withdraw", train[0], "--purpose", operated.manifest.purpose, *at)
    ok("consent", "erase", train[1], "--yes", *at)
    found = impact(operated, site, "--since", since)
    assert (found["persons"], [r["persons"] for r in found["runs"]]) == (2, [2, 2])
    words = ok("consent", "impact", "--since", since, "--site", site, *operated.secret).words
    assert "confide run start RUN.toml --retrain-after NAME" in words
    # An erasure at a site's own folder finds the ledger by itself: nobody is told any more which rounds held her.
    gone, left = exposure(operated, site, train[1]), exposure(operated, site, train[0])
    assert (gone["erased"], gone["forgotten"], gone["runs"]) == (True, True, [])
    assert gone["epsilon"] >= left["epsilon"] > 0
    assert [run["run"] for run in left["runs"]] == operated.runs
    opened = open_site(str(site), WORDS)
    opened.close()


def test_one_persons_part_in_a_round_of_a_deployed_run_is_proved(
    operated: Operated, exported: Path, tmp_path: Path
) -> None:
    train, _ = persons_of(operated, site := operated.demo.sites["dayton"])
    at = ("--party", "dayton", "--site", site, *operated.secret, "--run", operated.run)
    for person, round_ in ((train[0], "1"), (train[0], "2")):
        ok("audit", "prove", exported, "--person", person, "--round", round_, *at, "--out", tmp_path / "proof.json")
        told = ok("audit", "verify", tmp_path / "proof.json", "--json").last_line
        assert (told["person"]["run"], told["person"]["round"], told["person"]["role"]) == (
            operated.run, int(round_), "train",
        )  # fmt: skip


@pytest.mark.parametrize(("arguments", "code"), [
    (("audit", "exposure", "ann", "{site}"), 2), (("audit", "exposure", "ann", "{site}", "--ledger", "{site}"), 2),
    (("consent", "impact", "ann", "--site", "{site}", "--run", "{site}"), 2), (("consent", "impact", "ann"), 2),
    (("consent", "impact", "ann", "--site", "{empty}"), 2), (("audit", "exposure", "ann", "{empty}"), 2),
])  # fmt: skip
def test_questions_about_persons_that_have_no_answer_are_refused(
    site: Path, tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    (tmp_path / "empty").mkdir()
    answer = confide(*(a.format(site=site, empty=tmp_path / "empty") for a in arguments))
    assert answer.code == code
    assert "→" in answer.err


def test_a_site_without_its_key_makes_no_other(site: Path) -> None:
    (site / "site.key").unlink()
    with pytest.raises(ConfigError, match="is not there"):
        open_site(str(site), WORDS)
    assert not (site / "site.key").exists()


def test_two_agents_do_not_share_a_folder(site: Path) -> None:
    with alone(site), pytest.raises(ConfigError, match="another agent"), alone(site):
        pass
    with alone(site):
        assert ok("site", "status", site, "--json").last_line["agent_running"]
    assert not ok("site", "status", site, "--json").last_line["agent_running"]


# --- check ------------------------------------------------------------------------------------------------------------


def findings(site: Path, *secret: str | Path) -> tuple[int, dict[str, tuple[str, int]]]:
    """Exit code, and state and code of each look."""
    done = confide("site", "check", site, *secret, "--json")
    return done.code, {f["check"]: (f["state"], f["code"]) for f in done.last_line["findings"]}


@pytest.fixture
def listening(operated: Operated) -> Iterator[None]:
    """The coordinator's link, at its endpoint."""
    with Link(link_config(operated.fed)):
        yield


def link_config(fed: Path) -> LinkConfig:
    """As the service of this federation would listen."""
    state = FederationFolder(fed).state
    assert state.roster is not None
    host, _, port = state.endpoint.rpartition(":")
    nodes = {m.site: m.node_key for m in state.roster.members}
    return LinkConfig(host=host, port=int(port), certificate=fed / SERVER_CERTIFICATE, key=fed / SERVER_KEY,
                      nodes=nodes)  # fmt: skip


@pytest.mark.usefixtures("listening")
def test_a_site_that_is_ready_passes_every_look(operated: Operated, site: Path) -> None:
    code, found = findings(site, *operated.secret)
    assert {check: state for check, (state, _) in found.items() if state == "fail"} == {}
    assert code == 0
    assert found["coordinator"][1] == 0
    assert found["consent for research/health-utilisation"] == ("ok", 0)
    shown = ok("site", "check", site, *operated.secret)
    assert "at least 20 consenting subjects" in shown.words
    told = ok("site", "check", site, *operated.secret, "--json").last_line["findings"]
    of_people = [f["said"] + f["todo"] for f in told if f["check"] not in ("disk", "coordinator", "clock")]  # no people
    assert any("consenting" in said for said in of_people)
    assert not [said for said in of_people if re.search(rf"\b{PEOPLE * 17 // 20}\b", said)], "never how many"


def said_of_replies(site: Path, *secret: str | Path) -> tuple[str, str]:
    done = confide("site", "check", site, *secret, "--json")
    (found,) = (f for f in done.last_line["findings"] if f["check"] == "reply times")
    assert found["code"] == 0
    return found["state"], found["said"] + found["todo"]


def test_reply_times_are_looked_at(operated: Operated, site: Path) -> None:
    state, said = said_of_replies(site, *operated.secret)
    assert (state, "multiples of 1 s; the longest of the latest 6 rounds took" in said) == ("ok", True), said
    edit(site, lambda t: t["policy"].update(reply_seconds=3600))
    state, said = said_of_replies(site, *operated.secret)
    assert (state, "a run waits 3600 s" in said) == ("warn", True)
    edit(site, lambda t: t["policy"].update(reply_seconds=0))
    state, said = said_of_replies(site, *operated.secret)
    assert (state, "write reply_seconds = 1 into" in said) == ("warn", True)
    edit(site, lambda t: t["policy"].pop("reply_seconds"))
    opened = open_site(str(site), WORDS)
    for left, expected in ((2.0, "ok"), (3.0, "warn")):
        opened.note_reply(ReplyTime(run="r", round=1, again=1.0, took=left - 0.5, deadline=2.0, left=left))
        state, said = said_of_replies(site, *operated.secret)
        assert (state, "1 of the latest 8 replies left after their deadline" in said) == (expected, left > 2)
    opened.close()
    assert "reply_seconds = 8 hides more" in said


def _no_table(site: Path) -> None:
    (site / "data.csv").unlink()


def _other_column(site: Path) -> None:
    edit(site, lambda t: t["schema"]["features"].update(height={"kind": "number", "bounds": [0, 250]}))


def _open_key(site: Path) -> None:
    (site / "keys" / "signing.key").chmod(0o644)


def _nobody(site: Path) -> None:
    edit(site, lambda t: t["policy"].update(min_subjects=PEOPLE + 1))


def _no_ledger(site: Path) -> None:
    shutil.rmtree(site / "ledger")


def _other_limit(site: Path) -> None:
    edit(site, lambda t: t["policy"].update(ledger_epsilon_limit=9.0))


def _no_registry(site: Path) -> None:
    (site / "consent.db").unlink()


def _no_gpu(site: Path) -> None:
    edit(site, lambda t: t.update(device={"kind": "cuda:99"}))


def _unconfirmed(site: Path) -> None:
    edit(site, lambda t: t["policy"].pop("coordinator_key"))


@pytest.mark.parametrize(("spoil", "check", "code"), [
    (_no_table, "data", 3), (_other_column, "data", 3), (_open_key, "keys", 2), (_no_ledger, "ledger", 5),
    (_nobody, "consent for research/health-utilisation", 3), (_other_limit, "ledger", 5),
    (_no_registry, "consent for research/health-utilisation", 4), (_no_gpu, "device", 2), (_unconfirmed, "policy", 2),
])  # fmt: skip
@pytest.mark.usefixtures("listening")
def test_what_is_wrong_with_a_site_is_found_and_decides_the_exit_code(
    operated: Operated, site: Path, spoil: Callable[[Path], None], check: str, code: int
) -> None:
    spoil(site)
    exit_code, found = findings(site, *operated.secret)
    assert exit_code == code
    assert {name: failed for name, (state, failed) in found.items() if state == "fail"} == {check: code}


def test_nobody_listening_is_a_peers_failure_and_says_what_to_do(operated: Operated, site: Path) -> None:
    assert findings(site, *operated.secret)[0] == 8
    assert "confide server run" in confide("site", "check", site, *operated.secret).out


def test_a_coordinator_with_another_certificate_is_not_trusted(operated: Operated, site: Path, tmp_path: Path) -> None:
    ok("federation", "init", tmp_path / "other", "--name", "rand", "--endpoint",
       FederationFolder(operated.fed).state.endpoint)  # fmt: skip
    state = FederationFolder(operated.fed).state
    assert state.roster is not None
    host, _, port = state.endpoint.rpartition(":")
    other = tmp_path / "other"
    nodes = {m.site: m.node_key for m in state.roster.members}
    with Link(LinkConfig(host=host, port=int(port), certificate=other / SERVER_CERTIFICATE, key=other / SERVER_KEY,
                         nodes=nodes)):  # fmt: skip
        done = confide("site", "check", site, *operated.secret)
    assert done.code == 8
    assert "shows another certificate" in done.words


def test_a_wrong_passphrase_is_told_from_a_missing_one(site: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("another passphrase")
    assert findings(site)[1]["keys"] == ("fail", 2)
    assert findings(site, "--passphrase-file", tmp_path / "wrong")[1]["keys"] == ("fail", 6)


@pytest.mark.parametrize(("days_ago", "state"), [(366, "ok"), (368, "warn"), (396, "warn")])
def test_a_certificate_that_ends_within_thirty_days_is_warned_about(
    operated: Operated, site: Path, tmp_path: Path, days_ago: int, state: str
) -> None:
    fed = tmp_path / "fed"
    shutil.copytree(operated.fed, fed)
    made = FederationFolder(fed)
    made.renew(dt.datetime.now(dt.UTC) - dt.timedelta(days=days_ago), WORDS)
    said = expiry((fed / SERVER_CERTIFICATE).read_bytes(), (fed / AUTHORITY).read_bytes(), dt.datetime.now(dt.UTC))
    assert ("the server certificate ends on" in str(said)) == (state == "warn")
    with Link(link_config(fed)):
        assert findings(site, *operated.secret)[1]["coordinator"] == (state, 0)


@pytest.mark.parametrize(("age", "said"), [(0, None), (3653 - 181, None), (3653 - 179, "authority ends on"),
                                           (3653 + 1, "authority ended on")])  # fmt: skip
def test_the_authority_is_warned_about_half_a_year_ahead(age: int, said: str | None) -> None:
    now = dt.datetime.now(dt.UTC)
    key, authority = make_authority("f", now - dt.timedelta(days=age))
    made = now if age < 3653 else now - dt.timedelta(days=100)
    _, server = make_server_certificate("127.0.0.1:1", key, authority, made)
    pems = [c.public_bytes(serialization.Encoding.PEM) for c in (server, authority)]
    found = expiry(pems[0], pems[1], now)
    assert found is None if said is None else said in str(found)


def test_a_renewed_certificate_is_taken_without_a_restart_and_an_old_one_warned_about(
    operated: Operated, tmp_path: Path
) -> None:
    fed = tmp_path / "fed"
    shutil.copytree(operated.fed, fed)
    shutil.rmtree(fed / "runs", ignore_errors=True)
    FederationFolder(fed).renew(dt.datetime.now(dt.UTC) - dt.timedelta(days=390), WORDS)
    host, _, port = FederationFolder(fed).state.endpoint.rpartition(":")
    told, shown = list[str](), list[str]()

    def tell(event: str) -> None:
        told.append(event)
        if event.startswith("listening"):
            shown.append(ssl.get_server_certificate((host, int(port))))
        if event.startswith("the server certificate"):
            FederationFolder(fed).renew(dt.datetime.now(dt.UTC), WORDS)
        if len(shown) == 2:
            raise KeyboardInterrupt

    service = Service(ServiceConfig(folder=fed, store=run_store(fed), finish=write_model, tell=tell), WORDS)
    with pytest.raises(KeyboardInterrupt):
        service.run()
    assert len([event for event in told if "the server certificate ends on" in event]) == 1
    assert shown[1].split() == (fed / SERVER_CERTIFICATE).read_text().split()
    assert shown[0] != shown[1]


# --- through a proxy --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("listening")
def test_the_way_to_the_coordinator_is_looked_at_through_the_proxy_that_the_agent_takes(
    operated: Operated, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = FederationFolder(operated.fed).state.endpoint
    with connect_proxy() as (port, asked):
        proxy = f"http://127.0.0.1:{port}"
        assert findings(site, *operated.secret)[1]["coordinator"] == ("ok", 0)
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert findings(site, *operated.secret)[1]["coordinator"] == ("ok", 0)
        assert asked == [], "the control: none named, or excepted"
        monkeypatch.setenv("NO_PROXY", "")
        assert findings(site, *operated.secret)[1]["coordinator"] == ("ok", 0)
        assert asked == [f"CONNECT {endpoint} HTTP/1.1"] or asked == [f"CONNECT {endpoint} HTTP/1.0"]
        monkeypatch.delenv("HTTPS_PROXY")
        edit(site, lambda t: t.update(proxy=proxy))
        assert "through the proxy 127.0.0.1" in confide("site", "check", site, *operated.secret).words
        assert len(asked) == 2
        assert agent_config(site, WORDS).proxy == proxy
    done = confide("site", "check", site, *operated.secret)
    assert (done.code, "cannot be reached through the proxy" in done.words) == (8, True)
    edit(site, lambda t: t.update(proxy="socks5://127.0.0.1:1"))
    assert confide("site", "check", site, *operated.secret).code == ConfigError.exit_code


def test_the_proxy_of_a_site_is_for_its_node_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://elsewhere:1")
    monkeypatch.setenv("NO_PROXY", "coordinator.example")
    node, plain = _Process("node", tmp_path, "http://proxy:3128"), _Process("site", tmp_path)
    named, inherited = node._environment(), plain._environment()
    for process in (node, plain):
        process.end(0.0)
    assert {k: v for k, v in named.items() if k.lower().endswith("_proxy")} == {
        "HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    assert (inherited["HTTPS_PROXY"], inherited["NO_PROXY"]) == ("http://elsewhere:1", "coordinator.example,127.0.0.1")


# --- the site key under the passphrase --------------------------------------------------------------------------------


def test_the_site_key_lies_under_the_passphrase_that_the_site_was_made_with(operated: Operated, site: Path) -> None:
    assert is_encrypted(site / "site.key")
    assert findings(site, *operated.secret)[1]["keys"] == ("ok", 0)
    asked = ("consent", "status", "nobody", "--registry", site)
    assert confide(*asked).code == ConfigError.exit_code
    assert "--passphrase-file" in confide(*asked).err
    assert "nothing about such a person" in confide(*asked, *operated.secret).err, "the control: it was opened"
    site.joinpath("wrong").write_text("another passphrase")
    assert confide(*asked, "--passphrase-file", site / "wrong").code == SealingError.exit_code
    with pytest.raises(ConfigError, match="is encrypted"):
        open_site(str(site), None)


@pytest.mark.parametrize("variable", [PASSPHRASE, PASSPHRASE_FILE])
def test_the_environment_may_hold_the_passphrase_or_name_its_file(
    operated: Operated, site: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, WORDS if variable == PASSPHRASE else str(operated.demo.passphrase))
    assert "nothing about such a person" in confide("consent", "status", "nobody", "--registry", site).err
    assert findings(site)[1]["keys"] == ("ok", 0)


def test_keys_in_the_clear_are_put_under_a_passphrase_afterwards_and_are_the_same_keys(
    operated: Operated, site: Path
) -> None:
    sealed, words = site / "site.key", operated.secret
    key = site_key(sealed, WORDS)
    sealed.write_bytes(key.secret)
    sealed.chmod(0o600)
    assert findings(site, *words)[1]["keys"] == ("warn", 0)
    assert "in the clear: site.key" in confide("site", "check", site, *words).words
    assert ok("site", "lock", site, *words, "--json").last_line["encrypted"] == ["site.key"]
    assert (sealed.stat().st_mode & 0o777, site_key(sealed, WORDS)) == (0o600, key)
    assert key.secret not in sealed.read_bytes()
    assert ok("site", "lock", site, *words, "--json").last_line["encrypted"] == []
    site.joinpath("wrong").write_text("another passphrase")
    assert confide("site", "lock", site, "--passphrase-file", site / "wrong").code == SealingError.exit_code
    assert confide("site", "lock", site).code == ConfigError.exit_code


@pytest.mark.parametrize("place", [0, 30, -1])
def test_a_changed_site_key_is_no_other_site_key(operated: Operated, site: Path, place: int) -> None:
    """Everybody would get another role and another name."""
    changed = bytearray((site / "site.key").read_bytes())
    changed[place] ^= 1
    (site / "site.key").write_bytes(changed)
    with pytest.raises((ConsentError, SealingError)):
        open_site(str(site), WORDS)


def test_a_backup_holds_the_site_key_as_it_lies_there(operated: Operated, backup: Path, tmp_path: Path) -> None:
    ok("site", "restore", backup, "--out", tmp_path / "b", *operated.secret)
    assert is_encrypted(tmp_path / "b" / "site.key")


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    assert findings(tmp_path) == (2, {"site.toml": ("fail", 2)})


# --- status and export ------------------------------------------------------------------------------------------------


def test_the_status_tells_of_runs_refusals_and_the_ledger_and_changes_nothing(operated: Operated) -> None:
    place = operated.demo.sites["seattle"]
    before = (place / "ledger" / "ledger.db").read_bytes()
    tree = ok("site", "status", place, "--json").last_line
    seen = [(run["run"], run["state"], run["round"], run["sealed"]) for run in tree["runs"]]
    assert seen == [(run, "ended", 3, 3) for run in operated.runs]
    assert {r["role"] for r in tree["ledger"]} == {"train", "held_out"}
    assert all(0 < r["epsilon"] <= tree["epsilon_limit"] for r in tree["ledger"])
    assert tree["refusals"] == []
    assert operated.run in ok("site", "status", place).words
    assert (place / "ledger" / "ledger.db").read_bytes() == before


@pytest.fixture
def exported(operated: Operated, tmp_path: Path) -> Path:
    """Everybody's logs, as files."""
    for name, place in operated.demo.sites.items():
        done = ok("site", "export", place, "--out", tmp_path, "--json").last_line
        assert Path(done["log"]) == tmp_path / "logs" / f"{name}.log"
    ok("server", "export", operated.fed, "--out", tmp_path)
    return tmp_path


def test_exported_logs_verify_and_a_forged_one_does_not(operated: Operated, exported: Path) -> None:
    told = ok("audit", "verify", exported, "--json").last_line
    assert (told["verified"], told["runs"], told["parties"]) == (True, operated.runs, 4)
    log = exported / "logs" / "dayton.log"
    log.write_bytes(log.read_bytes().replace(b'"joined"', b'"jo1ned"', 1))
    assert confide("audit", "verify", exported).code == AuditError.exit_code


@pytest.mark.parametrize("number", [0, 1])
def test_the_model_beside_logs_of_several_runs_is_what_one_of_them_released(
    operated: Operated, exported: Path, number: int
) -> None:
    run, other = operated.runs[number], operated.runs[1 - number]
    write_model(exported, operated.load(run)[0], operated.released[number])
    for asked in ((), ("--run", run)):
        assert ok("audit", "verify", exported, *asked, "--json").last_line["verified"]
    assert confide("audit", "verify", exported, "--run", other).code == AuditError.exit_code
    model = exported / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    assert confide("audit", "verify", exported).code == AuditError.exit_code


def test_only_the_federated_log_and_the_roster_are_exported(operated: Operated, tmp_path: Path) -> None:
    ok("site", "export", operated.demo.sites["dayton"], "--out", tmp_path)
    names = ["dayton.checkpoint", "dayton.log", "roster.json"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == names
    assert b"local_" not in (tmp_path / "logs" / "dayton.log").read_bytes()


# --- new keys ---------------------------------------------------------------------------------------------------------


def moved(operated: Operated, to: Path) -> Operated:
    """The same federation somewhere else, to go on with it."""
    other, old = copy.copy(operated), operated.demo
    shutil.copytree(old.folder, to)
    demo = other.demo = copy.copy(old)
    demo.folder, demo.fed, demo.passphrase = to, to / "fed", to / "passphrase"
    demo.sites = {name: to / name for name in old.sites}
    other.fed, other.secret = demo.fed, ("--passphrase-file", demo.passphrase)
    return other


def rotate(federation: Operated, site: str) -> None:
    """New keys for a site, confirmed by everybody."""
    fed, sites, secret = federation.fed, federation.demo.sites, federation.secret
    ok("federation", "rotate", fed, ok("site", "rotate", sites[site], *secret, "--json").last_line["request"], *secret)
    kits = ok("federation", "kit", fed, *secret, "--json").last_line["kits"]
    for name, place in sites.items():
        said = ok("federation", "show", place, "--kit", kits[name], "--json").last_line["fingerprint"]
        done = ok("site", "confirm", place, kits[name], "--fingerprint", said, *secret, "--json").last_line
        ok("federation", "collect", fed, done["file"])
    kits = ok("federation", "kit", fed, *secret, "--json").last_line["kits"]
    for name, place in sites.items():
        ok("site", "confirm", place, kits[name], *secret)


def export_all(federation: Operated, to: Path) -> Path:
    for place in federation.demo.sites.values():
        ok("site", "export", place, "--out", to)
    ok("server", "export", federation.fed, "--out", to)
    return to


def test_a_sites_log_goes_on_under_its_new_key_and_verification_follows_the_roster(
    operated: Operated, tmp_path: Path
) -> None:
    later = moved(operated, tmp_path / "later")
    before = export_all(later, tmp_path / "before")
    rotate(later, "dayton")
    again = export_all(later, tmp_path / "again")
    told = json.loads(confide("audit", "verify", again, "--json").out)
    assert [(f["party"], f["severity"]) for f in told["findings"]] == [("dayton", "low")], "nobody has signed anew yet"
    open_site(str(later.demo.sites["dayton"]), WORDS).close()
    for name in ("dayton.log", "dayton.checkpoint"):
        shutil.copy(export_all(later, tmp_path / "now") / "logs" / name, again / "logs" / name)
    assert ok("audit", "verify", again, "--json").last_line["verified"], "the same entries, under the new key"
    run = later.demo.start_run("third", run={"rounds": 1, "report_metrics_every": 1}, privacy={"epsilon": 1.0})
    later._drive(run)
    after = export_all(later, tmp_path / "after")
    told = ok("audit", "verify", after, "--json").last_line
    assert (told["verified"], told["runs"], told["roster"]["version"]) == (True, [*operated.runs, run], 2)
    assert ok("audit", "verify", before, "--json").last_line["roster"]["version"] == 1
    log = (before / "logs" / "dayton.log").read_bytes()
    assert (after / "logs" / "dayton.log").read_bytes().startswith(log)
    shutil.copy(before / "logs" / "roster.json", after / "logs")
    assert confide("audit", "verify", after).code == AuditError.exit_code, "without the rotation nobody knows the key"


# --- a run after another ----------------------------------------------------------------------------------------------


def run_file(federation: Operated, name: str, **sections: dict[str, Any]) -> Path:
    """What the earlier runs asked for, in one round, at less ε."""
    tree = tomllib.loads((federation.demo.folder / "short.toml").read_text())
    small = {"run": {"name": name, "rounds": 1, "report_metrics_every": 1}, "privacy": {"epsilon": 0.5}}
    for section, values in (*small.items(), *sections.items()):
        tree[section] = {**tree[section], **values}
    path = federation.demo.folder / f"{name}.toml"
    path.write_text(to_toml(tree))
    return path


def start(federation: Operated, path: Path, *arguments: str) -> Any:
    return confide("run", "start", path, "--federation", federation.fed, *arguments, "--json")


def keep_released(federation: Operated) -> Path:
    """As the service leaves it when a run ends."""
    place = federation.fed / "runs" / federation.run
    place.mkdir(parents=True)
    write_model(place, federation.manifest, federation.released[0])
    (place / "result.json").write_text(json.dumps(finished(federation.manifest, federation.released[0])))
    return place


def test_a_model_is_trained_anew_without_whoever_has_left(operated: Operated, tmp_path: Path) -> None:
    later = moved(operated, tmp_path / "later")
    train, _ = persons_of(later, site := later.demo.sites["dayton"])
    gone, stayed = train[:2]
    ok("consent", "withdraw", gone, "--purpose", later.manifest.purpose, "--registry", site, *later.secret)
    told = start(later, run_file(later, "anew"), "--retrain-after", later.run)
    assert (told.code, told.last_line["begins_after"]) == (0, later.run), told.err
    manifest, weights = later.load(run := told.last_line["run"])
    assert np.array_equal(weights, later.load(later.run)[1])
    assert (manifest.begins_after, manifest.initial_model) == (later.run, later.manifest.initial_model)
    released = later._drive(run)
    assert not np.array_equal(released.weights, later.released[0].weights)
    assert finished(manifest, released)["begins_after"] == later.run
    assert [r["run"] for r in exposure(later, site, gone)["runs"]] == later.runs
    assert [r["run"] for r in exposure(later, site, stayed)["runs"]] == [*later.runs, run]
    assert later.demo.status(run)["begins_after"] == later.run
    assert "not erasure" in ok("run", "start", run_file(later, "more"), "--federation", later.fed, "--retrain-after",
                               later.run).words  # fmt: skip


def test_a_run_goes_on_from_a_released_model_and_a_later_one_goes_back_to_it(
    operated: Operated, tmp_path: Path
) -> None:
    """The last model before somebody's first exposure is the one that the first run that held her began with."""
    later = moved(operated, tmp_path / "later")
    place = keep_released(later)
    told = start(later, run_file(later, "on"), "--go-on-from", later.run)
    assert told.code == 0, told.err
    manifest, weights = later.load(run := told.last_line["run"])
    assert np.array_equal(weights, later.released[0].weights)
    assert (manifest.initial_model, manifest.begins_after) == (later.released[0].model, later.run)
    assert start(later, run_file(later, "early"), "--retrain-after", run).code == 2, "it has not ended"
    later._drive(run)
    told = start(later, run_file(later, "back"), "--retrain-after", run)
    manifest, weights = later.load(told.last_line["run"])
    assert (manifest.initial_model, manifest.begins_after) == (later.released[0].model, run)
    later._drive(manifest.run)
    model = place / "model.safetensors"
    write_model(place, operated.load(operated.runs[1])[0], operated.released[1])
    assert start(later, run_file(later, "other"), "--go-on-from", later.run).code == 2, "another run's model"
    model.unlink()
    assert start(later, run_file(later, "none"), "--go-on-from", later.run).code == 2


@pytest.mark.parametrize(("sections", "arguments"), [
    ({"run": {"purpose": "research/other"}}, ("--retrain-after", "{run}")),
    ({"model": {"kind": "mlp", "hidden": [4]}}, ("--retrain-after", "{run}")),
    ({}, ("--retrain-after", "nobody")), ({}, ("--retrain-after", "")), ({}, ("--go-on-from", "../{run}")),
    ({}, ("--retrain-after", "{run}", "--go-on-from", "{run}")),
])  # fmt: skip
def test_no_run_begins_after_what_is_not_its_like(
    operated: Operated, sections: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    before = ok("run", "status", "--federation", operated.fed, "--json").last_line
    asked = [a.format(run=operated.run) for a in arguments]
    assert start(operated, run_file(operated, "unlike", **sections), *asked).code == 2
    assert ok("run", "status", "--federation", operated.fed, "--json").last_line == before


def test_sites_refuse_a_beginning_that_is_not_what_its_manifest_says(operated: Operated, tmp_path: Path) -> None:
    later, wrong = moved(operated, tmp_path / "later"), []
    asked = load_run(run_file(later, "liar"))
    roster = FederationFolder(later.fed).state.roster
    assert roster is not None
    for name, after in (("control", None), ("liar", later.run)):
        weights = later.load(later.run)[1] + np.float32(1)
        manifest = make_manifest(asked, roster=roster, schema=asked.schema_, initial_model=weights,
                                 layout=later.manifest.layout, begins_after=after)  # fmt: skip
        store = RunStore(run_store(later.fed))
        store.submit(manifest.run, manifest.to_bytes(), weights.astype("<f4").tobytes())
        store.close()
        try:
            later._drive(manifest.run)
        except PeerError:
            wrong.append(name)
    assert wrong == ["liar"]
    refusals = ok("site", "status", later.demo.sites["dayton"], "--json").last_line["refusals"]
    assert f"does not begin with a model of run {later.run}" in refusals[-1]["reason"]


# --- backup and restore -----------------------------------------------------------------------------------------------


@pytest.fixture
def backup(operated: Operated, site: Path, tmp_path: Path) -> Path:
    """A backup of a site that holds keys of a run."""
    (site / "state" / "vault").mkdir(exist_ok=True)
    write_private(site / "state" / "vault" / "run-keys.vault", b"keys of a run")
    ok("site", "backup", site, "--out", tmp_path / "site.bak", *operated.secret)
    return tmp_path / "site.bak"


def test_a_restored_site_opens_and_has_spent_what_it_had_spent(
    operated: Operated, site: Path, backup: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back"
    files = ok("site", "restore", backup, "--out", back, *operated.secret, "--json").last_line["files"]
    assert {"site.toml", "site.key", "consent.db", "ledger/ledger.db", "ledger/personal.db", "logs/federated.db",
            "logs/local.db", "membership.json", "keys/signing.key", "state/state.db"} <= set(files)  # fmt: skip
    tree, again = (ok("site", "status", place, "--json").last_line for place in (site, back))
    assert tree == again
    shutil.copy(site / "data.csv", back)
    opened = open_site(str(back), WORDS)
    opened.close()
    assert (back / "keys" / "signing.key").stat().st_mode & 0o077 == 0


def test_a_registry_in_postgresql_is_in_the_backup_and_comes_back(
    operated: Operated, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres.server() as folder:
        here, there = (postgres.new_database(folder, name) for name in ("here", "there"))
        ok("consent", "copy", site / "consent.db", here)
        before = (site / "consent.db").read_bytes()
        (site / "consent.db").unlink()
        edit(site, lambda t: t["folders"].update(consent="env:REGISTRY"))
        monkeypatch.setenv("REGISTRY", here)
        done = ok("site", "backup", site, "--out", tmp_path / "s.bak", *operated.secret, "--json").last_line
        assert REGISTRY_COPY in done["files"]
        assert [what.split(":")[0].split(" (")[0] for what in done["left_out"]] == ["the table", "keys of runs"]
        assert before not in (tmp_path / "s.bak").read_bytes()
        back = tmp_path / "back"
        said = ok("site", "restore", tmp_path / "s.bak", "--out", back, *operated.secret).words
        assert f"confide consent copy {back / REGISTRY_COPY}" in said
        ok("consent", "copy", back / REGISTRY_COPY, there)
        shutil.copy(site / "data.csv", back)
        seen = []
        for place, url in ((site, here), (back, there)):
            monkeypatch.setenv("REGISTRY", url)
            opened = open_site(str(place), WORDS)
            seen.append([opened.participants(operated.manifest).train.sum(), opened._registry.history("125024")])
            opened.close()
        assert seen[0] == seen[1]
        assert seen[0][0] > 0
    assert not list(site.glob(".backup-*")), "no copy stays behind"


def test_keys_of_runs_are_in_no_backup(operated: Operated, backup: Path, tmp_path: Path) -> None:
    files = ok("site", "restore", backup, "--out", tmp_path / "b", *operated.secret, "--json").last_line["files"]
    assert not [name for name in files if "vault" in name]
    assert b"keys of a run" not in backup.read_bytes()


def test_a_backup_tells_nothing_without_its_passphrase(
    operated: Operated, site: Path, backup: Path, tmp_path: Path
) -> None:
    (tmp_path / "wrong").write_text("another passphrase")
    done = confide("site", "restore", backup, "--out", tmp_path / "b", "--passphrase-file", tmp_path / "wrong")
    assert done.code == 6
    assert not (tmp_path / "b").exists()
    assert (site / "site.key").read_bytes() not in backup.read_bytes()
    assert confide("site", "backup", site, "--out", tmp_path / "c.bak").code == 2, "never in the clear"


def test_a_changed_or_cut_backup_restores_nothing(operated: Operated, backup: Path, tmp_path: Path) -> None:
    whole = backup.read_bytes()
    last = len(whole) - 2**20 // 2
    flipped = bytearray(whole)
    flipped[last] ^= 1
    for bad in (bytes(flipped), whole[:-1], whole[:last], whole[:100], whole[:3], b"", whole + whole[-50:]):
        backup.write_bytes(bad)
        done = confide("site", "restore", backup, "--out", tmp_path / "b", *operated.secret)
        assert (done.code, (tmp_path / "b").exists()) == (6, False)
        assert not list(tmp_path.glob(".b.*"))
    backup.write_bytes(whole)
    ok("site", "restore", backup, "--out", tmp_path / "b", *operated.secret)


def test_backups_and_sites_are_never_written_over(operated: Operated, site: Path, backup: Path) -> None:
    assert confide("site", "backup", site, "--out", backup, *operated.secret).code == 2
    assert confide("site", "restore", backup, "--out", site, *operated.secret).code == 2


def test_a_backup_waits_for_whoever_writes_and_says_so_in_the_end(
    operated: Operated, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from confide.clients import backup as module

    monkeypatch.setattr(module, "_TRIES", 2)
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    writer = sqlite3.connect(site / "ledger" / "ledger.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    held = confide("site", "backup", site, "--out", tmp_path / "s.bak", *operated.secret)
    assert (held.code, (tmp_path / "s.bak").exists()) == (10, False)
    writer.execute("ROLLBACK")
    writer.close()
    ok("site", "backup", site, "--out", tmp_path / "s.bak", *operated.secret)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_file_with_data_or_consent_in_it_is_refused(operated: Operated, tmp_path: Path) -> None:
    good = tomllib.loads((operated.demo.folder / "short.toml").read_text())
    for section, key, value, said in (
        ("data", "file", "data.csv", "file"), ("consent", "file", "c.csv", "consent"),
        ("sites", "names", ["dayton", "seattle", "atlantis"], "atlantis"), ("sites", "names", ["dayton"], "fewer"),
        ("schema", "features", {"x*": {"kind": "number", "bounds": [0, 1]}}, "pattern"),
        ("schema", "features", {"x": {"kind": "number"}}, "bounds"),
    ):  # fmt: skip
        (tmp_path / "run.toml").write_text(to_toml({**good, section: {**good.get(section, {}), key: value}}))
        done = confide("run", "start", tmp_path / "run.toml", "--federation", operated.fed)
        assert done.code == 2, (section, key)
        assert said in done.err


def test_bounds_are_learned_by_a_run_of_their_own_and_the_same_file_starts_the_training(
    operated: Operated, tmp_path: Path
) -> None:
    """Without noise, so that sixty persons a site are enough; the sites' operators say that their data are public."""
    later = moved(operated, tmp_path / "later")
    asked = tomllib.loads((later.demo.folder / "short.toml").read_text())
    asked["schema"]["bounds"] = "learn"
    declared = asked["schema"]["features"]["xage"].pop("bounds")
    asked["privacy"]["epsilon"] = float("inf")
    asked["data"]["public"] = True
    asked["run"]["name"] = "learn"
    (tmp_path / "run.toml").write_text(to_toml(asked))

    def unbounded(tree: dict[str, Any]) -> None:
        tree["schema"] = asked["schema"]
        tree["data"]["public"] = True
        tree["policy"].update(statistics=True, release=False)

    for place in later.demo.sites.values():
        edit(place, unbounded)
    start = ("run", "start", tmp_path / "run.toml", "--federation", later.fed, "--json")
    first = ok(*start).last_line
    assert (first["learns"], first["rounds"]) == (["xage"], 1)
    manifest, _ = later.load(first["run"])
    result = finished(manifest, later._drive(first["run"]))
    low, high = result["bounds"]["xage"]
    assert declared[0] - 20 < low < high < declared[1] + 20
    assert confide(*start, "--bounds", first["run"]).code == ConfigError.exit_code, "it has no result yet"
    folder = later.fed / "runs" / first["run"]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    assert f"xage: bounds = [{low!r}" in ok("run", "status", first["run"], "--federation", later.fed).words
    second = ok(*start, "--bounds", first["run"]).last_line
    assert second["learns"] == []
    trained, _ = later.load(second["run"])
    assert trained.schema_.features["xage"].bounds == (low, high)  # type: ignore[union-attr]
    site = open_site(str(later.demo.sites["dayton"]), WORDS)
    with pytest.raises(PolicyError, match="schema or label"):
        site.check(trained)
    site.close()
    for place in later.demo.sites.values():
        edit(place, lambda t: t["schema"]["features"]["xage"].update(bounds=[low, high]))
        edit(place, lambda t: t["policy"].update(release=True))
    released = later._drive(second["run"])
    assert len(released.outcomes[-1].cohort) == len(SITES)
    assert ok("audit", "verify", export_all(later, tmp_path / "out"), "--json").last_line["verified"]


def test_a_site_that_allows_no_statistics_takes_no_part_in_learning_bounds(operated: Operated, site: Path) -> None:
    def unbounded(tree: dict[str, Any]) -> None:
        tree["schema"]["bounds"] = "learn"
        tree["schema"]["features"]["xage"].pop("bounds")

    edit(site, unbounded)
    assert findings(site, *operated.secret)[1]["data"] == ("warn", 0)
    assert "does not allow even that" in confide("site", "check", site, *operated.secret).words
    schema = tomllib.loads((site / "site.toml").read_text())["schema"]
    learning = operated.manifest.model_copy(update={
        "schema_": SchemaConfig.model_validate(schema), "statistics": True, "rounds": 1, "metric_rounds": (1, 2),
        "run": "learn",
    })  # fmt: skip
    opened = open_site(str(site), WORDS)
    try:
        with pytest.raises(PolicyError, match="bounds of columns"):
            opened.check(learning)
    finally:
        opened.close()


def test_a_waiting_run_is_stopped_at_once_and_the_status_says_so(operated: Operated) -> None:
    run = operated.demo.start_run("later")
    assert operated.demo.status(run)["status"] == "waiting"
    assert ok("run", "stop", run, "--federation", operated.fed, "--json").last_line["status"] == "stopped"
    assert operated.demo.status(operated.run)["status"] == "finished"
    assert confide("run", "stop", "nobody", "--federation", operated.fed).code == 2


def test_a_federation_without_a_complete_roster_starts_no_run(operated: Operated, tmp_path: Path) -> None:
    ok("federation", "init", tmp_path / "new", "--name", "new", "--endpoint", "127.0.0.1:9092")
    done = confide("run", "start", operated.demo.folder / "short.toml", "--federation", tmp_path / "new")
    assert (done.code, "no complete roster" in done.err) == (2, True)


@pytest.mark.parametrize(("sites", "asked", "fewest"), [(3, None, 3), (4, None, 3), (7, None, 5), (7, 3, 3), (7, 6, 6)])
def test_the_smallest_cohort_is_two_thirds_of_those_who_take_part(
    operated: Operated, sites: int, asked: int | None, fewest: int
) -> None:
    tree = tomllib.loads((operated.demo.folder / "short.toml").read_text())
    run = load_run({**tree, "sites": {} if asked is None else {"min_sites": asked}})
    roster = Cast(*(f"site{n}" for n in range(sites))).first()
    _, weights = operated.load(operated.run)
    manifest = make_manifest(
        run, roster=roster, schema=run.schema_, initial_model=weights, layout=operated.manifest.layout
    )
    assert (len(manifest.members), manifest.min_sites) == (sites, fewest)


def test_a_service_that_died_before_it_wrote_results_writes_them_and_needs_no_site(
    operated: Operated, tmp_path: Path
) -> None:
    fed = tmp_path / "fed"
    shutil.copytree(operated.fed, fed)
    shutil.rmtree(fed / "runs", ignore_errors=True)
    stopped = RunStore(run_store(fed))
    manifest, weights = operated.load(operated.run)
    third = manifest.model_copy(update={"run": "third"})
    stopped.submit("third", third.to_bytes(), weights.tobytes())
    stopped.mark("third", "stopping", only=("waiting",))
    stopped.close()
    told: list[str] = []

    def tell(event: str) -> None:
        told.append(event)
        if event == "run third: stopped":
            raise KeyboardInterrupt

    service = Service(ServiceConfig(folder=fed, store=run_store(fed), finish=write_model, tell=tell), WORDS)
    with pytest.raises(KeyboardInterrupt):
        service.run()
    results = [json.loads((fed / "runs" / run / "result.json").read_text()) for run in (*operated.runs, "third")]
    assert [r["status"] for r in results] == ["finished", "finished", "stopped"]
    assert [r["model"] for r in results[:2]] == [released.model for released in operated.released]
    assert all((fed / "runs" / run / "model.safetensors").is_file() for run in operated.runs)
    assert not (fed / "runs" / "third" / "model.safetensors").exists()
    assert results[0] == finished(operated.manifest, operated.released[0])
    chains = [RosterBook.read(fed / "runs" / run).chain for run in (*operated.runs, "third")]
    assert chains == [FederationFolder(fed).state.chain] * 3, "whose keys they are lies beside the logs"
