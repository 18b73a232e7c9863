"""Ledgers, logs and clocks that were put back: a restored backup is no fresh budget.

Every attack has its control: the same state without the attack goes on, or the attack succeeds without the witness.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.clients.rounds import RoundSteps
from confide.errors import AuditError, BudgetError
from confide.privacy.audit.log import export_log
from confide.privacy.consent import SiteKey
from confide.privacy.dp.events import event_to_json
from confide.privacy.dp.ledger import _link
from confide.privacy.sealing import vault
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope, seal_envelope
from confide.protocol.manifest import Manifest, Member
from confide.protocol.sightings import (
    WATCHERS,
    Sighting,
    pack_sightings,
    unpack_sightings,
    watched_by,
    watchers_of,
)
from tests.attacks.federation import header_of, is_refusal, refusal_of
from tests.attacks.machines import Machines
from tests.cli.command import confide

SITE = "birch"
EVERYTHING = ("sites", "ledgers", "logs")


@pytest.fixture
def federation(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Four sites that have agreed on keys; by a parameter, with another limit of ε than the usual one."""
    sites = {"min_sites": 3, "min_subjects": 1, "population": {"default": 12}}
    more = {"privacy": {"site_epsilon_limit": request.param}} if hasattr(request, "param") else {}
    made = Machines(tmp_path / "f", sites=sites, **more)
    made.agree()
    yield made
    made.world.close()


def next_run(federation: Machines) -> None:
    """The same federation's next run, with its invitation not sent yet."""
    federation.manifest = federation.manifest.model_copy(update={"run": "tiny-next"})
    federation.maker, federation.made = "", None


def delete(federation: Machines, *files: str) -> None:
    """Remove files of a stopped site's ledger folder, with what SQLite keeps beside them."""
    for file in files:
        for path in federation.place("ledgers", SITE).glob(f"{file}*"):
            path.unlink()


def forget(federation: Machines) -> None:
    """Remove a stopped site's federated log."""
    for path in federation.place("logs", SITE).glob("federated.db*"):
        path.unlink()


def complete(federation: Machines) -> None:
    """What the refusal advises."""
    folder, log = federation.place("ledgers", SITE), federation.place("logs", SITE) / "federated.db"
    done = confide("site", "recover", folder, "--log", log, "--json")
    assert done.code == 0, done.err
    assert done.last_line["added"], "something was missing"
    export_log(log, federation.folder / "copy.log")
    again = confide("site", "recover", folder, "--log", federation.folder / "copy.log", "--json")
    assert again.last_line["added"] == [], "and now nothing is, also by the exported log"


# --- the ledger against the site's own log ----------------------------------------------------------------------------


@pytest.mark.parametrize("files", [("ledger.db",), ("ledger.db", "personal.db")], ids=["alone", "with who was held"])
def test_a_deleted_ledger_is_missed_by_the_sites_own_log(federation: Machines, files: tuple[str, ...]) -> None:
    federation.round(1)
    federation.stop(SITE)
    delete(federation, *files)
    with pytest.raises(BudgetError, match=r"does not hold charge tiny-.*/1/train.*deleted") as refused:
        federation.start(SITE)
    assert "confide site recover" in refused.value.hint
    complete(federation)
    assert federation.start(SITE).ledger.charges().keys() == {f"{federation.run}/1/train"}, "and so it goes on"


def test_a_ledger_put_back_to_an_earlier_day_is_missed_by_the_sites_own_log(federation: Machines) -> None:
    put_back = federation.copy("ledgers", sites=[SITE])
    federation.round(1)
    with pytest.raises(BudgetError, match="put back to an earlier day"):
        put_back()
    complete(federation)
    assert federation.start(SITE).ledger.used() > 0, "and so it goes on"


def test_a_site_that_is_restarted_on_what_it_left_goes_on(federation: Machines) -> None:
    """The control of the two above."""
    federation.round(1)
    assert federation.restart(SITE).ledger.used() > 0


def test_a_deleted_ledger_is_missed_by_the_record_of_who_was_held(federation: Machines) -> None:
    """A new run has a new log: what stays with the ledger is the record of personal losses."""
    federation.round(1)
    federation.stop(SITE)
    delete(federation, "ledger.db")
    forget(federation)
    with pytest.raises(BudgetError, match="under which persons took part"):
        federation.start(SITE)
    delete(federation, "personal.db")
    assert federation.start(SITE).ledger.used() == 0, "the control: without any witness it is a fresh budget"


def shrink(path: Path) -> None:
    """Append a settlement that follows from the chain: whoever holds the file can."""
    with sqlite3.connect(path) as db:
        seq, chain = db.execute("SELECT seq, chain FROM entry ORDER BY seq DESC LIMIT 1").fetchone()
        charge, event = db.execute("SELECT charge, event FROM entry WHERE kind = 'reserve'").fetchone()
        text = event.replace('"steps":4', '"steps":0')
        assert text != event
        link = _link(chain, f"{seq + 1}\n{charge}\nsettle\n{text}")
        db.execute("INSERT INTO entry VALUES (?, ?, 'settle', ?, ?)", (seq + 1, charge, text, link))
    db.close()


def test_a_ledger_that_gives_back_what_the_log_says_stands_is_refused(federation: Machines) -> None:
    federation.round(1)
    federation.stop(SITE)
    shrink(federation.place("ledgers", SITE) / "ledger.db")
    with pytest.raises(BudgetError, match=r"gives back more of charge .* than this site's own log"):
        federation.start(SITE)
    forget(federation)
    assert federation.start(SITE).ledger.used() == 0, "the control: nothing but the log tells"


def test_what_was_really_given_back_is_no_finding(federation: Machines) -> None:
    committed = federation.train(1)
    federation.seal(1, committed, [n for n in federation.names if n != SITE])
    federation.train(2)
    used = federation.sites[SITE].ledger.charges()[f"{federation.run}/1/train"].steps
    assert used == 0, "its update was not sealed, so its charge shrank"
    assert federation.restart(SITE).ledger.charges()[f"{federation.run}/1/train"].steps == 0


def test_a_ledger_with_another_event_than_the_logs_is_refused(federation: Machines) -> None:
    federation.round(1)
    site, path = federation.sites[SITE], federation.place("ledgers", SITE) / "ledger.db"
    (charge, event), budget = next(iter(site.ledger.charges().items())), site.ledger.budget
    federation.stop(SITE)
    delete(federation, "ledger.db")
    ledger = type(site.ledger)(path, budget, held_out=federation.manifest.held_out)
    ledger.reserve(charge, replace(event, noise_multiplier=event.noise_multiplier * 2))
    ledger.close()
    with pytest.raises(BudgetError, match="does not hold charge"):
        federation.start(SITE)
    assert event_to_json(event)


def test_a_ledger_does_not_go_on_under_another_site_key(federation: Machines) -> None:
    """Roles come from the key: with another one the held-out of yesterday would be trained on today, as if unspent."""
    federation.round(1)
    site, path = federation.sites[SITE], federation.place("ledgers", SITE) / "ledger.db"
    budget, key = site.ledger.budget, site._key
    federation.stop(SITE)
    ledger = type(site.ledger)(path, budget, held_out=federation.manifest.held_out)
    with pytest.raises(BudgetError, match="another site key"):
        ledger.bind(SiteKey(bytes(32)).fingerprint)
    ledger.bind(key.fingerprint)
    ledger.close()
    federation.start(SITE)


# --- the clock --------------------------------------------------------------------------------------------------------


def test_a_clock_that_was_set_back_stops_a_running_site_before_it_charges(
    federation: Machines, set_clock: Callable[[float], None]
) -> None:
    total = federation.round(1)
    used = federation.sites[SITE].ledger.used()
    set_clock(-3600)
    with pytest.raises(AuditError, match=r"the clock is 3,\d{3} s behind"):
        federation.ask(SITE, "train", 2, m.TrainRequest(sums=(total.reference,)), total.chunks)
    assert federation.sites[SITE].ledger.used() == used
    set_clock(0)
    assert not is_refusal(federation.train(2, total, sites=[SITE])[SITE]), (
        "the control: with the right clock it goes on"
    )


def test_a_clock_that_was_set_back_keeps_a_site_from_starting(
    federation: Machines, set_clock: Callable[[float], None]
) -> None:
    federation.round(1)
    federation.stop(SITE)
    set_clock(-60)
    with pytest.raises(AuditError, match="behind this log's last entry") as refused:
        federation.start(SITE)
    assert "NTP" in refused.value.hint
    set_clock(0)
    federation.start(SITE)


def test_a_correction_of_seconds_makes_time_stand_still(
    federation: Machines, set_clock: Callable[[float], None]
) -> None:
    total = federation.round(1)
    log = federation.sites[SITE].log
    before = log.now()
    set_clock(-2)
    assert log.now() <= before
    assert not is_refusal(federation.train(2, total, sites=[SITE])[SITE])
    times = [json.loads(data)["at"] for _, data in map(log.entry, range(log.size))]
    assert times == sorted(times)


# --- everything at once, and the peers --------------------------------------------------------------------------------


@pytest.fixture
def rolled_back(federation: Machines) -> Machines:
    """All of one site's state is from before the first round, which its peers have seen."""
    put_back = federation.copy(*EVERYTHING, sites=[SITE])
    federation.finish(federation.round(1))
    put_back()
    assert federation.sites[SITE].ledger.used() == 0, "nothing here knows of the run"
    next_run(federation)
    return federation


def halted(federation: Machines) -> bool:
    """Does the site refuse an honest invitation?"""
    return is_refusal(federation.join([SITE])[SITE])


def joined(federation: Machines) -> Machines:
    """Up to the made secret, which is not handed over yet."""
    federation.participants = federation.names
    federation.joined = federation.join()
    federation.maker = federation.names[0]
    federation.made = federation.ask(federation.maker, "secret", 0, m.SecretRequest(statements=federation.statements()))
    return federation


@pytest.mark.parametrize("federation", [100.0], indirect=True, ids=["room for several runs"])
def test_a_site_whose_whole_state_was_put_back_is_told_by_its_peers_and_stops_for_good(rolled_back: Machines) -> None:
    joined(rolled_back)
    answer = refusal_of(rolled_back.hand_over(SITE))
    assert (answer.kind, answer.reason) == ("abstains", "abstains"), "others learn nothing of it"
    refusal = rolled_back.sites[SITE].last_refusal
    assert isinstance(refusal, AuditError)
    assert "put back to an earlier day" in refusal.what
    assert "complete the ledger" in refusal.hint
    assert rolled_back.sites[SITE].ledger.used() == 0
    rolled_back.manifest = rolled_back.manifest.model_copy(update={"run": "tiny-after"})
    assert halted(rolled_back), "also where nobody shows it anything"
    rolled_back.restart(SITE)
    assert halted(rolled_back), "also after a restart"
    others = [n for n in rolled_back.names if n != SITE]
    assert not any(map(is_refusal, rolled_back.join(others).values())), "the others go on"


def test_a_site_that_kept_its_state_agrees_on_the_next_runs_keys(federation: Machines) -> None:
    """The control: what its peers show it is what its log holds, also over a restart."""
    federation.finish(federation.round(1))
    federation.restart(SITE)
    next_run(federation)
    assert any(unpack_sightings(e.chunks[0]) for e in federation.join().values()), "there is something to be shown"
    federation.agree()
    assert not any(map(is_refusal, federation.train(1).values()))


def test_without_a_peer_that_saw_a_later_state_a_put_back_state_is_not_noticed(rolled_back: Machines) -> None:
    """The documented limit: a state that is put back as a whole is noticed only where somebody outside remembers."""
    for name in rolled_back.names:
        rolled_back.sites[name]._store._db.execute("DELETE FROM sighting")
    rolled_back.agree()
    assert not any(map(is_refusal, rolled_back.train(1).values()))


@pytest.mark.parametrize("how", ["left out", "emptied", "another's", "one too many"])
def test_a_coordinator_cannot_keep_the_peers_sightings_from_a_site(rolled_back: Machines, how: str) -> None:
    joined(rolled_back)
    watchers = watchers_of(rolled_back.manifest, SITE)
    honest = tuple(rolled_back.joined[w].chunks[0] for w in watchers)
    seen = {
        "left out": honest[1:],
        "emptied": (pack_sightings(()),) * len(honest),
        "another's": (honest[-1],) * len(honest),
        "one too many": (*honest, honest[0]),
    }[how]
    answer = refusal_of(rolled_back.hand_over(SITE, seen=seen))
    assert "sightings" in answer.reason
    assert answer.kind == "sealing"


def test_dropping_every_watcher_with_its_sightings_leaves_too_few_for_a_run(rolled_back: Machines) -> None:
    """All four sites watch each other: a coordinator would have to drop the peers themselves."""
    assert set(watchers_of(rolled_back.manifest, SITE)) == set(rolled_back.names) - {SITE}


def test_a_peer_cannot_accuse_a_site_of_a_log_that_it_never_showed(federation: Machines) -> None:
    """A forged sighting is worth nothing: signed by the peer, or with another checkpoint than was signed."""
    site = federation.sites[SITE]
    real = Sighting.of(federation.join([SITE])[SITE])
    later = real.header.replace(header_of(federation.joined[SITE]).checkpoint, f"999:{'ab' * 32}")
    assert later != real.header
    peer = federation.sites["ash"].identity
    forged = [Sighting(header=later, signature=real.signature), Sighting(header=later, signature=peer.sign(b"x").hex())]
    for sighting in forged:
        site._continuity._look_back(sighting, federation.manifest.federation, "ash")
    assert site._store.halted() is None
    honest = signed_state(federation, f"999:{'ab' * 32}")
    with pytest.raises(AuditError):
        site._continuity._look_back(honest, federation.manifest.federation, "ash")
    assert site._store.halted() is not None, "the control: with the site's own signature it counts"


def signed_state(federation: Machines, checkpoint: str) -> Sighting:
    """What the site would have signed at another state of its log."""
    envelope = seal_envelope(
        federation.sites[SITE].identity, federation.address("train", 1), recipient="coordinator", type_="train.reply",
        body=b"{}", checkpoint=checkpoint,
    )  # fmt: skip
    return Sighting.of(envelope)


# --- a run that goes on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("sites",), ("sites", "ledgers", "logs")], ids=["state", "everything"])
def test_a_put_back_site_applies_no_sum_that_counts_it_though_it_has_sealed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...]
) -> None:
    for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
        monkeypatch.setattr(vault, name, cheap)
    sites: dict[str, Any] = {"min_sites": 3, "min_subjects": 1, "population": {"default": 12}}
    federation = Machines(tmp_path / "f", vaults=True, sites=sites)
    federation.agree()
    put_back = federation.copy(*parts, sites=[SITE])
    total = federation.round(1)
    put_back()
    answer = federation.train(2, total, sites=[SITE])[SITE]
    assert "did not agree to" in refusal_of(answer).reason
    with monkeypatch.context() as patch:
        patch.setattr(RoundSteps, "_agreed_to", lambda *_: True)
        assert not is_refusal(federation.train(3, total, sites=[SITE])[SITE]), "the control: it could have"
    federation.world.close()


# --- who watches whom -------------------------------------------------------------------------------------------------


@given(st.integers(3, 60), st.data())
def test_every_site_is_watched_by_at_most_sixteen_others_which_know_it(size: int, data: st.DataObject) -> None:
    names = [f"site {n}" for n in range(size)]
    manifest = Manifest.model_construct(
        members=tuple(Member(site=n, public_key=f"{i:064x}", population=1) for i, n in enumerate(names))
    )
    site = data.draw(st.sampled_from(names))
    watchers = watchers_of(manifest, site)
    assert len(watchers) == min(WATCHERS, size - 1)
    assert site not in watchers
    assert all(site in watched_by(manifest, watcher) for watcher in watchers)
    assert all(site in watchers_of(manifest, watched) for watched in watched_by(manifest, site))


def test_a_join_reply_carries_no_more_than_sixteen_sightings(federation: Machines) -> None:
    sighting: Envelope = federation.join([SITE])[SITE]
    packed = pack_sightings([Sighting.of(sighting)] * (WATCHERS + 1))
    with pytest.raises(Exception, match="no site can use"):
        unpack_sightings(packed)
    assert len(unpack_sightings(pack_sightings([Sighting.of(sighting)] * WATCHERS))) == WATCHERS
