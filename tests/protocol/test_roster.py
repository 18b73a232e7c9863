"""Rosters: what a chain may look like, and what honest sites can be brought to accept by whoever coordinates."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from pydantic import ValidationError

from confide.clients.membership import Membership, SiteKeys
from confide.errors import SealingError
from confide.protocol.fingerprint import fingerprint, same_fingerprint
from confide.protocol.identity import Identity
from confide.protocol.roster import (
    Roster,
    RosterMember,
    SignedRoster,
    given_up_keys,
    look,
    required_keys,
    sign_roster,
    verify_chain,
)
from confide.protocol.standing import Standing
from tests.rosters import FEDERATION, POPULATION, Cast, Chain

NAMES = ("ash", "birch", "cedar")


@pytest.fixture(scope="module")
def cast() -> Cast:
    return Cast(*NAMES, "doum")


# --- names and keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [("ash", "ASH"), ("st mary", "st-mary"), ("st.mary", "st_mary"), ("north1", "northl"), ("north1", "northI"),
     ("r0ma", "roma"), ("modem", "modern"), ("vvest", "west"), ("ash", "ash."), ("a - b", "a-b")],
)  # fmt: skip
def test_names_that_look_alike_do_not_stand_in_one_roster(one: str, other: str) -> None:
    with pytest.raises(SealingError, match="looks like"):
        Cast(one, other).first()
    assert Cast(one, "birch").first(), "the control"


def test_no_site_looks_like_the_coordinator() -> None:
    with pytest.raises(SealingError, match="looks like 'coordinator'"):
        Cast("C00rdinator").first()


@pytest.mark.parametrize("name", ["аsh", "ash\u200b", "ａｓｈ", "ash\n", " ash", "", "../ash", "a" * 65, "*"])
def test_a_name_that_not_every_keyboard_has_is_none(cast: Cast, name: str) -> None:
    fields = cast.member("ash").model_dump()
    assert RosterMember.model_validate(fields)
    with pytest.raises(ValidationError):
        RosterMember.model_validate({**fields, "site": name})


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,20}", fullmatch=True))
def test_a_look_is_the_same_for_what_a_reader_takes_for_the_same(name: str) -> None:
    assert look(look(name)) == look(name)
    assert look(name.swapcase()) == look(name)
    assert look(name.replace(" ", "_").replace(".", "-")) == look(name)


@pytest.mark.parametrize("field", ["signing_key", "exchange_key", "node_key"])
def test_a_key_stands_in_a_roster_once(cast: Cast, field: str) -> None:
    roster = cast.first()
    fields = roster.model_dump()
    assert Roster.model_validate(fields) == roster, "the control"
    fields["members"][1][field] = fields["members"][0][field]
    with pytest.raises(ValidationError, match="twice"):
        Roster.model_validate(fields)


def test_a_node_key_is_p_384_and_has_one_spelling(cast: Cast) -> None:
    fields = cast.member("ash").model_dump()
    small = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    for wrong in (small.decode(), fields["node_key"] + " comment", "ssh-ed25519 AAAA", ""):
        with pytest.raises(ValidationError):
            RosterMember.model_validate({**fields, "node_key": wrong})


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_twelve_groups_of_five_digits_and_typed_as_people_type(cast: Cast) -> None:
    roster = cast.first()
    shown = fingerprint(roster)
    assert [len(group) for group in shown.split()] == [5] * 12
    assert same_fingerprint(shown.replace(" ", ""), roster)
    assert same_fingerprint(f"  {shown.replace(' ', '-')}\n", roster)
    digit = shown[0]
    for wrong in (shown[:-1], shown + "0", ("1" if digit != "1" else "2") + shown[1:], "", "x"):
        assert not same_fingerprint(wrong, roster)
    assert not same_fingerprint(shown, cast.first(NAMES))


# --- which signatures -------------------------------------------------------------------------------------------------


def test_everybody_signs_but_the_one_who_is_removed_or_has_lost_his_key(cast: Cast) -> None:
    chain = Cast.founded(fresh := Cast(*NAMES, "doum"), *NAMES)
    new = SiteKeys.generate(Identity.generate("ash"))
    others = [m for m in chain[-1].roster.members if m.site != "ash"]
    exchanged = [*others, new.member(POPULATION)]
    steps = {
        "add": fresh.adding(chain, "doum"),
        "remove": fresh.next(chain, "remove", "ash", members=others),
        "rotate": fresh.next(chain, "rotate", "ash", members=exchanged),
        "replace": fresh.next(chain, "replace", "ash", members=exchanged),
    }
    old, now = fresh.keys["ash"].identity.public_key.hex(), new.identity.public_key.hex()
    who = {kind: required_keys(roster, chain[-1].roster) for kind, roster in steps.items()}
    assert set(who["add"].values()) == {"coordinator", *NAMES, "doum"}
    assert set(who["remove"].values()) == {"coordinator", "birch", "cedar"}
    assert {old, now} <= who["rotate"].keys()
    assert now in who["replace"]
    assert old not in who["replace"]
    assert set(who["replace"].values()) == {"coordinator", *NAMES}


@pytest.mark.parametrize("dropped", [*NAMES, "coordinator"])
def test_a_version_without_one_signature_does_not_count(cast: Cast, dropped: str) -> None:
    roster = cast.first(NAMES)
    whole = cast.signed(roster, *NAMES)
    verify_chain([whole])
    key = (cast.coordinator if dropped == "coordinator" else cast.keys[dropped].identity).public_key.hex()
    signatures = {k: v for k, v in whole.signatures.items() if k != key}
    with pytest.raises(SealingError, match=f"not signed by (the )?{dropped}"):
        verify_chain([SignedRoster(roster=roster, signatures=signatures)])


@given(st.integers(0, 511))
def test_no_changed_signature_counts(bit: int) -> None:
    made = _FOUNDED
    key = sorted(made.signatures)[bit % len(made.signatures)]
    raw = bytearray(bytes.fromhex(made.signatures[key]))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SealingError):
        verify_chain([made.with_signatures({key: raw.hex()})])


_FOUNDED = Cast(*NAMES).founded()[0]


def test_a_stranger_has_no_say(cast: Cast) -> None:
    signed = cast.signed(cast.first(NAMES), *NAMES, others=[Identity.generate("x")])
    with pytest.raises(SealingError, match="no say"):
        verify_chain([signed])


CHANGES: dict[str, dict[str, Any]] = {
    "another federation": {"federation": "lung"},
    "another coordinator": {"coordinator_key": "11" * 32},
    "the same number": {"version": 1},
    "another past": {"previous": "22" * 32},
    "no past": {"previous": "0" * 64},
    "another authority": {"authority": "33" * 32},
    "another change": {"change": {"kind": "remove", "sites": ["ash"]}},
    "more than it says": {"change": {"kind": "add", "sites": ["doum", "elm"]}},
    "founding again": {"change": {"kind": "found", "sites": ["ash", "birch", "cedar", "doum"]}},
}


@pytest.mark.parametrize("what", CHANGES, ids=str)
def test_a_step_changes_what_it_says_and_nothing_else(what: str) -> None:
    cast = Cast(*NAMES, "doum")
    chain = cast.founded(*NAMES)
    honest = cast.adding(chain, "doum")
    verify_chain((*chain, cast.signed(honest, *NAMES, "doum")))
    wrong = Roster.model_validate({**honest.model_dump(mode="json"), **CHANGES[what]})
    with pytest.raises(SealingError):
        verify_chain((*chain, cast.signed(wrong, *NAMES, "doum")))


def test_a_key_that_left_does_not_come_back() -> None:
    cast = Cast(*NAMES, "doum")
    chain = cast.founded()
    others = [m for m in chain[-1].roster.members if m.site != "doum"]
    chain = cast.confirmed(chain, cast.next(chain, "remove", "doum", members=others), *NAMES)
    back = cast.adding(chain, "doum")
    with pytest.raises(SealingError, match="is back"):
        verify_chain((*chain, cast.signed(back, *NAMES, "doum")))
    fresh = SiteKeys.generate(Identity.generate("doum"))
    again = cast.next(chain, "add", "doum", members=[*others, fresh.member(POPULATION)])
    verify_chain((*chain, cast.signed(again, *NAMES, others=[fresh.identity])))  # the control: new keys may


# --- whatever a coordinator does --------------------------------------------------------------------------------------


class HostileCoordinator(RuleBasedStateMachine):
    """It holds its own key, a member's (`hemlock`), and that of a site it has invented. Honest operators confirm
    everything but rosters that hold an invented key: that is what comparing fingerprints tells them."""

    chains = Bundle("chains")

    def __init__(self) -> None:
        super().__init__()
        self.cast = Cast("ash", "birch", "doum", "elm", "hemlock")
        self.honest = ("ash", "birch", "doum", "elm")
        self.invented = {n: SiteKeys.generate(Identity.generate(n)) for n in (*self.honest, "sybil")}
        self.signatures: dict[str, dict[str, str]] = {}
        self.heights = dict.fromkeys(self.honest, 0)

    def put(self, before: Chain, roster: Roster) -> Chain:
        """Sign with every key that the attacker has."""
        mine = [self.cast.keys["hemlock"], *self.invented.values()]
        needed = required_keys(roster, before[-1].roster if before else None)
        signed = self.cast.signed(roster, others=[k.identity for k in mine if k.identity.public_key.hex() in needed])
        self.signatures.setdefault(roster.digest, {}).update(signed.signatures)
        return (*before, signed)

    def known(self, chain: Chain) -> Chain:
        """With every signature that was ever collected."""
        return tuple(s.with_signatures(self.signatures.get(s.roster.digest, {})) for s in chain)

    @initialize(target=chains)
    def start(self) -> Chain:
        return self.put((), self.cast.first(("ash", "birch", "hemlock")))

    @rule(target=chains, version=st.integers(1, 2), more=st.sampled_from([(), ("doum",), ("hemlock",)]))
    def found(self, version: int, more: tuple[str, ...]) -> Chain:
        return self.put((), self.cast.first(("ash", "birch", *more), version))

    def propose(self, chain: Chain, kind: str, site: str, gap: int, keys: SiteKeys | None) -> Chain:
        """A version after a chain, signed with all that the attacker has; the chain itself where there is none."""
        before = chain[-1].roster
        others = [m for m in before.members if m.site != site]
        try:
            roster = self.cast.next(
                chain, kind, site, members=[*others, keys.member(POPULATION)] if keys else others,
                version=before.version + gap,
            )  # fmt: skip
        except (SealingError, ValidationError):
            return chain
        return self.put(chain, roster)

    @rule(target=chains, chain=chains, site=st.sampled_from(["doum", "elm"]), gap=st.integers(1, 2))
    def add(self, chain: Chain, site: str, gap: int) -> Chain:
        return self.propose(chain, "add", site, gap, self.cast.keys[site])

    @rule(target=chains, chain=chains, site=st.sampled_from(["hemlock", "birch", "doum"]), gap=st.integers(1, 2))
    def remove(self, chain: Chain, site: str, gap: int) -> Chain:
        return self.propose(chain, "remove", site, gap, None)

    @rule(target=chains, chain=chains, kind=st.sampled_from(["add", "rotate", "replace"]),
          site=st.sampled_from(["ash", "doum", "sybil"]))  # fmt: skip
    def invent(self, chain: Chain, kind: str, site: str) -> Chain:
        return self.propose(chain, kind, site, 1, self.invented[site])

    @rule(chain=chains, site=st.sampled_from(["ash", "birch", "doum", "elm"]))
    def show(self, chain: Chain, site: str) -> None:
        shown = self.known(chain)
        if self.holds_invented(shown[-1].roster):
            return
        try:
            given = self.cast.sites[site].countersign(shown, self.cast.keys[site])
        except SealingError:
            return
        self.signatures.setdefault(given.roster, {}).update(given.signatures)

    @rule(chain=chains)
    def show_everybody(self, chain: Chain) -> None:
        for site in self.honest:
            self.show(chain, site)

    @rule(chain=chains)
    def deliver_everybody(self, chain: Chain) -> None:
        for site in self.honest:
            self.deliver(chain, site)

    @rule(one=chains, other=chains, first=st.sampled_from(["ash", "birch"]))
    def lead_apart(self, one: Chain, other: Chain, first: str) -> None:
        """Collect for both, then give one to one site and the other to another."""
        self.show_everybody(one)
        self.show_everybody(other)
        self.deliver(one, first)
        self.deliver(other, "birch" if first == "ash" else "ash")

    @rule(chain=chains, site=st.sampled_from(["ash", "birch", "doum", "elm"]))
    def deliver(self, chain: Chain, site: str) -> None:
        try:
            self.cast.sites[site].accept(self.known(chain))
        except SealingError:
            return

    def holds_invented(self, roster: Roster) -> bool:
        keys = {k.identity.public_key.hex() for k in self.invented.values()}
        return any(m.signing_key in keys for m in roster.members)

    @invariant()
    def nobody_goes_back(self) -> None:
        for site in self.honest:
            roster = self.cast.sites[site].standing.roster
            height = roster.version if roster else 0
            assert height >= self.heights[site]
            self.heights[site] = height

    @invariant()
    def nobody_has_accepted_an_invented_site(self) -> None:
        for site in self.honest:
            assert not any(self.holds_invented(s.roster) for s in self.cast.sites[site].standing.accepted)

    @invariant()
    def two_sites_that_sign_for_each_other_never_part(self) -> None:
        steps = []
        for site in self.honest:
            before: Roster | None = None
            for signed in self.cast.sites[site].standing.accepted:
                steps.append((site, signed.roster, set(required_keys(signed.roster, before).values())))
                before = signed.roster
        for one, a, who_a in steps:
            for other, b, who_b in steps:
                if a.previous == b.previous and {one, other} <= who_a & who_b:
                    assert a.digest == b.digest, f"{one} and {other} follow two rosters"


HostileCoordinator.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestHostileCoordinator = HostileCoordinator.TestCase


def test_without_the_promise_two_sites_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the machine: sites that sign any number twice can be led apart."""

    def fork() -> set[str]:
        cast = Cast(*NAMES, "doum", "elm")
        chain = cast.founded(*NAMES)
        ends = []
        for new in ("doum", "elm"):
            signed = cast.signed(cast.adding(chain, new), new)
            for name in NAMES:
                given = cast.sites[name].countersign((*chain, signed), cast.keys[name])
                signed = signed.with_signatures(given.signatures)
            ends.append((*chain, signed))
        cast.sites["ash"].accept(ends[0])
        cast.sites["birch"].accept(ends[1])
        return {cast.sites[n].standing.accepted[-1].roster.digest for n in ("ash", "birch")}

    with pytest.raises(SealingError, match="is not above version 2"):
        fork()
    monkeypatch.setattr(Standing, "promise", lambda self, chain: self)
    assert len(fork()) == 2


def test_a_signature_leaves_only_after_its_promise_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = Cast(*NAMES)
    site = Membership(tmp_path / "m.json", Standing(federation=FEDERATION, me=cast.member("ash")))
    order: list[str] = []
    write = Membership._write
    monkeypatch.setattr(Membership, "_write", lambda self, s: (order.append("disk"), write(self, s))[0])
    monkeypatch.setattr(
        "confide.clients.membership.sign_roster", lambda r, i: (order.append("signature"), sign_roster(r, i))[1]
    )
    site.countersign((cast.signed(cast.first()),), cast.keys["ash"])
    assert order == ["disk", "signature"]
    assert Membership(tmp_path / "m.json").standing.promised == 1


@pytest.mark.parametrize("turn", range(8))
def test_two_processes_that_confirm_at_once_sign_one_version_of_a_number(turn: int, tmp_path: Path) -> None:
    """Two handles on one folder, as two processes have them."""
    cast = Cast(*NAMES, "doum", "elm")
    chain = cast.founded(*NAMES)
    Membership(tmp_path / "m.json", cast.sites["ash"].standing)
    offers = [(*chain, cast.signed(cast.adding(chain, new), new)) for new in ("doum", "elm")]
    ready, signed = threading.Barrier(2), list[str]()

    def confirm(offer: Chain) -> None:
        ready.wait()
        with contextlib.suppress(SealingError):
            signed.append(Membership(tmp_path / "m.json").countersign(offer, cast.keys["ash"]).roster)

    threads = [threading.Thread(target=confirm, args=(offer,)) for offer in offers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(signed) == 1
    assert Membership(tmp_path / "m.json").standing.promised_digest == signed[0]


def test_keys_that_were_given_up_are_followed_back_through_signed_changes_only() -> None:
    cast = Cast("ash", "birch", "cedar")
    chain = cast.founded()
    first = cast.keys["ash"].identity.public_key
    for kind in ("rotate", "rotate", "replace"):
        old, new = cast.keys["ash"], SiteKeys.generate(Identity.generate("ash"))
        members = [m for m in chain[-1].roster.members if m.site != "ash"] + [cast.member("ash", new)]
        roster = cast.next(chain, kind, "ash", members=sorted(members, key=lambda m: m.site))
        signed = cast.signed(roster, "birch", "cedar", others=[new.identity, *([old.identity] * (kind == "rotate"))])
        cast.keys["ash"], chain = new, (*chain, signed)
        verify_chain(chain)
        found = given_up_keys(chain, "ash")
        assert found == ((old.identity.public_key, *found[1:]) if kind == "rotate" else ())
        assert (first in found) == (kind == "rotate")
    assert given_up_keys(chain, "birch") == given_up_keys((), "ash") == given_up_keys(chain, "nobody") == ()
