"""Who stands in a cohort, with which key and which secret: everything that the coordinator could slip in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import confide.clients.keys as keys_module
from confide.errors import PolicyError, SealingError
from confide.privacy.sealing.wrapping import new_ephemeral, wrap
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope, chunk_digests
from confide.protocol.identity import Identity
from tests.attacks.federation import Federation, header_of, is_refusal, open_federation, refusal_of, resign

ASH = "ash"


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Sites that have not joined yet."""
    with open_federation(tmp_path / "f") as made:
        yield made


# --- the cohort of a round --------------------------------------------------------------------------------------------


def test_an_honest_cohort_is_sealed_for(federation: Federation) -> None:
    """The control of this part: all of four, or any three."""
    federation.agree()
    assert not any(map(is_refusal, federation.seal(1, federation.train(1)).values()))
    assert not any(map(is_refusal, federation.seal(2, federation.train(2), federation.names[:3]).values()))


def test_sites_that_were_shown_different_logs_of_the_coordinator_make_no_sum(federation: Federation) -> None:
    """A split view: each site cosigns, with its reply, the state of the coordinator's log that it was shown."""
    committed, round_ = federation.agree().train(1), m.TrainRequest(sums=())
    for number, odd in ((2, {}), (3, {ASH: "2:" + "cd" * 32})):
        committed = {
            site: federation.sites[site].handle(
                "train", federation.sign("train", number, site, round_, checkpoint=odd.get(site, "2:" + "ab" * 32))
            )
            for site in federation.names
        }
        assert not any(map(is_refusal, committed.values()))
        answers = federation.seal(number, committed)
        if not odd:
            assert not any(map(is_refusal, answers.values())), "the control: they were all shown the same"
    for site, answer in answers.items():
        assert "different states of the coordinator's log" in refusal_of(answer).reason
        assert federation.sites[site]._store.sealed_transcript(federation.manifest.run, 3) is None
    # Those who saw the same may still be summed.
    assert not any(map(is_refusal, federation.seal(3, committed, [s for s in federation.names if s != ASH]).values()))


@pytest.mark.parametrize("cohort", [(ASH,), (ASH, "birch"), (ASH, "birch", "birch"), (ASH, ASH, ASH), ()])
def test_a_cohort_below_min_sites_is_refused_also_with_a_site_counted_twice(
    federation: Federation, cohort: tuple[str, ...]
) -> None:
    committed = federation.agree().train(1)
    assert is_refusal(federation.ask(ASH, "seal", 1, federation.seal_request(cohort, committed)))
    assert federation.sites[ASH]._store.sealed_transcript(federation.manifest.run, 1) is None


def test_a_site_may_ask_for_more_company_than_the_run_does(federation: Federation) -> None:
    federation.set_policy(ASH, min_sites=4)
    assert refusal_of(federation.join((ASH,))[ASH]).kind == "policy"
    federation.set_policy(ASH, min_sites=3)
    committed = federation.agree().train(1)
    federation.set_policy(ASH, min_sites=4)
    three = federation.seal_request(federation.names[:3], committed)
    assert is_refusal(federation.ask(ASH, "seal", 1, three))
    assert not is_refusal(federation.ask(ASH, "seal", 1, federation.seal_request(federation.names, committed)))


@pytest.mark.parametrize("order", [("birch", ASH, "cedar"), ("cedar", "birch", ASH)])
def test_a_cohort_has_one_order_only(federation: Federation, order: tuple[str, ...]) -> None:
    committed = federation.agree().train(1)
    assert is_refusal(federation.ask(ASH, "seal", 1, federation.seal_request(order, committed)))


def sybil_reply(federation: Federation, honest: Envelope, name: str = "cedar") -> Envelope:
    """A reply like a member's, under a key of the coordinator's own."""
    body = m.TrainReply.model_validate_json(honest.body)
    request = header_of(honest).request
    return federation.sign("train", 1, "coordinator", body, identity=Identity.generate(name), request=request)


def test_a_sybil_outside_the_roster_does_not_fill_a_cohort(federation: Federation) -> None:
    committed = federation.agree().train(1)
    with_sybil = {s: committed[s] for s in (ASH, "birch")} | {"sybil": sybil_reply(federation, committed[ASH], "sybil")}
    answer = federation.ask(ASH, "seal", 1, federation.seal_request((ASH, "birch", "sybil"), with_sybil))
    assert "somebody else's" in refusal_of(answer).reason, "no member of the roster has this name"
    assert not is_refusal(federation.ask(ASH, "seal", 1, federation.seal_request((ASH, "birch", "cedar"), committed)))


def test_a_sybil_under_a_members_name_does_not_fill_a_cohort(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = federation.agree().train(1)
    forged = committed | {"cedar": sybil_reply(federation, committed[ASH])}
    request = federation.seal_request((ASH, "birch", "cedar"), forged)
    assert "signature" in refusal_of(federation.ask(ASH, "seal", 1, request)).reason
    monkeypatch.setattr("confide.protocol.envelope.verify_signature", lambda *_: True)
    assert not is_refusal(federation.ask(ASH, "seal", 1, request)), "the control: only the signature stops it"


def test_one_members_reply_does_not_count_under_anothers_name(federation: Federation) -> None:
    committed = federation.agree().train(1)
    assert is_refusal(federation.ask(ASH, "seal", 1, federation.seal_request(
        (ASH, "birch", "cedar"), committed | {"cedar": committed["birch"]})))  # fmt: skip
    names = federation.seal_request((ASH, "birch", "cedar"), committed)
    mislabelled = tuple(s.model_copy(update={"site": ASH}) for s in names.statements)
    assert is_refusal(federation.ask(ASH, "seal", 1, names.model_copy(update={"statements": mislabelled})))


@pytest.mark.parametrize("digest", ["model", "state", "secret"])
def test_members_that_hold_something_else_are_refused(federation: Federation, digest: str) -> None:
    committed = federation.agree().train(1)
    other = resign(federation.sites["birch"], committed["birch"], **{digest: "00" * 32})
    request = federation.seal_request(federation.names, committed | {"birch": other})
    for site in (ASH, "cedar", "doum"):
        assert "holds another model or run secret" in refusal_of(federation.ask(site, "seal", 1, request)).reason
    agreed = federation.seal_request(federation.names, committed)
    assert not is_refusal(federation.ask(ASH, "seal", 1, agreed)), "the control: where all agree it is sealed"


def test_a_site_is_not_in_a_cohort_with_a_reply_that_it_did_not_send(federation: Federation) -> None:
    committed = federation.agree().train(1)
    other = resign(federation.sites[ASH], committed[ASH], commitment="00" * 32)
    request = federation.seal_request(federation.names, committed | {ASH: other})
    assert "this site's own reply" in refusal_of(federation.ask(ASH, "seal", 1, request)).reason
    without = federation.seal_request(federation.names[1:], committed)
    assert "this site's own reply" in refusal_of(federation.ask(ASH, "seal", 1, without)).reason


def test_sites_that_were_told_different_cohorts_make_no_sum(federation: Federation) -> None:
    """An equivocating coordinator: each transcript binds its own cohort, so nothing opens at anybody."""
    committed = federation.agree().train(1)
    all_ = federation.seal_request(federation.names, committed)
    sealed = {s: federation.ask(s, "seal", 1, all_) for s in (ASH, "birch", "cedar")}
    other = resign(federation.sites["birch"], committed["birch"], commitment="11" * 32)
    sealed["doum"] = federation.ask("doum", "seal", 1, federation.seal_request(
        federation.names, committed | {"birch": other}))  # fmt: skip
    assert not any(map(is_refusal, sealed.values()))
    before = federation.models()
    assert all(map(is_refusal, federation.train(2, federation.add(1, sealed)).values()))
    assert federation.models() == before


# --- ephemeral keys ---------------------------------------------------------------------------------------------------


def with_key(federation: Federation, site: str, public: bytes, identity: Identity | None = None) -> m.Statement:
    """A `join` reply of a site with another ephemeral key, under the site's own key or somebody else's."""
    honest = federation.joined[site]
    if identity is None:
        return m.Statement.of(site, resign(federation.sites[site], honest, ephemeral=public.hex()))
    body = m.JoinReply(ephemeral=public.hex())
    return m.Statement.of(site, federation.sign(
        "join", 0, "coordinator", body, identity=identity, request=header_of(honest).request))  # fmt: skip


def swapped(federation: Federation, statement: m.Statement) -> tuple[m.Statement, ...]:
    """The participants' statements with one exchanged."""
    return tuple(statement if s.site == statement.site else s for s in federation.statements())


def test_a_substituted_ephemeral_key_is_refused(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys of its own in the middle the coordinator would take off every mask."""
    federation.participants = federation.names
    federation.joined = federation.join()
    _, public = new_ephemeral()
    forged = swapped(federation, with_key(federation, "birch", public, Identity.generate("birch")))
    assert "signature" in refusal_of(federation.ask(ASH, "secret", 0, m.SecretRequest(statements=forged))).reason
    monkeypatch.setattr("confide.protocol.envelope.verify_signature", lambda *_: True)
    assert not is_refusal(federation.ask(ASH, "secret", 0, m.SecretRequest(statements=forged))), "the control"


def test_an_ephemeral_key_of_another_run_is_refused(federation: Federation) -> None:
    federation.agree()
    other = federation.manifest.model_copy(update={"run": "another"})
    foreign = federation.join(("birch",), other)["birch"]
    assert not is_refusal(foreign)
    statements = swapped(federation, m.Statement.of("birch", foreign))
    assert (
        "another run" in refusal_of(federation.ask("cedar", "secret", 0, m.SecretRequest(statements=statements))).reason
    )


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little")])
def test_a_member_with_an_unusable_key_is_refused_by_name(federation: Federation, public: bytes) -> None:
    federation.participants = federation.names
    federation.joined = federation.join()
    bad = swapped(federation, with_key(federation, "birch", public))
    assert refusal_of(federation.ask(ASH, "secret", 0, m.SecretRequest(statements=bad))).kind == "sealing"


@pytest.mark.parametrize("change", ["too few", "twice", "without this site", "stranger"])
def test_key_agreement_is_among_different_members_and_at_least_min_sites(federation: Federation, change: str) -> None:
    federation.participants = federation.names
    federation.joined = federation.join()
    all_ = federation.statements()
    statements = {
        "too few": all_[:2],
        "twice": (*all_[:3], all_[2]),
        "without this site": all_[1:],
        "stranger": (*all_, all_[1].model_copy(update={"site": "stranger"})),
    }[change]
    assert is_refusal(federation.ask(ASH, "secret", 0, m.SecretRequest(statements=statements)))
    assert not is_refusal(federation.ask(ASH, "secret", 0, m.SecretRequest(statements=all_))), "the control"


# --- the run secret ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made(federation: Federation) -> Federation:
    """Everybody joined and ash made the secret; nobody was handed it yet."""
    federation.participants = federation.names
    federation.joined = federation.join()
    federation.maker = ASH
    federation.made = federation.ask(ASH, "secret", 0, m.SecretRequest(statements=federation.statements()))
    assert not is_refusal(federation.made)
    return federation


def digests(federation: Federation) -> set[str]:
    """The secrets that sites hold, by digest; empty for none."""
    found = set()
    for name in federation.names:
        session = federation.sites[name]._runs[federation.manifest.run].keys._session
        found.add(session.secret_digest if session is not None else "")
    return found


def test_an_honest_secret_reaches_everybody(made: Federation) -> None:
    """The control of this part."""
    assert not any(is_refusal(made.hand_over(s)) for s in made.names)
    assert len(digests(made)) == 1
    assert digests(made) != {""}


def test_a_wrap_for_another_recipient_is_refused(made: Federation) -> None:
    assert made.made is not None
    for site in made.names:
        other = made.made.chunks[(made.names.index(site) + 1) % 4]
        assert is_refusal(made.hand_over(site, wrapped=other))
    assert digests(made) == {""}


def test_a_wrap_is_bound_to_maker_recipient_epoch_and_run_also_without_signatures(made: Federation) -> None:
    """HPKE's own context: were a maker to sign a wrap that it took from elsewhere, it would still not open."""
    assert made.made is not None
    keys = made.sites["birch"]._runs[made.manifest.run].keys
    right = made.made.chunks[1]
    info = keys._info(0, ASH, "birch")
    assert keys_module.unwrap(right, keys._private, info), "the control"
    moved = (keys._info(0, ASH, "cedar"), keys._info(0, "cedar", "birch"), keys._info(1, ASH, "birch"), b"")
    other_run = made.manifest.model_copy(update={"run": "another"})
    elsewhere = keys_module.RunKeys(other_run, "birch", made.sites["birch"]._runs[made.manifest.run].profile, "c")
    for other in (*moved, elsewhere._info(0, ASH, "birch")):
        with pytest.raises(SealingError, match="not wrapped for this site"):
            keys_module.unwrap(right, keys._private, other)
    for broken in (b"", right[:-1], right + b"x", b"\0" * len(right), b"x" * 2**20):
        with pytest.raises(SealingError):
            keys_module.unwrap(broken, keys._private, info)


def test_a_secret_that_the_coordinator_makes_is_refused(made: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows every ephemeral public key, so it can wrap; it cannot sign as a member."""
    run = made.sites["birch"]._runs[made.manifest.run]
    secret = run.profile.make_secret()
    forged = tuple(
        wrap(secret, made.sites[s]._runs[made.manifest.run].keys.public, run.keys._info(0, ASH, s)) for s in made.names
    )
    reply = made.sign(
        "secret", 0, "coordinator", m.SecretReply(), forged, identity=Identity(ASH, made.world.coordinator.key)
    )
    statement = m.Statement.of(ASH, reply)
    assert (
        "signature"
        in refusal_of(made.hand_over("birch", made=statement, wraps=chunk_digests(forged), wrapped=forged[1])).reason
    )
    monkeypatch.setattr("confide.protocol.envelope.verify_signature", lambda *_: True)
    assert not is_refusal(made.hand_over("birch", made=statement, wraps=chunk_digests(forged), wrapped=forged[1])), (
        "the control"
    )


def test_a_wrap_counts_only_among_those_that_its_maker_signed(
    made: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests of the wraps travel beside the maker's signed reply: they must be the ones it was signed for."""
    assert made.made is not None
    run = made.sites["birch"]._runs[made.manifest.run]
    own = wrap(run.profile.make_secret(), run.keys.public, run.keys._info(0, ASH, "birch"))
    honest = chunk_digests(made.made.chunks)
    forged = (honest[0], *chunk_digests((own,)), *honest[2:])
    for wraps in (forged, (), honest[:2], honest[::-1], (*honest, honest[0])):
        answer = made.hand_over("birch", wraps=wraps, wrapped=own)
        assert "not what its maker signed" in refusal_of(answer).reason
    monkeypatch.setattr(keys_module, "carries", lambda *_: True)
    assert not is_refusal(made.hand_over("birch", wraps=forged, wrapped=own)), "the control"


def test_different_secrets_for_different_sites_are_noticed_before_anything_is_sealed(made: Federation) -> None:
    """A maker in league with the coordinator wraps another secret for one site."""
    assert made.made is not None
    run = made.sites[ASH]._runs[made.manifest.run]
    other = wrap(run.profile.make_secret(), made.sites["doum"]._runs[made.manifest.run].keys.public,
                 run.keys._info(0, ASH, "doum"))  # fmt: skip
    honest, wraps = made.made, (*made.made.chunks[:3], other)
    reply = resign(made.sites[ASH], honest, chunks=wraps)
    for i, site in enumerate(made.names):
        taken = made.hand_over(
            site, made=m.Statement.of(ASH, reply), wraps=chunk_digests(reply.chunks), wrapped=wraps[i]
        )
        assert not is_refusal(taken)
    assert len(digests(made)) == 2, "each site alone cannot know"
    committed = made.train(1)
    assert all(map(is_refusal, made.seal(1, committed).values()))
    assert not any(map(is_refusal, made.seal(1, committed, made.names[:3]).values())), "the control: those who agree"


def test_the_coordinator_stops_where_sites_hold_different_secrets(
    federation: Federation,
) -> None:
    def lie(site: str, request: Envelope, reply: Envelope) -> Envelope:
        is_keys = header_of(reply).type == m.KeysReply.TYPE
        return resign(federation.sites[site], reply, secret="00" * 32) if is_keys and site == "birch" else reply

    with pytest.raises(SealingError, match="different run secrets"):
        federation.coordinator(federation.grid(tamper=lie)).run()


def test_a_second_secret_is_refused(made: Federation) -> None:
    made.hand_over("birch")
    before = digests(made)
    run = made.sites["cedar"]._runs[made.manifest.run]
    second = made.ask("cedar", "secret", 0, m.SecretRequest(statements=made.statements()))
    assert not is_refusal(second)
    assert run.keys._session is None
    statement = m.Statement.of("cedar", second)
    for round_ in (0, 1):
        assert is_refusal(made.hand_over("birch", made=statement, wrapped=second.chunks[1], round=round_))
    assert digests(made) == before


def agree_again(made: Federation, epoch: int, maker: str) -> None:
    """Have another maker make the secret of another epoch; nobody is handed it yet."""
    made.key_epoch, made.maker = epoch, maker
    made.made = made.ask(maker, "secret", 0, m.SecretRequest(statements=made.statements()))


def test_a_secret_of_a_later_epoch_takes_the_place_of_an_earlier_one(made: Federation) -> None:
    """The control of what follows: one maker that dies, or lies, must not decide who takes part."""
    made.hand_over("birch")
    before = digests(made)
    agree_again(made, 1, "cedar")
    assert not any(is_refusal(made.hand_over(s)) for s in made.names)
    assert len(digests(made)) == 1
    assert not digests(made) & before
    total = made.round(1)
    assert not any(map(is_refusal, made.train(2, total).values())), "and it is the one that sums are sealed under"


def test_a_secret_of_an_earlier_epoch_never_comes_back(made: Federation) -> None:
    """Else a coordinator could split the sites between two secrets, or return to one that it has learnt."""
    old = made.made
    agree_again(made, 2, "cedar")
    assert not is_refusal(made.hand_over("birch"))
    held = digests(made)
    made.key_epoch, made.maker, made.made = 0, ASH, old
    assert "another run secret was accepted before" in refusal_of(made.hand_over("birch")).reason
    assert digests(made) == held
    assert not is_refusal(made.hand_over("doum")), "the control: who has no later one takes it"


def test_a_secret_made_for_one_epoch_is_not_handed_over_in_another(made: Federation) -> None:
    made.key_epoch = 1
    assert "another key_epoch" in refusal_of(made.hand_over("birch")).reason
    made.key_epoch = 0
    assert not is_refusal(made.hand_over("birch")), "the control"


@pytest.mark.parametrize("epoch", [0, 1, 1000])
def test_keys_do_not_change_once_a_round_has_begun(made: Federation, epoch: int) -> None:
    """A new secret between two rounds would be one that a coordinator chose the moment for."""
    for site in made.names:
        made.hand_over(site)
    agree_again(made, 1, "cedar")
    assert not is_refusal(made.made), "the control: before the first round another one may be made"
    made.key_epoch = 0
    held, committed = digests(made), made.train(1)
    statements, made.key_epoch = made.statements(), epoch
    late = (
        made.ask("birch", "secret", 0, m.SecretRequest(statements=statements)),
        *(made.hand_over(s) for s in made.names),
    )
    reasons = {refusal_of(answer).reason for answer in late}
    assert "keys are agreed on before the first round only" in reasons
    assert all("before the first round" in reason or "answered already" in reason for reason in reasons)
    assert digests(made) == held
    made.key_epoch = 0
    assert not any(map(is_refusal, made.seal(1, committed).values()))


def test_a_cohort_of_sites_under_two_secrets_is_not_sealed_for(made: Federation) -> None:
    """Both are honest secrets; the coordinator handed the later one to some only."""
    for site in made.names:
        made.hand_over(site)
    agree_again(made, 1, "cedar")
    for site in made.names[:3]:
        made.hand_over(site)
    later = made.train(1, sites=made.names[:3])
    made.key_epoch = 0
    committed = later | made.train(1, sites=("doum",))
    assert not any(map(is_refusal, committed.values()))
    assert is_refusal(made.seal(1, committed)["doum"])
    made.key_epoch = 1
    assert all(map(is_refusal, made.seal(1, committed, made.names[1:]).values()))
    assert not any(map(is_refusal, made.seal(1, later).values())), "the control: those of one epoch"


def test_a_secret_from_outside_the_participants_is_refused(made: Federation) -> None:
    assert made.made is not None
    statement = m.Statement.of(ASH, made.made)
    for maker in ("sybil", "coordinator", "cedar"):
        assert is_refusal(made.hand_over("birch", made=statement.model_copy(update={"site": maker})))


# --- the profile ------------------------------------------------------------------------------------------------------


def test_readable_updates_are_refused_where_the_policy_says_sealed(tmp_path: Path) -> None:
    with open_federation(tmp_path / "f", sealing={"profile": "open"}) as federation:
        assert not is_refusal(federation.join((ASH,))[ASH]), "the control: the data are declared public"
        federation.set_policy("birch", profiles=frozenset({"sealed"}))
        with pytest.raises(PolicyError, match="profiles allows") as caught:
            federation.sites["birch"].check(federation.manifest)
        assert caught.value.exit_code == 9
        refusal = refusal_of(federation.join(("birch",))["birch"])
        assert refusal.kind == "policy"
        assert is_refusal(federation.ask("birch", "train", 1, m.TrainRequest(sums=())))


def test_on_private_data_no_site_hands_out_readable_updates(tmp_path: Path) -> None:
    with open_federation(tmp_path / "f", data={"public": False}, sealing={"profile": "open"}) as federation:
        assert {refusal_of(a).kind for a in federation.join().values()} == {"policy"}


def test_a_sealed_run_takes_no_readable_sum(federation: Federation) -> None:
    """The sum in the clear, as the profile `open` would send it, where the run says sealed."""
    first = federation.agree().round(1)
    clear = np.zeros(federation.manifest.vector_size(1)).tobytes()
    before = federation.models()
    answers = federation.train(2, first.changed(chunks=(clear,), tags=()))
    assert {refusal_of(a).kind for a in answers.values()} == {"sealing"}
    assert federation.models() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda e: replace(e, chunks=()),
        lambda e: replace(e, chunks=(bytes(100),)),
        lambda e: replace(e, chunks=e.chunks * 2),
    ],
)
def test_the_accumulator_takes_no_readable_update(federation: Federation, change: Callable[[Any], Any]) -> None:
    sealed = federation.agree().seal(1, federation.train(1))
    assert federation.add(1, sealed).chunks
    with pytest.raises(SealingError):
        federation.add(1, sealed | {ASH: change(sealed[ASH])})
