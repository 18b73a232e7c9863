"""A coordinator and sites that make rosters without files: whoever writes a test is whoever holds the keys he names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from confide.clients.membership import Membership, SiteKeys
from confide.protocol.identity import Identity
from confide.protocol.roster import (
    COORDINATOR,
    NO_AUTHORITY,
    Change,
    Roster,
    RosterMember,
    SignedRoster,
    first_roster,
    next_roster,
    sign_roster,
)
from confide.protocol.standing import Standing

FEDERATION, POPULATION = "heart", 800
Chain = tuple[SignedRoster, ...]


class Cast:
    """A coordinator, and a site for each name."""

    def __init__(self, *names: str) -> None:
        self.coordinator = Identity.generate(COORDINATOR)
        self.keys = {name: SiteKeys.generate(Identity.generate(name)) for name in names}
        self.sites = {
            name: Membership(None, Standing(federation=FEDERATION, me=self.member(name))) for name in self.keys
        }

    def member(self, name: str, keys: SiteKeys | None = None) -> RosterMember:
        """A site's entry, under its own keys or others."""
        return (keys or self.keys[name]).member(POPULATION)

    def first(self, names: Iterable[str] = (), version: int = 1) -> Roster:
        """The founding version."""
        members = [self.member(n) for n in names or self.keys]
        return first_roster(FEDERATION, self.coordinator.public_key.hex(), NO_AUTHORITY, members, version)

    def next(
        self, chain: Chain, kind: str, *sites: str, members: Iterable[RosterMember] | None = None, version: int = 0
    ) -> Roster:
        """A version after the chain's last; `members` are all of it (None: as before)."""
        before = chain[-1].roster
        change = Change.model_validate({"kind": kind, "sites": sites})
        return next_roster(
            before, change, before.members if members is None else members, version or before.version + 1
        )

    def adding(self, chain: Chain, name: str, version: int = 0) -> Roster:
        """The version that adds a site."""
        return self.next(chain, "add", name, members=[*chain[-1].roster.members, self.member(name)], version=version)

    def signed(self, roster: Roster, *signers: str, others: Sequence[Identity] = ()) -> SignedRoster:
        """With the coordinator's signature, and these."""
        signatures: dict[str, str] = {}
        for identity in (self.coordinator, *(self.keys[n].identity for n in signers), *others):
            signatures |= sign_roster(roster, identity)
        return SignedRoster(roster=roster, signatures=signatures)

    def confirmed(self, chain: Chain, roster: Roster, *sites: str) -> Chain:
        """The chain with this version, which these sites have confirmed as a site does, and accepted."""
        signed = self.signed(roster)
        for name in sites:
            signed = signed.with_signatures(self.sites[name].countersign((*chain, signed), self.keys[name]).signatures)
        done = (*chain, signed)
        for name in sites:
            self.sites[name].accept(done)
        return done

    def founded(self, *names: str) -> Chain:
        """A federation of these sites (none: of all), in force at all of them."""
        names = names or tuple(self.keys)
        return self.confirmed((), self.first(names), *names)
