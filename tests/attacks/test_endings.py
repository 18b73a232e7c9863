"""The word that a run is over: the coordinator's own about this run, or none. Whoever forges it stops nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import confide.clients.ending as ending_module
from confide.clients.ending import Endings
from confide.errors import SealingError
from confide.privacy.audit import records as audit
from confide.privacy.sealing import vault
from confide.protocol import messages as m
from confide.protocol.envelope import EVERYBODY, Envelope
from confide.protocol.identity import Identity
from tests.attacks.federation import Federation, is_refusal, open_federation, refusal_of
from tests.attacks.machines import Machines

WORD, SITE = m.EndRequest(status="stopped"), "ash"
ENDS = audit.KeysDestroyed | audit.RunStopped | audit.ToldEnded


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Sites that share keys, in a run under way."""
    with open_federation(tmp_path / "f") as made:
        made.agree()
        yield made


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One for all words that end nothing and so leave no trace."""
    with open_federation(tmp_path_factory.mktemp("f") / "f") as made:
        yield made.agree()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """The same with a vault each; passphrases cost nothing."""
    for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
        monkeypatch.setattr(vault, name, cheap)
    made = Machines(tmp_path / "f", sites={"min_subjects": 1, "population": {"default": 12}}, vaults=True)
    made.agree()
    yield made
    made.world.close()


def heard(federation: Federation, request: Envelope, site: str = SITE) -> bool:
    """Did a site take it for the end of its run? Then it is: nothing of the run is answered any more."""
    try:
        taken = not is_refusal(federation.sites[site].handle("end", request))
    except SealingError:
        taken = False
    goes_on = not is_refusal(federation.train(1, sites=[site])[site])
    assert taken != goes_on
    return taken


def ends(federation: Federation, site: str = SITE) -> list[audit.Record]:
    """What its log tells of the end of the run."""
    return [e for e in federation.sites[site].log.entries() if isinstance(e, ENDS)]


def elsewhere(of: Federation, **fields: Any) -> Envelope:
    return of.sign("end", 0, SITE, WORD, address=of.address("end", 0).model_copy(update=fields))


def unsigned(of: Federation) -> Envelope:
    honest = of.sign("end", 0, SITE, WORD)
    return Envelope(honest.header, bytes(64), honest.body)


FORGED: dict[str, Callable[[Federation], Envelope]] = {
    "unsigned": unsigned,
    "by a member": lambda f: f.sign("end", 0, SITE, WORD, identity=f.sites["birch"].identity),
    "by the site itself": lambda f: f.sign("end", 0, SITE, WORD, identity=f.sites[SITE].identity),
    "by a stranger of the same name": lambda f: f.sign("end", 0, SITE, WORD, identity=Identity.generate("coordinator")),
    "for another site": lambda f: f.sign("end", 0, "birch", WORD),
    "for everybody": lambda f: f.sign("end", 0, EVERYBODY, WORD),
    "of another run": lambda f: elsewhere(f, run="another-run"),
    "of another manifest": lambda f: elsewhere(f, manifest="00" * 32),
    "of another federation": lambda f: elsewhere(f, federation="another"),
    "of another roster": lambda f: elsewhere(f, roster_version=2),
    "of another round": lambda f: elsewhere(f, round=1),
    "of another step": lambda f: f.sign("release", 0, SITE, WORD),
    "as an answer": lambda f: f.sign("end", 0, SITE, WORD, request="00" * 32),
    "of another type": lambda f: f.sign("end", 0, SITE, m.JoinRequest()),
    "with chunks": lambda f: f.sign("end", 0, SITE, WORD, (b"x",)),
    "changed on the way": lambda f: Envelope(
        (e := f.sign("end", 0, SITE, WORD)).header, e.signature, m.EndRequest(status="failed").to_bytes()
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", FORGED)
def test_a_word_that_is_not_the_coordinators_about_this_run_ends_nothing(standing: Federation, how: str) -> None:
    assert not heard(standing, FORGED[how](standing))
    assert ends(standing) == []


def test_the_control_the_coordinators_word_ends_it(federation: Federation) -> None:
    assert heard(federation, federation.sign("end", 0, SITE, WORD))
    with pytest.raises(SealingError, match="destroyed"):
        federation.sites[SITE].current_model(federation.manifest.run)
    assert "the coordinator has ended this run" in refusal_of(federation.train(2, sites=[SITE])[SITE]).reason
    other = federation.sign("end", 0, SITE, m.EndRequest(status="failed"))
    assert "contradicts itself" in refusal_of(federation.sites[SITE].handle("end", other)).reason


@pytest.mark.parametrize("how", ["unsigned", "by a member", "by a stranger of the same name"])
def test_without_the_check_of_the_signature_anybody_would_end_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("confide.protocol.envelope.verify_signature", lambda *_: True)
    monkeypatch.setattr(ending_module, "expect", lambda *_a, **_k: None)
    assert not is_refusal(federation.sites[SITE].handle("end", FORGED[how](federation)))


@pytest.mark.parametrize("how", ["for another site", "of another manifest", "of another roster"])
def test_without_the_check_of_the_address_a_replayed_word_would_end_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(ending_module, "expect", lambda *_a, **_k: None)
    assert not is_refusal(federation.sites[SITE].handle("end", FORGED[how](federation)))


def test_the_word_of_one_run_does_not_end_another_one(tmp_path: Path, federation: Federation) -> None:
    """Recorded, and shown again to the same site in its next run."""
    with open_federation(tmp_path / "other") as other:
        other.agree()
        word = federation.sign("end", 0, SITE, WORD)
        assert heard(federation, word)
        assert not heard(other, word)


# --- what it ends -----------------------------------------------------------------------------------------------------


def test_an_update_that_was_not_sealed_is_dropped_and_its_charge_given_back(federation: Federation) -> None:
    federation.train(1)
    assert any(federation.charges(SITE, 1).values())
    federation.ask(SITE, "end", 0, WORD)
    assert not any(federation.charges(SITE, 1).values()), "nothing of it left"
    federation.seal(1, committed := federation.train(1, sites=["birch", "cedar", "doum"]))
    assert committed
    federation.ask("birch", "end", 0, WORD)
    assert any(federation.charges("birch", 1).values()), "the control: what was sealed is paid for"


def test_keys_in_the_vault_go_and_another_process_knows_that_the_run_is_over(kept: Machines) -> None:
    assert kept.entry(SITE) is not None
    kept.ask(SITE, "end", 0, WORD)
    assert kept.entry(SITE) is None
    kept.restart(SITE)
    assert is_refusal(kept.train(1, sites=[SITE])[SITE])
    assert [type(e) for e in ends(kept)] == [audit.ToldEnded]


def test_a_site_that_cannot_go_on_with_the_run_still_destroys_its_keys(kept: Machines) -> None:
    """Its process is a new one, and what it would need for the run is not there: it need not build the run."""
    kept.restart(SITE)
    kept.sites[SITE]._known = lambda _: pytest.fail("nothing is built")  # type: ignore[method-assign]
    assert not is_refusal(kept.ask(SITE, "end", 0, WORD))
    assert kept.entry(SITE) is None


@pytest.mark.parametrize("at", ["drop", "expire"])
def test_killed_as_it_ends_a_run_a_site_ends_it_the_next_time(
    kept: Machines, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    word = kept.sign("end", 0, SITE, WORD)
    with monkeypatch.context() as patch:
        patch.setattr(f"confide.clients.rounds.RoundSteps.{at}", die)
        with pytest.raises(Killed):
            kept.sites[SITE].handle("end", word)
    site = kept.restart(SITE)
    assert kept.entry(SITE) is None, "the next process owed it"
    assert is_refusal(kept.train(1, sites=[SITE])[SITE])
    first = site.handle("end", word)
    assert not is_refusal(first)
    assert site.handle("end", word) == first, "the same word gets the same answer"
    assert [type(e) for e in ends(kept)] == [audit.KeysDestroyed, audit.ToldEnded]


def test_without_a_durable_end_a_killed_site_would_go_on(kept: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""

    class Killed(BaseException):
        pass

    def forgetful(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(Endings, "told", forgetful)
    with pytest.raises(Killed):
        kept.ask(SITE, "end", 0, WORD)
    kept.restart(SITE)
    assert not is_refusal(kept.train(1, sites=[SITE])[SITE])


def test_a_site_that_never_joined_is_told_nothing_and_says_so(tmp_path: Path) -> None:
    with open_federation(tmp_path / "f") as federation:
        assert "has not joined" in refusal_of(federation.ask(SITE, "end", 0, WORD)).reason
        federation.agree()
        assert not is_refusal(federation.train(1, sites=[SITE])[SITE])


@pytest.mark.parametrize("people", [12, 40])
def test_the_number_of_entries_does_not_depend_on_the_people(tmp_path: Path, people: int) -> None:
    """The same steps, another table: the same kinds of entries in the log that travels."""
    sites = {"min_subjects": 1, "population": {"default": 40}}
    with open_federation(tmp_path / "f", people={"people": people, "seed": people}, sites=sites) as federation:
        federation.agree()
        federation.train(1)
        federation.ask(SITE, "end", 0, WORD)
        kinds = [e.KIND for e in federation.sites[SITE].log.entries()]
    charged = [kind for kind in kinds if kind == "charged"]
    assert kinds == [
        "joined", "keys_agreed", *charged, "snapshot_taken", "update_committed", *["settled"] * len(charged),
        "told_ended",
    ]  # fmt: skip
    assert len(charged) == 1, "training; nothing is evaluated in the first round"
